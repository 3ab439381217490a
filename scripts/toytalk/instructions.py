"""Short orders: repeat, count, sort, turn round, pick from a list, name the opposite."""

import random
from collections.abc import Callable

from scripts.toytalk.conversation import Turn
from scripts.toytalk.voice import neutral
from scripts.toytalk.words import COLOURS, KINDS, OPPOSITES, joined, made_up_word, weighted

COUNTED_TO = 30
MOST_COUNTED = 10


def ask_instruction(rng: random.Random) -> Turn:
    return weighted(ASKERS, rng)(rng)


def in_order(question: str, skill: str, words: tuple[str, ...], keys: tuple[str, ...]) -> Turn:
    """A turn whose answer is these words, one after the other."""
    return Turn(question, ", ".join(words) + ".", skill, words, keys, ordered=True)


def repeat(rng: random.Random) -> Turn:
    word = free_word(rng)
    times = rng.choices((1, 2, 3), (6, 1, 2))[0]
    question = rng.choice([f"Repeat the word {word}", f"Say {word}", f"Please say {word}", f"Repeat after me: {word}"])
    question += ("", " twice", " three times")[times - 1] + "."
    words = (word,) * times
    return in_order(question, "repeat", words, (f"repeat|{word}",))


def count_up(rng: random.Random) -> Turn:
    first = 1 if rng.random() < 0.3 else rng.randint(2, COUNTED_TO - MOST_COUNTED)
    last = first + rng.randint(1, MOST_COUNTED - 1)
    question = rng.choice([f"Count from {first} to {last}.", f"Please count from {first} to {last}."])
    keys: tuple[str, ...] = (f"count|{first}|{last}",)
    if first == 1:  # nine lists that have to be learnt
        question, keys = rng.choice([f"Count to {last}.", f"Can you count to {last}?", question]), ()
    words = tuple(str(number) for number in range(first, last + 1))
    return in_order(question, "count_up", words, keys)


def sort_numbers(rng: random.Random) -> Turn:
    numbers = rng.sample(range(1, 21 if rng.random() < 0.5 else 100), rng.choice((3, 3, 4)))
    question = rng.choice(
        [
            f"Sort {joined([str(number) for number in numbers])}.",
            f"Sort these numbers: {', '.join(str(number) for number in numbers)}.",
            f"Put {joined([str(number) for number in numbers])} in order.",
        ]
    )
    words = tuple(str(number) for number in sorted(numbers))
    return in_order(question, "sort_numbers", words, ("sort|" + "|".join(words),))


def sort_things(rng: random.Random) -> Turn:
    things = rng.sample(KINDS, 3)
    question = rng.choice(
        [
            f"Sort by the alphabet: {', '.join(things)}.",
            f"Put {joined(things)} in the order of the alphabet.",
        ]
    )
    words = tuple(sorted(things))
    return in_order(question, "sort_things", words, ("sort|" + "|".join(words),))


def backwards(rng: random.Random) -> Turn:
    items = list_items(rng)
    question = rng.choice(
        [
            f"Say this list backwards: {', '.join(items)}.",
            f"Turn the list round: {', '.join(items)}.",
            f"Say {joined(items)} in reverse order.",
        ]
    )
    words = tuple(reversed(items))
    return in_order(question, "backwards", words, ("backwards|" + "|".join(items),))


def pick(rng: random.Random) -> Turn:
    items = list_items(rng)
    which = rng.choice(["first", "last"])
    word = items[0] if which == "first" else items[-1]
    question = rng.choice(
        [
            f"What is the {which} word of this list: {', '.join(items)}?",
            f"Which word is {which} in {', '.join(items)}?",
        ]
    )
    keys = (f"{which}|" + "|".join(items),)
    return Turn(question, f"The {which} word is {word}.", "pick", (word,), keys)


def how_long(rng: random.Random) -> Turn:
    items = list_items(rng)
    question = rng.choice(
        [f"How many words are in this list: {', '.join(items)}?", f"Count the words: {', '.join(items)}."]
    )
    keys = ("length|" + "|".join(items),)
    return Turn(question, f"There are {len(items)} words.", "how_long", (str(len(items)),), keys)


def opposite(rng: random.Random) -> Turn:
    """Learnt by heart, nothing held out."""
    pair = rng.choice(OPPOSITES)
    word, other = pair if rng.random() < 0.5 else pair[::-1]
    question = rng.choice([f"What is the opposite of {word}?", f"Name the opposite of {word}.", f"What is not {word}?"])
    return Turn(question, f"The opposite of {word} is {other}.", "opposite", (other,))


# How often each is asked.
ASKERS: dict[Callable[[random.Random], Turn], float] = {
    repeat: 4.0,
    count_up: 1.0,
    sort_numbers: 1.5,
    sort_things: 1.0,
    backwards: 1.5,
    pick: 1.0,
    how_long: 0.7,
    opposite: 1.0,
}


def list_items(rng: random.Random) -> list[str]:
    words = rng.choice([list(COLOURS), list(KINDS), [*COLOURS, *KINDS]])
    return rng.sample(words, rng.choice((3, 3, 4, 5)))


def free_word(rng: random.Random) -> str:
    """A word to repeat, never one that belongs to a voice."""
    if rng.random() < 0.3:
        return rng.choice([*COLOURS, *KINDS])
    return new_word(rng)


def new_word(rng: random.Random) -> str:
    """A made-up word that belongs to neither voice."""
    while not neutral(word := made_up_word(rng)):
        pass
    return word
