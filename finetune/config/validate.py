"""Every problem of a configuration that can be seen without loading anything."""

import math
import os
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

from finetune.config.describe import as_dict, rules
from finetune.config.model_kinds import MODEL_KINDS, model_kind
from finetune.config.schema import (
    CheckpointChoice,
    Config,
    LoraConfig,
    LoraInit,
    ModelConfig,
    OptimConfig,
    Optimizer,
    Quantize,
    SampleConfig,
)
from finetune.config.spelling import setting
from finetune.config.typed_text import PATHS
from finetune.errors import ConfigError

LONGEST_NAME, LONGEST_PATH = 255, 3840  # bytes; NAME_MAX of Linux, and PATH_MAX less what comes below a folder
MOST_OFFERED = 6  # micro-batches in a message
RATE_OF_SMALL_BASES = 1e-3  # from here on a rate for AdamW is none for a released base


def check(config: Config) -> list[str]:
    """Every problem, one line each: what contradicts the kind of model, wrong values, settings at odds."""
    return [
        *_kind_problems(config),
        *_value_problems(config),
        *_path_problems(config),
        *_folder_problems(config),
        *_resolution_problems(config.model),
        *_start_problems(config.model, config.lora),
        *_rate_problems(config.optim),
        *_validation_problems(config.trainer.validate_every, config.trainer.patience, config.export.checkpoint),
        *_negative_problems(config.sample),
        *_profile_problems(config.profile.micro_batches, config.trainer.micro_batch * config.trainer.accumulate),
    ]


def cautions(config: Config) -> list[str]:
    """What a training can do but hardly should, one line each."""
    found, optim = [], config.optim
    warmup, steps = optim.warmup_steps, config.trainer.steps
    if warmup > steps:
        line = f"optim.warmup_steps={warmup} is longer than the run (trainer.steps={steps})"
        found.append(f"{line}: the learning rate never reaches optim.lr; try optim.warmup_steps={steps // 10}")
    of_adam = optim.name.largest_lr == Optimizer.adamw.largest_lr
    if of_adam and optim.lr >= RATE_OF_SMALL_BASES and not config.model.base.startswith("embedded:"):
        found.append(
            f"optim.lr={optim.lr:g} is a rate for the small models of this package; {config.model.base} will hardly "
            "take more than 5e-4; try optim.lr=1e-4, or the preset of its architecture (model=…), which brings its own"
        )
    return found


def _kind_problems(config: Config) -> Iterator[str]:
    try:
        kind = model_kind(config.model.kind)
    except ConfigError as error:
        yield str(error)
        return
    given = [other for other in MODEL_KINDS.values() if attrgetter(other.data_key)(config).strip()]
    if kind not in given and given:
        # Format and targets of a recipe for the other kind are wrong too, and one line about it is enough.
        yield (
            f"this recipe is for {given[0].name} models ({given[0].data_key} is set), this is a {kind.name} model; "
            f"take a recipe such as conf={kind.example_recipe}, or another model"
        )
        return
    if kind not in given:
        yield f"{kind.data_key} is not set; type {kind.data_key}=…"
    if foreign := [format_.name for format_ in config.export.formats if format_ not in kind.export_formats]:
        offered = ", ".join(format_.name for format_ in kind.export_formats)
        yield f"export.formats={foreign[0]} is not for a {kind.name} model; it offers: {offered}"
    if config.lora.targets not in config.model.lora_targets:
        offered = ", ".join(sorted(config.model.lora_targets)) or "none"
        yield f"lora.targets={config.lora.targets} is not a preset of this model; it offers: {offered}"


def _value_problems(config: Config) -> Iterator[str]:
    defaults = Config()
    for key, rule in rules().items():
        value, default = attrgetter(key)(config), as_dict(attrgetter(key)(defaults))
        words = rule.words
        if isinstance(value, float) and not math.isfinite(value):
            words = "be a finite number"
        elif isinstance(value, int | float) and value > rule.most:
            words = f"be at most {rule.most:,}"
        if words != rule.words or not rule.holds(value):
            got = repr(value) if isinstance(value, str) else value
            good = default if rule.example is None else rule.example
            yield f"{key} must {words}, got {got}; try {setting(key, good)}"


def _path_problems(config: Config) -> Iterator[str]:
    values = [(key, attrgetter(key)(config)) for key in PATHS]
    values += [("serve.adapters", path) for path in config.serve.adapters.values()]
    for key, value in values:
        is_template = key == "data.chat_template" and "{" in value
        for path in [] if is_template else value.split(os.pathsep):
            whole, name = _bytes(path), max(map(_bytes, Path(path).parts), default=0)
            if name > LONGEST_NAME or whole > LONGEST_PATH:
                yield (
                    f"{key} must be a path that file systems take, of {LONGEST_PATH} bytes, {LONGEST_NAME} a name; "
                    f"got {whole:,}, {name:,} a name: {path[:20]}…; take a shorter one"
                )


def _folder_problems(config: Config) -> Iterator[str]:
    folder = config.data.folder
    if folder.strip() and os.path.realpath(config.run_dir) == os.path.realpath(folder):
        yield (
            f"{setting('run_dir', config.run_dir)} is the folder of the images: what a run draws would lie among them, "
            f"and be trained on; try {setting('run_dir', f'outputs/{config.name}')}"
        )


def _bytes(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))


def _resolution_problems(model: ModelConfig) -> Iterator[str]:
    step = max(1, model.bucket_step)
    if model.resolution % step:
        nearest = max(1, round(model.resolution / step)) * step
        rule = f"must be a multiple of model.bucket_step={step}, got {model.resolution}"
        yield f"model.resolution {rule}; try model.resolution={nearest}"


def _start_problems(model: ModelConfig, lora: LoraConfig) -> Iterator[str]:
    if lora.init is LoraInit.pissa and lora.start_from:
        yield f"lora.init=pissa does not start at {lora.start_from}; set lora.init=default"
    if lora.init is LoraInit.loftq and model.quantize is not Quantize.nf4:
        yield "lora.init=loftq makes up for what nf4 loses; try lora.init=default, or model.quantize=nf4"
    if model.offload and model.quantize is Quantize.int8:
        yield "model.offload=true needs model.quantize=nf4 or none: int8 layers stay on the GPU once used"


def _negative_problems(sample: SampleConfig) -> Iterator[str]:
    if sample.negative.strip() and sample.guidance <= 1:
        yield f"sample.negative is not looked at with sample.guidance={sample.guidance:g}; try sample.guidance=3"


def _rate_problems(optim: OptimConfig) -> Iterator[str]:
    largest = optim.name.largest_lr
    highest = optim.lr * max(1.0, optim.lora_plus)
    if optim.allow_large_lr or not math.isfinite(highest) or highest <= largest:
        return
    what = f"optim.lr={optim.lr:g}" + (f" times optim.lora_plus={optim.lora_plus:g}" if optim.lora_plus > 1 else "")
    yield (
        f"{what} is more than {optim.name.name} can learn with (over {largest:g} the weights are lost at once); "
        "try optim.lr=1e-4, or optim.allow_large_lr=true if it is meant"
    )


def _validation_problems(validate_every: int, patience: int, checkpoint: CheckpointChoice) -> Iterator[str]:
    chosen = (
        ("trainer.patience", str(patience), "0"),
        ("export.checkpoint", checkpoint.name, CheckpointChoice.last.name),
    )
    for key, value, without in chosen:
        if not validate_every and value != without:
            rule = f"{key}={value} needs validation losses, and trainer.validate_every=0 makes none"
            yield f"{rule}; try {key}={without}, or trainer.validate_every=100"


def _profile_problems(micro_batches: list[int], effective: int) -> Iterator[str]:
    """A larger one trains otherwise, and may be looked at."""
    divisors = [size for size in range(1, effective + 1) if effective % size == 0]
    if wrong := [size for size in micro_batches if 0 < size < effective and effective % size]:
        rule = f"profile.micro_batches below the effective batch of {effective} must divide it, got {wrong[0]}"
        yield f"{rule}; try {setting('profile.micro_batches', divisors[:MOST_OFFERED])}"
