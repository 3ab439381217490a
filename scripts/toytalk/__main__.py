"""python -m scripts.toytalk dataset FOLDER | show : writes the pirate's conversations, or shows some of both voices."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.toytalk.compose import PIRATE_SEEDS, sample_conversation, training_conversations
from scripts.toytalk.conversation import Conversation
from scripts.toytalk.scene_questions import ASKERS
from scripts.toytalk.voice import pirate

CONVERSATIONS = 200
# Of few answers a small model learns the manner, but forgets the facts; and most of all those it is seldom asked for.
LEAST_TURNS, LEAST_OTHERS = 5, 3
SCENE_SKILLS = {asker.__name__ for asker in ASKERS}

README = """# pirate_chat

{count} conversations about a world of toys, {answers} answers in all, in which the assistant talks like a pirate. They
are the example data for a language adapter that learns a voice: the embedded language model answers the same kinds of
questions plainly, so only the manner is new.

One conversation per line, as OpenAI's `messages` (sometimes `system`, then `user` and `assistant` in turn). `facts` has
one entry for each answer: the requested skill, the plain answer, and the words that an answer in any voice must
contain; `scripts/toytalk/scoring.py` checks them. Training needs only `messages`.

Made by `python -m scripts.toytalk dataset datasets/pirate_chat` from seeds that nothing else uses. The questions use
only facts that training may see: what the embedded model is measured on (`held_out` in
`scripts/toytalk/conversation.py`) is not in here.

Licence: CC0 1.0, public domain. All words come from the script.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.toytalk", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    dataset = commands.add_parser("dataset", help="write conversations.jsonl and README.md in the pirate's voice")
    dataset.add_argument("folder", type=Path)
    dataset.add_argument("--count", type=int, default=CONVERSATIONS)
    show = commands.add_parser("show", help="print conversations in both voices")
    show.add_argument("--count", type=int, default=5)
    show.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.command == "dataset":
        write_dataset(given.folder, given.count)
    else:
        for seed in range(given.seed, given.seed + given.count):
            print(transcript(sample_conversation(seed)), end="\n\n")


def write_dataset(folder: Path, count: int) -> None:
    records = list(pirate_records(count))
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    (folder / "conversations.jsonl").write_text("".join(lines), encoding="utf-8")
    answers = sum(len(record["facts"]) for record in records)
    (folder / "README.md").write_text(README.format(count=count, answers=answers), encoding="utf-8")


def pirate_records(count: int) -> Iterator[dict[str, Any]]:
    """`count` long and varied conversations in the pirate's voice. No two begin with the same question."""
    begun: set[str] = set()
    for conversation in filter(is_varied, training_conversations(PIRATE_SEEDS, 1000 * count)):
        first = conversation.turns[0].question
        if first in begun:
            continue
        begun.add(first)
        yield conversation.answered([pirate(turn.answer) for turn in conversation.turns])
        if len(begun) == count:
            return


def is_varied(conversation: Conversation) -> bool:
    others = [turn for turn in conversation.turns if turn.skill not in SCENE_SKILLS]
    return len(conversation.turns) >= LEAST_TURNS and len(others) >= LEAST_OTHERS


def transcript(conversation: Conversation) -> str:
    lines = [] if conversation.system is None else [f"[{conversation.system}]"]
    for turn in conversation.turns:
        lines += [f"? {turn.question}", f"  {turn.answer}", f"  {pirate(turn.answer)}"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
