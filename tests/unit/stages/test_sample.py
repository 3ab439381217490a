"""Samples: none without prompts, and what a person put beside them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.config.schema import Config
from finetune.run.atomic import remove_leftovers
from finetune.run.receipts import load_receipt
from finetune.run.records import Adapter, Dataset
from finetune.run.rundir import LEFTOVERS
from finetune.stages.export import export
from finetune.stages.sample import sample
from finetune.stages.train import train
from tests.unit.conftest import Setting

pytestmark = pytest.mark.sampled


def test_without_prompts_nothing_is_loaded_and_there_is_a_receipt(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    config = setting.config
    config.sample.prompts = []
    found = sample(config, Adapter("nowhere", {"peft": "peft"}, {}, "base", ""))
    assert (found.page, found.items) == ("", ())
    receipt = load_receipt(Path(config.run_dir), "sample")
    assert receipt is not None
    assert (receipt.seconds, receipt.figures) == (0.0, {"samples": 0})
    assert "sample.prompts is empty" in capsys.readouterr().err
    assert not (Path(config.run_dir) / "samples").exists()


def test_what_a_person_put_beside_the_samples_is_kept_when_they_are_made_again(setting: Setting) -> None:
    config = setting.config
    adapter = export(config, train(config, setting.dataset))
    folder = Path(sample(config, adapter).folder)
    (folder / "favourite.png").write_text("an image")
    config.sample.prompts = ["another prompt"]
    sample(config, adapter)
    assert not (folder / "favourite.png").exists()
    kept = [path for path in Path(config.run_dir, "samples-kept-1").rglob("*") if path.is_file()]
    assert [(path.name, path.read_text()) for path in kept] == [("favourite.png", "an image")]


def test_a_prompt_that_the_base_does_not_read_whole_is_named(
    config: Config, make_dataset: Callable[[], Dataset], capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = export(config, train(config, make_dataset()))
    config.sample.prompts = [
        "short\nand in two lines",
        "a red wall, " + " ".join(f"brick{number}" for number in range(3000)),
    ]
    capsys.readouterr()
    sample(config, adapter, own=False)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert line.startswith("warning: the prompt a red wall, brick0 brick1")
    assert " words dropped: " in line
    assert len(line) < 1200


@pytest.mark.parametrize("prompt", ["A big, red robot!", "猫 im Schnee", "?", "x" * 100])
def test_what_a_kill_leaves_of_own_samples_is_known_by_its_name(setting: Setting, prompt: str) -> None:
    config = setting.config
    config.sample.prompts = [prompt]
    folder = Path(sample(config, export(config, train(config, setting.dataset)), own=False).folder)
    left = folder.with_name(f".{folder.name}.tmp")
    folder.rename(left)
    remove_leftovers(Path(config.run_dir), LEFTOVERS)
    assert not left.exists()
