"""Settings that the program writes are read back as the same values, by a shell and by Hydra."""

import random
import shlex
from pathlib import Path
from typing import Any

import pytest

import finetune
from finetune.config.schema import Precision
from finetune.config.spelling import override, setting
from finetune.errors import ConfigError

ODD = [
    *("my pictures", "a [b]", "(2024)", "a=b", "a,b", "x:y", 'say "hi"', "it's", "both ' and \"", "Mädchen", "雪の日"),
    *("${seed}", "\\${seed}", "a\\", 'a\\"', "~/x", " a ", "1e5", "true", "null", "2024_05_01", "#1", "a;b & c", "*?"),
    *("", "a\nb", "{x}", "%d", "$HOME", "`ls`", "!x", "-x"),
]


@pytest.mark.exhaustive
def test_any_text_survives_the_shell_and_hydra() -> None:
    """As one text, here two keys to a composition, and in a list."""
    assert finetune.load("smoke", shlex.split(setting("sample.prompts", ODD))).sample.prompts == ODD
    for prefix, trigger in zip(ODD[::2], ODD[1::2], strict=True):
        words = shlex.split(f"{setting('caption.prefix', prefix)} {setting('caption.trigger', trigger)}")
        caption = finetune.load("smoke", words).caption
        assert (caption.prefix, caption.trigger) == (prefix, trigger)


def test_random_texts_survive() -> None:
    draw = random.Random(0)
    parts = [*" a1.-_/\\\"'${}[](),=:;#&!%~*?`|<>\n\tß雪", "${seed}", "\\${", "true", "null"]
    texts = ["".join(draw.choices(parts, k=draw.randrange(9))) for _ in range(400)]
    (word,) = shlex.split(setting("sample.prompts", texts))
    assert finetune.load("smoke", [word]).sample.prompts == texts


@pytest.mark.parametrize(
    ("key", "value", "written"),
    [
        ("lora.rank", 8, "lora.rank=8"),
        ("data.flip", True, "data.flip=true"),
        ("optim.lr", 1e-5, "optim.lr=1e-05"),
        ("trainer.precision", Precision.bf16, "trainer.precision=bf16"),
        ("sample.seeds", [0, 1], "'sample.seeds=[0,1]'"),  # a shell may look for files of that pattern
        ("run_dir", Path("outputs/mine"), "run_dir=outputs/mine"),
        ("run_dir", "a b", "'run_dir=\"a b\"'"),
    ],
)
def test_quotes_stand_where_they_are_needed(key: str, value: Any, written: str) -> None:
    assert setting(key, value) == written


# -- as typed ------------------------------------------------------------------------------------------------------


def test_text_that_the_grammar_does_not_take_is_taken_as_typed() -> None:
    for prefix, trigger in (("Mädchen", "a=b"), ("x (1)", "it's"), ("C#", "100%"), ("a;b", "${seed} ä")):
        caption = finetune.load("smoke", [f"caption.prefix={prefix}", f"caption.trigger={trigger}"]).caption
        assert (caption.prefix, caption.trigger) == (prefix, trigger.replace("${seed}", "0"))


# -- in Python -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["model.lora_targets={mine:[to_q]}", "model.lora_targets.mine=[to_q]"])
def test_a_mapping_gets_further_entries(word: str) -> None:
    targets = finetune.load("smoke", [word, "lora.targets=mine"]).model.lora_targets
    assert targets["mine"] == ["to_q"]
    assert "attention" in targets


def test_one_text_is_one_setting() -> None:
    assert finetune.load("smoke", "lora.rank=4").lora.rank == 4
    assert finetune.load("smoke", "caption.prefix=a b").caption.prefix == "a b"


def test_a_mapping_is_key_to_value() -> None:
    values: dict[str, Any] = {
        "lora": {"rank": 4, "alpha": 8.0},
        "optim": "adamw8bit",
        "trainer.precision": Precision.fp32,
        "caption.prefix": "it's, ${seed}",
        "sample.prompts": ["a, b", 'c "d"'],
        "data.flip": True,
    }
    config = finetune.load("smoke", values)
    assert (config.lora.rank, config.lora.alpha, config.optim.name.name) == (4, 8.0, "adamw8bit")
    assert (config.trainer.precision, config.data.flip) == (Precision.fp32, True)
    assert (config.caption.prefix, config.sample.prompts) == ("it's, ${seed}", ["a, b", 'c "d"'])
    several = {"data.file": ["a b.jsonl", 'c"d.jsonl']}
    assert finetune.load("pirate_chat", several).data.file == 'a b.jsonl:c"d.jsonl'


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("lora.rank=4 seed=3", "give a list: ['lora.rank=4', 'seed=3']"),
        (["lora.rank=4", 5], "got 5"),
        ({"lora.rnak": 4}, "did you mean lora.rank?"),
        ({"lora": {"rank": "x"}}, "lora.rank must be a whole number"),
    ],
)
def test_what_is_no_setting_is_refused_in_one_line(overrides: Any, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        finetune.load("smoke", overrides)
    assert said in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_a_recipe_may_be_called_anything(workdir: Path) -> None:
    (workdir / "conf").mkdir()
    for name in ("my recipe", "2024", "a=b (c)"):
        (workdir / "conf" / f"{name}.yaml").write_text("defaults: [smoke]\nseed: 3\n")
        assert finetune.load(name).seed == 3
        assert finetune.load(name).name == name
        assert override("conf", name).startswith("conf=")
