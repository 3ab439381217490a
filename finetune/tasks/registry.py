"""Kind of model -> the functions that handle it. The only place that lists the kinds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.config import Config
from finetune.errors import ConfigError
from finetune.records import CaptionSet, Dataset, Run, Sample

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from finetune.tasks.base import Task

KINDS = ("diffusion",)


def build_dataset(config: Config, captions: CaptionSet) -> Dataset:
    """Read, encode and cache every example, and write the index."""
    _check(config)
    from finetune.tasks import pictures

    return pictures.build(config, captions)


def build_task(config: Config, dataset: Dataset, device: torch.device) -> Task:
    """The model with adapters injected, on `device`."""
    _check(config)
    from finetune.tasks.diffusion import DiffusionTask

    return DiffusionTask(config, dataset, device)


def write_adapter(
    config: Config, run: Run, weights: dict[str, Tensor], averaged: dict[str, Tensor] | None, folder: Path
) -> tuple[dict[str, str], dict[str, float]]:
    """Write the adapter in every dialect into `folder`: files and, by dialect, the difference to the trained module."""
    _check(config)
    from finetune.tasks import handout

    return handout.write(config, run, weights, averaged, folder)


def draw_samples(config: Config, adapter: Path, folder: Path) -> tuple[str, tuple[Sample, ...]]:
    """Draw base beside tuned into `folder`: the grid's file name and every sample."""
    _check(config)
    from finetune.tasks import gallery

    return gallery.draw(config, adapter, folder)


def _check(config: Config) -> None:
    if config.model.kind not in KINDS:
        raise ConfigError(f"model.kind={config.model.kind} is not known; allowed: {', '.join(KINDS)}")
