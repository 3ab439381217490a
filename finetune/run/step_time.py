"""What `finetune profile` hands back: where the time of a training step goes, and what would make it shorter."""

from dataclasses import dataclass, field

DATA, COPIES, GAPS, BETWEEN = "waiting for data", "host-device copies", "launch gaps", "between operations"
ATTENTION, MATMUL, ELEMENT_WISE, OPTIMISER, OTHER = "attention", "matmul", "element-wise", "optimiser", "other"
MEANINGS = {
    DATA: "until the batches of a step are there",
    COPIES: "CPU memory and GPU, while nothing is computed",
    GAPS: "the GPU waits for the next kernel",
    BETWEEN: "Python and PyTorch around operations",
    ATTENTION: "fused; a plain one counts as matmul",
    MATMUL: "products and convolutions",
    ELEMENT_WISE: "sums, norms, activations, copies in place",
    OPTIMISER: "the update of the adapter",
    OTHER: "autograd, and kernels of unknown names",
}
"""What takes time -> its meaning, in the order of tables."""


@dataclass(frozen=True)
class StepTime:
    """One optimiser step with one setting, as a mean of several.

    settings: as `planning.choice.settings` names them. seconds: without the profiler; fastest_s, slowest_s: of these
    steps. parts: of `seconds`, by what takes them, keys of `MEANINGS`; what a machine can't tell is missing. traced_s:
    under the profiler. largest: seconds by kernel, on a CPU by operation, the most first. count: images or tokens
    (`unit`) of a step. trace: the file, for Perfetto. oom_fallbacks: what was changed because memory ran out, empty if
    nothing.
    """

    settings: dict[str, int | bool]
    seconds: float
    fastest_s: float
    slowest_s: float
    traced_s: float
    parts: dict[str, float]
    largest: dict[str, float]
    unit: str
    count: float
    peak_gib: float
    trace: str
    oom_fallbacks: str = ""

    @property
    def name(self) -> str:
        """Micro-batch × accumulation."""
        return f"{self.settings['micro_batch']} × {self.settings['accumulate']}"

    @property
    def effective(self) -> int:
        """Examples of a step."""
        return self.settings["micro_batch"] * self.settings["accumulate"]

    @property
    def items_per_s(self) -> float:
        return self.count / self.seconds

    def share(self, part: str) -> float:
        """Of the step, 0 to 1."""
        return self.parts.get(part, 0.0) / self.seconds


@dataclass(frozen=True)
class Profile:
    """Where the time of a step goes, by setting, the one that trains first.

    threads: of a CPU that computes, 0 on a GPU. verdict: what holds the step back, in words. change: the settings to
    type, empty if none would help. expected: gain of throughput by it, 0.2 is 20 %, by the plan or by what was measured
    beside it; None if unknown. check: whether that change should be measured; checked: with it. unknown: what this
    machine can't tell. others_cpu: share of the CPUs' time that other programs took meanwhile. failed: setting -> the
    error that its measurement ended in.
    """

    name: str
    device: str
    threads: int
    precision: str
    steps: int
    times: tuple[StepTime, ...]
    verdict: str
    change: tuple[str, ...]
    expected: float | None
    check: bool
    checked: StepTime | None
    unknown: tuple[str, ...]
    others_cpu: float
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def gain(self) -> float | None:
        """Of throughput by the change, as measured; None where it wasn't."""
        return self.checked.items_per_s / self.times[0].items_per_s - 1 if self.checked else None
