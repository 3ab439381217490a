"""Keys of 0.1 under their old names: accepted wherever settings stand, and said once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import finetune
from finetune.config import compose, describe, renamed
from finetune.errors import ConfigError

OLD = {  # what 0.1 called it, as typed -> key and value now
    "export.dialects=[peft,kohya]": ("export.formats", ["peft", "kohya"]),
    "trainer.checkpointing=2": ("trainer.activation_checkpointing", 2),
    "trainer.keep=3": ("trainer.keep_checkpoints", 3),
    "trainer.fit=asked": ("trainer.autotune", "check"),
    "trainer.fit=off": ("trainer.autotune", "off"),
    "hardware.card=NVIDIA_L4": ("hardware.gpu", "NVIDIA_L4"),
}


def value(config: Any, key: str) -> Any:
    section, name = key.split(".")
    return describe.as_dict(config)[section][name]


def test_every_old_key_is_tried_and_leads_to_a_key_that_there_is() -> None:
    assert {word.partition("=")[0] for word in OLD} == renamed.KEYS.keys()
    for old, new in renamed.KEYS.items():
        assert renamed.new_key(old) == new == renamed.new_key(new)
        assert describe.key_problem(new) is None
        assert describe.key_problem(old) is not None
    assert renamed.new_key("lora.rank") == "lora.rank"


@pytest.mark.sampled
@pytest.mark.parametrize("word", OLD)
def test_an_old_key_works_as_an_override_and_is_said_once(word: str, capfd: pytest.CaptureFixture[str]) -> None:
    old, (key, now) = word.partition("=")[0], OLD[word]
    for config in (finetune.load("pixar_style", [word]), compose.apply(finetune.load("pixar_style"), [word])):
        assert value(config, key) == now
    (line,) = set(capfd.readouterr().err.splitlines())
    assert line.startswith(f"{old} is now called {key}")
    assert ("asked is now check" in line) == (old == "trainer.fit")


@pytest.mark.sampled
@pytest.mark.parametrize("word", OLD)
@pytest.mark.parametrize("place", ["recipe", "extended", "preset"])
def test_an_old_key_works_in_files(workdir: Path, place: str, word: str, capfd: pytest.CaptureFixture[str]) -> None:
    old, _, text = word.partition("=")
    section, name = old.split(".")
    (workdir / "conf" / section).mkdir(parents=True)
    if place == "preset":
        file = workdir / "conf" / section / "old.yaml"
        file.write_text(f"{name}: {text}\n")
        (workdir / "conf/mine.yaml").write_text(f"defaults: [pixar_style, override /{section}: old]\n")
    else:
        file = workdir / "conf" / ("mine.yaml" if place == "recipe" else "base.yaml")
        (workdir / "conf/mine.yaml").write_text("defaults: [base]\n")
        file.write_text(f"defaults: [pixar_style]\n{section}:\n  {name}: {text}\n")
    assert value(finetune.load("mine"), OLD[word][0]) == OLD[word][1]
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{file.relative_to(workdir)}: {old} is now called {OLD[word][0]}")


def test_files_that_are_not_chosen_say_nothing(workdir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (workdir / "conf/trainer").mkdir(parents=True)
    (workdir / "conf/other.yaml").write_text("trainer: {keep: 1}\n")
    (workdir / "conf/trainer/other.yaml").write_text("keep: 1\n")
    finetune.load("pixar_style")
    assert capfd.readouterr().err == ""


def test_an_old_key_of_several_places_is_said_once_and_the_last_one_counts(
    workdir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (workdir / "conf").mkdir()
    (workdir / "conf/base.yaml").write_text("defaults: [pixar_style]\ntrainer: {keep: 7, keep_checkpoints: 8}\n")
    (workdir / "conf/mine.yaml").write_text("defaults: [pixar_style]\ntrainer: {keep: 7}\n")
    assert finetune.load("mine", ["trainer.keep=9"]).trainer.keep_checkpoints == 9
    assert len(capfd.readouterr().err.splitlines()) == 1
    assert finetune.load("mine", ["trainer.keep_checkpoints=9"]).trainer.keep_checkpoints == 9


def test_both_names_of_one_setting_are_refused(workdir: Path) -> None:
    with pytest.raises(ConfigError, match=r"^trainer\.keep and trainer\.keep_checkpoints are two names of one setting"):
        finetune.load("pixar_style", ["trainer.keep=1", "trainer.keep_checkpoints=1"])
    (workdir / "conf").mkdir()
    (workdir / "conf/mine.yaml").write_text("defaults: [pixar_style]\ntrainer: {keep: 7, keep_checkpoints: 8}\n")
    with pytest.raises(ConfigError, match=r"^conf/mine\.yaml: trainer\.keep and .*; leave out trainer\.keep$"):
        finetune.load("mine")


def test_a_wrong_value_of_an_old_key_is_named_by_the_new_one() -> None:
    with pytest.raises(ConfigError, match=r"^trainer\.autotune must be one of auto, check, off, got 'maybe'"):
        finetune.load("pixar_style", ["trainer.fit=maybe"])


def test_old_keys_on_the_command_line(finetune_cli: Callable[..., Any], workdir: Path) -> None:
    answer = finetune_cli("train", "conf=pixar_style", "trainer.keep=3", "++trainer.fit=asked", "--cfg", "job")
    assert answer.code == 0
    trainer = yaml.safe_load(answer.out)["trainer"]
    assert (trainer["keep_checkpoints"], trainer["autotune"]) == (3, "check")
    assert [line.split()[0] for line in answer.errors] == ["trainer.fit", "trainer.keep"]
    answer = finetune_cli("--help", "conf=pixar_style", "trainer.keep=3")
    assert "trainer.keep_checkpoints=3" in answer.out
    assert len(answer.errors) == 1


def test_whoever_composes_without_saying_how_to_tell_gets_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    compose.load("pixar_style", ["trainer.keep=3"])
    assert [record.levelname for record in caplog.records if "trainer.keep" in record.message] == ["WARNING"]
