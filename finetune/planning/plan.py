"""What `finetune plan` hands back: which settings a GPU takes, which are fastest, and where the memory goes."""

from dataclasses import dataclass, field

from finetune.config.spelling import setting
from finetune.run.room import Need

KEYS = {
    "micro_batch": "trainer.micro_batch",
    "accumulate": "trainer.accumulate",
    "checkpointing": "trainer.activation_checkpointing",
    "offload_activations": "trainer.offload_activations",
    "offload": "model.offload",
}
"""What a setting says -> the key of the configuration."""


@dataclass(frozen=True)
class Setting:
    """One way to train the same thing. seconds: of one optimiser step, an estimate; parts: GiB at the worst moment.

    checkpointing: 0 none, 1 every block, n every n-th. offload_activations, offload: what backward needs, and whole
    blocks, in CPU memory. count: images, or token positions of rows, in one optimiser step.
    """

    micro_batch: int
    accumulate: int
    checkpointing: int
    offload_activations: bool
    offload: bool
    seconds: float
    count: int
    parts: dict[str, float]

    @property
    def gib(self) -> float:
        """All that the process takes in a training step."""
        return sum(self.parts.values())

    @property
    def overrides(self) -> tuple[str, ...]:
        """What to type to train like this."""
        values = {name: getattr(self, name) for name in KEYS}
        return tuple(setting(KEYS[name], value) for name, value in values.items() if value is not False)


@dataclass(frozen=True)
class Plan:
    """Whether a run fits, said before anything starts.

    chosen: the fastest setting that fits, None if none does. requested: the recipe's own. others: the next best that
    fit, fastest first. phases: GiB of each phase at its worst moment, "training" among them, for `chosen` (or the
    setting that needs least); cpu_gib: CPU memory besides that of the GPU, at most, by what is done, the most first.
    problems: what doesn't fit the memory, a line each that ends in what would. notes: what the figures rest on.
    seconds: of each phase in a whole run, None where that isn't known. steps, effective: of the training. epochs: how
    often it sees each example, None where the data can't be counted; guessed: from the size of files. lr, lr_scale: the
    peak rate, and what the update is scaled by. download: bytes by name of the model that isn't on this machine. disk:
    what will be written into the run folder; cache_bytes: and into the cache, None where the data can't be counted;
    free_bytes: on the run folder's disk, None where that isn't known; shortage: a line if they don't suffice.
    """

    name: str
    base: str
    gpu: str
    budget_gib: float
    precision: str
    quantize: str
    unit: str
    chosen: Setting | None
    requested: Setting
    others: tuple[Setting, ...]
    phases: dict[str, float]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    cpu_gib: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float | None] = field(default_factory=dict)
    steps: int = 0
    effective: int = 0
    epochs: float | None = None
    guessed: bool = False
    lr: float = 0.0
    lr_scale: float = 1.0
    download: dict[str, float] = field(default_factory=dict)
    disk: Need | None = None
    cache_bytes: float | None = None
    free_bytes: float | None = None
    shortage: str = ""

    @property
    def refusals(self) -> tuple[str, ...]:
        """Why the run can't be made on this machine, a line each."""
        return (*self.problems, *filter(None, [self.shortage]))

    @property
    def fits(self) -> bool:
        """Whether every phase fits the memory, and the run the disk."""
        return not self.refusals
