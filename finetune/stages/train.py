"""Train the adapter: examples in, checkpoints and curves out. Resumes by itself, loses no step to a signal."""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from finetune import kinds
from finetune.adapters import formats
from finetune.config import hints
from finetune.config.describe import as_dict
from finetune.config.schema import Config, Quantize
from finetune.errors import Interrupted, RunError
from finetune.memory.device import gpu_gib, peak_gib, pick_device, pick_precision, reset_peak
from finetune.planning import choice
from finetune.run import previous, ranks, room
from finetune.run.hashing import hash_of
from finetune.run.progress import plural, say
from finetune.run.receipts import load_record, save_receipt
from finetune.run.records import Dataset, Run, TextSet
from finetune.run.signals import Stop, catch_stop, cause
from finetune.training import checkpoint, disk, distributed
from finetune.training.accelerator import build_accelerator, without_cudnn_attention
from finetune.training.identity import CONTENT, flat, noted, resume, settings_of
from finetune.training.loop import Step
from finetune.training.trainer import Trainer
from finetune.workstation.meanwhile import Meanwhile

FIGURES = (
    *("steps", "micro_batch", "processes", "oom_fallbacks", "peak_gib", "planned_gib", "dry_run_gib", "measured_gib"),
    *("first_loss", "last_loss", "first_validation", "best_validation", "skipped_steps"),
)
"""Of the record, in the receipt under the same names."""


def train(config: Config, dataset: Dataset | TextSet) -> Run:
    """Train to `config.trainer.steps`, or until it no longer helps (`trainer.patience`), from the newest checkpoint.

    Raises RunError if an earlier run in the folder was trained with other settings or data (they are listed) or a
    checkpoint is damaged, or the disk has no room for what will be written, TrainingError after too many non-finite
    steps, Interrupted after a signal (state saved).
    """
    began, run_dir = time.monotonic(), Path(config.run_dir)
    contents = noted(distributed.on_first_rank(lambda: kinds.contents(config)))
    settings = settings_of(config) | {dataset.identity_key: dataset.content}
    identity = settings | contents
    known = {key: value for key, value in identity.items() if f"{CONTENT}{key}" not in contents}  # names aside
    input_hash = hash_of(known, config.trainer.steps)
    earlier = hash_of(settings, config.trainer.steps)
    if config.trainer.restart:
        distributed.on_first_rank(lambda: previous.restart(run_dir, input_hash))
    record = load_record(run_dir, "train", Run, input_hash=input_hash, earlier=earlier, noted=contents)
    if record and Path(record.checkpoint).is_dir():
        say(f"train: up to date, skipped ({plural(record.steps, 'step')})")
        return record
    resumed = resume(run_dir, identity, config.trainer.steps, dataset)
    if resumed is None and ranks.rank() == 0:
        previous.save_summary(run_dir, dataset)
        if config.lora.start_from:
            path = formats.peft_folder(Path(config.lora.start_from))
            formats.warn_of_another_base(path, config.model.base, contents[f"{CONTENT}model.base"])
    with without_cudnn_attention(), catch_stop() as stop:
        trainer = build_trainer(config, dataset, identity, resumed)
        try:
            distributed.on_first_rank(lambda: _require_room(config, trainer))
            trainer.start()
            with trainer.bar() as bar:
                for step in trainer.steps(stop):
                    trainer.after_step(step)
                    bar.advance(1, f"loss {trainer.state.smoothed_loss:.4f}")
                    _heed(stop, step, trainer)
                    if trainer.exhausted():
                        say(f"train: no better validation loss since step {trainer.state.lowest_step}; stopping early")
                        break
            record = distributed.on_first_rank(lambda: trainer.finish(input_hash))
        finally:
            trainer.close()
    if ranks.rank() == 0:
        figures = {name: getattr(record, name) for name in FIGURES}
        figures |= {"effective_batch": record.effective, f"{record.unit}_per_s": record.items_per_s}
        # Loading and validation too, as in other stages; the record has the time of all steps, also before a resume.
        seconds = max(record.seconds, time.monotonic() - began)
        save_receipt(run_dir, "train", record, input_hash=input_hash, seconds=seconds, figures=figures)
    return record


def build_trainer(
    config: Config,
    dataset: Dataset | TextSet,
    identity: dict[str, Any] | None = None,
    resumed: checkpoint.Checkpoint | None = None,
) -> Trainer:
    """Everything that trains, with the memory settings that suit this machine."""
    device = pick_device(config.hardware.device)
    requested = choice.settings(config.trainer, config.model) | {"fit": config.trainer.autotune.name}
    requested |= {"gpu_gib": round(gpu_gib(device), 1), "vram_gib": config.hardware.vram_gib}
    comparable: tuple[int, ...] = ()
    planned_gib, before, dry_run_first = None, peak_gib(device), False
    if resumed and resumed.state.fits(requested):
        config = _with_settings(config, **resumed.state.applied)
    elif dry_run_first := choice.is_needed(config.trainer.autotune, device):
        choose = partial(choice.choose_settings, kinds.of(config).workload(config), config.hardware)
        settings, planned_gib, comparable = distributed.on_first_rank(choose)  # the same for all
        config = _with_settings(config, **settings)
    reset_peak(device)
    accelerator = build_accelerator(pick_precision(config.trainer.precision, device), device)
    if config.trainer.validate_every and not dataset.validation:
        reason = "under 20 none are" if config.data.validation_share else "data.validation_share=0"
        say(
            f"warning: no examples are held out ({reason}); the validation loss, and what is chosen by it, is of some "
            "that are trained on"
        )
    return Trainer(
        task=kinds.of(config).build_task(config, dataset, device),
        accelerator=accelerator,
        run_dir=Path(config.run_dir),
        trainer=config.trainer,
        optim=config.optim,
        sample=config.sample,
        seed=config.seed,
        machine=Meanwhile(device),
        identity=identity or {},
        shown=flat(as_dict(config)),
        requested=requested,
        applied=choice.settings(config.trainer, config.model),
        hint=hints.smallest(config, on_gpu=device.type == "cuda"),
        resumed=resumed,
        dry_run_first=dry_run_first,
        planned_gib=planned_gib,
        comparable=comparable,
        peak_gib=before,
    )


def _require_room(config: Config, trainer: Trainer) -> None:
    """Raises RunError where the run folder's disk can't take the checkpoints and the export that are to come."""
    run_dir = Path(config.run_dir)
    needed = disk.need(
        trainer.task.model,
        config.trainer,
        config.optim.name,
        config.export.formats,
        done=trainer.state.step,
        there=len(checkpoint.steps_on_disk(run_dir / "checkpoints")),
        quantised=config.model.quantize is not Quantize.none,
    )
    found = room.usage(run_dir)
    if found and (line := needed.shortage(run_dir, found.free, config.trainer.keep_checkpoints)):
        raise RunError(line)


def _with_settings(
    config: Config, *, micro_batch: int, accumulate: int, checkpointing: int, offload_activations: bool, offload: bool
) -> Config:
    """The same run with other memory settings, named as `choice.settings` names them."""
    trainer = replace(
        config.trainer,
        micro_batch=micro_batch,
        accumulate=accumulate,
        activation_checkpointing=checkpointing,
        offload_activations=offload_activations,
    )
    return replace(config, trainer=trainer, model=replace(config.model, offload=offload))


def _heed(stop: Stop, step: Step, trainer: Trainer) -> None:
    """Raises Interrupted after a signal, once the state is saved."""
    if stop.number is None:
        return
    distributed.on_first_rank(trainer.save)
    then = "exports what was trained" if step.number == trainer.trainer.steps else "goes on from there"
    raise Interrupted(f"stopped by {cause(stop.number)} after step {step.number}; the same command {then}", stop.number)
