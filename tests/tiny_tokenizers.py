"""Tokenizers of single letters, of the kinds that image models' text encoders have: no download, a file or two."""

import json
from pathlib import Path
from typing import Any

LETTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)]
CHAT = (  # as Qwen3 writes a question; an empty thought says that it shall not think
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


def clip_tokenizer(folder: Path) -> Any:
    """CLIP's, saved into `folder`."""
    from transformers import CLIPTokenizer

    vocabulary = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    tokenizer.save_pretrained(folder)
    return tokenizer


def t5_tokenizer(folder: Path) -> Any:
    """T5's, saved into `folder`."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import Unigram
    from transformers import T5TokenizerFast

    learner = Tokenizer(Unigram([(letter, -1.0) for letter in ["<pad>", "</s>", "<unk>", "▁", *LETTERS]], unk_id=2))
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.decoder = decoders.Metaspace()
    tokenizer = T5TokenizerFast(tokenizer_object=learner, extra_ids=0)
    tokenizer.save_pretrained(folder)
    return tokenizer


def qwen_tokenizer(folder: Path) -> Any:
    """Qwen's, of single bytes, with a chat template; saved into `folder`."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *marks]
    tokenizer = Qwen2Tokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": marks[1:3]})
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return tokenizer
