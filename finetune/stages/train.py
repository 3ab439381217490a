"""Train the adapter: examples in, checkpoints and curves out. Resumes by itself, loses no step to a signal."""

from functools import partial
from pathlib import Path
from typing import Any

from finetune import hub, kinds
from finetune.config.describe import as_dict
from finetune.config.schema import Config
from finetune.errors import Interrupted, RunError
from finetune.memory.device import limit_memory, peak_gib, pick_device, pick_precision, reset_peak
from finetune.planning import choice
from finetune.run import distributed, previous
from finetune.run.hashing import hash_of
from finetune.run.progress import say
from finetune.run.receipts import load_record, save_receipt
from finetune.run.records import Dataset, Run, TextSet
from finetune.training import checkpoint
from finetune.training.accelerator import build_accelerator
from finetune.training.signals import catch_stop
from finetune.training.trainer import Trainer, flat

OFFLOAD = "model.offload"  # says where weights are, not what they are; in 0.1 it was part of a run's identity


def train(config: Config, dataset: Dataset | TextSet) -> Run:
    """Train to `config.trainer.steps`, or until it no longer helps (`trainer.patience`), from the newest checkpoint.

    Raises RunError if an earlier run in the folder was trained with other settings or images (they are listed) or a
    checkpoint is damaged, TrainingError after too many non-finite steps, Interrupted after a signal (state saved).
    """
    run_dir = Path(config.run_dir)
    folder = run_dir / "checkpoints"
    if config.trainer.restart:
        distributed.on_first_rank(lambda: previous.set_aside(run_dir))
    identity = _identity(config, dataset)
    input_hash = hash_of(identity, config.trainer.steps)
    record = load_record(run_dir, "train", Run, input_hash=input_hash)
    if record and Path(record.checkpoint).is_dir():
        say(f"train: fresh ({record.steps} steps)")
        return record

    resumed = _resume(folder, identity, config.trainer.steps, dataset)
    if resumed is None and distributed.rank() == 0:
        previous.save_summary(run_dir, dataset)
    device = pick_device(config.hardware.device)
    limit_memory(device, config.hardware.vram_gib)
    requested = choice.settings(config) | {"fit": config.trainer.autotune.name}
    planned_gib, before = None, peak_gib(device)
    dry_run_first = False
    if resumed and resumed.state.requested == requested:
        config = choice.with_settings(config, **resumed.state.taken)
    elif dry_run_first := choice.is_needed(config, device):
        config, planned_gib = distributed.on_first_rank(partial(choice.choose_settings, config))  # the same for all
    reset_peak(device)
    accelerator = build_accelerator(pick_precision(config.trainer.precision, device), device)
    if config.trainer.validate_every and not dataset.validation:
        say("train: no examples are held out (under 20 none are); the validation loss is of some that are trained on")
    task = kinds.build_task(config, dataset, device)
    run = Trainer(config, task, accelerator, identity, resumed, requested, dry_run_first, planned_gib, before)
    with catch_stop() as stop:
        try:
            for step in run.steps(stop):
                run.note(step)
                if stop.number is not None:
                    distributed.on_first_rank(run.save)
                    then = "exports what was trained" if step.number == config.trainer.steps else "goes on from there"
                    raise Interrupted(
                        f"stopped by signal {stop.number} after step {step.number}; the same command {then}",
                        stop.number,
                    )
            record = distributed.on_first_rank(lambda: run.finish(input_hash))
        finally:
            run.close()
    figures: dict[str, float | int | str | None] = {
        "steps": record.steps,
        f"{record.unit}_per_s": record.items_per_s,
        "micro_batch": record.micro_batch,
        "effective_batch": record.effective,
        "processes": record.processes,
        "eased": record.oom_fallbacks,
        "peak_gib": record.peak_gib,
        "planned_gib": record.planned_gib,
        "probed_gib": record.dry_run_gib,
        "measured_gib": record.measured_gib,
        "first_loss": record.first_loss,
        "last_loss": record.last_loss,
        "first_validation": record.first_validation,
        "best_validation": record.best_validation,
        "skipped_steps": record.skipped_steps,
    }
    if distributed.rank() == 0:
        save_receipt(run_dir, "train", record, input_hash=input_hash, seconds=record.seconds, figures=figures)
    return record


def _identity(config: Config, dataset: Dataset | TextSet) -> dict[str, Any]:
    """What decides the result, flat; a run may only be continued with the same. Steps may be raised, micro-batch and
    accumulation exchanged, and weights kept elsewhere."""
    settings = as_dict(config)
    trainer = settings["trainer"]
    if hub.single_file(config.model.base) is None:
        settings["model"].pop("parts", None)  # not looked at, and runs from before there was one shall go on
    kept: dict[str, Any] = {
        "seed": settings["seed"],
        **{key: value for key, value in settings.items() if key in ("model", "lora", "optim", "loss")},
        "trainer": {key: trainer[key] for key in ("precision", "clip_norm", "ema_decay")},
        "effective batch": trainer["micro_batch"] * trainer["accumulate"] * distributed.world_size(),
        dataset.content_name: dataset.content,
    }
    return {key: value for key, value in flat(kept).items() if key != OFFLOAD}


def _resume(
    folder: Path, identity: dict[str, Any], steps: int, dataset: Dataset | TextSet
) -> checkpoint.Checkpoint | None:
    """The newest checkpoint if it continues this very run. Raises RunError with every difference otherwise."""
    found = checkpoint.steps_on_disk(folder)
    if not found:
        return None
    newest = checkpoint.load(checkpoint.at(folder, found[-1]))
    before = newest.state.identity
    changed = [
        f"{key}: {before.get(key, 'not set')} -> {identity.get(key, 'not set')}"
        if key != dataset.content_name
        else previous.changes(folder.parent, dataset)
        for key in sorted((before.keys() | identity.keys()) - {OFFLOAD})
        if before.get(key) != identity.get(key)
    ]
    advice = "take another run_dir=…, or trainer.restart=true to set the earlier run aside and start again"
    if changed:
        raise RunError(f"{folder.parent} was trained with other settings ({'; '.join(changed)}); {advice}")
    if found[-1] > steps:
        raise RunError(f"{folder.parent} is already at step {found[-1]}, past trainer.steps={steps}; {advice}")
    return newest
