"""Kind of model -> the functions that handle it. The only place that lists the kinds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from finetune.errors import ConfigError
from finetune.run.records import Answer, Answers, CaptionSet, Dataset, Run, Sample, Samples, TextSet

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from finetune.config.schema import Config
    from finetune.planning.tracer import PhaseOption, Tracer
    from finetune.training.task import Task


class Data(Protocol):
    """The module that makes a kind's data set."""

    def inputs(self, config: Config, captions: CaptionSet | None) -> list[Any]:
        """Everything that decides the data set, as plain values."""
        ...

    def build(self, config: Config, captions: CaptionSet | None) -> Any:
        """Read, encode and cache every example: the data set's record."""
        ...

    def complete(self, record: Any) -> bool:
        """Whether all that the record names is still there: the cache may be deleted at any time."""
        ...

    def figures(self, record: Any) -> dict[str, float | int | str | None]:
        """For the receipt."""
        ...


class Handout(Protocol):
    """The module that hands a kind's adapters out."""

    def usage(self, config: Config) -> str:
        """Python that loads an adapter, `{base}` to be filled in with what its libraries load the base from."""
        ...

    def write(
        self, config: Config, run: Run, weights: dict[str, Tensor], averaged: dict[str, Tensor] | None, folder: Path
    ) -> tuple[dict[str, str], dict[str, float]]:
        """Write the adapter in every format: files and, by format, the difference to the trained module."""
        ...


class Show(Protocol):
    """The module that shows what base and tuned model make of the prompts."""

    def draw(self, config: Config, adapter: Path, folder: Path) -> tuple[str, tuple[Sample, ...] | tuple[Answer, ...]]:
        """Fill `folder`: the name of the file that shows all, and every sample."""
        ...


class MemoryModel(Protocol):
    """A kind's model without weights, its tensors fakes of `tracer`: what the memory plan traces."""

    unit: str
    """What throughput counts: images or tokens."""
    count: int
    """Of them in one example."""
    model: nn.Module
    """With adapters injected."""
    tracer: Tracer
    room: float
    """Bytes that tensors may take."""
    notes: list[str]
    """What the traces assume or leave out, a line each."""

    def set_checkpointing(self, every: int) -> None:
        """As `trainer.activation_checkpointing`, for every step from now on."""
        ...

    def inputs(self, micro_batch: int) -> Any:
        """One micro-batch at its largest."""
        ...

    def forward(self, inputs: Any) -> Any:
        """The task's own way from inputs to what the loss takes."""
        ...

    def loss(self, output: Any, inputs: Any) -> Tensor:
        """The task's own loss: the sum over items."""
        ...

    def offloaded(self) -> dict[str, float]:
        """What `model.offload` changes on the GPU, bytes by name."""
        ...

    def training_phases(self, micro_batch: int) -> Iterator[tuple[str, Iterable[PhaseOption]]]:
        """The worst moment of what a training does besides its steps, by name, in the ways that are tried in turn."""
        ...

    def phases(self, micro_batch: int) -> Iterator[tuple[str, Iterable[PhaseOption]]]:
        """The same of every phase but the steps of training."""
        ...


@dataclass(frozen=True)
class Kind:
    """One kind of model. captioned: its examples are images that may need captions first."""

    captioned: bool
    dataset: type[Dataset] | type[TextSet]
    samples: type[Samples] | type[Answers]
    data: Data
    handout: Handout
    show: Show


def kind(config: Config) -> Kind:
    """What handles this configuration's model. Raises ConfigError for a kind there isn't."""
    if config.model.kind == "diffusion":
        from finetune.diffusion import encode, export, sample

        return Kind(True, Dataset, Samples, encode, export, sample)
    if config.model.kind == "language":
        from finetune.language import export as language_export
        from finetune.language import sample as language_sample
        from finetune.language import tokenize

        return Kind(False, TextSet, Answers, tokenize, language_export, language_sample)
    raise ConfigError(f"model.kind={config.model.kind} is not known; allowed: diffusion, language")


def build_task(config: Config, dataset: Any, device: torch.device) -> Task:
    """The model with adapters injected, on `device`."""
    if config.model.kind == "diffusion":
        from finetune.diffusion.task import DiffusionTask

        return DiffusionTask(config, dataset, device)
    from finetune.language import export
    from finetune.language.task import LanguageTask

    export.refuse(config)  # now, and not when the training is over
    return LanguageTask(config, dataset, device)


def memory_model(config: Config, dtype: torch.dtype, *, cuda: bool, room: float) -> MemoryModel:
    """The model without weights. dtype: of the arithmetic; cuda: compute as a GPU does; room: bytes for the process.

    Raises ModelError for a base whose configuration isn't on this machine, ConfigError for what it can't do.
    """
    if config.model.kind == "diffusion":
        from finetune.diffusion.memory_model import DiffusionMemoryModel

        return DiffusionMemoryModel(config, dtype, cuda=cuda, room=room)
    from finetune.language.memory_model import LanguageMemoryModel

    return LanguageMemoryModel(config, dtype, cuda=cuda, room=room)
