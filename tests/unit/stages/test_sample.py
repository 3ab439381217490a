"""Samples: none where nobody asked for any."""

from pathlib import Path

import pytest

from finetune.run.receipts import load_receipt
from finetune.run.records import Adapter
from finetune.stages.sample import sample
from tests.unit.conftest import Setting


def test_without_prompts_nothing_is_loaded_and_a_receipt_says_so(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    config = setting.config
    config.sample.prompts = []
    found = sample(config, Adapter("nowhere", {"peft": "peft"}, {}, "base", ""))
    assert (found.page, found.items) == ("", ())
    receipt = load_receipt(Path(config.run_dir), "sample")
    assert receipt is not None
    assert (receipt.seconds, receipt.figures) == (0.0, {"samples": 0})
    assert capsys.readouterr().err == "sample: none, sample.prompts is empty\n"
    assert not (Path(config.run_dir) / "samples").exists()
