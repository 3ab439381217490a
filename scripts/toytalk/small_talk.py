"""Greetings, thanks, names, and what the helper says of itself."""

import random

from scripts.toytalk.conversation import Turn
from scripts.toytalk.instructions import new_word
from scripts.toytalk.words import KINDS, NAMES, article, capitalised

# Questions and the one answer to all of them. Learnt by heart, nothing held out.
EXCHANGES: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("Hello!", "Hello.", "Hi!", "Hi there!", "Hey!", "Good day!", "Hello there!"), "Hello! How can I help?", "hello"),
    (("Good morning.", "Good morning!", "Morning!"), "Good morning! How can I help?", "morning"),
    (("Good evening.", "Good evening!"), "Good evening! How can I help?", "evening"),
    (("Good night!", "Good night.", "Sleep well!"), "Good night!", "night"),
    (("Thank you.", "Thanks!", "Thank you very much!", "Many thanks."), "You are welcome.", "welcome"),
    (("Well done!", "Great!", "That is right.", "Very good!", "Correct!"), "Thank you.", "thank"),
    (("Bye!", "Goodbye.", "See you later!", "I have to go."), "Goodbye!", "goodbye"),
    (("How are you?", "How are you today?", "How do you do?", "Are you well?"), "I am well, thank you.", "well"),
    (
        ("Who are you?", "What are you?", "Tell me about yourself.", "What is your name?"),
        "I am a small helper from the toy world.",
        "helper",
    ),
    (
        ("What can you do?", "What do you know?", "How can you help me?", "Help!"),
        "I can count, sort, add and talk about toys.",
        "count",
    ),
    (("What is the capital of France?", "Who won the game?", "What time is it?"), "I do not know.", "not"),
    (("How is the weather?", "What happened today?", "Tell me a secret."), "I do not know.", "not"),
)


def ask_small_talk(rng: random.Random) -> Turn:
    draw = rng.random()
    if draw < 0.35:
        return introduce(rng)
    if draw < 0.45:
        return unseen(rng)
    questions, answer, word = rng.choice(EXCHANGES)
    return Turn(rng.choice(questions), answer, "small_talk", (word,))


def greeting(rng: random.Random) -> Turn:
    questions, answer, word = rng.choice(EXCHANGES[:3])
    return Turn(rng.choice(questions), answer, "small_talk", (word,))


def thanks(rng: random.Random) -> Turn:
    questions, answer, word = rng.choice(EXCHANGES[4:7])
    return Turn(rng.choice(questions), answer, "small_talk", (word,))


def introduce(rng: random.Random) -> Turn:
    # Mostly names that nobody has: of few names a model learns those by heart, and does not hear another one.
    name = rng.choice(NAMES) if rng.random() < 0.2 else capitalised(new_word(rng))
    question = rng.choice([f"My name is {name}.", f"I am {name}.", f"Hello, I am {name}.", f"Call me {name}."])
    return Turn(question, f"Nice to meet you, {name}.", "introduce", (name,), (f"name|{name}",))


def recall_name(introduced: Turn, rng: random.Random) -> Turn:
    name = introduced.words[0]
    question = rng.choice(["What is my name?", "Do you remember my name?", "Who am I?", "Say my name."])
    return Turn(question, f"Your name is {name}.", "recall_name", (name,), introduced.keys)


def unseen(rng: random.Random) -> Turn:
    """Asked about a thing before any scene was described; learnt by heart."""
    kind = rng.choice(KINDS)
    question = rng.choice([f"What colour is the {kind}?", f"Where is the {kind}?", f"How big is the {kind}?"])
    return Turn(question, f"I do not see {article(kind)}.", "unseen", (kind,))
