"""Which settings a run starts with: the fastest that fit the machine, of all that train the same thing."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from finetune.config.schema import Autotune, HardwareConfig, ModelConfig, Quantize, TrainerConfig
from finetune.errors import ModelError
from finetune.memory.device import release_memory
from finetune.planning import host_memory
from finetune.planning.candidates import Candidates, fastest
from finetune.planning.machine import read
from finetune.planning.plan import KEYS, Setting
from finetune.planning.workload import Workload
from finetune.run.progress import say

CLOSE, MEASURED = 1.25, 3  # the plan's seconds compare settings to about a fifth (docs/memory.md); the most measured


@dataclass(frozen=True)
class Choice:
    """Settings that were looked at, all on `candidates`; chosen: the fastest that fits, None if none does."""

    candidates: Candidates
    tried: tuple[Setting, ...]
    chosen: Setting | None

    @property
    def best(self) -> Setting:
        """The chosen one, or the one that takes least memory."""
        return self.chosen or min(self.tried, key=lambda setting: setting.gib)

    @property
    def comparable(self) -> tuple[int, ...]:
        """Micro-batches that fit and that the plan can't tell from the chosen one by their seconds, the fastest first.

        All else is equal: another level of activation checkpointing would need the base loaded again.
        """
        if self.chosen is None:
            return ()
        best, budget = self.chosen, self.candidates.machine.vram_gib
        same = [s for s in self.tried if _kept(s) == _kept(best)]
        near = [s for s in same if s.gib <= budget and s.seconds <= CLOSE * best.seconds]
        return tuple(s.micro_batch for s in sorted(near, key=lambda s: s.seconds)[:MEASURED])


def _kept(setting: Setting) -> tuple[int, bool, bool]:
    """Where activations and weights are."""
    return setting.checkpointing, setting.offload_activations, setting.offload


def choose(candidates: Candidates) -> Choice:
    """Look no further than the first way to save memory with which something fits: activation checkpointing,
    activations in CPU memory, and at last blocks there.

    Raises ModelError for a base without a configuration, ConfigError for what base or machine can't do.
    """
    machine = candidates.machine
    budget = machine.vram_gib
    tried = candidates.level(0)
    if not all(setting.gib <= budget for setting in tried):
        tried += candidates.level(1)
        best = fastest(tried, budget)
        if best is not None and best.checkpointing:
            for every in candidates.memory_model.mild_checkpointing:
                tried += candidates.level(every)
    chosen = fastest(tried, budget)
    if chosen is None and machine.cuda:
        tried += candidates.level(1, away=True)
        chosen = fastest(tried, budget)
    if chosen is None and (offloaded := _offloaded(candidates)):
        candidates = offloaded
        tried = candidates.level(1)
        if (chosen := fastest(tried, budget)) is None:
            tried += candidates.level(1, away=True)
            chosen = fastest(tried, budget)
    return Choice(candidates, tuple(tried), chosen)


def is_needed(autotune: Autotune, device: torch.device) -> bool:
    """Whether there is a GPU whose memory a run has to fit, and that is to be seen to."""
    return device.type == "cuda" and autotune is not Autotune.off


def choose_settings(
    workload: Workload, hardware: HardwareConfig
) -> tuple[dict[str, Any], float | None, tuple[int, ...]]:
    """The settings to start with on this GPU, as `trainer.autotune` says, the GiB of tensors that the plan sees in
    training, validation and previews, and the micro-batches of which only a measurement can say which is fastest; the
    workload's own settings, None and none for a base that can't be planned.

    To be called before anything of the run is on the GPU.
    """
    requested = settings(workload.trainer, workload.model)
    try:
        return _chosen_settings(workload, hardware, requested)
    except ModelError as error:  # a base that can't be had at all is named again when it is loaded
        say(f"autotune: {error}")
        return requested, None, ()


def settings(trainer: TrainerConfig, model: ModelConfig) -> dict[str, Any]:
    """Those that `choose_settings` may change, named as a `Setting` names them."""
    return {
        "micro_batch": trainer.micro_batch,
        "accumulate": trainer.accumulate,
        "checkpointing": trainer.activation_checkpointing,
        "offload_activations": trainer.offload_activations,
        "offload": model.offload,
    }


def _chosen_settings(
    workload: Workload, hardware: HardwareConfig, requested: dict[str, Any]
) -> tuple[dict[str, Any], float, tuple[int, ...]]:
    release_memory()
    # Whatever GPU the preset is of: what counts is this one, and what of it is free now.
    machine = read(replace(hardware, gpu=""))
    comparable: tuple[int, ...] = ()
    candidates, chosen = Candidates(workload, machine), requested
    if workload.trainer.autotune is Autotune.auto:
        choice = choose(candidates)
        candidates, setting = choice.candidates, choice.best
        for line in host_memory.warning(host_memory.peaks(candidates, setting), machine.cpu_gib, candidates):
            say(f"autotune: {line}")  # now, and not when the training is over
        chosen, comparable = {name: getattr(setting, name) for name in KEYS}, choice.comparable
        if choice.chosen is None:
            least = f"the plan's least is {setting.gib:.1f} GiB, and {machine.vram_gib:.1f} are free"
            say(f"autotune: {least}; trying it all the same")
    planned_gib = candidates.tensors_gib(
        chosen["micro_batch"], chosen["checkpointing"], away=chosen["offload_activations"]
    )
    return chosen, planned_gib, comparable


def _offloaded(candidates: Candidates) -> Candidates | None:
    """The same with layers in CPU memory, where that can be had."""
    model, machine = candidates.workload.model, candidates.machine
    if not machine.cuda or model.offload or model.quantize is Quantize.int8:
        return None
    return Candidates(candidates.workload.with_offload(), machine)
