"""Two processes with half the micro-batches each train the same adapter as one with all of them."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from finetune.config import Config
from finetune.models import lora
from finetune.records import Dataset
from finetune.training.loop import fit
from tests.unit.training.steps import ladder, prepared, visits


def train_rank(rank: int, processes: int, port: int, config: Config, dataset: Dataset, out: str) -> None:
    """One process of the group: two steps on its share of every step's examples."""
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    config.trainer.accumulate = 4 // processes
    task, accelerator, optimizer = prepared(config, dataset)
    assert accelerator.num_processes == processes
    steps = list(
        fit(
            task,
            visits(task, config, 2, rank, processes),
            optimizer,
            lambda _: 1e-2,
            accelerator,
            ladder=ladder(task, config),
            seed=0,
            start=0,
            clip_norm=1.0,
            max_bad_steps=1,
        )
    )
    assert [step.units for step in steps] == [4, 4]
    if rank == 0:
        torch.save({"loss": [step.loss for step in steps], "adapter": lora.state(task.model)}, out)
    if processes > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(config: Config, make_dataset: Callable[..., Dataset], tmp_path: Path) -> None:
    config.optim.eps = 1e-3  # with 1e-8 Adam turns rounding of vanishing gradients into full steps
    config.trainer.micro_batch = 1
    dataset = make_dataset(12)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.pt"
        arguments = (processes, port, config, dataset, str(out))
        torch.multiprocessing.spawn(train_rank, arguments, nprocs=processes)
        results.append(torch.load(out))
    one, two = results
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    for name, weight in one["adapter"].items():
        assert torch.allclose(two["adapter"][name], weight, rtol=1e-4, atol=1e-6)
