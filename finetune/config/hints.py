"""What to type when the memory doesn't suffice."""

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
    model = config.model
    if model.kind == "diffusion":
        side = max(model.bucket_step, model.resolution // 2 // model.bucket_step * model.bucket_step)
        less = f"smaller images: model.resolution={side}"
    else:
        less = f"shorter rows: data.length={max(2, config.data.length // 2)}"
    quantised = ", model.quantize=nf4" if model.quantize is Quantize.none else ""
    return f"try {less}{quantised}, or a smaller base model"
