"""Text that is streamed is the text of all tokens, and nothing of it is taken back."""

from typing import Any

import pytest

from finetune.language.causal_lm import load_tokenizer
from finetune.serving.text_stream import TextStream

TEXTS = ["Hello, world! How are you?", "  spaces   within", "naïve café – 5 €", "🙂🚀 rockets", "two\nlines\n"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("embedded:language")


def pieces(stream: TextStream, ids: list[int]) -> list[str]:
    found = []
    for token in ids:
        found.append(stream.push(token))
        if stream.stopped:
            return found
    return [*found, stream.end()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_whole_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = pieces(TextStream(tokenizer), ids)
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(found) == whole.lstrip()
    assert not any("�" in piece for piece in found)
    assert sum(map(bool, found)) > 1, "not all at the end"


def test_half_a_character_at_the_end_is_shown_as_what_it_is(tokenizer: Any) -> None:
    ids = tokenizer.encode("🙂", add_special_tokens=False)
    assert len(ids) > 1
    assert "".join(pieces(TextStream(tokenizer), ids[:-1])) == "�"


@pytest.mark.parametrize(
    ("stops", "expected", "stopped"),
    [
        (["world"], "Hello, ", True),
        (["rld!", ", w"], "Hello", True),
        (["o, wo"], "Hell", True),
        (["worlds"], "Hello, world! How are you?", False),
        (["?!"], "Hello, world! How are you?", False),
    ],
)
def test_a_reply_ends_before_its_stop_text(tokenizer: Any, stops: list[str], expected: str, stopped: bool) -> None:
    stream = TextStream(tokenizer, stops)
    assert "".join(pieces(stream, tokenizer.encode(TEXTS[0], add_special_tokens=False))) == expected
    assert stream.stopped == stopped
