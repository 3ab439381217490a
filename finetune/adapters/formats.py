"""The files that an adapter is exported in and read from: PEFT folders and single safetensors files.

r rank, O output features of a layer.
"""

import copy
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor, nn

from finetune import hub
from finetune.adapters import lora
from finetune.config.spelling import setting
from finetune.errors import ModelError
from finetune.reading import read_text, require_file
from finetune.run.progress import plural, say

# A text-only model loaded from one that also reads images keeps, in this attribute, the prefix that its layers have in
# the full model. An adapter is exported under the full model's names, which is what everybody else loads.
FULL_MODEL_PREFIX, TEXT_MODEL_PREFIX = "full_model_prefix", "model."
FULL_TO_TEXT_MODEL = {r"^model\.language_model\.": TEXT_MODEL_PREFIX}  # as PEFT's `key_mapping`
OTHER_MODALITIES = r".*(vision|audio).*"  # parts of the full model whose layers have the same names
PEFT_DEFAULT = 8  # of r and lora_alpha
LARGEST_ALPHA = 1e9  # far above any; its product with weights is still finite in fp32
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
BASE_CONTENT = "base_content"  # in the metadata of a file of ours
ON_DISK = "sha256:"  # begins the content of a base on disk (`hub.content_hash`)
KOHYA_FACTORS = {"lora_A": "lora_down", "lora_B": "lora_up"}
A, B, MAGNITUDE, ALPHA = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "alpha"
PARTS = {"lora_A": A, "lora_down": A, "lora_B": B, "lora_up": B, MAGNITUDE: MAGNITUDE, ALPHA: ALPHA, "lora_mid": ""}
"""Parts of a layer's adapter, by their names in files of any program; LoCon's third factor has no place in PEFT."""
KEY = re.compile(rf"(?P<layer>.+?)\.(?P<part>{'|'.join(PARTS)})(\.(?!bias)\w+)?(\.weight)?")
FACTOR_A = re.compile(r"\.lora_(?:embedding_)?A")
EARLY_DIFFUSERS = re.compile(r".+[._]lora\.(down|up)\.weight")  # named after attention processors, without an alpha
PREFIXES = (
    *("base_model.model.", "diffusion_model.", "transformer.", "unet."),
    *("lora_transformer_", "lora_unet_", "lycoris_", ""),
)
"""What may stand before a layer's name; the rest may have underscores for dots."""
TEXT_ENCODERS = ("lora_te", "text_encoder")  # begin names of their layers
CONVERTER_ERRORS = (ValueError, LookupError, RuntimeError, TypeError, AttributeError)
STARTS_AS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""PEFT's starts that leave the base's weights as they are. After others A and B add to weights that no file holds."""
OTHER_FUNCTIONS = (
    *("alora_invocation_tokens", "layer_replication", "use_qalora", "use_bdlora", "arrow_config", "kasa_config"),
    "monteclora_config",
)
"""Settings of PEFT's LoRA with which the same factors are another function than LoRA, rsLoRA or DoRA."""


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter that was read from a file.

    weights: under PEFT's names, as `lora.load_state` takes them. scales: by layer, the factor of its update B A.
    unused: what else the file holds.
    """

    weights: dict[str, Tensor]
    scales: dict[str, float]
    unused: tuple[str, ...] = ()

    def describe_unused(self) -> str:
        """How many tensors aren't used, of which kinds, and the first; empty if all are."""
        if not self.unused:
            return ""
        kinds = ", ".join(sorted({key.removesuffix(".weight").rpartition(".")[2] for key in self.unused})[:5])
        count = plural(len(self.unused), "tensor")
        return f"{count} without a place in this base ({kinds}; first {self.unused[0]})"


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of an adapter's file. Raises ModelError for a missing or damaged one, or if one is not finite."""
    from safetensors.torch import load_file

    if not path.exists():
        raise ModelError(f"{path} does not exist; name a PEFT folder, or the .safetensors file of an adapter")
    if path.suffix.lower() != ".safetensors":
        raise ModelError(f"{path}: adapters are read from .safetensors files; get it in that format")
    with _explained(path):
        require_file(path)
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                raise ValueError(f"{name} is not finite")
    return tensors


def _explained(path: Path) -> AbstractContextManager[None]:
    return hub.explained(lambda reason: f"{path} is damaged ({reason}); export it again or restore it from a copy")


def peft_folder(path: Path) -> Path:
    """The PEFT folder in a run folder or its `adapter/`, or around a PEFT folder's weights; any other path as it is."""
    if path.name == PEFT_WEIGHTS and (path.parent / PEFT_CONFIG).exists():
        return path.parent  # the file alone doesn't say how strong it is
    return next((inner for inner in (path / "peft", path / "adapter" / "peft") if (inner / PEFT_CONFIG).exists()), path)


def holds_weights(path: Path) -> bool:
    """Whether a path is a file, or a folder with an adapter's weights in it."""
    return path.is_file() or any((path / name).is_file() for name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS))


def require_start(path: Path) -> None:
    """Raises ModelError where there is no adapter to start from; whether it fits shows when it is read."""
    named = setting("lora.start_from", path)
    try:
        found = holds_weights(peft_folder(path))
    except OSError as error:  # a folder above is closed to this user
        raise ModelError(f"{named} can't be read ({error.strerror}); make it readable, or name another") from error
    if not found:
        raise ModelError(
            f"{named} names no adapter; name a run folder, a PEFT folder or, for an image model, a .safetensors file"
        )


def read_peft_folder(folder: Path) -> dict[str, Tensor]:
    """An exported PEFT adapter's weights under the names that `load_state` takes. Raises ModelError."""
    return {_text_model_name(name): weight for name, weight in _as_saved(folder).items()}


def _as_saved(folder: Path) -> dict[str, Tensor]:
    """Under the names of the model that the adapter was made for, which `rank_pattern` and `alpha_pattern` use too."""
    if folder.is_file():
        raise ModelError(f"{folder} is a file, and only an image model takes one; name a PEFT folder")
    weights = read_weights(folder / PEFT_WEIGHTS)
    return {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}


def read_peft_config(folder: Path) -> dict[str, Any]:
    """A PEFT folder's settings. Raises ModelError if they are damaged, or those of anything but a LoRA."""
    path = folder / PEFT_CONFIG
    with _explained(path):
        settings = json.loads(read_text(path))
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind != "LORA":
        raise ModelError(f"{path} is of type {kind}, and only LORA adapters are read")
    _require_strength(settings, path)
    if variant := next((name for name in OTHER_FUNCTIONS if settings.get(name)), ""):
        raise ModelError(f"{path} sets {variant}, and only plain LoRA, rsLoRA and DoRA are read")
    return dict(settings)


def made_for(path: Path) -> tuple[str, str]:
    """The base of an adapter, a PEFT folder or a file: what it was called, and its content; empty if unknown."""
    from safetensors import safe_open

    settings = read_peft_config(path) if (path / PEFT_CONFIG).is_file() else {}
    file = path / PEFT_WEIGHTS if path.is_dir() else path
    metadata: dict[str, str] = {}
    if file.is_file() and file.suffix.lower() == ".safetensors":
        with _explained(file), safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
    name = settings.get("base_model_name_or_path", metadata.get("base"))
    return name if isinstance(name, str) else "", metadata.get(BASE_CONTENT, "")


def is_of_base(path: Path, base: str, content: str) -> bool:
    """Whether an adapter was made for a base, by content (`kinds.Kind.contents`) where both are known, else by name.

    True for an adapter that doesn't say. A model on the hub and a copy of it on disk have no common content.
    """
    return _is_same(*made_for(path), base, content)


def _is_same(name: str, known: str, base: str, content: str) -> bool:
    if known and known.startswith(ON_DISK) == content.startswith(ON_DISK):
        return known == content
    return not name or _model_name(name) == _model_name(base)


def warn_of_another_base(path: Path, base: str, content: str) -> None:
    """Say that an adapter was made for another base: where the shapes fit, nothing else shows it."""
    name, known = made_for(path)
    if _is_same(name, known, base, content):
        return
    name = name or "another base"
    if name == base:
        say(f"warning: {path} was trained on {name} with other weights or settings than it has now")
    else:
        own = setting("model.base", name)
        say(f"warning: {path} was trained on {name}, and model.base is {base}; if that is another model, try {own}")


def _model_name(base: str) -> str:
    """Of a path, or of an id on the hub, what names the model in both."""
    return PurePath(base.rpartition("@")[0] or base).name.casefold()


def _require_strength(settings: Mapping[str, Any], path: Path) -> None:
    """Raises ModelError unless ranks are above 0 and alphas finite, of single layers too."""
    for name, pattern, least in (("r", "rank_pattern", 1), ("lora_alpha", "alpha_pattern", -LARGEST_ALPHA)):
        layers = settings.get(pattern) or {}
        values = layers.values() if isinstance(layers, dict) else [None]
        for value in (settings.get(name, PEFT_DEFAULT), *values):
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= LARGEST_ALPHA:
                raise ModelError(f"{path} is damaged ({name} is {value}); export it again or restore it from a copy")
    if not any((settings.get("lora_alpha", PEFT_DEFAULT), *(settings.get("alpha_pattern") or {}).values())):
        raise ModelError(f"{path}: lora_alpha is 0, so the adapter changes nothing; take another checkpoint's")


def read_peft(folder: Path) -> StoredAdapter:
    """A PEFT folder from any trainer. Raises ModelError if it is missing, damaged, or changes the base besides."""
    saved = _as_saved(folder)
    settings = read_peft_config(folder)
    if (start := settings.get("init_lora_weights", True)) not in STARTS_AS_BASE:
        raise ModelError(
            f"{folder} was saved with init_lora_weights={start}, which changes the base too; save it again with "
            "PEFT's path_initial_model_for_weight_conversion"
        )
    with _explained(folder / PEFT_CONFIG):
        scales = {_text_model_name(layer): _scale(settings, layer) for layer in _layers(saved)}
    return StoredAdapter({_text_model_name(name): weight for name, weight in saved.items()}, scales)


def _layers(weights: Iterable[str]) -> set[str]:
    """Names of layers that have a factor A."""
    return {FACTOR_A.split(name)[0] for name in weights if FACTOR_A.search(name)}


def _scale(settings: Mapping[str, Any], layer: str) -> float:
    """What PEFT multiplies a layer's update by: alpha / r, or alpha / sqrt(r) for rsLoRA."""
    rank = _of_layer(settings.get("rank_pattern"), layer, settings.get("r", PEFT_DEFAULT))
    alpha = _of_layer(settings.get("alpha_pattern"), layer, settings.get("lora_alpha", PEFT_DEFAULT))
    return float(alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def _of_layer(patterns: Mapping[str, float] | None, layer: str, default: float) -> float:
    """The first of `patterns` that ends the layer's name, as PEFT finds it."""
    matching = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", layer))
    return next(matching, default)


def _text_model_name(name: str) -> str:
    for pattern, prefix in FULL_TO_TEXT_MODEL.items():
        name = re.sub(pattern, prefix, name)
    return name


def save_peft(model: nn.Module, folder: Path, weights: Mapping[str, Tensor], base: str, content: str = "") -> None:
    """Write a PEFT folder that `PeftModel.from_pretrained` reads into the untouched base.

    weights: as from `state`, or an average of what is trained. content: the base's, if it is known. PiSSA becomes an
    ordinary adapter of twice the rank. LoftQ's base is the one quantised to nf4. Tokens beyond the base's vocabulary
    need `resize_token_embeddings` before it is read.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config: Any = copy.copy(model.peft_config[lora.ADAPTER])  # type: ignore[index]
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set: another order in each process
    if hasattr(model, "generate"):  # AutoPeftModelForCausalLM asks for it
        config.task_type = "CAUSAL_LM"
    tensors = lora.adapter_tensors(model)
    if initial := {name: start for name, start in tensors.items() if name.endswith(".initial")}:
        weights = _join_initial(weights, initial)
        config.r *= 2
        config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2  # the scale stays
    prefix = getattr(model, FULL_MODEL_PREFIX, None)
    if prefix:
        config.exclude_modules = OTHER_MODALITIES
        weights = {re.sub(rf"^{TEXT_MODEL_PREFIX}", prefix, name): weight for name, weight in weights.items()}
    config.save_pretrained(folder)
    named = {f"base_model.model.{name}": weight for name, weight in weights.items()}
    metadata = {"format": "pt"} | ({BASE_CONTENT: content} if content else {})
    save_file(named, folder / PEFT_WEIGHTS, metadata=metadata)
    sort_metadata(folder / PEFT_WEIGHTS)


def _join_initial(weights: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PiSSA's change B A − B₀ A₀ as an ordinary adapter of twice the rank."""
    joined = {name: weight for name, weight in weights.items() if name not in initial}
    for name, start in initial.items():
        factor = name.removesuffix("initial") + "weight"
        joined[factor] = torch.cat([weights[factor], start.to(weights[factor])], 0 if ".lora_A." in name else 1)
    return joined


def save_kohya(
    file: Path, weights: Mapping[str, Tensor], prefix: str, alpha: float, metadata: Mapping[str, str]
) -> Path:
    """Write one safetensors file with kohya-style keys, as other programs read it.

    prefix: begins the name of each layer; after one that ends with a dot names keep their dots, else they get
    underscores.
    """
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    named = {}
    for name, weight in weights.items():
        layer, _, factor = name.removesuffix(".weight").rpartition(".")
        key = _kohya_name(prefix, layer)
        named[f"{key}.{KOHYA_FACTORS[factor]}.weight"] = weight.contiguous()
        named[f"{key}.alpha"] = torch.tensor(float(alpha))
    save_file(named, file, metadata=dict(metadata))
    sort_metadata(file)
    return file


def sort_metadata(file: Path) -> None:
    """Put a safetensors file's metadata in order, in place: safetensors writes another order in each process."""
    with open(file, "r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        if metadata := header.get("__metadata__"):
            header["__metadata__"] = dict(sorted(metadata.items()))
            ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length)
            if len(ordered) == length:  # else the tensors behind would move; safetensors spells it as Python does
                stream.seek(8)
                stream.write(ordered)


def read_file(
    path: Path, part: str, layers: Iterable[str], convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> StoredAdapter:
    """An adapter in one safetensors file of any program; its strength is within B, so all scales are 1.

    The strength is the file's alphas, else that of PEFT's settings in its metadata, as diffusers writes them for each
    `part` of a pipeline, else 1. layers: names in the base. convert: other programs' names of layers to the base's.
    Raises ModelError for a missing or damaged file.
    """
    tensors = read_weights(path)
    forms = {form: name for name in layers for form in (name.replace(".", "_"), name)}
    pairs, unused = _complete_pairs(tensors)
    weights, others = _renamed(pairs, forms)
    if foreign := {key: tensor for key, tensor in others.items() if not key.startswith(TEXT_ENCODERS)}:
        try:
            converted, left = _renamed(convert(dict(foreign)), forms)
        except CONVERTER_ERRORS:  # each converter meets an unknown name in its own way
            converted, left = {}, foreign
        weights |= converted
        others = {key: tensor for key, tensor in others.items() if key not in foreign} | left
    if not any(key.endswith(f".{ALPHA}") for key in tensors):
        settings = _peft_settings(path, part)
        for layer in _layers(weights) if settings else ():
            weights[f"{layer}.{B}"] = weights[f"{layer}.{B}"] * _scale(settings, layer)
    return StoredAdapter(weights, dict.fromkeys(_layers(weights), 1.0), (*others, *unused))


def _peft_settings(path: Path, part: str) -> dict[str, Any]:
    """PEFT's settings of a part in the metadata of a diffusers file; empty without."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        stored = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    found = {key.removeprefix(f"{part}."): value for key, value in stored.items() if key.startswith(f"{part}.")}
    _require_strength(found, path)
    return found


def _complete_pairs(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The pairs A and B with alpha / r in B, under the file's names, and the names of everything else."""
    parts: dict[str, dict[str, str]] = {}
    for key in tensors:
        if match := KEY.fullmatch(key):
            parts.setdefault(match["layer"], {})[PARTS[match["part"]]] = key
    found: dict[str, Tensor] = {}
    used: set[str] = set()
    for keys in parts.values():
        if not keys.keys() >= {A, B} or "" in keys:
            continue
        found |= {key: tensors[key] for part, key in keys.items() if part != ALPHA}
        if ALPHA in keys:
            up_Or = tensors[keys[B]]
            found[keys[B]] = up_Or * (float(tensors[keys[ALPHA]]) / up_Or.shape[1])
        used.update(keys.values())
    early = {key: tensor for key, tensor in tensors.items() if EARLY_DIFFUSERS.fullmatch(key)}
    return found | early, [key for key in tensors if key not in used | early.keys()]


def _renamed(tensors: Mapping[str, Tensor], forms: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Those of the base's layers under PEFT's names, and the others. forms: layers by what files may call them."""
    found, others = {}, {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        names = [match["layer"].removeprefix(prefix) for prefix in PREFIXES if key.startswith(prefix)] if match else []
        layer = next((forms[name] for name in names if name in forms), None)
        if match and layer:
            found[f"{layer}.{PARTS[match['part']]}"] = tensor
        else:
            others[key] = tensor
    return found, others


def _kohya_name(prefix: str, layer: str) -> str:
    return prefix + (layer if prefix.endswith(".") else layer.replace(".", "_"))
