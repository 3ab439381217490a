"""Image models in one `.safetensors` file, as model sites hand them out; each part is read alone, when it is needed.

Such a file has weights under their original names and no configuration. Configuration, tokenizers and whatever weights
it lacks come from `model.parts`; of released models the package has the configuration, and of CLIP the tokenizer.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

from finetune import hub
from finetune.config.schema import ModelConfig
from finetune.config.spelling import setting
from finetune.diffusion.families import family, names
from finetune.diffusion.families.spec import CLIP_TOKENS, FamilySpec
from finetune.errors import ModelError
from finetune.run import libraries
from finetune.run.progress import plural

BACKBONE = "model.diffusion_model."  # before a backbone's names, unless the file holds nothing else
VAE = ("first_stage_model.", "vae.")
# Parts of the names of weights: of adapters in all formats, and of 8-bit weights whose scale is stored beside them.
ADAPTER_MARKS = ("lora_A", "lora_B", "lora_up", "lora_down", "lora.up", "lora.down", "hada_w", "lokr_w")
SCALE_MARKS = ("scaled_fp8", "scale_weight", "weight_scale", "comfy_quant")
CLIP_MERGES = Path(__file__).parent / "tokenizers" / "clip" / "merges.txt"


@dataclass(frozen=True)
class SingleFile:
    """A file that was found to be a base of the configured architecture.

    shapes: of every weight, by its name in the file. settings: folder with the configuration of each part. parts:
    `model.parts`.
    """

    path: Path
    spec: FamilySpec
    shapes: Mapping[str, tuple[int, ...]]
    settings: Path
    parts: str

    def names(self, part: str) -> list[str]:
        """Names of a part's weights that can be read; none if the file lacks the part."""
        texts = self.spec.file_text_prefixes
        if part == self.spec.backbone:
            own = [name for name in self.shapes if name.startswith(BACKBONE)]
            return own or [name for name in self.shapes if not name.startswith((*VAE, *texts.values()))]
        begin = texts.get(part, VAE if part == "vae" and self.spec.file_vae else ())
        return [name for name in self.shapes if name.startswith(begin)]


def find(model: ModelConfig) -> SingleFile | None:
    """The file that `model.base` names; None for a folder, a hub id or an embedded model.

    Raises ModelError for a file that is damaged, no base, or a base of another architecture than the preset's, and for
    a folder without an image model.
    """
    path = hub.single_file(model.base)
    if path is None:
        hub.require(model.base, "model_index.json")
        return None
    if not model.parts:
        raise ModelError(
            f"{path} is a single file, which says nothing about its architecture; choose that with a preset: "
            f"model=sd15, model=sdxl, … {setting('model.base', path)}"
        )
    return _opened(path, path.stat().st_mtime_ns, family(model.family), model.parts)


def load(loader: Any, found: SingleFile, part: str, **options: Any) -> Any:
    """A part of the base: from the file, or from `model.parts` if the file lacks it.

    loader: its class in transformers or diffusers. options: passed on (`torch_dtype`, `quantization_config`,
    `device_map` of one device). Raises ModelError if it can't be had.
    """
    if "tokenizer" in part:
        return _tokenizer(loader, found, part)
    if not found.names(part):
        return _borrowed(loader, found, part, **options)
    if "device_map" in options:
        options["device"] = options.pop("device_map")[""]
    with (
        hub.explained(lambda reason: f"the {part} in {found.path} can't be loaded ({reason}); get the file again"),
        libraries.without_warnings(),  # about casts that change nothing
    ):
        built = _build(loader, found, part, **options)
    lacking = [name for name, weight in built.named_parameters() if weight.is_meta]
    if lacking:
        lacks = f"lacks {plural(len(lacking), 'weight')} of its {part}, first {lacking[0]}"
        raise ModelError(f"{found.path} {lacks}; get it again")
    return built


def complete(found: SingleFile, given: Mapping[str, Any], dtypes: Mapping[str, Any]) -> dict[str, Any]:
    """`given` and the pipeline's other parts, loaded; what is None in `given` stays away.

    dtypes: by part, and `default`. Raises ModelError.
    """
    index = cast(dict[str, Any], hub.model_index(str(found.settings)))
    filled = dict(given)
    for part in found.spec.parts:
        if part not in given:
            library, name = index[part]
            loader = getattr(import_module(library), name)
            filled[part] = load(loader, found, part, torch_dtype=dtypes.get(part, dtypes["default"]))
    return filled


def content_hash(found: SingleFile, *parts: str) -> str:
    """Hash of the base, as `hub.content_hash` makes it of others: of those parts, or of everything.

    Raises ModelError if a part that the file lacks is neither on disk nor on the hub.
    """
    wanted = [part for part in found.spec.parts if not parts or any(fnmatchcase(part, pattern) for pattern in parts)]
    digest = hashlib.sha256()
    hub.hash_file_content(found.path, digest.update)
    for folder in filter(None, (_beside(found, part) for part in wanted)):
        digest.update(hub.content_hash(str(folder)).encode())
    lacking = [part for part in wanted if "tokenizer" not in part and not found.names(part)]
    # Configuration and tokenizers of a released model are the same wherever they come from: no hub is asked for those.
    others = found.parts
    if lacking or isinstance(hub.resolve(found.parts), Path):
        with _borrowing(found, lacking):
            others = hub.content_hash(found.parts, *parts)
    return f"sha256:{digest.hexdigest()}" + "".join(f"/{part}" for part in sorted(parts)) + f"+{others}"


@cache
def _opened(path: Path, _changed_ns: int, spec: FamilySpec, parts: str) -> SingleFile:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if any(mark in name for name in shapes for mark in ADAPTER_MARKS):
        raise ModelError(
            f"{path} is an adapter, not a base; type {setting('sample.adapter', path)} to draw with it, and a base as "
            "model.base"
        )
    if any(mark in name for name in shapes for mark in SCALE_MARKS):
        raise ModelError(f"{path} is quantised (8-bit weights with scales); get the same model in 16 bit")
    found = SingleFile(path, spec, shapes, hub.config_folder(parts), parts)
    if reason := misfit(found):
        others = " or ".join(f"model={name}" for name in _presets(found))
        raise ModelError(
            f"{path} is not of the architecture of {parts} ({reason}); "
            + (f"type {others} besides" if others else "none of the presets has its architecture: take another file")
        )
    scheduler = hub.read_object(found.settings / "scheduler" / "scheduler_config.json")
    if "v_pred" in shapes and scheduler.get("prediction_type") != "v_prediction":
        raise ModelError(
            f"{path} predicts velocities, {parts} doesn't; name a folder of its configuration as model.parts, with "
            "prediction_type v_prediction in scheduler/scheduler_config.json"
        )
    return found


def misfit(found: SingleFile) -> str:
    """What keeps the file's backbone from being one of that configuration; empty if nothing. Reads no weights."""
    import diffusers
    import torch
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    spec = found.spec
    loader = getattr(diffusers, spec.backbone_class)
    settings = found.settings / spec.backbone
    with hub.explained(lambda reason: f"{settings} can't be read ({reason}); get it again"), torch.device("meta"):
        config = loader.load_config(str(settings))
        wanted = loader.from_config(config).state_dict()
    with torch.device("meta"):
        weights = {_original(spec, name): torch.empty(found.shapes[name]) for name in found.names(spec.backbone)}
    try:
        converted = SINGLE_FILE_LOADABLE_CLASSES[spec.backbone_class]["checkpoint_mapping_fn"](
            checkpoint=weights, config=config
        )
    except (KeyError, IndexError, ValueError, RuntimeError):  # what the converters say of names that they don't know
        converted = {}
    if not converted:
        return f"it holds no {spec.backbone} of that kind"
    for name, weight in wanted.items():
        if name not in converted:
            return f"it lacks {name}"
        if converted[name].shape != weight.shape:
            return f"{name} is {list(converted[name].shape)} instead of {list(weight.shape)}"
    return ""


def _presets(found: SingleFile) -> Iterator[str]:
    """The presets whose architecture the file has."""
    specs = {spec.pipeline: spec for spec in map(family, names())}
    for folder in sorted(hub.ARCHITECTURES.iterdir()):
        index = hub.model_index(str(folder)) if folder.is_dir() else None
        if index and not misfit(replace(found, spec=specs[index["_class_name"]], settings=folder)):
            yield folder.name


def _original(spec: FamilySpec, name: str) -> str:
    """A backbone's name as diffusers' converters know it: UNets' with their prefix, all of transformers' without."""
    bare = name.removeprefix(BACKBONE)
    return BACKBONE + bare if spec.backbone == "unet" else bare


def _current(_spec: FamilySpec, name: str) -> str:
    """A name in a text encoder as transformers has had it since 2022; many a merged file still has older ones."""
    begin, older, rest = name.partition("cond_stage_model.transformer.")
    return f"{older}text_model.{rest}" if older and not begin and not rest.startswith("text_model.") else name


def _build(loader: Any, found: SingleFile, part: str, **options: Any) -> Any:
    """A part from its weights in the file, by diffusers' converters; what is missing stays without memory."""
    from diffusers.loaders import single_file_model
    from diffusers.loaders import single_file_utils as converters
    from safetensors import safe_open

    rename = _original if part == found.spec.backbone else _current
    with safe_open(found.path, "pt") as file:  # other parts stay on disk
        weights = {rename(found.spec, name): file.get_tensor(name) for name in found.names(part)}
    options |= {"config": str(found.settings), "subfolder": part}
    if part in (found.spec.backbone, "vae"):
        quantizer = single_file_model.DiffusersAutoQuantizer
        # Else diffusers takes what a file holds for quantised already, and finds no scales.
        quantize_anew = partial(quantizer.from_config, pre_quantized=False)
        try:
            with patch.object(quantizer, "from_config", quantize_anew):
                return loader.from_single_file(weights, **options)
        except converters.SingleFileComponentError as error:  # no weight has a name that it knows
            raise ValueError(error) from error
    if loader.__name__ == "T5EncoderModel":
        build = converters.create_diffusers_t5_model_from_checkpoint
    else:
        build = converters.create_diffusers_clip_model_from_ldm
    built = build(loader, checkpoint=weights, **options)
    built.tie_weights()  # of T5's two names for its embedding a file may have one
    return built.eval()  # diffusers leaves T5 with its dropout at work


def _tokenizer(loader: Any, found: SingleFile, part: str) -> Any:
    """A tokenizer from beside the file, from `model.parts` if that is on disk, from the package, or from the hub."""
    if (beside := _beside(found, part)) is not None:
        return hub.load(loader, str(beside))
    folder = hub.local(found.parts)
    if loader.__name__ == "CLIPTokenizer" and not (folder and _is_tokenizer(folder / part)):
        return _clip_tokenizer(loader, found, part)
    return _borrowed(loader, found, part)


def _beside(found: SingleFile, part: str) -> Path | None:
    folder = found.path.parent / part
    return folder if "tokenizer" in part and _is_tokenizer(folder) else None


def _is_tokenizer(folder: Path) -> bool:
    """Whether a folder has a whole tokenizer: a vocabulary without merges would spell every word out."""
    whole = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "spiece.model"))
    return whole or all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))


def _clip_tokenizer(loader: Any, found: SingleFile, part: str) -> Any:
    """CLIP's tokenizer from its merges: single bytes, the same at the end of a word, what is merged, and two marks."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    encoder = part.replace("tokenizer", "text_encoder")
    activation = hub.read_object(found.settings / encoder / "config.json").get("hidden_act")
    letters = list(bytes_to_unicode().values())
    merges = [tuple(line.split()) for line in CLIP_MERGES.read_text(encoding="utf-8").splitlines()[1:]]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    return loader(
        vocab={token: index for index, token in enumerate(vocabulary)},
        merges=merges,
        pad_token="!" if activation == "gelu" else "<|endoftext|>",  # OpenCLIP's models, and OpenAI's
        model_max_length=CLIP_TOKENS,
    )


def _borrowed(loader: Any, found: SingleFile, part: str, **options: Any) -> Any:
    """A part that the file lacks, from `model.parts`."""
    if loader.__module__.startswith("transformers.") and "torch_dtype" in options:
        options["dtype"] = options.pop("torch_dtype")
    with _borrowing(found, [part]):
        return hub.load(loader, found.parts, subfolder=part, **options)


@contextmanager
def _borrowing(found: SingleFile, parts: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except ModelError as error:
        raise ModelError(
            f"{found.path} holds no {' and no '.join(parts)}; it is to come from model.parts={found.parts}: {error}"
        ) from error
