"""What to type when the memory doesn't suffice."""

from finetune.config.model_kinds import model_kind
from finetune.config.schema import Config, Quantize


def smaller(config: Config, *, on_gpu: bool) -> str:
    """What needs less memory and trains the same, with the same effective batch; where nothing does, `smallest`."""
    trainer = config.trainer
    if trainer.micro_batch > 1:
        micro_batch = trainer.micro_batch // 2
        accumulate = -(-trainer.micro_batch * trainer.accumulate // micro_batch)
        return f"try trainer.micro_batch={micro_batch} trainer.accumulate={accumulate}"
    if trainer.activation_checkpointing != 1:
        return "try trainer.activation_checkpointing=1"
    return smallest(config, on_gpu=on_gpu)


def smallest(config: Config, *, on_gpu: bool) -> str:
    """What is left when every setting that trains the same was tried: another result, or another base."""
    kind = model_kind(config.model.kind)
    half, changed = kind.resize(config, 0.5)
    ideas = [half] if changed != config else []
    if config.model.quantize is Quantize.none and (on_gpu or kind.quantizes_on_cpu):
        ideas.append("model.quantize=nf4")
    return f"try {', '.join([*ideas, 'or a smaller base model' if ideas else 'a smaller base model'])}"
