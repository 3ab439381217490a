"""The words of the conversations, and the little grammar that they need."""

import random
import string
from typing import TypeVar

from scripts.toyworld.scene import COLOURS, KINDS, PLACES, SETTINGS, SIZES

C = TypeVar("C")
__all__ = ["COLOURS", "KINDS", "PLACES", "SETTINGS", "SIZES"]

# fmt: off
NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)
# fmt: on

PLURALS = {kind: kind + "s" for kind in KINDS} | {"fish": "fish", "snowman": "snowmen"}

# How a setting is introduced, and how an answer names it.
SETTING_PHRASES = {
    "meadow": ("in a meadow", "in the meadow"),
    "beach": ("on a beach", "on the beach"),
    "city": ("in a city", "in the city"),
    "snow": ("in the snow", "in the snow"),
    "space": ("in space", "in space"),
    "kitchen": ("in a kitchen", "in the kitchen"),
}
PLACE_PHRASES = {"left": "on the left", "centre": "in the centre", "right": "on the right"}

# fmt: off
NAMES = (
    "Ada", "Alan", "Anna", "Ben", "Bella", "Carl", "Clara", "Dan", "Dora", "Ella", "Emil", "Eva", "Fred", "Freya",
    "Gina", "Hana", "Henry", "Ida", "Ivan", "Jack", "Jane", "Karl", "Kate", "Lena", "Leo", "Lucy", "Mara", "Max",
    "Mia", "Nina", "Noah", "Olga", "Oscar", "Paul", "Petra", "Rosa", "Sam", "Sara", "Tim", "Tina", "Tom", "Uma",
    "Vera", "Victor", "Will", "Yuri", "Zara", "Zoe",
)
# fmt: on

OPPOSITES = (
    ("big", "small"),
    ("hot", "cold"),
    ("up", "down"),
    ("left", "right"),
    ("day", "night"),
    ("open", "closed"),
    ("fast", "slow"),
    ("old", "new"),
    ("wet", "dry"),
    ("happy", "sad"),
    ("light", "dark"),
    ("full", "empty"),
    ("long", "short"),
    ("good", "bad"),
    ("first", "last"),
    ("black", "white"),
)


def weighted(choices: dict[C, float], rng: random.Random) -> C:
    """One of the choices, each as likely as its weight says."""
    return rng.choices(list(choices), list(choices.values()))[0]


def article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def noun(kind: str, count: int) -> str:
    return kind if count == 1 else PLURALS[kind]


def joined(words: list[str]) -> str:
    """a; a and b; a, b and c."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def made_up_word(rng: random.Random) -> str:
    """A word of no language: whoever repeats such words can spell any word."""
    if rng.random() < 0.3:  # any letters at all
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 6)))
    vowels = "aeiouy"
    consonants = [letter for letter in string.ascii_lowercase if letter not in vowels]
    syllables = [
        rng.choice(consonants) * (rng.random() < 0.9)
        + rng.choice(vowels)
        + rng.choice(consonants) * (rng.random() < 0.4)
        for _ in range(rng.randint(1, 3))
    ]
    return "".join(syllables)
