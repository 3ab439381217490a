"""Which settings a run starts with: the fastest that fit the machine, of all that train the same thing."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from finetune.config.schema import Autotune, Config, Quantize
from finetune.errors import ModelError
from finetune.memory.device import release_memory
from finetune.planning import host_memory
from finetune.planning.candidates import Candidates, fastest
from finetune.planning.machine import Machine, read
from finetune.planning.plan import KEYS, Setting
from finetune.run.progress import say


@dataclass(frozen=True)
class Choice:
    """Settings that were looked at, all on `candidates`; chosen: the fastest that fits, None if none does."""

    candidates: Candidates
    tried: tuple[Setting, ...]
    chosen: Setting | None

    @property
    def best(self) -> Setting:
        """The chosen one, or the most frugal."""
        return self.chosen or min(self.tried, key=lambda setting: setting.gib)


def choose(candidates: Candidates) -> Choice:
    """Look no further than the first measure with which something fits: recomputing, activations in CPU memory, and at
    last blocks there. Raises ModelError for a base without a configuration, ConfigError for what base or machine can't.
    """
    config, machine = candidates.config, candidates.machine
    budget = machine.vram_gib
    tried = candidates.level(0)
    if not all(setting.gib <= budget for setting in tried):
        tried += candidates.level(1)
        best = fastest(tried, budget)
        if best is not None and best.checkpointing:
            tried += candidates.level(2)
    chosen = fastest(tried, budget)
    if chosen is None and machine.cuda:
        tried += candidates.level(1, away=True)
        chosen = fastest(tried, budget)
    if chosen is None and (streamed := _offloaded(config, machine)):
        candidates = streamed
        tried = candidates.level(1)
        if (chosen := fastest(tried, budget)) is None:
            tried += candidates.level(1, away=True)
            chosen = fastest(tried, budget)
    return Choice(candidates, tuple(tried), chosen)


def is_needed(config: Config, device: torch.device) -> bool:
    """Whether there is a GPU whose memory a run has to fit, and somebody wants that seen to."""
    return device.type == "cuda" and config.trainer.autotune is not Autotune.off


def choose_settings(config: Config) -> tuple[Config, float | None]:
    """The configuration with the settings to start with on this GPU, as `trainer.autotune` says, and the GiB of tensors
    that the plan sees in training, validation and previews; the same configuration and None for a base that can't be
    planned. To be called before anything of the run is on the GPU."""
    try:
        return _chosen_settings(config)
    except ModelError as error:  # a base that can't be had at all is named again when it is loaded
        say(f"fit: {error}")
        return config, None


def _chosen_settings(config: Config) -> tuple[Config, float]:
    release_memory()
    # Whatever GPU the preset is of: what counts is this one, and what of it is free now.
    machine = read(replace(config.hardware, gpu=""))
    if config.trainer.autotune is not Autotune.auto:
        candidates = Candidates(config, machine)
    else:
        choice = choose(Candidates(config, machine))
        candidates, setting = choice.candidates, choice.best
        needed_here = host_memory.peaks(config, candidates, setting)
        for line in host_memory.warning(config, needed_here, machine.cpu_gib):
            say(f"fit: {line}")  # now, and not when the training is over
        config = with_settings(config, **{name: getattr(setting, name) for name in KEYS})
        if choice.chosen is None:
            say(f"fit: the plan's least is {setting.gib:.1f} GiB, and {machine.vram_gib:.1f} are free; trying it")
    trainer = config.trainer
    return config, candidates.tensors_gib(
        trainer.micro_batch, trainer.activation_checkpointing, trainer.offload_activations
    )


def settings(config: Config) -> dict[str, Any]:
    """Those that `choose_settings` may change, named as a `Setting` names them."""
    trainer = config.trainer
    return {
        "micro_batch": trainer.micro_batch,
        "accumulate": trainer.accumulate,
        "checkpointing": trainer.activation_checkpointing,
        "offload_activations": trainer.offload_activations,
        "offload": config.model.offload,
    }


def with_settings(config: Config, *, offload: bool, **trainer: Any) -> Config:
    """The same run with other `settings`."""
    return replace(config, trainer=replace(config.trainer, **trainer), model=replace(config.model, offload=offload))


def _offloaded(config: Config, machine: Machine) -> Candidates | None:
    """The same with layers in CPU memory, where that can be had."""
    model = config.model
    if not machine.cuda or model.offload or model.quantize is Quantize.int8:
        return None
    return Candidates(replace(config, model=replace(model, offload=True)), machine)
