"""What to type when the memory doesn't suffice."""

from finetune.config.model_kinds import model_kind
from finetune.config.schema import Config, Quantize


def smaller(config: Config) -> str:
    """What needs less memory and trains the same, with the same effective batch; where nothing does, `smallest`."""
    trainer = config.trainer
    if trainer.micro_batch > 1:
        micro_batch = trainer.micro_batch // 2
        accumulate = -(-trainer.micro_batch * trainer.accumulate // micro_batch)
        return f"try trainer.micro_batch={micro_batch} trainer.accumulate={accumulate}"
    if trainer.activation_checkpointing != 1:
        return "try trainer.activation_checkpointing=1"
    return smallest(config)


def smallest(config: Config) -> str:
    """What is left when every setting that trains the same was tried: another result, or another base."""
    half, _ = model_kind(config.model.kind).resize(config, 0.5)
    quantised = ", model.quantize=nf4" if config.model.quantize is Quantize.none else ""
    return f"try {half}{quantised}, or a smaller base model"
