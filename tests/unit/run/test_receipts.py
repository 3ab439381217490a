"""Receipts and checkpoints: read back as they were written, by this version and by earlier ones."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import RunError
from finetune.run import hashing, receipts
from finetune.run.plain import from_plain
from finetune.run.receipts import load_receipt, load_record, receipt_path, save_receipt
from finetune.run.records import Adapter, Caption, CaptionSet, Run, TextSet
from finetune.training import checkpoint
from finetune.training.checkpoint import TrainState
from tests.conftest import ROOT
from tests.unit.reporting.records import run_record, text_set

STATE = TrainState(
    {"seed": 1}, step=4, count=16, last_losses=((3, 0.5), (4, 0.25)), requested={"offload": False}, fallbacks=1
)


def in_old_words(record: Any) -> dict[str, Any]:
    old = {new: name for name, new in type(record).RENAMED.items()}
    return {old.get(name, name): value for name, value in asdict(record).items()}


def test_a_record_comes_back_unless_the_inputs_have_changed(tmp_path: Path) -> None:
    captions = CaptionSet("images", (Caption("a.jpg", "a robot", "user"),), ("b.jpg",))
    save_receipt(tmp_path, "caption", captions, input_hash="h", seconds=1.5, figures={"images": 1})
    assert load_record(tmp_path, "caption", CaptionSet, input_hash="h") == captions
    assert load_record(tmp_path, "caption", CaptionSet, input_hash="other") is None
    assert load_record(tmp_path, "train", Run) is None
    receipt = load_receipt(tmp_path, "caption")
    assert receipt is not None
    assert (receipt.seconds, receipt.figures, receipt.versions.keys() >= {"torch", "peft"}) == (
        1.5,
        {"images": 1},
        True,
    )


@pytest.mark.parametrize("damage", ["{", "[]", '{"stage": "train"}'])
def test_a_damaged_receipt_is_named(tmp_path: Path, damage: str) -> None:
    save_receipt(tmp_path, "train", run_record(tmp_path), input_hash="h", seconds=1.0, figures={})
    receipt_path(tmp_path, "train").write_text(damage)
    with pytest.raises(RunError, match=r"train\.json is damaged"):
        load_receipt(tmp_path, "train")


@pytest.mark.parametrize(
    "damage", [b"\xff\xfe", b"[" * 100_000, b"null", b"{}"], ids=["bytes", "depth", "null", "no keys"]
)
def test_a_receipt_that_is_no_text_is_damaged(tmp_path: Path, damage: bytes) -> None:
    receipt_path(tmp_path, "train").parent.mkdir()
    receipt_path(tmp_path, "train").write_bytes(damage)
    with pytest.raises(RunError, match=r"train\.json is damaged .*delete it and the stage `train` runs again"):
        load_record(tmp_path, "train", Run)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"record": {}}, "missing"),
        ({"record": {"steps": "4"}}, "steps can't be '4'"),
        ({"record": {"checkpoint": "checkpoints/.."}}, "no path in a run folder"),
        ({"figures": {"steps": []}}, "figures.steps"),
        ({"seconds": -1}, "no number of seconds"),
        ({"outputs": {"a": {}}}, "missing"),
        ({"stage": "../../evil"}, "of the stage '../../evil'"),  # whose file would be written elsewhere
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_receipt_with_other_types_or_keys_is_damaged(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    save_receipt(tmp_path, "train", run_record(tmp_path), input_hash="h", seconds=1.0, figures={})
    path = receipt_path(tmp_path, "train")
    plain = json.loads(path.read_text())
    if wrong.get("record"):
        wrong = {"record": plain["record"] | wrong["record"]}
    path.write_text(json.dumps(plain | wrong))
    with pytest.raises(RunError, match=r"train\.json is damaged") as error:
        load_record(tmp_path, "train", Run, input_hash="h")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_receipt_without_a_hash_is_not_up_to_date(tmp_path: Path) -> None:
    save_receipt(tmp_path, "train", run_record(tmp_path), input_hash="", seconds=1.0, figures={})
    assert load_record(tmp_path, "train", Run, input_hash="h") is None


@pytest.mark.parametrize(("much", "writes"), [(10**6, False), (1, True)])
def test_large_files_that_were_read_again_are_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, much: int, writes: bool
) -> None:
    """So that a merged model is not read each time; without any, a command with nothing to do changes nothing."""
    monkeypatch.setattr(receipts, "MUCH_BYTES", much)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_bytes(b"weights")
    adapter = Adapter(str(tmp_path / "adapter"), {}, {}, "base", "")
    folders = [tmp_path / "adapter"]
    save_receipt(tmp_path, "export", adapter, input_hash="h", seconds=1.0, figures={}, outputs=folders)
    before = receipt_path(tmp_path, "export").read_bytes()
    monkeypatch.setattr(hashing, "RACY_NS", -(10**12))  # time has passed
    assert load_record(tmp_path, "export", Adapter, input_hash="h") == adapter
    assert (receipt_path(tmp_path, "export").read_bytes() != before) == writes


def test_a_stage_is_up_to_date_only_with_the_files_it_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = Adapter(str(tmp_path / "adapter"), {"peft": "peft"}, {"peft": 0.0}, "base", "")
    weights = tmp_path / "adapter" / "peft" / "weights"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")

    def load() -> Adapter | None:
        return load_record(tmp_path, "export", Adapter, input_hash="h", outputs=lambda found: [Path(found.folder)])

    save_receipt(tmp_path, "export", adapter, input_hash="h", seconds=1.0, figures={}, outputs=[tmp_path / "adapter"])
    assert load() == adapter
    weights.write_bytes(b"Weights")
    assert load() is None
    assert capsys.readouterr().err.startswith("export: adapter/peft/weights has changed")
    plain = json.loads(receipt_path(tmp_path, "export").read_text())
    receipt_path(tmp_path, "export").write_text(json.dumps(plain | {"outputs": {}}))  # as an earlier version
    assert load() == adapter
    weights.write_bytes(b"weights")
    assert load() is None  # it is known from then on


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            run_record(Path("run"), oom_fallbacks="micro-batch 1", dry_run_gib=3.5),
            {"eased": "micro-batch 1", "probed_gib": 3.5},
        ),
        (
            text_set(truncated_share=0.1),
            {"lost": 0.1, "real": 0.97, "learnt": 0.25, "marked": text_set().preview},
        ),
        (
            replace(STATE, dry_run_gib=3.5),
            {"units": 16, "asked": {"offload": False}, "measures": 1, "probed_gib": 3.5},
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_records_in_the_words_of_an_earlier_version_are_read(
    tmp_path: Path, record: Any, words: dict[str, Any]
) -> None:
    old = in_old_words(record)
    assert old.items() >= words.items()
    gone = {"slow_steps": 3} if isinstance(record, Run) else {}
    assert from_plain(type(record), json.loads(json.dumps(old | gone))) == record


def test_a_receipt_in_the_words_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    texts = text_set(truncated_share=0.1)
    save_receipt(tmp_path, "dataset", texts, input_hash="h", seconds=1.0, figures={})
    path = receipt_path(tmp_path, "dataset")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"record": in_old_words(texts)}))
    assert load_record(tmp_path, "dataset", TextSet) == texts


def test_the_stored_runs_of_an_earlier_version_are_read() -> None:
    images, chat = (ROOT / "tests" / "stored" / name for name in ("run_pictures", "run_chat"))
    for folder, unit in ((images, "images"), (chat, "tokens")):
        run = load_record(folder, "train", Run)
        assert run is not None
        assert (run.unit, run.steps, run.oom_fallbacks) == (unit, 2, "")
        state = checkpoint.load(checkpoint.at(folder / "checkpoints", 2)).state
        assert (state.step, state.count) == (2, run.items)
    texts = load_record(chat, "dataset", TextSet)
    assert texts is not None
    assert 0 < texts.trained_share < texts.fill_share <= 1
    assert "⟦" in texts.preview
