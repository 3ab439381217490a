"""What the planner is handed of a model: its module without weights, and what every phase of a run does with it."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from finetune.planning.tracer import PhaseOption, Tracer


class MemoryModel(Protocol):
    """A model without weights, its tensors fakes of `tracer`."""

    unit: str
    """What throughput counts: images or tokens."""
    count: int
    """Of them in one example."""
    entry_bytes: float
    """Of an example in the cache, at most."""
    model: nn.Module
    """With adapters injected."""
    tracer: Tracer
    room: float
    """Bytes that tensors may take."""
    notes: list[str]
    """What the traces assume or leave out, a line each."""
    mild_checkpointing: tuple[int, ...]
    """Values of `trainer.activation_checkpointing` to look at where recomputing every block is more than it takes."""

    @property
    def less_cpu_memory(self) -> Mapping[str, str]:
        """What to do about phases that take too much CPU memory, by name; about all others a base in 4 bit."""
        ...

    def replayed(self, checkpointing: int, offload_activations: bool) -> bool:
        """Whether a step with these settings is a CUDA graph, whose kernels no host has to launch."""
        ...

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

    def training_phases(
        self, micro_batch: int, held: Mapping[str, float]
    ) -> Iterator[tuple[str, Iterable[PhaseOption]]]:
        """The worst moment of what a training does besides its steps, by name, in the ways that are tried in turn.

        held: bytes that training keeps there all the time, such as the optimiser's.
        """
        ...

    def phases(self, micro_batch: int, held: Mapping[str, float]) -> Iterator[tuple[str, Iterable[PhaseOption]]]:
        """The same of every phase but the steps of training."""
        ...

    def download_bytes(self) -> dict[str, float]:
        """What has to be downloaded before all phases can run, by name of the model; nothing that is here already."""
        ...

    def cpu_memory(self, *, export_on_cpu: bool) -> dict[str, float]:
        """Bytes of CPU memory, at most, that phases on a GPU take besides, by name. export_on_cpu: the GPU is too small
        for the export."""
        ...
