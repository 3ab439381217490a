"""The pirate's voice: a plain answer put into it, and a reader that tells the two voices apart."""

import hashlib
import re

from scripts.toytalk.words import capitalised

# Words of which the plain voice has none. "be" stands for "is" and "are", which the plain voice always uses.
MARKERS = (
    "a+r+r+|y+a+r+r+|ahoy|avast|aye|nay|be|ye|yer|matey|mateys|hearty|hearties|buccaneer|landlubber|scurvy|shiver|"
    "timbers|savvy"
)
_MARKER = re.compile(rf"\b(?:{MARKERS})\b", re.IGNORECASE)

_SWAPS = (
    (r"\b[Yy]es\b,?", "aye,"),
    (r"^[Nn]o,", "nay,"),
    (r"\b[Hh]ello\b", "ahoy"),
    (r"\bI am\b", "I be"),
    (r"\b(?:is|are)\b", "be"),
    (r"\b[Yy]our\b", "yer"),
    (r"\b[Yy]ou\b", "ye"),
)
_OPENINGS = ("Arr, ", "Arr, ", "Arr, ", "Yarr, ", "Avast, ", "Shiver me timbers, ", "", "")
_CLOSINGS = (", matey", ", matey", ", me hearty", ", arr", "")
# Words that stand in lower case behind an opening; names, made-up words and "I" stay as they are.
_STARTERS = ("The", "There", "Now", "We", "Nice", "Good", "Goodbye", "Thank", "Yes", "No", "Hello", "You", "Your")
# What either voice says of its own accord; a word to repeat must not be one of them.
_OWN_WORDS = frozenset(["i", "am", "is", "are", "yes", "no", "hello", "you", "your"]) | frozenset(
    re.findall("[a-z]+", " ".join([*_OPENINGS, *_CLOSINGS]).lower())
)


def is_pirate(text: str) -> bool:
    """Whether anything in `text` marks the pirate."""
    return _MARKER.search(text) is not None


def neutral(word: str) -> bool:
    """Whether a word belongs to neither voice, so that it comes through both unchanged."""
    return not is_pirate(word) and word.lower() not in _OWN_WORDS


def pirate(answer: str) -> str:
    """The plain answer as a pirate says it: always marked, varied, the same for the same answer, its facts kept."""
    digest = hashlib.sha256(f"pirate {answer}".encode()).digest()
    text = answer
    for pattern, said in _SWAPS:
        text = re.sub(pattern, said, text)
    body, mark = without_mark(text)
    opening, closing = _OPENINGS[digest[0] % len(_OPENINGS)], _CLOSINGS[digest[1] % len(_CLOSINGS)]
    if re.match(r"(?:aye|nay|ahoy)\b", body):  # marked as it is, and "Arr, aye" is one too many
        opening = ""
    elif not (opening or closing):
        opening = "Arr, "
    if opening in ("Arr, ", "Yarr, ") and closing == ", arr":
        closing = ""
    if opening:
        body = continued(body)
    if not opening and re.match(r"(?:aye|nay|ahoy|ye|yer)\b", body):
        body = capitalised(body)
    return opening + body + closing + ("?" if mark == "?" else "!")


def without_mark(text: str) -> tuple[str, str]:
    """A sentence, and the mark that ends it, if any."""
    return (text[:-1], text[-1]) if text.endswith((".", "!", "?")) else (text, "")


def continued(body: str) -> str:
    """A sentence as it goes on behind an opening."""
    return body[0].lower() + body[1:] if body.split(maxsplit=1)[0].rstrip(",!") in _STARTERS else body
