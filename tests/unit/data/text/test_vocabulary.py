"""Padding, identity and tokenizers written in Python."""

import numpy as np

from finetune.data.text import vocabulary
from finetune.data.text.formats import Conversation, Message
from finetune.data.text.tokens import Chat, preview_row
from tests import chat_templates as templates
from tests.chat_templates import tokenizer

BARE = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def test_identity_is_by_content(tmp_path):
    from transformers import AutoTokenizer

    made = tokenizer(templates.CHATML)
    made.save_pretrained(tmp_path / "a")
    again = AutoTokenizer.from_pretrained(tmp_path / "a")
    again(["a", "b b b b"], padding=True, truncation=True, max_length=3) if again.pad_token else None
    assert Chat(again).content_hash == Chat(made).content_hash
    others = [Chat(tokenizer(templates.PHI)), Chat(tokenizer(templates.CHATML, eos="<|im_end|>")),
              Chat(tokenizer(templates.CHATML, special=BARE)), Chat(made, template="chatml")]  # fmt: skip
    assert len({chat.content_hash for chat in [*others, Chat(made)]}) == 5


class Letters:
    """As much of a tokenizer written in Python as is used: one id per character, without offsets."""

    is_fast = False
    bos_token, eos_token, bos_token_id, eos_token_id = "<s>", "$", None, ord("$")
    special_tokens_map = {"eos_token": "$"}  # noqa: RUF012
    all_special_tokens = ("$",)
    added_tokens_decoder = {}  # noqa: RUF012
    chat_template = templates.ZEPHYR

    def get_chat_template(self):
        return self.chat_template

    def get_vocab(self):
        return {chr(code): code for code in range(256)}

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [ord(letter) for letter in text]

    def decode(self, ids, **_):
        return "".join(map(chr, ids))


def test_tokenizers_without_offsets_are_given_text_in_pieces():
    letters = Letters()
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))
    encoded = Chat(letters).encode(Conversation(turns, "f:1"))
    assert preview_row(letters, encoded) == "<|user|>\na$\n<|assistant|>\n⟦b$⟧\n<|user|>\nc$\n<|assistant|>\n⟦d$⟧\n"
    assert len(Chat(letters).content_hash) == 64
    [(ids, trained)] = vocabulary.token_spans(letters, ["abcdefgh"], [[(4, 6), (1, 3), (2, 4), (7, 8)]])
    assert (ids.tolist(), trained.astype(int).tolist()) == (list(b"abcdefgh"), [0, 1, 1, 1, 1, 1, 0, 1])
    [(_, trained)] = vocabulary.token_spans(letters, ["ab"], [[(0, 1)]])
    assert trained.tolist() == [True, False]


def test_no_text_no_tokens():
    assert vocabulary.token_spans(tokenizer(), [], []) == []
    [(ids, trained)] = vocabulary.token_spans(tokenizer(), [""], [[(0, 0)]])
    assert ids.dtype == np.uint32
    assert len(ids) == len(trained) == 0
