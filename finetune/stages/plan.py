"""Say before anything starts whether a run fits the GPU, and how it is fastest."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from finetune import hub, kinds
from finetune.adapters import formats
from finetune.config.describe import as_dict
from finetune.config.schema import Config, Quantize
from finetune.errors import DataError, ModelError
from finetune.planning import host_memory, speed
from finetune.planning.candidates import Candidates
from finetune.planning.choice import Choice, choose
from finetune.planning.machine import Machine, read
from finetune.planning.plan import Plan, Setting
from finetune.reading import is_there
from finetune.reporting.facts import update_scale
from finetune.run import room, rundir
from finetune.run.room import Need
from finetune.training import checkpoint, disk
from finetune.training.optim import require_device

OTHERS = 3  # alternatives shown
MONITOR_GIB = 1.0  # that a desktop takes of a GPU, at most mostly
TRAIN_KNOWS = "train itself sees what is free"
REMEDIES = {
    "captioning": "caption.batch=1, or finetune caption with these settings and hardware=cpu first",
    "encoding texts": "more CPU memory, or a base with smaller text encoders",
    "encoding images": "finetune dataset with these settings and hardware=cpu first",
    "validation": "trainer.validate_every=0 trainer.patience=0 export.checkpoint=last",
    "sampling": "'sample.prompts=[]', and finetune sample with prompts and hardware=cpu after the training",
    "export": "finetune export with these settings and hardware=cpu, after the training",
}
"""What makes a phase smaller, or where else it can run."""


def plan(config: Config) -> Plan:
    """The fastest setting that fits `hardware`, what it takes, and what else there is.

    Nothing is written and nothing is loaded but configurations, and an adapter to start from. Raises ModelError for a
    base whose configuration isn't on this machine and for an adapter that doesn't fit, ConfigError for what base or
    machine can't do, DataError for examples that prove unusable within a second. What isn't on this machine is named in
    the notes of a plan for another. Raises RunError for a run folder that can't be written or was trained otherwise.
    """
    machine = read(config.hardware)
    _require(config, machine)
    (found,) = plans(config, [machine])
    return found


def _require(config: Config, machine: Machine) -> None:
    """Raises what `train` raises before its first step, as far as it can be said of the machine that is planned for."""
    device = torch.device("cuda" if machine.cuda else "cpu")
    require_device(config.optim.name, device)
    kinds.of(config).require_device(config, device)
    if hub.single_file(config.model.base) is None:
        hub.config_folder(config.model.base)  # with which no hub is asked below
    if not config.hardware.gpu:
        kinds.of(config).require_base(config)
        rundir.require_usable(Path(config.run_dir), as_dict(config))
    start = Path(config.lora.start_from)
    if config.lora.start_from and (is_there(start) or not config.hardware.gpu):
        formats.require_start(start)
        kinds.of(config).require_start(config)
    if not config.hardware.gpu:
        kinds.require_resumable(config)
        kinds.of(config).require_examples(config)


def plans(config: Config, machines: Iterable[Machine]) -> Iterator[Plan]:
    """The same for several machines: what is traced for one is known for the next."""
    workload, candidates = kinds.of(config).workload(config), None
    for machine in machines:
        candidates = candidates.on(machine) if candidates else Candidates(workload, machine)
        yield _planned(config, choose(candidates))


def _planned(config: Config, choice: Choice) -> Plan:
    candidates, chosen, best = choice.candidates, choice.chosen, choice.best
    machine = candidates.machine
    requested, examples = config.trainer, candidates.workload.examples
    others = list(candidates.phases(best.micro_batch))
    phases = {"training": best.gib} | {phase.name: phase.gib for phase in others}
    seconds: dict[str, float | None] = {"training": requested.steps * best.seconds}
    seconds |= {phase.name: phase.seconds for phase in others}
    over = {name: gib for name, gib in phases.items() if gib > machine.vram_gib}
    disk_need, free = _disk(config, candidates)
    cpu_gib = host_memory.peaks(candidates, best, {name for name, gib in phases.items() if not gib})
    return Plan(
        name=config.name,
        base=config.model.base,
        gpu=", ".join(filter(None, [machine.name, machine.words])),
        budget_gib=machine.vram_gib,
        precision=candidates.precision.name,
        quantize=config.model.quantize.name,
        unit=candidates.memory_model.unit,
        chosen=chosen,
        requested=candidates.setting(
            requested.micro_batch, requested.activation_checkpointing, requested.offload_activations
        ),
        others=_others(choice.tried, chosen, machine.vram_gib),
        phases=phases,
        problems=tuple(_problem(config, machine, name, gib) for name, gib in over.items()),
        notes=(
            speed.explained(machine, candidates.precision),
            *candidates.memory_model.notes,
            *(f"{phase.name}: {phase.words}" for phase in others if phase.words),
            *_absent(kinds.of(config).require_base, config),
            *_absent(kinds.require_data, config, otherwise=_unread(config)),
            *_absent(_require_start, config),
            *_monitor(chosen, machine),
            *host_memory.warning(cpu_gib, machine.cpu_gib, candidates),
        ),
        cpu_gib=cpu_gib,
        seconds=seconds,
        steps=requested.steps,
        effective=candidates.effective,
        epochs=None if examples is None else requested.steps * candidates.effective / examples.per_epoch,
        guessed=examples is not None and not examples.measured,
        lr=config.optim.lr,
        lr_scale=update_scale(as_dict(config)["lora"]),
        download=candidates.memory_model.download_bytes(),
        disk=disk_need,
        cache_bytes=None if examples is None else examples.cached * candidates.memory_model.entry_bytes,
        free_bytes=free,
        shortage="" if free is None else disk_need.shortage(Path(config.run_dir), free, requested.keep_checkpoints),
    )


def _disk(config: Config, candidates: Candidates) -> tuple[Need, float | None]:
    """What the rest of the run writes, and what is free on the run folder's disk, if it is of this machine."""
    run_dir = Path(config.run_dir)
    steps = checkpoint.steps_on_disk(run_dir / "checkpoints")
    need = disk.need(
        candidates.memory_model.model,
        config.trainer,
        config.optim.name,
        config.export.formats,
        done=steps[-1] if steps else 0,
        there=len(steps),
        quantised=config.model.quantize is not Quantize.none,
    )
    found = None if config.hardware.gpu else room.usage(run_dir)
    return need, found and found.free


def _monitor(chosen: Setting | None, machine: Machine) -> Iterator[str]:
    """Of a GPU that isn't here nobody knows what else is on it."""
    if chosen and machine.cuda and machine.cpu_gib is None and machine.vram_gib - chosen.gib < MONITOR_GIB:
        yield (
            f"the fastest settings fill this GPU; where a monitor is connected to it, plan for less: "
            f"hardware.vram_gib={machine.vram_gib - MONITOR_GIB:.1f} ({TRAIN_KNOWS})"
        )


def _absent(require: Callable[[Config], None], config: Config, *, otherwise: str = "") -> Iterator[str]:
    """What a plan for another machine, where it may be, misses on this one."""
    try:
        if config.hardware.gpu:  # in a plan for this machine it was refused
            require(config)
    except (DataError, ModelError) as error:
        yield f"warning: {error}"
    else:
        yield from filter(None, [otherwise])


def _unread(config: Config) -> str:
    """Why a plan needs no data: what there is could only be smaller, and shapes of one area hardly are."""
    key = kinds.of(config).FACTS.data_key
    return f"{key} is counted, not read: no example can be larger than what is planned for"


def _require_start(config: Config) -> None:
    if config.lora.start_from:
        formats.require_start(Path(config.lora.start_from))


def _others(tried: Sequence[Setting], chosen: Setting | None, budget_gib: float) -> tuple[Setting, ...]:
    fitting = [setting for setting in tried if setting.gib <= budget_gib and setting is not chosen]
    return tuple(sorted(fitting, key=lambda setting: (setting.seconds, setting.gib))[:OTHERS])


def _problem(config: Config, machine: Machine, phase: str, gib: float) -> str:
    line = f"{phase} needs {gib:.1f} GiB at least, and {machine.name} has {machine.vram_gib:.1f}"
    if phase != "training":
        return f"{line}; try {REMEDIES[phase]}"
    for words, changed in _smaller(config, machine):
        if Candidates(kinds.of(changed).workload(changed), machine).least_gib() <= machine.vram_gib:
            return f"{line}; {words} would fit"
    return f"{line}, and nothing that this program can change makes it fit; try a smaller base model"


def _smaller(config: Config, machine: Machine) -> Iterator[tuple[str, Config]]:
    """What changes the result and takes less memory, mildest first: what to type, and the configuration."""
    model, prefix, facts = config.model, "", kinds.of(config).FACTS
    if model.quantize is Quantize.none and (machine.cuda or facts.quantizes_on_cpu):
        for how in (Quantize.int8, Quantize.nf4):
            yield f"model.quantize={how.name}", replace(config, model=replace(model, quantize=how, offload=False))
        config, prefix = (
            replace(config, model=replace(model, quantize=Quantize.nf4, offload=False)),
            "model.quantize=nf4 ",
        )
    for words, changed in facts.smaller_examples(config):
        yield prefix + words, changed
