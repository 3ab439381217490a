"""The settings that train the same thing, traced and timed, and the fastest of them that fits.

What a setting may change: how an effective batch is cut into micro-batches, which blocks are recomputed, and whether
weights wait in CPU memory. Nothing here changes what is learnt.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass

from finetune.adapters import lora
from finetune.memory import activation_offload
from finetune.memory.device import DTYPES
from finetune.planning import speed
from finetune.planning.machine import GIB, Machine
from finetune.planning.plan import Setting
from finetune.planning.tracer import PhaseOption, Trace, extrapolated
from finetune.planning.workload import Workload

TRACED = (2, 3)  # micro-batches; a batch of one may take fewer kernels, because its reshaped tensors need no copy
SLACK = 0.10
"""Of what comes and goes: what the allocator reserves beyond it. 2 to 14 % were seen with UNets on an H200; assumed for
others. What stays (weights) lies close."""
OUTSIDE = ("CUDA itself", "PyTorch's reserve")
PINNED = 2  # times its size is the most that a tensor takes in pinned memory, which comes in powers of two
WORKSPACES_GIB = 0.1  # of cuBLAS and cuDNN in training steps; assumed


@dataclass(frozen=True)
class Phase:
    """Part of a run. gib: at its worst moment, 0 in CPU memory. words: in which way it is done, if there are several.

    seconds: of a whole run, None where that isn't known.
    """

    name: str
    gib: float
    words: str
    seconds: float | None


class Candidates:
    """Settings of one workload on one machine, all of the same effective batch; a level of activation checkpointing is
    traced when it is first needed."""

    def __init__(self, workload: Workload, machine: Machine) -> None:
        """Raises ModelError for a base without a configuration, ConfigError for what the base or the machine can't."""
        self.workload, self.machine = workload, machine
        self.precision = machine.precision(workload.trainer.precision)
        self.memory_model = workload.build(workload.model, DTYPES[self.precision], machine.cuda, _room(machine))
        self.effective = workload.effective_batch
        trained = lora.adapter_parameters(self.memory_model.model)
        self.held = {"optimiser": workload.optimizer_bytes(trained)} | self.memory_model.offloaded()
        if workload.trainer.ema_decay:
            self.held["averaged adapter"] = sum(parameter.nbytes for parameter in trained)
        self.traces: dict[tuple[int, bool], list[Trace]] = {}  # by level, of the micro-batches TRACED

    def on(self, machine: Machine) -> "Candidates":
        """The same settings on another machine; where only memory and speed differ, what was traced stays known."""
        precision = machine.precision(self.workload.trainer.precision)
        if self.workload.model.offload or (machine.cuda, precision) != (self.machine.cuda, self.precision):
            return Candidates(self.workload, machine)
        other = copy(self)
        other.machine, other.memory_model = machine, copy(self.memory_model)
        other.memory_model.room = _room(machine)
        return other

    def level(self, checkpointing: int, away: bool = False) -> list[Setting]:
        """All micro-batches that divide the effective batch, the largest first; away: `trainer.offload_activations`."""
        sizes = [size for size in range(self.effective, 0, -1) if self.effective % size == 0]
        return [self.setting(size, checkpointing, away) for size in sizes]

    def setting(self, micro_batch: int, checkpointing: int, away: bool = False) -> Setting:
        """One of them."""
        trace = self._trace(micro_batch, checkpointing, away)
        accumulate = self.effective // micro_batch
        replayed = self.memory_model.replayed(checkpointing, away)
        computing = speed.seconds(trace, self.machine, self.precision, replayed=replayed)
        once = max(computing, self._fetching_s()) + 2 * self._copy_s(trace.away)
        return Setting(
            micro_batch=micro_batch,
            accumulate=accumulate,
            checkpointing=checkpointing,
            offload_activations=away,
            offload=self.workload.model.offload,
            seconds=accumulate * once,
            count=self.effective * self.memory_model.count,
            parts=parts(trace, self.machine),
        )

    def waiting(self, setting: Setting) -> dict[str, float]:
        """GiB that wait in CPU memory for their turn in a training step, by what they are; at most."""
        trace = self._trace(setting.micro_batch, setting.checkpointing, setting.offload_activations)
        sizes = {
            "blocks": -self.held.get("weights", 0.0),
            "activations": PINNED * trace.away,
            "optimiser": self.held["optimiser"] if self.workload.paged_optimizer else 0.0,
        }
        return {name: size / GIB for name, size in sizes.items() if size}

    def least_gib(self) -> float:
        """What the setting of least memory takes, from one trace."""
        return sum(parts(self.step(1, 1, away=self.machine.cuda), self.machine).values())

    def tensors_gib(self, micro_batch: int, checkpointing: int, away: bool = False) -> float:
        """What torch's allocator gives out at the worst moment of a training: its steps, validation and previews."""
        known = (checkpointing, away) in self.traces  # by whoever chose this setting; a start needn't wait for another
        step = (self._trace if known else self.step)(micro_batch, checkpointing, away)
        found = [_tensors_gib(parts(step, self.machine))]
        for _, ways in self.memory_model.training_phases(micro_batch, self.held):
            held, _, others = self._taken(ways)
            found.append(_room(self.machine) / GIB if others else _tensors_gib(held))  # what doesn't fit is tried first
        return max(found)

    def phases(self, micro_batch: int) -> Iterator[Phase]:
        """Every phase but the steps of training."""
        for name, ways in self.memory_model.phases(micro_batch, self.held):
            held, way, _ = self._taken(ways)
            yield Phase(name, sum(held.values()), way.words, self._seconds(way))

    def _taken(self, ways: Iterable[PhaseOption]) -> tuple[dict[str, float], PhaseOption, int]:
        """What the first way that fits holds, that way, and how many came before; of the last one where none does."""
        held, way, before = {}, PhaseOption(None), -1
        for way in ways:
            held = parts(way.trace, self.machine) if way.trace else {}
            before += 1
            if sum(held.values()) <= self.machine.vram_gib:
                break
        return held, way, before

    def _seconds(self, way: PhaseOption) -> float | None:
        """Of the whole run, where that is known."""
        timed = way.timed or way.trace
        if way.runs is None or timed is None:
            return None
        return way.runs * speed.seconds(timed, self.machine, self.precision) + way.moved / speed.DISK_BYTES_PER_S

    def step(self, micro_batch: int, checkpointing: int, away: bool = False) -> Trace:
        """One step, traced at this very size."""
        self.memory_model.set_checkpointing(checkpointing)
        return self._step(micro_batch, away)

    def _trace(self, micro_batch: int, checkpointing: int, away: bool = False) -> Trace:
        key = checkpointing, away
        if key not in self.traces:
            self.memory_model.set_checkpointing(checkpointing)
            sizes = TRACED if self.effective > 1 else (1,)
            self.traces[key] = [self._step(size, away) for size in sizes]
        found = self.traces[key]
        return found[0] if self.effective == 1 else extrapolated(found[0], found[1], TRACED, micro_batch)

    def _step(self, micro_batch: int, away: bool = False) -> Trace:
        memory_model = self.memory_model
        worth = activation_offload.WORTH_BYTES if away else math.inf
        return memory_model.tracer.step(
            memory_model.model,
            lambda: memory_model.inputs(micro_batch),
            memory_model.forward,
            memory_model.loss,
            held=self.held,
            away=worth,
        )

    def _fetching_s(self) -> float:
        """Weights that wait in CPU memory come twice in each micro-batch, forward and to recompute, while others work.

        FLUX.1 with all of them on the GPU took 4 % less (docs/memory.md).
        """
        return 2 * self._copy_s(max(0.0, -self.held.get("weights", 0.0)))

    def _copy_s(self, size: float) -> float:
        """Of so many bytes from CPU memory to the GPU, or back."""
        return size / (self.machine.pcie_gb_per_s * 1e9)


def _room(machine: Machine) -> float:
    """Bytes that tensors may take."""
    return (machine.vram_gib - machine.context_gib) * GIB


def parts(trace: Trace, machine: Machine) -> dict[str, float]:
    """GiB at the worst moment of a trace, by what holds them, slack and context included."""
    peak = trace.peak
    held = {name: size / GIB for name, size in trace.held.items() if size}
    moving = peak.live / GIB - sum(held.values())
    of_loss = peak.of_loss / GIB
    found = held | {"activations": moving - of_loss, "loss": of_loss}
    if machine.cuda:
        found |= {OUTSIDE[0]: machine.context_gib, OUTSIDE[1]: SLACK * moving + WORKSPACES_GIB}
    else:
        found |= {"Python, libraries": machine.context_gib}
    return found


def _tensors_gib(held: Mapping[str, float]) -> float:
    """Of `parts`, what torch's allocator gives out."""
    return sum(gib for name, gib in held.items() if name not in OUTSIDE)


def fastest(settings: Sequence[Setting], budget_gib: float) -> Setting | None:
    """The fastest that fits; of equals the one of least memory. None if none fits."""
    fitting = [setting for setting in settings if setting.gib <= budget_gib]
    return min(fitting, key=lambda setting: (setting.seconds, setting.gib), default=None)
