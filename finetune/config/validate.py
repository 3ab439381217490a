"""Every problem of a configuration that can be seen without loading anything."""

from finetune.config.schema import Config, ExportFormat, LoraInit, Quantize

EXPORT_FORMATS = {
    "diffusion": (ExportFormat.peft, ExportFormat.diffusers, ExportFormat.kohya),
    "language": (ExportFormat.peft, ExportFormat.merged, ExportFormat.gguf),
}
RECIPES = {"diffusion": "pixar_style", "language": "pirate_chat"}  # one to begin with


def check(config: Config) -> list[str]:
    """Every problem of a configuration that can be seen without loading anything, one line each."""
    problems: list[str] = []

    def require(good: bool, key: str, rule: str, value: object, try_: str) -> None:
        if not good:
            problems.append(f"{key} {rule}, got {value}; try {key}={try_}")

    trainer, lora, optim, data, sample, loss = (
        config.trainer,
        config.lora,
        config.optim,
        config.data,
        config.sample,
        config.loss,
    )
    require(0 <= config.seed < 2**63, "seed", "must be in 0 … 2^63-1", config.seed, "0")
    places = {"diffusion": ("data.folder", data.folder), "language": ("data.file", data.file)}
    needed = places.get(config.model.kind)
    missing = needed is not None and not needed[1].strip()
    other = next((kind for kind, (_, value) in places.items() if missing and value.strip()), "")
    if other:
        problems.append(
            f"this recipe is for {other} models ({places[other][0]} is set), this is a "
            f"{config.model.kind} model; take a recipe such as conf={RECIPES[config.model.kind]}, or another model"
        )
    elif needed and missing:
        problems.append(f"{needed[0]} is not set; type {needed[0]}=…")
    formats = EXPORT_FORMATS.get(config.model.kind, tuple(ExportFormat))
    # Format and targets of a recipe for the other kind are wrong too, and one line about it is enough.
    if not other and (
        foreign := [export_format.name for export_format in config.export.formats if export_format not in formats]
    ):
        problems.append(
            f"export.formats={foreign[0]} is not for a {config.model.kind} model; "
            f"it offers: {', '.join(export_format.name for export_format in formats)}"
        )
    require(bool(config.run_dir.strip()), "run_dir", "must name a folder", repr(config.run_dir), "outputs/mine")
    for key, least, value, try_ in (
        ("model.resolution", config.model.bucket_step, config.model.resolution, "512"),
        ("model.bucket_step", 1, config.model.bucket_step, "64"),
        ("lora.rank", 1, lora.rank, "16"),
        ("trainer.steps", 1, trainer.steps, "1000"),
        ("trainer.micro_batch", 1, trainer.micro_batch, "4"),
        ("trainer.accumulate", 1, trainer.accumulate, "4"),
        ("trainer.max_bad_steps", 1, trainer.max_bad_steps, "5"),
        ("trainer.save_every", 1, trainer.save_every, "500"),
        ("trainer.keep_checkpoints", 1, trainer.keep_checkpoints, "2"),
        ("trainer.log_every", 1, trainer.log_every, "10"),
        ("trainer.validate_every", 0, trainer.validate_every, "100"),
        ("trainer.activation_checkpointing", 0, trainer.activation_checkpointing, "1"),
        ("trainer.clip_norm", 0, trainer.clip_norm, "1.0"),
        ("optim.warmup_steps", 0, optim.warmup_steps, "100"),
        ("optim.weight_decay", 0, optim.weight_decay, "0.01"),
        ("caption.batch", 1, config.caption.batch, "8"),
        ("caption.max_new_tokens", 1, config.caption.max_new_tokens, "40"),
        ("caption.num_beams", 1, config.caption.num_beams, "1"),
        ("data.max_pixels", 1, data.max_pixels, "178956970"),
        ("data.max_aspect", 1, data.max_aspect, "2.0"),
        ("data.length", 2, data.length, "2048"),
        ("data.workers", 0, data.workers, "0"),
        ("trainer.patience", 0, trainer.patience, "5"),
        ("sample.max_new_tokens", 1, sample.max_new_tokens, "128"),
        ("sample.temperature", 0, sample.temperature, "0.7"),
        ("sample.steps", 1, sample.steps, "25"),
        ("sample.guidance", 0, sample.guidance, "7.5"),
        ("sample.every", 0, sample.every, "0"),
        ("sample.previews", 0, sample.previews, "4"),
        ("loss.min_snr_gamma", 0, loss.min_snr_gamma, "5.0"),
        ("loss.noise_offset", 0, loss.noise_offset, "0.05"),
        ("hardware.vram_gib", 0, config.hardware.vram_gib, "24"),
    ):
        require(value >= least, key, f"must be at least {least}", value, try_)
    for key, value, try_ in (
        ("lora.dropout", lora.dropout, "0.05"),
        ("trainer.ema_decay", trainer.ema_decay, "0.999"),
        ("loss.caption_dropout", loss.caption_dropout, "0.1"),
        ("data.validation_share", data.validation_share, "0.1"),
    ):
        require(0 <= value < 1, key, "must be in 0 … 1 (1 excluded)", value, try_)
    for key, number, try_ in (
        ("lora.alpha", lora.alpha, "32"),
        ("optim.lr", optim.lr, "1e-4"),
        ("optim.eps", optim.eps, "1e-8"),
        ("optim.lora_plus", optim.lora_plus, "1"),
        ("export.tolerance", config.export.tolerance, "1e-5"),
        ("export.divergence", config.export.divergence, "0.05"),
    ):
        require(number > 0, key, "must be above 0", number, try_)
    require(
        len(optim.betas) == 2 and all(0 <= beta < 1 for beta in optim.betas),
        "optim.betas",
        "must be two numbers in 0 … 1 (1 excluded)",
        optim.betas,
        "[0.9,0.999]",
    )
    require(
        config.model.bucket_step < 1 or config.model.resolution % config.model.bucket_step == 0,
        "model.resolution",
        f"must be a multiple of model.bucket_step={config.model.bucket_step}",
        config.model.resolution,
        str(max(1, round(config.model.resolution / max(1, config.model.bucket_step))) * config.model.bucket_step),
    )
    if not other and lora.targets not in config.model.lora_targets:
        offered = ", ".join(sorted(config.model.lora_targets)) or "none"
        problems.append(f"lora.targets={lora.targets} is not a preset of this model; it offers: {offered}")
    if lora.init is LoraInit.loftq and config.model.quantize is not Quantize.nf4:
        problems.append("lora.init=loftq makes up for what nf4 loses; try lora.init=default, or model.quantize=nf4")
    if config.model.offload and config.model.quantize is Quantize.int8:
        problems.append("model.offload=true needs model.quantize=nf4 or none: int8 layers stay on the GPU once used")
    require(bool(sample.seeds), "sample.seeds", "must name at least one seed", sample.seeds, "[0,1]")
    return problems
