"""Records and plain values: what is of another type is named, and paths go with their run folder."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from finetune.run.plain import from_plain, inside, placed
from finetune.run.records import Adapter, CaptionSet, Dataset, Report, Run, Samples
from finetune.training.checkpoint import TrainState
from tests.unit.reporting.records import run_record

RUN = asdict(run_record(Path("run")))
ADAPTER = asdict(Adapter("run/adapter", {"peft": "peft"}, {"peft": 0.0}, "base", "robot"))


@pytest.mark.parametrize(
    ("kind", "values", "wrong"),
    [
        (Run, RUN, {"steps": "4"}),
        (Run, RUN, {"steps": True}),
        (Run, RUN, {"steps": None}),
        (Run, RUN, {"items": 10**400}),
        (Run, RUN, {"first_loss": []}),
        (Run, RUN, {"best_step": 1.5}),
        (Run, RUN, {"unit": "\ud800"}),
        (Run, RUN, {"seconds": math.nan}),
        (Run, RUN, {"seconds": math.inf}),
        (Run, RUN, {"processes": 0}),
        (Adapter, ADAPTER, {"files": ["peft"]}),
        (Adapter, ADAPTER, {"files": {"peft": "../other/peft"}}),
        (Adapter, ADAPTER, {"differences": {"peft": "none"}}),
        (CaptionSet, {"folder": "images", "items": []}, {"items": ["a.jpg"]}),
        (CaptionSet, {"folder": "images", "items": []}, {"items": {}}),
        (Dataset, asdict(Dataset("run/dataset.jsonl", 1, 0, {}, "e")), {"buckets": {"32x32": "4"}}),
        (TrainState, asdict(TrainState({"seed": 1})), {"interval_count": 0.5}),
        (TrainState, asdict(TrainState({"seed": 1})), {"identity": []}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_values_of_another_type_are_refused(kind: type, values: dict[str, Any], wrong: dict[str, Any]) -> None:
    assert asdict(from_plain(kind, values)) == asdict(from_plain(kind, dict(values)))
    with pytest.raises((TypeError, ValueError)):
        from_plain(kind, values | wrong)


@pytest.mark.parametrize("data", [None, [], "text", 5])
def test_what_is_no_object_is_no_record(data: Any) -> None:
    with pytest.raises(TypeError, match="Run is no object"):
        from_plain(Run, data)


def test_a_loss_may_be_no_number_and_a_figure_a_whole_one() -> None:
    record = from_plain(Run, RUN | {"first_loss": math.nan, "last_loss": 1, "best_step": None})
    assert math.isnan(record.first_loss)
    assert (record.last_loss, record.best_step) == (1, None)


@pytest.mark.parametrize("before", ["outputs/mine", "/somewhere/else", "."])
def test_paths_go_with_the_run_folder(before: str) -> None:
    """Whole paths, as the first version wrote them, and paths below the run folder mean the same place."""
    folder, now = Path(before), Path("moved/here")
    for record, there in (
        (run_record(folder), {"folder": "moved/here", "checkpoint": "moved/here/checkpoints/step-000004"}),
        (Adapter(str(folder / "adapter"), {}, {}, "b", ""), {"folder": "moved/here/adapter"}),
        (
            Samples(str(folder / "samples"), str(folder / "samples" / "grid.png"), ()),
            {"folder": "moved/here/samples", "grid": "moved/here/samples/grid.png"},
        ),
        (Samples("", "", ()), {"folder": "", "grid": ""}),
        (Report(str(folder / "report.html")), {"file": "moved/here/report.html"}),
        (
            Dataset(str(folder / "dataset.jsonl"), 1, 0, {}, "cache/a"),
            {"index": "moved/here/dataset.jsonl", "empty_text": "cache/a"},
        ),
    ):
        old = asdict(record)
        assert from_plain(type(record), placed(type(record), old, now)) == replace(record, **there)
        short = inside(type(record), old)
        assert placed(type(record), short, now) == old | there
        assert before == "." or before not in str(short)


@pytest.mark.parametrize("path", ["..", "/", "adapter/..", 5, ["adapter"], {"a": 1}])
def test_a_path_that_leads_out_of_the_run_folder_is_none(path: Any) -> None:
    with pytest.raises(TypeError):
        placed(Adapter, ADAPTER | {"folder": path}, Path("run"))
