"""The real command in two processes: the adapter of one process, output of the first alone, one end."""

import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from finetune.training import checkpoint
from tests.conftest import Answer
from tests.end_to_end import command
from tests.end_to_end.test_cutting import losses
from tests.ports import free_port
from tests.tiny_language_models import save_language
from tests.unit.conftest import conversations

pytestmark = pytest.mark.exhaustive

STEPS = 30  # of which a signal meets one long before the end
TWO, ONE = "trainer.accumulate=1", "trainer.accumulate=2"  # the same effective batch
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python")


def started(cwd: Path, *words: str) -> list[command.Running]:
    """Two processes of one run, as a launcher starts them, each with an exit code and output of its own."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        command.start("train", *words, cwd=cwd, RANK=rank, LOCAL_RANK=rank, OMP_NUM_THREADS="1", **common)
        for rank in ("0", "1")
    ]


def adapter(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.at(run_dir / "checkpoints", step) / "adapter.safetensors")


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Within what sums in another order come to: thousands of times less than a step changes."""
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.linalg.vector_norm(ours[name] - weight) <= 1e-4 * torch.linalg.vector_norm(weight), name


def test_stopped_in_two_and_finished_in_one_it_is_the_adapter_of_one(
    small: Sequence[str], images: Path, finetune_cli: Callable[..., Answer]
) -> None:
    Image.new("RGB", (96, 64), "brown").save(images / "brown.png")  # a bucket of its own: shares are uneven
    (images / "brown.txt").write_text("a brown wall, pixar style")
    work = images.parent
    settings = [*small, f"trainer.steps={STEPS}", f"trainer.save_every={STEPS}", "trainer.validate_every=0"]
    settings += ["lora.dropout=0.1", "optim.eps=1e-3"]  # with 1e-8 Adam turns rounding of tiny gradients into steps
    both = started(work, *settings, TWO)
    both[0].wait_for("step 2", lambda: 2 in dict(losses(work / "run")))
    both[1].send(signal.SIGTERM)
    first, second = (running.finish() for running in both)
    assert (first.code, second.code) == (143, 143), first.err + second.err
    assert first.err.count("stopped by SIGTERM after step") == 1
    assert (second.out, second.err) == ("", "")
    stopped = checkpoint.steps_on_disk(work / "run" / "checkpoints")[-1]
    assert stopped < STEPS

    answer = finetune_cli("train", *settings, ONE)
    assert answer.code == 0, answer.err
    assert f"going on from step {stopped}" in answer.err
    assert finetune_cli("train", *settings, ONE, "run_dir=whole").code == 0
    assert_close(adapter(work / "run", STEPS), adapter(work / "whole", STEPS))
    assert dict(losses(work / "run")) == pytest.approx(dict(losses(work / "whole")), rel=1e-4)


def test_torchrun_trains_a_language_model_as_one_process_does(
    tmp_path: Path, finetune_cli: Callable[..., Answer]
) -> None:
    base = save_language(tmp_path / "llama")
    (tmp_path / "chats.jsonl").write_text(conversations(40))
    settings = [
        *("conf=pirate_chat", f"model.base={base}", f"data.file={tmp_path}/chats.jsonl", "data.length=192"),
        *("trainer.micro_batch=1", "trainer.steps=4", "trainer.save_every=2", "trainer.validate_every=2"),
        *("optim.warmup_steps=0", "optim.eps=1e-3", "lora.dropout=0.1", "hardware.device=cpu"),
        *("sample.max_new_tokens=2", "sample.prompts=[hello]", "export.formats=[peft]"),
    ]
    work = tmp_path / "work"
    work.mkdir()
    two = command.run("train", *settings, TWO, f"run_dir={work}/two", cwd=work, before=TORCHRUN)
    assert two.code == 0, two.err
    assert two.err.count("train: 4/4 steps") == two.out.count("stage") == 1
    assert {path.name for path in (work / "two").iterdir()} >= {"adapter", "samples", "report.html", "receipts"}

    one = finetune_cli("train", *settings, ONE, f"run_dir={work}/one")
    assert one.code == 0, one.err
    assert_close(adapter(work / "two", 4), adapter(work / "one", 4))
    assert dict(losses(work / "two")) == pytest.approx(dict(losses(work / "one")), rel=1e-5)


def test_an_error_of_the_first_process_is_printed_once_and_ends_both(small: Sequence[str], images: Path) -> None:
    shutil.rmtree(images)
    first, second = (running.finish() for running in started(images.parent, *small))
    assert (first.code, second.code) == (3, 3)
    assert len(first.errors) == 1
    assert (second.out, second.err) == ("", "")
    assert not (images.parent / "run").exists()
