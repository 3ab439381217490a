"""Whole conversations: one integer names one, and the split says who may see it."""

import random
from collections.abc import Iterator
from dataclasses import replace

from scripts.toytalk.arithmetic import ask_arithmetic
from scripts.toytalk.conversation import Conversation, Question, Turn, held_out
from scripts.toytalk.instructions import ask_instruction
from scripts.toytalk.scene_questions import ask_about_scene
from scripts.toytalk.scenes import describe, sample_talk_scene
from scripts.toytalk.small_talk import ask_small_talk, greeting, introduce, recall_name, thanks, unseen

# Seeds of different uses never meet.
TRAINING_SEEDS = 0
PIRATE_SEEDS = 50_000_000
EVALUATION_SEEDS = 60_000_000

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helper in the toy world.",
    "Answer in one short sentence.",
    "You answer questions about toys and numbers.",
    "Be kind and brief.",
)
SYSTEM_SHARE = 0.2
SCENE_ONLY_SHARE = 0.2
ALTERED_SHARE = 0.25


def sample_conversation(seed: int) -> Conversation:
    """The conversation that `seed` names: one to three topics, each of one to four turns."""
    rng = random.Random(f"toytalk conversation {seed}")
    turns: list[Turn] = []
    if rng.random() < 0.08:
        turns.append(greeting(rng))
    introduced = introduce(rng) if rng.random() < 0.1 else None
    if introduced:
        turns.append(introduced)
    if rng.random() < 0.02:
        turns.append(unseen(rng))
    for _ in range(rng.choices((1, 2, 3), (70, 20, 10))[0]):
        turns += topic(rng, first=not turns)
    if introduced and rng.random() < 0.7:
        turns.append(recall_name(introduced, rng))
    if rng.random() < 0.05:
        turns.append(thanks(rng))
    system = rng.choice(SYSTEM_PROMPTS) if rng.random() < SYSTEM_SHARE else None
    return Conversation(tuple(as_typed(turn, rng) for turn in turns), system)


def training_conversations(first_seed: int, seeds: int) -> Iterator[Conversation]:
    """Those of the seeds' conversations that ask nothing held out, about seven in ten."""
    for seed in range(first_seed, first_seed + seeds):
        conversation = sample_conversation(seed)
        if not held_out(conversation):
            yield conversation


def held_out_questions(count: int, first_seed: int = EVALUATION_SEEDS) -> list[Question]:
    """Questions on held-out facts, each after the right answers to what came before it."""
    questions: list[Question] = []
    seed = first_seed
    while len(questions) < count:
        questions += [asked for asked in sample_conversation(seed).questions() if held_out(asked.turn)]
        seed += 1
    return questions[:count]


def topic(rng: random.Random, *, first: bool) -> list[Turn]:
    draw = rng.random()
    if draw < 0.52:
        return scene_turns(rng)
    if draw < 0.74:
        return [ask_arithmetic(rng) for _ in range(rng.choice((1, 1, 2)))]
    if draw < 0.90:
        return [ask_instruction(rng)]
    turn = ask_small_talk(rng)
    while turn.skill == "unseen" and not first:  # behind a scene this would not be the answer
        turn = ask_small_talk(rng)
    return [turn]


def scene_turns(rng: random.Random) -> list[Turn]:
    """A description with a question behind it, or alone; then questions that refer back to it."""
    scene = sample_talk_scene(rng)
    text, about = describe(scene, rng), None
    turns: list[Turn] = []
    if rng.random() < SCENE_ONLY_SHARE:
        turns.append(Turn(text, "I see.", "described", ("see",)))
        text = ""
    for _ in range(rng.choices((1, 2, 3, 4), (45, 30, 15, 10))[0]):
        asked = ask_about_scene(scene, about, rng)
        while any(asked.turn.answer == turn.answer for turn in turns):  # nobody asks the same thing twice
            asked = ask_about_scene(scene, about, rng)
        turns.append(replace(asked.turn, question=f"{text} {asked.turn.question}".strip()))
        scene, about, text = asked.scene, asked.topic, ""
    return turns


def as_typed(turn: Turn, rng: random.Random) -> Turn:
    """The question as people type: without capitals or full stops, in American spelling, with a please."""
    question = turn.question
    if rng.random() < ALTERED_SHARE:
        way = rng.randrange(4)
        if way == 0 and turn.skill not in ("introduce", "repeat"):  # their answers copy the letters
            question = question.lower()
        elif way == 1:
            question = question.rstrip(".?!")
        elif way == 2:
            question = question.replace("colour", "color")
        elif turn.skill not in ("described", "introduce", "small_talk", "repeat"):
            question = question.rstrip(".?!") + ", please" + question[-1] * (question[-1] in ".?!")
    return replace(turn, question=question)
