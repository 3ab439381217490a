"""What the configuration knows of each kind of model: a table instead of branches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from finetune.config.schema import Config, ExportFormat
from finetune.errors import ConfigError


@dataclass(frozen=True)
class ModelKind:
    """Facts about a kind of model that need no library."""

    name: str
    """The value of `model.kind`."""
    data_key: str
    """The setting that names the user's data."""
    export_formats: tuple[ExportFormat, ...]
    example_recipe: str
    """One to begin with."""
    captioned: bool
    """Whether its examples are images, which may need captions first."""
    smaller_words: str
    """What `smaller_examples` are, in a message."""
    smaller_examples: Callable[[Config], Iterator[tuple[str, Config]]]
    """What shrinks one example and so changes the result, mildest first: what to type, and the configuration."""


def _smaller_images(config: Config) -> Iterator[tuple[str, Config]]:
    model = config.model
    sides = (int(model.resolution * share) // model.bucket_step * model.bucket_step for share in (0.75, 0.5, 0.25))
    for side in dict.fromkeys(filter(None, sides)):
        yield f"model.resolution={side}", replace(config, model=replace(model, resolution=side))


def _shorter_rows(config: Config) -> Iterator[tuple[str, Config]]:
    data = config.data
    for length in (data.length // 2, data.length // 4, data.length // 8):
        if length >= 2:  # a token, and the one to predict
            yield f"data.length={length}", replace(config, data=replace(data, length=length))


IMAGE_FORMATS = (ExportFormat.peft, ExportFormat.diffusers, ExportFormat.kohya)
TEXT_FORMATS = (ExportFormat.peft, ExportFormat.merged, ExportFormat.gguf)
MODEL_KINDS = {
    kind.name: kind
    for kind in (
        ModelKind("diffusion", "data.folder", IMAGE_FORMATS, "pixar_style", True, "smaller images", _smaller_images),
        ModelKind("language", "data.file", TEXT_FORMATS, "pirate_chat", False, "shorter rows", _shorter_rows),
    )
}


def model_kind(name: str) -> ModelKind:
    """The kind of this name. Raises ConfigError for one that there isn't."""
    if name not in MODEL_KINDS:
        raise ConfigError(f"model.kind={name} is not known; allowed: {', '.join(MODEL_KINDS)}")
    return MODEL_KINDS[name]
