"""Which settings a run starts with: the fastest that fit the machine, of all that train the same thing."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from finetune.config.schema import Config, Fit, Quantize
from finetune.errors import ModelError
from finetune.memory.device import free
from finetune.planning import host_memory
from finetune.planning.candidates import Ladder, quickest
from finetune.planning.machine import Machine, read
from finetune.planning.plan import KEYS, Setting
from finetune.run.progress import say


@dataclass(frozen=True)
class Choice:
    """Settings that were looked at, all on `ladder`; chosen: the fastest that fits, None if none does."""

    ladder: Ladder
    tried: tuple[Setting, ...]
    chosen: Setting | None

    @property
    def best(self) -> Setting:
        """The chosen one, or the most frugal."""
        return self.chosen or min(self.tried, key=lambda setting: setting.gib)


def choose(ladder: Ladder) -> Choice:
    """Look no further than the first measure with which something fits: recomputing, activations in main memory, and at
    last blocks there. Raises ModelError for a base without a configuration, ConfigError for what base or machine can't.
    """
    config, machine = ladder.config, ladder.machine
    budget = machine.vram_gib
    tried = ladder.level(0)
    if not all(setting.gib <= budget for setting in tried):
        tried += ladder.level(1)
        best = quickest(tried, budget)
        if best is not None and best.checkpointing:
            tried += ladder.level(2)
    chosen = quickest(tried, budget)
    if chosen is None and machine.cuda:
        tried += ladder.level(1, away=True)
        chosen = quickest(tried, budget)
    if chosen is None and (streamed := _offloaded(config, machine)):
        ladder = streamed
        tried = ladder.level(1)
        if (chosen := quickest(tried, budget)) is None:
            tried += ladder.level(1, away=True)
            chosen = quickest(tried, budget)
    return Choice(ladder, tuple(tried), chosen)


def needed(config: Config, device: torch.device) -> bool:
    """Whether there is a card whose memory a run has to fit, and somebody wants that seen to."""
    return device.type == "cuda" and config.trainer.fit is not Fit.off


def settle(config: Config) -> tuple[Config, float | None]:
    """The configuration with the settings to start with on this card, as `trainer.fit` says, and the GiB of tensors
    that the plan sees in training, validation and previews; the same configuration and None for a base that can't be
    planned. To be called before anything of the run is on the card."""
    try:
        return _settled(config)
    except ModelError as error:  # a base that can't be had at all is named again when it is loaded
        say(f"fit: {error}")
        return config, None


def _settled(config: Config) -> tuple[Config, float]:
    free()
    # Whatever card the preset is of: what counts is this one, and what of it is free now.
    machine = read(replace(config.hardware, card=""))
    if config.trainer.fit is not Fit.auto:
        ladder = Ladder(config, machine)
    else:
        choice = choose(Ladder(config, machine))
        ladder, setting = choice.ladder, choice.best
        needed_here = host_memory.moments(config, ladder, setting)
        for line in host_memory.warning(config, needed_here, machine.main_gib):
            say(f"fit: {line}")  # now, and not when the training is over
        config = with_settings(config, **{name: getattr(setting, name) for name in KEYS})
        if choice.chosen is None:
            say(f"fit: the plan's least is {setting.gib:.1f} GiB, and {machine.vram_gib:.1f} are free; trying it")
    trainer = config.trainer
    return config, ladder.tensors_gib(trainer.micro_batch, trainer.checkpointing, trainer.offload_activations)


def settings(config: Config) -> dict[str, Any]:
    """Those that `settle` may change, named as a `Setting` names them."""
    trainer = config.trainer
    return {
        "micro_batch": trainer.micro_batch,
        "accumulate": trainer.accumulate,
        "checkpointing": trainer.checkpointing,
        "offload_activations": trainer.offload_activations,
        "offload": config.model.offload,
    }


def with_settings(config: Config, *, offload: bool, **trainer: Any) -> Config:
    """The same run with other `settings`."""
    return replace(config, trainer=replace(config.trainer, **trainer), model=replace(config.model, offload=offload))


def _offloaded(config: Config, machine: Machine) -> Ladder | None:
    """The same with layers in main memory, where that can be had."""
    model = config.model
    if not machine.cuda or model.offload or model.quantize is Quantize.int8:
        return None
    return Ladder(replace(config, model=replace(model, offload=True)), machine)
