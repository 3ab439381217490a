"""A finished run is named by its folder alone: its config.yaml says what a recipe would."""

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import finetune
from finetune.config.compose import from_plain
from finetune.config.describe import as_dict
from finetune.errors import ConfigError, RunError
from finetune.run.rundir import CONFIG, REPLACED, write_config, written_config
from tests.conftest import ROOT
from tests.end_to_end import command

pytestmark = pytest.mark.sampled


Cli = Callable[..., Any]


def test_report_and_export_of_a_folder(finetune_cli: Cli, trained: Path) -> None:
    (trained / "report.html").unlink()
    shown = finetune_cli("report", f"run_dir={trained}")
    assert (shown.code, shown.out) == (0, f"report: {trained / 'report.html'}\n")
    assert (trained / "report.html").exists()
    exported = finetune_cli("export", f"run_dir={trained}")
    assert exported.code == 0
    assert "export: up to date, skipped" in exported.err  # the very settings that it was trained with


def test_sample_of_a_folder_takes_other_settings(finetune_cli: Cli, trained: Path) -> None:
    drawn = finetune_cli("sample", f"run_dir={trained}", 'sample.prompts=["a blue wall, 100%"]', "sample.seeds=[7]")
    assert drawn.code == 0, drawn.err
    (folder,) = (trained / "samples_more").iterdir()
    assert (folder / "000-seed7-tuned.png").exists()
    again = finetune_cli("sample", f"run_dir={trained}")
    assert "sample: up to date, skipped" in again.err


def test_a_folder_under_another_name_is_the_folder_that_is_meant(finetune_cli: Cli, trained: Path) -> None:
    copy = Path("outputs/it's [a] copy")
    shutil.copytree(trained, copy)
    before = command.contents(trained)
    assert finetune_cli("report", f'run_dir="{copy}"').out == f"report: {copy / 'report.html'}\n"
    assert finetune_cli("report", 'name="it\'s [a] copy"').out == f"report: {copy / 'report.html'}\n"
    assert command.contents(trained) == before


def test_what_to_type_where_no_run_is_named(finetune_cli: Cli, trained: Path) -> None:
    shutil.copytree(trained, "outputs/mine one")
    offered = """such as 'run_dir="outputs/mine one"', or which recipe, such as conf=pixar_style; there are: """
    for words, said in {
        (): "error: conf= is missing: say which run, such as",
        ("name=other",): "error: conf= is missing, and outputs/other holds no run: say which run, such as",
        ("run_dir=other",): "error: conf= is missing, and other holds no run: say which run, such as",
    }.items():
        refused = finetune_cli("report", *words)
        assert refused.code == ConfigError.exit_code
        assert refused.err.startswith(said)
        assert offered in refused.err
    stray = finetune_cli("report", "run").err.splitlines()[0]
    assert stray == "error: 'run' is not a setting; settings are written key=value, such as run_dir=run"
    assert "conf= is missing: say which recipe" in finetune_cli("train", f"run_dir={trained}").err


def test_what_to_type_where_there_is_no_run_yet(finetune_cli: Cli, workdir: Path) -> None:
    assert "such as run_dir=outputs/NAME, or" in finetune_cli("report").err
    assert list(workdir.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lora": {"rnk": 4}}, "no key called lora.rnk"),
        ({"lora": {"rank": "high"}}, "lora.rank must be a whole number"),
        ({"seed": "${lora.rank}"}, "Value '${lora.rank}' of type 'str' could not be converted to Integer"),
    ],
)
def test_a_config_that_cannot_be_used(finetune_cli: Cli, trained: Path, changed: dict[str, Any], said: str) -> None:
    write_config(written_config(trained) | changed, trained)
    refused = finetune_cli("report", f"run_dir={trained}")
    assert refused.code == RunError.exit_code
    assert refused.err.startswith(f"error: {trained / CONFIG} can't be used (")
    assert said in refused.err
    assert "name its recipe, such as conf=pixar_style" in refused.err


@pytest.mark.parametrize("text", ["", "- a list\n"])
def test_an_empty_config_is_named(finetune_cli: Cli, trained: Path, text: str) -> None:
    (trained / CONFIG).write_text(text)
    refused = finetune_cli("export", f"run_dir={trained}")
    assert refused.code == RunError.exit_code
    assert f"{trained / CONFIG} is damaged (it holds no settings); the same `train` command" in refused.err


def test_an_export_whose_checkpoint_was_deleted(finetune_cli: Cli, trained: Path) -> None:
    shutil.rmtree(trained / "checkpoints")
    shutil.rmtree(trained / "adapter")
    refused = finetune_cli("export", f"run_dir={trained}")
    assert refused.code == RunError.exit_code
    assert "there is no checkpoint run/checkpoints/step-000002; restore it from a copy, or train again" in refused.err


def test_presets_need_a_recipe(finetune_cli: Cli, trained: Path) -> None:
    refused = finetune_cli("export", f"run_dir={trained}", "lora=r32")
    assert refused.code == ConfigError.exit_code
    assert "lora=r32 chooses a preset, which needs a recipe: conf=…, or finetune.load" in refused.err


def test_a_folder_without_a_finished_run(finetune_cli: Cli, workdir: Path) -> None:
    write_config(as_dict(finetune.load("smoke")), workdir / "begun")
    refused = finetune_cli("export", "run_dir=begun", "hardware.device=cpu")
    assert refused.code == RunError.exit_code
    assert "begun holds no finished run; train first, with the same settings: finetune train conf=…" in refused.err


def test_a_run_is_deleted_as_the_docs_say(finetune_cli: Cli, small: list[str], images: Path) -> None:
    """Nothing of it is left, and another run that shares its cache loses nothing but what is encoded again."""
    (typed,) = re.findall(r"^    rm -r (.*)$", (ROOT / "docs" / "outputs.md").read_text(), flags=re.MULTILINE)
    mine, cache = (Path(word) for word in shlex.split(typed))
    settings = [*small, f"data.cache={cache}", "trainer.steps=1"]
    other = [*settings, "run_dir=other", "seed=1"]
    before = command.contents(Path())
    assert finetune_cli("train", *settings, f"run_dir={mine}").code == 0
    assert finetune_cli("train", *other).code == 0
    kept = command.contents(Path("other"))
    shutil.rmtree(mine)
    shutil.rmtree(cache)
    assert command.contents(Path()) == before | kept
    again = finetune_cli("train", *other)
    assert again.code == 0
    assert all(f"{stage}: up to date, skipped" in again.err for stage in ("caption", "train", "export", "sample"))
    changed = {name for name, text in command.contents(Path("other")).items() if kept.get(name) != text}
    assert changed <= {"other/receipts/dataset.json", "other/report.html", "other/receipts/report.json"}


@pytest.mark.parametrize("name", REPLACED)
def test_a_file_of_no_run_is_not_replaced(finetune_cli: Cli, small: list[str], images: Path, name: str) -> None:
    other = images.parent / "other"
    (other / "checkpoints").mkdir(parents=True)
    (other / name).write_text("mine")
    (other / "checkpoints" / "checkpoint-500").write_text("mine")
    before = command.contents(other)
    for verb in ("train", "caption"):
        refused = finetune_cli(verb, *small, "run_dir=other")
        assert refused.code == RunError.exit_code
        assert f"error: other/{name} is of no run, and a run would replace it" in refused.err
    assert command.contents(other) == before


@pytest.mark.parametrize("recipe", ["smoke", "pirate_chat"])
def test_a_configuration_comes_back_from_its_plain_values(recipe: str) -> None:
    config = finetune.load(recipe, {"sample.prompts": ["${a} \\${b} $c {d}"], "run_dir": "${x}", "name": "2024_05_01"})
    assert as_dict(from_plain(as_dict(config))) == as_dict(config)
