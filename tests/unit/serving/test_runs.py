"""What the runs page is told of run folders, and that nothing in one leads out of it."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from finetune.run import rundir
from finetune.run.receipts import receipt_path, save_receipt
from finetune.run.records import METRICS, Answer, Answers, Caption, CaptionSet, Run, Sample, Samples
from finetune.serving import runs as serving_runs
from finetune.serving.requests import Refused
from finetune.serving.runs import Runs
from finetune.training.tracking import Tracker

RUN = Run("run", "run/checkpoints/step-4", 4, 1, 10, 1.0, 0.5, None, None, None, "images", 8, 1.0, 0.1, 0, "hash")
DATA_URI = "data:image/png;base64,"


def save(run: Path, stage: str, record: Any) -> None:
    save_receipt(run, stage, record, input_hash="", seconds=1.0, figures={})


def make_run(folder: Path, name: str, *, kind: str = "diffusion", losses: Sequence[float] = ()) -> Path:
    run = folder / name
    (run / "receipts").mkdir(parents=True)
    rundir.write_config({"model": {"kind": kind, "base": "x"}, "lora": {"rank": 4}, "trainer": {"steps": 9}}, run)
    rows = [{"step": step, "loss/smoothed": loss} for step, loss in enumerate(losses)]
    (run / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def paint(file: Path) -> str:
    file.parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(file)
    return file.name


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    return tmp_path / "outputs"


def test_without_a_folder_there_are_none(outputs: Path) -> None:
    assert Runs(outputs).all() == []


def test_each_run_is_summed_up_the_last_that_changed_first(outputs: Path) -> None:
    for age, name in enumerate(("going", "done", "stopped", "killed")):
        run = make_run(outputs, name, losses=[2.0, 1.0 + age])
        if name == "done":
            save(run, "train", RUN)
        if name in ("going", "killed"):
            pid = os.getpid() if name == "going" else 2**22 + 1
            (run / rundir.OWNER).write_text(json.dumps({"pid": pid, "since": "now"}))
        for file in run.rglob("*"):
            os.utime(file, (1000 - age, 1000 - age))
    (outputs / ".cache").mkdir()
    found = Runs(outputs).all()
    assert [(run["name"], run["state"]) for run in found] == [
        ("going", "running"),
        ("done", "finished"),
        ("stopped", "stopped"),
        ("killed", "stopped"),
    ]
    first = {"kind": "diffusion", "base": "x", "rank": 4, "step": 1, "steps": 9, "loss": 1.0, "validation": None}
    assert first.items() <= found[0].items()


def test_a_damaged_run_says_what_is_wrong(outputs: Path) -> None:
    run = make_run(outputs, "bad")
    for stage in ("train", "sample", "caption"):
        receipt_path(run, stage).write_text("{")
    runs = Runs(outputs)
    (found,) = runs.all()
    assert found["state"] == "damaged"
    assert "is damaged" in found["problem"]
    for ask in (runs.samples, lambda name: runs.captions(name, 0)):
        with pytest.raises(Refused, match="is damaged") as refused:
            ask("bad")
        assert (refused.value.status, refused.value.code) == (409, "run_damaged")


def test_samples_of_a_kind_of_model_that_there_is_not_are_refused(outputs: Path) -> None:
    make_run(outputs, "new", kind="music")
    with pytest.raises(Refused, match=r"model\.kind=music is not known"):
        Runs(outputs).samples("new")


@pytest.mark.parametrize("name", ["", ".", "..", "nowhere", "../secret", "/", "run/../run", "plain", "run\x00"])
def test_only_names_of_the_listing_are_runs(outputs: Path, name: str) -> None:
    make_run(outputs, "run")
    make_run(outputs.parent, "secret")
    (outputs / "plain").mkdir()
    runs = Runs(outputs)
    for ask in (runs.summary, runs.curves, runs.samples, runs.previews, lambda name: runs.captions(name, 0)):
        with pytest.raises(Refused, match="there is no run") as refused:
            ask(name)
        assert refused.value.status == 404


def test_curves_go_on_while_the_run_trains_and_are_thinned(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_runs, "MOST_POINTS", 3)
    run, runs = make_run(outputs, "run", losses=[3.0, 2.0]), Runs(outputs)
    assert runs.curves("run") == {"loss/smoothed": [(0, 3.0), (1, 2.0)]}
    with open(run / METRICS, "a") as lines:
        lines.writelines(json.dumps({"step": step, "loss/smoothed": 1.0}) + "\n" for step in range(2, 8))
    assert [step for step, _ in runs.curves("run")["loss/smoothed"]] == [0, 3, 6, 7]


def test_samples_are_thumbnails_of_the_runs_own_files(outputs: Path, tmp_path: Path) -> None:
    run, secret = make_run(outputs, "run"), tmp_path / "secret.png"
    paint(secret)
    good = Sample("a wall", 0, paint(run / "samples/tuned.png"), paint(run / "samples/base.png"))
    (run / "samples/link.png").symlink_to(secret)
    save(run, "sample", Samples(str(run / "samples"), "", (good, Sample("a wall", 1, "link.png", "gone.png"))))
    found = Runs(outputs).samples("run")
    assert found["kind"] == "images"
    first, second = found["items"]
    assert first["base"].startswith(DATA_URI)
    assert first["tuned"].startswith(DATA_URI)
    assert second == {"prompt": "a wall", "seed": 1, "base": None, "tuned": None}


def test_answers_are_texts(outputs: Path) -> None:
    run = make_run(outputs, "run", kind="language")
    assert Runs(outputs).samples("run")["items"] == []
    save(run, "sample", Answers("", "", (Answer("Hello", 0, "Hi.", "Arr!"),)))
    item = {"prompt": "Hello", "seed": 0, "base": "Hi.", "tuned": "Arr!"}
    assert Runs(outputs).samples("run") == {"kind": "texts", "items": [item]}


def test_previews_come_from_the_training(outputs: Path) -> None:
    run, tag = make_run(outputs, "run"), "samples/0: a wall: red"
    assert Runs(outputs).previews("run") == []
    tracker = Tracker(run, 0, torch.device("cpu"))
    for step in (0, 5):
        tracker.previews(step, {tag: Image.new("RGB", (8, 8), "red"), "samples/1: Hello": "**base**: Hi."})
    tracker.scalars(1, {"loss/step": 1.0})
    found = Runs(outputs).previews("run")  # while the run goes on
    tracker.close()
    assert [(item["step"], item["prompt"], item["text"]) for item in found] == [
        (0, "a wall: red", None),
        (0, "Hello", "**base**: Hi."),
        (5, "a wall: red", None),
        (5, "Hello", "**base**: Hi."),
    ]
    assert found[0]["image"].startswith(DATA_URI)
    for file in (run / "tensorboard").rglob("events.*"):
        file.write_bytes(file.read_bytes()[:200] + b"\xff" * 99)
    assert Runs(outputs).previews("run") == []


def test_training_images_are_shown_from_the_recipes_own_folder_alone(outputs: Path, tmp_path: Path) -> None:
    run, images = make_run(outputs, "run"), tmp_path / "images"
    paint(images / "a.png")
    paint(tmp_path / "secret.png")
    items = (Caption("a.png", "a red wall", "user"), Caption("../secret.png", "no", "generated"))
    save(run, "caption", CaptionSet(str(images), items))
    own, other = Runs(outputs, str(images)), Runs(outputs, str(tmp_path / "other"))
    assert Runs(outputs).captions("run", 5) == {"total": 2, "items": []}
    first, second = own.captions("run", 0)["items"]
    assert first["image"].startswith(DATA_URI)
    assert second["image"] is None
    assert [(item["text"], item["image"]) for item in other.captions("run", 0)["items"]] == [
        ("a red wall", None),
        ("no", None),
    ]
