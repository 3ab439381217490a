"""What is known of each kind of model without loading anything."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from finetune.config.schema import Config, ExportFormat
from finetune.errors import ConfigError

SHORTEST_ROW = 2  # tokens: one that is seen, and the one after it


@dataclass(frozen=True)
class ModelKind:
    """Facts of a kind of model; its package is `finetune.NAME`.

    data_key: the setting that names the examples. example_recipe: the recipe that shows it. captioned: its examples may
    need captions first. verb: `finetune.VERB` uses what was trained. resize: make every example that share of its size:
    what to type, and the configuration. smaller_shares: those that may help where memory is short. quantizes_on_cpu:
    `model.quantize` works without a GPU too.
    """

    name: str
    data_key: str
    example_recipe: str
    captioned: bool
    verb: str
    resize: Callable[[Config, float], tuple[str, Config]]
    smaller_shares: tuple[float, ...]
    quantizes_on_cpu: bool

    @property
    def export_formats(self) -> tuple[ExportFormat, ...]:
        """What its adapters can be exported in."""
        return tuple(export_format for export_format in ExportFormat if self.name in export_format.kinds)

    def smaller_examples(self, config: Config) -> Iterator[tuple[str, Config]]:
        """Settings that make an example smaller, mildest first; none where it is as small as it can be."""
        resized = (self.resize(config, share) for share in self.smaller_shares)
        return iter({words: changed for words, changed in resized if changed != config}.items())


def _resized_images(config: Config, share: float) -> tuple[str, Config]:
    model = config.model
    side = max(model.bucket_step, int(model.resolution * share) // model.bucket_step * model.bucket_step)
    return f"model.resolution={side}", replace(config, model=replace(model, resolution=side))


def _resized_rows(config: Config, share: float) -> tuple[str, Config]:
    length = max(SHORTEST_ROW, int(config.data.length * share))
    return f"data.length={length}", replace(config, data=replace(config.data, length=length))


MODEL_KINDS = {
    kind.name: kind
    for kind in (
        ModelKind(
            name="diffusion",
            data_key="data.folder",
            example_recipe="pixar_style",
            captioned=True,
            verb="draw",
            resize=_resized_images,
            smaller_shares=(0.75, 0.5, 0.25),
            quantizes_on_cpu=False,  # diffusers quantises on GPUs alone
        ),
        ModelKind(
            name="language",
            data_key="data.file",
            example_recipe="pirate_chat",
            captioned=False,
            verb="chat",
            resize=_resized_rows,
            smaller_shares=(0.5, 0.25, 0.125),
            quantizes_on_cpu=True,
        ),
    )
}


def model_kind(name: str) -> ModelKind:
    """The kind of that name. Raises ConfigError for one that there isn't."""
    if name not in MODEL_KINDS:
        raise ConfigError(f"model.kind={name} is not known; allowed: {', '.join(MODEL_KINDS)}")
    return MODEL_KINDS[name]
