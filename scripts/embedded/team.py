"""Several processes that train one model together, one a GPU: each computes its own batch, gradients are averaged."""

import json
import math
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
from torch import Tensor, distributed

from scripts.embedded.settings import Settings

PATIENCE = timedelta(minutes=4)  # compiling may make one process wait that long for another


@dataclass(frozen=True)
class Team:
    """One process's place among those that train together; a team of one needs no other."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that saves and prints."""
        return self.rank == 0

    def average_(self, tensor: Tensor) -> None:
        """Replace the tensor by its mean over the team."""
        if self.size > 1:
            distributed.all_reduce(tensor)
            tensor /= self.size

    def share_(self, tensor: Tensor) -> None:
        """Replace the tensor by the leader's."""
        if self.size > 1:
            distributed.broadcast(tensor, 0)

    def follow(self, *numbers: float) -> tuple[float, ...]:
        """The leader's numbers. They travel between CPUs, so that no GPU is waited for."""
        if self.size == 1:
            return numbers
        message = torch.tensor(numbers, dtype=torch.float64)
        distributed.broadcast(message, 0)
        return tuple(message.tolist())


ALONE = Team()


def together(phase: Callable[[Settings, Team], None], settings: Settings, isolated: bool | None = None) -> None:
    """Run a phase in `settings.processes` processes; in this one where that is one.

    Where one of them fails, the others are ended and the failure is raised here. `isolated`: each sees its own GPU
    alone, as cuda:0, so that what one compiles serves all; None asks the probe whether that works.
    """
    if settings.processes == 1:
        phase(settings, ALONE)
        return
    isolated = probed_isolation(settings) if isolated is None else isolated
    arguments = (phase, settings, isolated, free_port())
    torch.multiprocessing.spawn(member, arguments, nprocs=settings.processes)


def member(rank: int, phase: Callable[[Settings, Team], None], settings: Settings, isolated: bool, port: int) -> None:
    """One process of the team."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine; its name may resolve to nothing
    if settings.device == "cuda":
        index = 0 if isolated else rank
        if isolated:  # before CUDA starts, which reads it once
            everyone = ",".join(map(str, range(settings.processes)))
            os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", everyone).split(",")[rank]
        settings = replace(settings, device=f"cuda:{index}")
        torch.cuda.set_device(index)
    settle_torch()
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if settings.device.startswith("cuda") else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=settings.processes,
        timeout=PATIENCE,
    )
    try:
        phase(settings, Team(rank, settings.processes))
    finally:
        distributed.destroy_process_group()


def probed_isolation(settings: Settings) -> bool:
    """Whether all-reduce between isolated processes worked, and not clearly slower; no without a measurement."""
    path = settings.probed / "team.json"
    milliseconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    return "isolated" in milliseconds and milliseconds["isolated"] <= 1.5 * milliseconds.get("shared", math.inf)


def settle_torch() -> None:
    """The same for every process that trains: TF32 for what stays in fp32, the fastest convolutions found by trial."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
