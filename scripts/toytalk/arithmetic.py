"""Numbers: sums, differences, small products, word problems with toys, and what one says of single numbers."""

import random
from collections.abc import Callable

from scripts.toytalk.conversation import Turn
from scripts.toytalk.words import KINDS, NAMES, PLURALS, noun, weighted

LARGEST = 99
LARGEST_FACTOR = 10


def ask_arithmetic(rng: random.Random) -> Turn:
    return weighted(ASKERS, rng)(rng)


def add(rng: random.Random) -> Turn:
    a, b = operand(rng), operand(rng)
    question = rng.choice(
        [
            f"What is {a} plus {b}?",
            f"{a} + {b}",
            f"{a} + {b} = ?",
            f"How much is {a} and {b}?",
            f"How much is {a} plus {b}?",
            f"Add {a} and {b}.",
            f"Can you add {a} and {b}?",
            f"What do you get when you add {a} and {b}?",
        ]
    )
    return Turn(question, f"{a} plus {b} is {a + b}.", "add", (str(a + b),), (sum_key(a, b),))


def subtract(rng: random.Random) -> Turn:
    a, b = sorted((operand(rng), operand(rng)), reverse=True)
    question = rng.choice(
        [
            f"What is {a} minus {b}?",
            f"{a} - {b}",
            f"{a} - {b} = ?",
            f"How much is {a} minus {b}?",
            f"Take {b} from {a}.",
            f"Subtract {b} from {a}.",
            f"What is left when you take {b} from {a}?",
        ]
    )
    return Turn(question, f"{a} minus {b} is {a - b}.", "subtract", (str(a - b),), (difference_key(a, b),))


def multiply(rng: random.Random) -> Turn:
    """The small table has to be learnt by heart: nothing of it is held out but its use in word problems."""
    a, b = rng.randint(1, LARGEST_FACTOR), rng.randint(1, LARGEST_FACTOR)
    question = rng.choice(
        [
            f"What is {a} times {b}?",
            f"{a} * {b}",
            f"{a} x {b} = ?",
            f"How much is {a} times {b}?",
            f"Multiply {a} by {b}.",
        ]
    )
    return Turn(question, f"{a} times {b} is {a * b}.", "multiply", (str(a * b),))


def get_more(rng: random.Random) -> Turn:
    a, b, kind, name = rng.randint(2, 30), rng.randint(1, 20), rng.choice(KINDS), rng.choice(NAMES)
    things, more = PLURALS[kind], noun(kind, b)
    question = rng.choice(
        [
            f"{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
            f"{name} has {a} {things}. {name} buys {b} more {more}. How many {things} does {name} have?",
            f"{name} owns {a} {things} and finds {b}. How many {things} are there?",
        ]
    )
    return Turn(question, f"{name} has {a + b} {things}.", "get_more", (str(a + b),), (sum_key(a, b),))


def give_away(rng: random.Random) -> Turn:
    a, kind, name = rng.randint(3, 40), rng.choice(KINDS), rng.choice(NAMES)
    b = rng.randint(1, a - 2)
    things = PLURALS[kind]
    question = rng.choice(
        [
            f"{name} has {a} {things} and gives {b} away. How many {things} does {name} have now?",
            f"{name} has {a} {things}. {name} loses {b}. How many {things} does {name} have?",
            f"{name} had {a} {things} and sold {b} of them. How many {things} are left?",
        ]
    )
    return Turn(question, f"{name} has {a - b} {things}.", "give_away", (str(a - b),), (difference_key(a, b),))


def in_boxes(rng: random.Random) -> Turn:
    a, b, kind = rng.randint(2, LARGEST_FACTOR), rng.randint(2, LARGEST_FACTOR), rng.choice(KINDS)
    things, box = PLURALS[kind], rng.choice(["boxes", "bags", "rows"])
    question = rng.choice(
        [
            f"There are {a} {box} with {b} {things} in each. How many {things} are there?",
            f"I have {a} {box} of {b} {things}. How many {things} is that?",
        ]
    )
    return Turn(question, f"There are {a * b} {things}.", "in_boxes", (str(a * b),), (f"boxes|{a}|{b}|{kind}",))


def larger(rng: random.Random) -> Turn:
    a, b = rng.sample(range(LARGEST + 1), 2)
    word = rng.choice(["bigger", "smaller"])
    right = max(a, b) if word == "bigger" else min(a, b)
    question = rng.choice([f"Which is {word}, {a} or {b}?", f"Which number is {word}: {a} or {b}?"])
    return Turn(question, f"{right} is {word}.", "larger", (str(right),), (f"{word}|{min(a, b)}|{max(a, b)}",))


def neighbour(rng: random.Random) -> Turn:
    a, step = rng.randint(1, 2 * LARGEST), rng.choice([-1, 1])
    word = "after" if step == 1 else "before"
    question = rng.choice(
        [f"What comes {word} {a}?", f"Which number comes {word} {a}?", f"What is the number {word} {a}?"]
    )
    return Turn(question, f"{a + step} comes {word} {a}.", "neighbour", (str(a + step),), (f"{word}|{a}",))


def parity(rng: random.Random) -> Turn:
    a = rng.randint(0, 2 * LARGEST)
    word = "odd" if a % 2 else "even"
    question = rng.choice([f"Is {a} even or odd?", f"Is {a} odd or even?", f"Is the number {a} even or odd?"])
    return Turn(question, f"{a} is {word}.", "parity", (word,), (f"parity|{a}",))


# How often each is asked.
ASKERS: dict[Callable[[random.Random], Turn], float] = {
    add: 5.0,
    subtract: 5.0,
    multiply: 2.0,
    get_more: 2.0,
    give_away: 2.0,
    in_boxes: 1.5,
    larger: 1.0,
    neighbour: 1.0,
    parity: 0.7,
}


def operand(rng: random.Random) -> int:
    return rng.randint(0, 9) if rng.random() < 0.35 else rng.randint(10, LARGEST)


def sum_key(a: int, b: int) -> str:
    """The same for both orders and for every story around it."""
    return f"plus|{min(a, b)}|{max(a, b)}"


def difference_key(a: int, b: int) -> str:
    return f"minus|{a}|{b}"
