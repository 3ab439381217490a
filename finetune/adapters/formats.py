"""The files that an adapter is exported in and read from: PEFT folders and kohya-style safetensors."""

import copy
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.adapters.lora import ADAPTER, starts
from finetune.errors import ModelError

# A language model taken out of one that also reads images has this attribute: where its layers are in the whole. An
# adapter is exported under the whole's names, which is what everybody else loads.
PART_OF, TEXT_MODEL = "part_of", "model."
WITHIN = {r"^model\.language_model\.": TEXT_MODEL}
OTHER_PARTS = r".*(vision|audio).*"  # of the whole, where layers have the same names
KOHYA_FACTORS = {"lora_A": "lora_down", "lora_B": "lora_up"}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Raises ModelError for a missing or damaged one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise ModelError(f"{path} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged ({error}); export it again or restore it from a copy") from error


def peft_folder(path: Path) -> Path:
    """The PEFT folder in a run's `adapter/` folder; any other path as it is."""
    return path / "peft" if (path / "peft" / "adapter_config.json").exists() else path


def read_peft_folder(folder: Path) -> dict[str, Tensor]:
    """An exported PEFT adapter's weights under the names that `load_state` takes."""
    weights = read_weights(folder / "adapter_model.safetensors")
    return {_inner(name.removeprefix("base_model.model.")): weight for name, weight in weights.items()}


def _inner(name: str) -> str:
    """A layer's name in the language model alone."""
    for pattern, prefix in WITHIN.items():
        name = re.sub(pattern, prefix, name)
    return name


def save_peft(model: nn.Module, folder: Path, weights: Mapping[str, Tensor], base: str) -> None:
    """Write a PEFT folder that `PeftModel.from_pretrained` reads into the untouched base.

    weights: as from `state`, or an average of what is trained. PiSSA becomes an ordinary adapter of twice the rank.
    LoftQ's base is the one quantised to nf4. Tokens beyond the base's vocabulary need `resize_token_embeddings` before
    it is read.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config: Any = copy.copy(model.peft_config[ADAPTER])  # type: ignore[index]
    config.base_model_name_or_path = base
    config.inference_mode = True
    begun = {name: start.float().cpu() for name, start in starts(model).items()}
    plain = _plain(begun | dict(weights))
    if begun:
        config.r *= 2
        config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2  # the scale stays
    within = getattr(model, PART_OF, None)
    if within:
        config.exclude_modules = OTHER_PARTS
    config.save_pretrained(folder)
    named = {
        f"base_model.model.{re.sub(rf'^{TEXT_MODEL}', within, name) if within else name}": weight
        for name, weight in plain.items()
    }
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})


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
    return file


def from_kohya(model: nn.Module, weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor] | None:
    """A kohya-style file under PEFT's names, alpha / r within B; None if it has other keys than layers of `model`."""
    layers = {_kohya_name(prefix, name): name for name, _ in model.named_modules()}
    found = {}
    for key, weight in weights.items():
        layer, _, factor = key.removesuffix(".weight").rpartition(".")
        if layer not in layers or factor not in (*KOHYA_FACTORS.values(), "alpha"):
            return None
        if factor == "lora_up":
            weight = weight * (weights[f"{layer}.alpha"] / weight.shape[1])
        if factor != "alpha":
            found[f"{layers[layer]}.{'lora_A' if factor == 'lora_down' else 'lora_B'}.weight"] = weight
    return found


def is_kohya(weights: Mapping[str, Tensor]) -> bool:
    """Whether a file has kohya-style keys."""
    return any(name.endswith(".lora_down.weight") for name in weights)


def _kohya_name(prefix: str, layer: str) -> str:
    return prefix + (layer if prefix.endswith(".") else layer.replace(".", "_"))


def _plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PiSSA's weights without its starts, as an ordinary adapter of twice the rank."""
    plain = {name: weight for name, weight in weights.items() if not name.endswith(".initial")}
    for name in weights.keys() - plain.keys():
        factor = name.removesuffix("initial") + "weight"
        plain[factor] = torch.cat([weights[factor], weights[name]], 0 if ".lora_A." in name else 1)
    return plain
