"""Samples: none without prompts."""

from pathlib import Path

import pytest

from finetune.run.receipts import load_receipt
from finetune.run.records import Adapter
from finetune.stages.sample import sample
from tests.unit.conftest import Setting


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
