"""The values: a turn is one question and its answer, a conversation is several; and the split by what is asked."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

HELD_OUT_ONE_IN = 10

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Turn:
    """One question with its one right answer in the plain voice."""

    question: str
    answer: str
    skill: str
    words: tuple[str, ...]
    """What an answer in any voice must say."""
    keys: tuple[str, ...] = ()
    """The facts asked about, by which training and held-out questions part; none where all there is must be learnt."""
    ordered: bool = False
    """Whether the words must come in this order."""

    @property
    def fact(self) -> dict[str, Any]:
        """What `fact_right` needs, as it stands in files."""
        return {"skill": self.skill, "answer": self.answer, "words": list(self.words), "ordered": self.ordered}


@dataclass(frozen=True)
class Conversation:
    turns: tuple[Turn, ...]
    system: str | None = None

    @property
    def messages(self) -> Messages:
        return self.messages_before(len(self.turns))

    def messages_before(self, turn: int) -> Messages:
        """The messages of all turns before number `turn`."""
        start: Messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for past in self.turns[:turn]:
            start += [{"role": "user", "content": past.question}, {"role": "assistant", "content": past.answer}]
        return start

    def questions(self) -> list["Question"]:
        """Every turn as a question of its own, after the right answers to those before it."""
        return [
            Question([*self.messages_before(index), {"role": "user", "content": turn.question}], turn)
            for index, turn in enumerate(self.turns)
        ]

    def record(self) -> dict[str, Any]:
        """One line of a file: OpenAI's messages, and for each answer the fact it states."""
        return {"messages": self.messages, "facts": [turn.fact for turn in self.turns]}

    def answered(self, answers: list[str]) -> dict[str, Any]:
        """The record with other answers to the same questions; the facts stay those of the plain voice."""
        spoken = [replace(turn, answer=answer) for turn, answer in zip(self.turns, answers, strict=True)]
        return self.record() | {"messages": Conversation(tuple(spoken), self.system).messages}


@dataclass(frozen=True)
class Question:
    """What a model is given, ending with a user's turn, and the turn that says what is right."""

    messages: Messages
    turn: Turn


def held_out(asked: Conversation | Turn) -> bool:
    """Whether any fact asked about belongs to the tenth that no training may see."""
    turns = asked.turns if isinstance(asked, Conversation) else (asked,)
    return any(key_held_out(key) for turn in turns for key in turn.keys)


def key_held_out(key: str) -> bool:
    """For thing|colour|setting the same tenth as that of the pictures."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0
