"""What is known of each kind of model without loading anything."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from finetune.config.schema import Config, ExportFormat
from finetune.errors import ConfigError


@dataclass(frozen=True)
class ModelKind:
    """Facts of a kind of model; its package is `finetune.NAME`.

    data_key: the setting that names the examples. export_formats: what its adapters can be exported in. example_recipe:
    the recipe that shows it. captioned: its examples may need captions first. smaller_examples: settings that make an
    example smaller, mildest first: what to type, and the configuration.
    """

    name: str
    data_key: str
    export_formats: tuple[ExportFormat, ...]
    example_recipe: str
    captioned: bool
    smaller_examples: Callable[[Config], Iterator[tuple[str, Config]]]


def _smaller_images(config: Config) -> Iterator[tuple[str, Config]]:
    model = config.model
    for share in (0.75, 0.5, 0.25):
        side = int(model.resolution * share) // model.bucket_step * model.bucket_step
        if side >= model.bucket_step:
            yield f"model.resolution={side}", replace(config, model=replace(model, resolution=side))


def _shorter_rows(config: Config) -> Iterator[tuple[str, Config]]:
    data = config.data
    for length in (data.length // 2, data.length // 4, data.length // 8):
        yield f"data.length={length}", replace(config, data=replace(data, length=length))


MODEL_KINDS = {
    kind.name: kind
    for kind in (
        ModelKind(
            name="diffusion",
            data_key="data.folder",
            export_formats=(ExportFormat.peft, ExportFormat.diffusers, ExportFormat.kohya),
            example_recipe="pixar_style",
            captioned=True,
            smaller_examples=_smaller_images,
        ),
        ModelKind(
            name="language",
            data_key="data.file",
            export_formats=(ExportFormat.peft, ExportFormat.merged, ExportFormat.gguf),
            example_recipe="pirate_chat",
            captioned=False,
            smaller_examples=_shorter_rows,
        ),
    )
}


def model_kind(name: str) -> ModelKind:
    """The kind of that name. Raises ConfigError for one that there isn't."""
    if name not in MODEL_KINDS:
        raise ConfigError(f"model.kind={name} is not known; allowed: {', '.join(MODEL_KINDS)}")
    return MODEL_KINDS[name]
