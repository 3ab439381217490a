"""Which process of a run this is: torchrun and accelerate start several and say so in the environment."""

import os

from finetune.errors import ConfigError


def world_size() -> int:
    """How many processes this run has; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process among them, from 0."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def require_single_process() -> None:
    """Raises ConfigError where several processes are to do what one does."""
    if world_size() > 1:
        raise ConfigError("several processes can only train; type this command without torchrun or accelerate")
