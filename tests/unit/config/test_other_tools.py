"""Settings as other tools call them: each is answered with the key that is meant, or with what to know instead."""

import re
import shlex
import typing
from collections.abc import Callable
from typing import Any

import pytest

from finetune.config import describe, recipes
from finetune.config.other_tools import KEYS, NOTES, VALUE_NOTES, VALUES

Cli = Callable[..., Any]
NAMES = {*describe.leaf_types(), *describe.sections(), *recipes.preset_files()}


@pytest.mark.parametrize("word", sorted(KEYS | NOTES))
def test_every_name_is_no_key_and_leads_to_one(word: str) -> None:
    assert word not in NAMES
    assert not KEYS.keys() & NOTES.keys()
    said = describe.key_problem(word) or ""
    if word in KEYS:
        assert KEYS[word] in NAMES
        assert said == f"no key called {word}; did you mean {KEYS[word]}?"
    else:
        assert said == f"no key called {word}; {NOTES[word]}"
        keys = re.findall(rf"\b(?:{'|'.join(describe.sections())})\.\w+", NOTES[word])
        assert set(keys) <= NAMES


@pytest.mark.parametrize(
    ("key", "word", "meant"), [(key, *pair) for key, words in VALUES.items() for pair in words.items()]
)
def test_every_value_is_none_and_leads_to_one(key: str, word: str, meant: str) -> None:
    hint = describe.leaf_types()[key]
    is_list = typing.get_origin(hint) is list
    offered = f"try '{key}=[{meant}]'" if is_list else f"did you mean {meant}?"
    assert (describe.value_problem(key, [word] if is_list else word.upper()) or "").endswith(f"; {offered}")
    assert describe.value_problem(key, [meant] if is_list else meant) is None


@pytest.mark.parametrize(("key", "word"), [(key, word) for key, words in VALUE_NOTES.items() for word in words])
def test_every_value_without_a_like_is_answered_by_a_setting(key: str, word: str) -> None:
    assert (describe.value_problem(key, word) or "").endswith(f"; {VALUE_NOTES[key][word]}")
    for setting in re.findall(r"\b\w+\.\w+=\w+", VALUE_NOTES[key][word]):
        assert describe.value_problem(*setting.split("=")) is None


@pytest.mark.parametrize("word", ["color_aug", "resumed", "conditioning"])
def test_a_short_name_is_not_like_every_long_one(word: str) -> None:
    assert "did you mean" not in (describe.key_problem(word) or "")


@pytest.mark.parametrize(
    ("wrong", "meant"), [("seed_", "seed"), ("trainr", "trainer"), ("optim_lr", "optim.lr"), ("rundir", "run_dir")]
)
def test_what_is_like_a_name_is_offered(wrong: str, meant: str) -> None:
    assert describe.nearest(wrong) == meant


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        *((f"network_dim=16 {rest}".strip(), "lora.rank") for rest in ("", "seed=1")),
        *(("--gpu 0", "CUDA_VISIBLE_DEVICES"), ("gpu=0", "CUDA_VISIBLE_DEVICES")),
        *(("lora_r=8", "lora.rank"), ("lora_alpha=16", "lora.alpha"), ("lora_target_modules=[q_proj]", "lora.targets")),
        *(("learning_rate=1e-4", "optim.lr"), ("train_batch_size=2", "trainer.micro_batch")),
        *(("max_train_steps=500", "trainer.steps"), ("micro_batch_size=2", "trainer.micro_batch")),
        *(("num_epochs=3", "trainer.steps"), ("sequence_len=2048", "data.length"), ("cfg_scale=7", "sample.guidance")),
        *(("sampler_name=euler", "the base's own scheduler"), ("save_every_n_epochs=1", "trainer.save_every")),
        *(("resolution=512,512", "model.resolution"), ("--network_dim 16", "lora.rank=16")),
        *(("--max_train_epochs=10", "trainer.steps"), ("--resolution 512", "model.resolution=512")),
        *(("optim.scheduler=cosine", "optim.schedule?"), ("max_new_tokens=8", "sample.max_new_tokens")),
        *(
            ("lora.r=8", "lora.rank"),
            ("model.resolution=512,512", "model.resolution=512;"),
            ("load_in_4bit=true", "nf4"),
            ("trainer.precision=fp8", "model.quantize=int8"),
            ("hardware.device=mps", "type hardware.device=cpu"),
            ("optim=Lion", "adamw8bit"),
        ),
    ],
)
def test_the_command_names_what_is_meant(finetune_cli: Cli, typed: str, meant: str) -> None:
    (line,) = finetune_cli("train", "conf=smoke", *shlex.split(typed)).errors
    assert meant in line.partition(";")[2]
