"""What a training and its export will write into the run folder, known before the first step."""

from collections.abc import Collection

from torch import nn

from finetune.adapters import lora
from finetune.config.schema import ExportFormat, Optimizer, TrainerConfig
from finetune.run.room import Need
from finetune.training.optim import optimizer_bytes

FP32, HALF = 4, 2  # bytes of a number
WHOLE_MODEL = {ExportFormat.merged}  # all others hold the adapter alone
MADE_OF_PEFT = {ExportFormat.merged, ExportFormat.gguf}  # a folder that is written with them


def need(
    model: nn.Module,
    trainer: TrainerConfig,
    optimizer: Optimizer,
    formats: Collection[ExportFormat],
    *,
    done: int,
    there: int,
    quantised: bool,
) -> Need:
    """Of the rest of a run. model: with adapters; done, there: steps and checkpoints of it; quantised: its base."""
    averaged = trainer.ema_decay > 0
    most, kept = more_checkpoints(trainer, done=done, there=there)
    exported = export_bytes(model, formats, averaged=averaged, quantised=quantised)
    return Need(checkpoint_bytes(model, optimizer, averaged=averaged), most, kept, exported)


def checkpoint_bytes(model: nn.Module, optimizer: Optimizer, *, averaged: bool) -> float:
    """Of one checkpoint: the adapter and its average, in fp32, and the optimiser's states. model: with adapters."""
    numbers = sum(tensor.numel() for tensor in lora.adapter_tensors(model).values())
    if averaged:
        numbers += sum(tensor.numel() for tensor in lora.trainable_tensors(model).values())
    return FP32 * numbers + optimizer_bytes(optimizer, lora.adapter_parameters(model))


def more_checkpoints(trainer: TrainerConfig, *, done: int, there: int) -> tuple[int, int]:
    """How many checkpoints there may be beside the `there` of today, at most while one is written, and at the end.

    done: steps. The newest are kept and the best, and what is no longer kept goes once the new one is written.
    """
    to_come = -(-trainer.steps // trainer.save_every) - done // trainer.save_every if done < trainer.steps else 0
    kept = trainer.keep_checkpoints + bool(trainer.validate_every)
    most = min(there + to_come, kept + 1) - there
    return max(most, min(to_come, 1)), max(min(there + to_come, kept) - there, 0)


def export_bytes(model: nn.Module, formats: Collection[ExportFormat], *, averaged: bool, quantised: bool) -> float:
    """Of an export, at most while it is written. model: with adapters; quantised: its base, which is merged twice, of
    which the better one is kept."""
    written = {*formats, *([ExportFormat.peft] if MADE_OF_PEFT & set(formats) else [])}
    adapters = len(written - WHOLE_MODEL) + averaged
    numbers = sum(tensor.numel() for tensor in lora.adapter_tensors(model).values())
    models = len(written & WHOLE_MODEL) * (1 + quantised)
    trained, total = lora.counts(model)
    return FP32 * numbers * adapters + HALF * (total - trained) * models
