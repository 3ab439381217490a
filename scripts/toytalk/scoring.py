"""Whether an answer is right: word for word in the plain voice, or by the facts it states in any voice."""

import re
from typing import Any

from scripts.toytalk.conversation import Turn
from scripts.toytalk.words import COLOURS, KINDS, NUMBER_WORDS, PLACES, PLURALS, SETTINGS, SIZES

# Several words for one: numbers as digits, kinds in the singular, the pirate's words as the plain ones.
_SAME = (
    {word: str(number) for number, word in enumerate(NUMBER_WORDS)}
    | {plural: kind for kind, plural in PLURALS.items()}
    | {"aye": "yes", "nay": "no", "ahoy": "hello", "yer": "your", "color": "colour", "center": "centre"}
)
_CLASSES = tuple(frozenset(words) for words in (COLOURS, KINDS, SIZES, PLACES, SETTINGS, ("yes", "no")))


def exactly_right(turn: Turn, text: str) -> bool:
    return text.strip() == turn.answer


def fact_right(fact: Turn | dict[str, Any], text: str) -> bool:
    """Whether `text` states the fact, in any voice: all its words, and no rival of any of them.

    Rivals are the other words of the same class (colours, numbers, kinds, yes and no, …) that the plain answer lacks:
    "red or blue" is no answer where "red" is. `fact` is a turn, or one entry of a record's "facts".
    """
    fact = fact.fact if isinstance(fact, Turn) else fact
    wanted = [word for part in fact["words"] for word in read_words(part)]
    said, plain = read_words(text), read_words(fact["answer"])
    if not set(wanted) <= set(said):
        return False
    classes = [words for words in _CLASSES if words & set(wanted)]
    rivals = [word for word in said if any(word in words for words in classes) and word not in plain]
    if any(word.isdigit() for word in wanted):
        rivals += [word for word in said if word.isdigit() and word not in plain]
    if fact["ordered"]:
        return not rivals and [word for word in said if word in wanted] == wanted
    return not rivals


def read_words(text: str) -> list[str]:
    """Words in lower case and numbers, synonyms made one."""
    return [_SAME.get(word, word) for word in re.findall(r"[a-z]+|\d+", text.lower())]
