"""A key twice in one object is found and located, whatever surrounds it; all other JSON is what `json` makes of it."""

import json
import random

import pytest

from finetune.data import strict_json

ODD_TEXTS = ['"', "\\", ":", '\\":{"a', "{[", "a\nb", "ü💥", ""]


def made(draw: random.Random, depth: int = 3) -> object:
    """Random JSON whose keys and texts look like structure."""
    kind = draw.randrange(5 if depth else 3)
    if kind == 3:
        return [made(draw, depth - 1) for _ in range(draw.randrange(4))]
    if kind == 4:
        return {draw.choice(ODD_TEXTS): made(draw, depth - 1) for _ in range(draw.randrange(4))}
    return (draw.choice(ODD_TEXTS), draw.random(), None)[kind]


def test_all_other_json_is_read_as_ever():
    draw = random.Random(1)
    for number in range(300):
        value = made(draw)
        text = json.dumps(value, indent=number % 3 or None, ensure_ascii=bool(number % 2))
        assert strict_json.loads(text) == value
        assert strict_json.raw_decode(f"7 {text} x", 2) == (value, 2 + len(text))


@pytest.mark.parametrize("text", ["", "{", '{"a": }', "[1] 2", '{"a": 1, "a": 2'])
def test_what_is_no_json_is_the_error_of_the_library(text):
    with pytest.raises(json.JSONDecodeError):
        strict_json.loads(text)


def test_the_place_of_the_second_key_is_named():
    draw = random.Random(2)
    for _ in range(300):
        inner = json.dumps(made(draw), indent=draw.choice((None, 1)), ensure_ascii=False)
        # Around it, before it and in it are keys of the same name, which are other objects'.
        head = f'[{{"k": {inner}}},\n {{"o": {{"k": [{inner}, {{"k": 1}}], "ü": "k",\t'
        text = head + f'"\\u006b" : {inner}}}, "k": 3}}, {{"k": 1, "k": 2}}]'
        with pytest.raises(strict_json.KeyTwice) as caught:
            strict_json.loads(text)
        assert caught.value.line == head.count("\n") + 1
        column = len(head) - head.rfind("\n")
        assert str(caught.value) == f'has the key "\\u006b" twice in one object (column {column}); keep one of them'


def test_a_long_key_is_shortened_and_a_long_text_is_passed_quickly():
    key, long = "k" * 500, '\\"' * 1_000_000
    with pytest.raises(strict_json.KeyTwice, match=rf'"{"k" * 57}…" twice'):
        strict_json.loads(f'{{"text": "{long}", "{key}": 1, "{key}": 2}}')
