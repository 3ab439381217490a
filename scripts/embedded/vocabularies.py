"""The tokenizers, made from captions: CLIP's byte-level pairs for diffusion, BERT's word pieces for the captioner."""

import json
import re
import string
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import BertTokenizer, CLIPTokenizer

CLIP_LENGTH = 77  # the text encoder's positions, as in every Stable Diffusion
CLIP_MERGES = 400
END_OF_WORD = "</w>"


def train_clip_tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    """Learn merges from captions. All 256 bytes are in the vocabulary, so that any word of any language tokenises."""
    pattern = CLIPTokenizer().backend_tokenizer  # its normaliser and splitting, so that both see the same pieces
    learner = Tokenizer(BPE(end_of_word_suffix=END_OF_WORD))
    learner.normalizer, learner.pre_tokenizer = pattern.normalizer, pattern.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        captions,
        BpeTrainer(
            vocab_size=2 * len(alphabet) + CLIP_MERGES,
            initial_alphabet=alphabet,
            end_of_word_suffix=END_OF_WORD,
            show_progress=False,
        ),
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]][:CLIP_MERGES]
    words = [*alphabet, *(letter + END_OF_WORD for letter in alphabet), *("".join(pair) for pair in merges)]
    words = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_LENGTH)


def save_clip_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """tokenizer.json, which transformers 5 reads, and vocab.json with merges.txt, which every other tool reads."""
    forget_batching(tokenizer)
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))


def make_wordpiece_tokenizer(captions: Iterable[str], length: int) -> BertTokenizer:
    """Every caption word whole; letters and digits as pieces for all others. [DEC] starts a caption, as in BLIP."""
    words = sorted({word for text in captions for word in re.findall(r"[a-z]+", text.lower())})
    letters = list(string.ascii_lowercase + string.digits + ".,;:!?'-")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *letters, *(f"##{x}" for x in letters), *words]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return BertTokenizer(vocab=vocabulary, bos_token="[DEC]", model_max_length=length)


def forget_batching(tokenizer: BertTokenizer | CLIPTokenizer) -> None:
    """Padding and truncation of the last call would be saved as if they were part of the tokenizer."""
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
