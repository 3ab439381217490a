"""Which process of a run this is: torchrun and accelerate start several and say so in the environment."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from finetune.errors import ConfigError

MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # what mpirun sets, and Accelerate reads
PLUGINS = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM")
NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what a launcher sets besides WORLD_SIZE


def world_size() -> int:
    """How many processes this run has; 1 without a launcher."""
    return max(1, _number("WORLD_SIZE", 1))


def rank() -> int:
    """This process among them, from 0."""
    return _number("RANK", 0) if world_size() > 1 else 0


def local_rank() -> int:
    """This process among those on this machine, from 0."""
    return _number("LOCAL_RANK", 0) if world_size() > 1 else 0


def check_launcher() -> None:
    """Raises ConfigError where the environment says half of what a launcher says, as a forgotten variable does."""
    size = world_size()
    for name in PLUGINS:
        if os.environ.get(name, "").lower() == "true":
            raise ConfigError(f"{name}=true asks for what finetune does not do; type: unset {name}")
    if size == 1:
        for name in MPI:
            if _number(name, 1) > 1:
                count = os.environ[name]
                raise ConfigError(
                    f"{name}={count} announces {count} processes of MPI, which finetune does not join; start them with "
                    f"torchrun --nproc-per-node {count} -m finetune …, or type: unset {name}"
                )
        return
    way = f"start all of them with torchrun --nproc-per-node {size} -m finetune …, or type: unset WORLD_SIZE"
    if lacking := [name for name in NEEDED if not os.environ.get(name)]:
        raise ConfigError(f"WORLD_SIZE={size} announces {size} processes, but {', '.join(lacking)} is not set; {way}")
    if not 0 <= rank() < size:
        raise ConfigError(f"RANK={os.environ['RANK']} is none of the {size} processes of WORLD_SIZE={size}; {way}")


@contextmanager
def alone_if_single() -> Iterator[None]:
    """Within, a run of one process is seen as that: of some variables that another launcher left Accelerate concludes
    that there are others, and waits for them."""
    if world_size() > 1:
        yield
        return
    hidden = {name: os.environ.pop(name) for name in ("WORLD_SIZE", *NEEDED) if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def require_single_process() -> None:
    """Raises ConfigError where several processes are to do what one does."""
    if world_size() > 1:
        raise ConfigError("several processes can only train; type this command without torchrun or accelerate")


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.lstrip("-").isdecimal() else otherwise
