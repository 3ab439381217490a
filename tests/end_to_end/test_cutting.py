"""Interrupted or killed anywhere and run again: nothing is lost and the result is the same, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.training import checkpoint
from scripts.toyworld.captions import caption
from scripts.toyworld.output import dataset_scenes
from tests.conftest import ROOT, Answer
from tests.end_to_end import command

torch.set_num_threads(1)  # sums of several threads are added up in another order

Cli = Callable[..., Answer]

IMAGES = 20  # the fewest of which some are held out for validation
STEPS = 9
# Steps of a tenth of a second on the embedded model, so that a signal meets a step in progress.
TRAINING = [
    "conf=pixar_style",
    *("model.resolution=64", "export.formats=[peft]"),
    *(f"trainer.steps={STEPS}", "trainer.save_every=3", "trainer.validate_every=6", "trainer.ema_decay=0.9"),
    *("trainer.micro_batch=2", "trainer.accumulate=2", "optim.warmup_steps=2", "hardware.device=cpu"),
    *("sample.previews=0", "sample.steps=1", "sample.seeds=[0]", 'sample.prompts=["a red cat, pixar style"]'),
]


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with some of the example images and their true captions."""
    work = tmp_path_factory.mktemp("cutting") / "work"
    data = work / "datasets" / "pixar_style"
    copy_images(data, IMAGES)
    rows = [
        {"file_name": image.name, "text": f"{caption(scene)}, pixar style"}
        for image, scene in zip(sorted(data.glob("*.jpg")), dataset_scenes(40), strict=False)
    ]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return work


def copy_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for image in sorted((ROOT / "datasets" / "pixar_style").glob("*.jpg"))[:count]:
        shutil.copy(image, folder)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every adapter file."""
    files = sorted((run_dir / "adapter").rglob("*.safetensors"))
    assert len(files) == 2  # the adapter and its average
    return {
        f"{file.relative_to(run_dir)}: {name}": tensor for file in files for name, tensor in load_file(file).items()
    }


def losses(run_dir: Path) -> list[tuple[int, float]]:
    """Step and loss of every whole line so far."""
    file = run_dir / "metrics.jsonl"
    written = file.read_text().splitlines() if file.exists() else []
    lines = [json.loads(line) for line in written if line.endswith("}")]
    return [(line["step"], line["loss/step"]) for line in lines if "loss/step" in line]


@pytest.mark.exhaustive
def test_a_run_interrupted_by_a_signal_gives_the_very_same_adapter(
    captioned: Path, finetune_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(captioned)
    whole = finetune_cli("train", *TRAINING, "run_dir=whole")
    assert whole.code == 0, whole.err
    run_dir = captioned / "cut"
    running = command.start("train", *TRAINING, "run_dir=cut", cwd=captioned, OMP_NUM_THREADS="1")
    running.wait_for("step 3", lambda: 3 in dict(losses(run_dir)))  # somewhere behind a checkpoint's
    running.send(signal.SIGTERM)
    ended = running.finish()
    assert ended.code == 128 + signal.SIGTERM, ended.err
    newest = checkpoint.steps_on_disk(run_dir / "checkpoints")[-1]
    assert 2 < newest < STEPS  # the step that the signal met is finished and saved
    last_line = ended.err.splitlines()[-1]
    assert f"SIGTERM after step {newest}; the same command" in last_line
    assert "Traceback" not in ended.err
    assert "error" not in ended.err

    last = finetune_cli("train", *TRAINING, "run_dir=cut")
    assert last.code == 0, last.err
    assert f"train: going on from step {newest}" in last.errors
    one, other = weights(captioned / "whole"), weights(run_dir)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert losses(run_dir) == losses(captioned / "whole")


@pytest.mark.exhaustive
def test_captioning_interrupted_by_ctrl_c_captions_nothing_twice(
    tmp_path: Path, finetune_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, count = tmp_path / "work", 12
    data = work / "images"
    copy_images(data, count)
    words = ["caption", "conf=pixar_style", "data.folder=images", "caption.batch=1"]
    running = command.start(*words, cwd=work)
    running.wait_for("a caption", lambda: bool(command.captions(data)))
    running.send(signal.SIGINT)
    ended = running.finish()
    assert ended.code == 130, ended.err
    assert "Traceback" not in ended.err
    kept = command.captions(data)
    assert 0 < len(kept) < count
    # Words of one's own in a caption that is there: they would be lost if it were made again.
    kept[next(iter(kept))] = "my own words, pixar style"
    rows = [json.dumps({"file_name": name, "text": text}) for name, text in kept.items()]
    (data / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    monkeypatch.chdir(work)
    last = finetune_cli(*words)
    assert last.code == 0, last.err
    left = count - len(kept)
    assert [line for line in last.errors if line.startswith(f"caption: {left}/{left} images")]
    texts = command.captions(data)
    assert len(texts) == count
    assert texts.items() >= kept.items()


@pytest.mark.exhaustive
def test_killed_at_any_file_operation_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """More kills, and every command alone: `python -m scripts.torture --kills 1000`."""
    counts = tmp_path / "counts.json"
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "scripts.torture",
            "--kills=20",
            "--jobs=2",
            "--only=(language train|image caption)$",
            f"--out={counts}",
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(counts.read_text())
    assert found["kills"] >= 20
    assert set(found["by kind and stage"]) == {"image", "language"}
    assert found["failed"] == []
