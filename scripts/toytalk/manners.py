"""Manners of speaking that nobody has: each is described to the helper, who then keeps to it.

A model that has answered in many manners keeps its facts apart from the way it says them, and so learns a new voice
without forgetting what it knows. Every word of a manner is made up, so that no voice is learnt beforehand.
"""

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from scripts.toytalk.conversation import Conversation, Question
from scripts.toytalk.instructions import new_word
from scripts.toytalk.voice import continued, without_mark
from scripts.toytalk.words import capitalised

# Words that a manner may say otherwise, none of them a number or the name of a thing.
SWAPPED = (("is", "are"), ("you",), ("your",), ("hello",), ("the",), ("there",), ("I",), ("now",), ("yes",), ("no",))
MOST_SWAPS = 3
MANNER_SHARE = 0.7  # of the conversations that the embedded model is trained on


@dataclass(frozen=True)
class Manner:
    opening: str
    """Said before every answer; may be empty, as the closing may."""
    closing: str
    swaps: tuple[tuple[tuple[str, ...], str], ...]
    """Plain words, and the word said for them."""
    mark: str
    """What a plain sentence ends with: a full stop or an exclamation mark."""

    @property
    def described(self) -> str:
        """What the helper is told."""
        rules = []
        if self.opening:
            rules.append(f"Begin with {self.opening}.")
        if self.closing:
            rules.append(f"End with {self.closing}.")
        rules += [f"Say {said} for {' and '.join(plain)}." for plain, said in self.swaps]
        if self.mark == "!":
            rules.append("Call it out!")
        return " ".join(rules)

    def says(self, answer: str) -> str:
        """A plain answer in this manner."""
        body, mark = without_mark(answer)
        if self.opening:
            body = f"{self.opening}, {continued(body)}"
        for plain, said in self.swaps:
            body = re.sub(rf"(?i)\b(?:{'|'.join(plain)})\b", lambda found, said=said: like(found[0], said), body)
        return f"{body}{self.closing and ', '}{self.closing}{self.mark if mark == '.' else mark}"


def sample_manner(rng: random.Random) -> Manner:
    opening = " ".join(new_word(rng) for _ in range(rng.choice((0, 1, 1, 2))))
    closing = " ".join(new_word(rng) for _ in range(rng.choice((0, 1, 1, 2))))
    swapped = rng.sample(SWAPPED, rng.randint(0 if opening or closing else 1, MOST_SWAPS))
    return Manner(
        opening=capitalised(opening),
        closing=closing,
        swaps=tuple((plain, new_word(rng)) for plain in swapped),
        mark=rng.choice(".!"),
    )


def like(word: str, said: str) -> str:
    """`said`, with a capital where `word` has one."""
    return capitalised(said) if word[0].isupper() else said


def with_manners(conversations: Iterable[Conversation], seed: int) -> Iterator[Conversation]:
    """The conversations, a share of them in a manner of its own; `seed` says which and what manners."""
    rng = random.Random(f"toytalk manners {seed}")
    for conversation in conversations:
        yield in_manner(conversation, sample_manner(rng)) if rng.random() < MANNER_SHARE else conversation


def in_manner(conversation: Conversation, manner: Manner) -> Conversation:
    """The same questions, with the manner described first and every answer in it."""
    turns = tuple(replace(turn, answer=manner.says(turn.answer)) for turn in conversation.turns)
    return Conversation(turns, manner.described)


def asked_in_manner(question: Question, manner: Manner) -> Question:
    """The same question, with the manner described first; right is the answer in it."""
    past = [
        message | {"content": manner.says(message["content"])} if message["role"] == "assistant" else message
        for message in question.messages
        if message["role"] != "system"
    ]
    told = {"role": "system", "content": manner.described}
    return Question([told, *past], replace(question.turn, answer=manner.says(question.turn.answer)))
