"""Interrupted or killed anywhere and run again: nothing is lost and the adapter is the same, bit for bit."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.training import checkpoint
from scripts.toyworld.captions import caption
from scripts.toyworld.output import dataset_scenes
from tests.conftest import ROOT
from tests.end_to_end import command

pytestmark = pytest.mark.slow

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


def test_a_run_interrupted_by_a_signal_and_killed_gives_the_very_same_adapter(captioned: Path) -> None:
    whole = command.run("train", *TRAINING, "run_dir=whole", cwd=captioned)
    assert whole.code == 0, whole.err
    run_dir = captioned / "cut"
    checkpoints = run_dir / "checkpoints"

    def cut(after: int, number: signal.Signals) -> command.Finished:
        """The same command, cut somewhere in the steps behind a checkpoint's."""
        running = command.start("train", *TRAINING, "run_dir=cut", cwd=captioned)
        running.wait_for(f"step {after + 1}", lambda: after + 1 in dict(losses(run_dir)))
        running.send(number)
        return running.finish()

    ended = cut(2, signal.SIGTERM)
    assert ended.code == 128 + signal.SIGTERM, ended.err
    newest = checkpoint.steps_on_disk(checkpoints)[-1]
    assert 2 < newest <= 6  # the step that the signal met is finished and saved
    last_line = ended.err.splitlines()[-1]
    assert f"SIGTERM after step {newest}; the same command" in last_line
    assert "Traceback" not in ended.err
    assert "error" not in ended.err

    assert cut(6, signal.SIGKILL).code == -signal.SIGKILL
    assert checkpoint.steps_on_disk(checkpoints)[-1] == 6
    assert max(dict(losses(run_dir))) > 6  # steps that are lost, and done again

    last = command.run("train", *TRAINING, "run_dir=cut", cwd=captioned)
    assert last.code == 0, last.err
    assert "train: going on from step 6" in last.err.splitlines()
    one, other = weights(captioned / "whole"), weights(run_dir)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert losses(run_dir) == losses(captioned / "whole")


def test_captioning_interrupted_by_ctrl_c_and_killed_captions_nothing_twice(tmp_path: Path) -> None:
    work, count = tmp_path / "work", 16
    data = work / "images"
    copy_images(data, count)
    words = ["caption", "conf=pixar_style", "data.folder=images", "caption.batch=1"]
    kept: dict[str, str] = {}
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        running, there = command.start(*words, cwd=work), len(kept)
        running.wait_for("a caption", lambda there=there: len(command.captions(data)) > there)  # type: ignore[misc]
        running.send(number)
        ended = running.finish()
        assert ended.code == code, ended.err
        assert "Traceback" not in ended.err
        before, kept = kept, command.captions(data)
        assert there < len(kept) < count
        assert kept.items() >= before.items()
    # Words of one's own in a caption that is there: they would be lost if it were made again.
    kept[next(iter(kept))] = "my own words, pixar style"
    rows = [json.dumps({"file_name": name, "text": text}) for name, text in kept.items()]
    (data / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    last = command.run(*words, cwd=work)
    assert last.code == 0, last.err
    left = count - len(kept)
    assert [line for line in last.err.splitlines() if line.startswith(f"caption: {left}/{left} images")]
    texts = command.captions(data)
    assert len(texts) == count
    assert texts.items() >= kept.items()
