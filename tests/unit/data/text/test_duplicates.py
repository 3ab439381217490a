"""Equal and nearly equal conversations."""

import random

import numpy as np

from finetune.data.text import duplicates
from finetune.data.text.formats import Conversation, Message


def row(question, answer, system=""):
    turns = (Message("user", question), Message("assistant", answer))
    return Conversation((Message("system", system), *turns) if system else turns, "f:1")


def words(draw, count):
    return " ".join(f"w{draw.randrange(5000)}" for _ in range(count))


def signatures(rows):
    return np.stack([duplicates.signature_of(item) for item in rows])


def test_groups_ignore_case_and_white_space_only():
    first = duplicates.group_of(row("What is 3+4?", "It is 7."))
    assert first == duplicates.group_of(row(" what  is\n3+4?", "IT is 7. "))
    assert first != duplicates.group_of(row("What is 3-4?", "It is 7."))
    assert first != duplicates.group_of(row("What is 3+4? It is", "7."))
    assert 0 <= first < 2**64


def test_signatures_estimate_the_shared_part():
    draw = random.Random(0)
    differences = []
    for _ in range(200):
        text, other = words(draw, 120).split(), words(draw, 120).split()
        keep = draw.randrange(121)
        mixed = text[:keep] + other[keep:]
        first, second = signatures([row(" ".join(text), "yes"), row(" ".join(mixed), "yes")])
        shared, whole = max(0, keep - 2), 240 - max(0, keep - 2)
        differences.append((first == second).mean() - shared / whole)
    assert abs(np.mean(differences)) < 0.02
    assert np.std(differences) < 0.15


def test_near_duplicates_are_found_and_others_are_not():
    draw = random.Random(1)
    train = [row(words(draw, 30), words(draw, 60)) for _ in range(400)]
    copies = [row(item.messages[0].content + " please", item.messages[1].content) for item in train[:50]]
    fresh = [row(words(draw, 30), words(draw, 60)) for _ in range(50)]
    many, rows = signatures(train), np.arange(400)
    assert duplicates.near(signatures(copies), many, rows) >= 45
    assert duplicates.near(signatures(fresh), many, rows) == 0
    assert duplicates.near(signatures(copies), many, rows[50:]) == 0
    assert duplicates.near(signatures(copies)[:0], many, rows) == 0
    assert duplicates.near(signatures(copies), many, rows[:0]) == 0


def test_a_shared_system_turn_makes_nothing_alike():
    draw = random.Random(2)
    system = words(draw, 500)
    first, second = signatures([row(words(draw, 20), words(draw, 20), system) for _ in range(2)])
    assert (first == second).mean() < 0.3


def test_short_and_unspaced_texts():
    assert duplicates.signature_of(row("a", "b")).shape == (duplicates.HASHES,)
    assert duplicates.signature_of(Conversation((Message("text", ""),), "f:1")).dtype == np.uint32
    first, second, third = signatures(
        [row("\u4f60\u597d\u5417\u6211\u5f88\u597d\u8c22\u8c22\u4f60" * 2, x) for x in ("\u597d", "\u5f88", "\u5f88")]
    )
    assert (first == second).mean() > 0.5, "letters of scripts without spaces count as words"
    assert (second == third).all()


def test_chunks_change_nothing(monkeypatch):
    draw = random.Random(3)
    train = signatures([row(words(draw, 20), "yes") for _ in range(300)])
    whole = duplicates.near(train[:40], train, np.arange(300))
    monkeypatch.setattr(duplicates, "CHUNK", 7)
    assert duplicates.near(train[:40], train, np.arange(300)) == whole == 40
