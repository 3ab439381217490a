"""Two processes on two GPUs, through NCCL: the adapter of one process on one GPU."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.end_to_end import command
from tests.end_to_end.test_cutting import losses
from tests.end_to_end.test_two_processes import ONE, TORCHRUN, TWO, adapter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]

STEPS = 3
# In fp32 two sums of the same gradients differ by 1e-7 (on CPUs three steps ended 2e-6 apart). On a GPU convolutions
# round what they multiply to 11 bits and may sum in any order, so a difference of 1e-7 can come out as one of 2**-11 in
# single products, which means out in sums. A share that is missing or counted twice changes an adapter by tenths.
TOLERANCE = 5e-3


@pytest.mark.parametrize("kind", ["images", "talk"])
def test_two_gpus_train_what_one_does(kind: str, tmp_path: Path) -> None:
    work = tmp_path / "work"
    name = {"images": "pixar_style", "talk": "pirate_chat"}[kind]
    shutil.copytree(ROOT / "datasets" / name, work / "datasets" / name)
    settings = [
        *(f"conf={name}", f"trainer.steps={STEPS}", f"trainer.save_every={STEPS}", "trainer.validate_every=3"),
        *("trainer.precision=fp32", "trainer.micro_batch=2", "trainer.autotune=off", "hardware.device=cuda"),
        *("optim.warmup_steps=0", "optim.eps=1e-3"),  # with 1e-8 Adam makes steps of rounding
        *("lora.dropout=0.1", "sample.previews=0", "sample.prompts=[hello]", "export.formats=[peft]"),
    ]
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    two = command.run("train", *settings, TWO, "run_dir=two", cwd=work, before=TORCHRUN, **path)
    assert two.code == 0, two.err
    assert two.err.count(f"train: {STEPS}/{STEPS} steps") == 1
    one = command.run("train", *settings, ONE, "run_dir=one", cwd=work, **path)
    assert one.code == 0, one.err
    ours, theirs = adapter(work / "two", STEPS), adapter(work / "one", STEPS)
    assert ours.keys() == theirs.keys()
    apart = sum(float((ours[key] - weight).square().sum()) for key, weight in theirs.items()) ** 0.5
    # Only the B matrices start at zero: their size is what training did.
    trained = sum(float(weight.square().sum()) for key, weight in theirs.items() if "lora_B" in key) ** 0.5
    assert apart <= TOLERANCE * trained
    assert dict(losses(work / "two")) == pytest.approx(dict(losses(work / "one")), rel=1e-3)
