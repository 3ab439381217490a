"""The files that an adapter is exported in and read from: PEFT folders and kohya-style safetensors."""

import copy
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.adapters import lora
from finetune.errors import ModelError

# A text-only model loaded from one that also reads images keeps, in this attribute, the prefix that its layers have in
# the full model. An adapter is exported under the full model's names, which is what everybody else loads.
FULL_MODEL_PREFIX, TEXT_MODEL_PREFIX = "full_model_prefix", "model."
FULL_TO_TEXT_MODEL = {r"^model\.language_model\.": TEXT_MODEL_PREFIX}  # as PEFT's `key_mapping`
OTHER_MODALITIES = r".*(vision|audio).*"  # parts of the full model whose layers have the same names
KOHYA_FACTORS = {"lora_A": "lora_down", "lora_B": "lora_up"}
PEFT_FACTORS = {kohya: peft for peft, kohya in KOHYA_FACTORS.items()}


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
    return {_text_model_name(name.removeprefix("base_model.model.")): weight for name, weight in weights.items()}


def _text_model_name(name: str) -> str:
    for pattern, prefix in FULL_TO_TEXT_MODEL.items():
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
    config: Any = copy.copy(model.peft_config[lora.ADAPTER])  # type: ignore[index]
    config.base_model_name_or_path = base
    config.inference_mode = True
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
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})


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
    return file


def from_kohya(model: nn.Module, weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor] | None:
    """A kohya-style file under PEFT's names, alpha / r within B; None if it has other keys than layers of `model`."""
    layers = {_kohya_name(prefix, name): name for name, _ in model.named_modules()}
    found = {}
    for key, weight in weights.items():
        layer, _, factor = key.removesuffix(".weight").rpartition(".")
        if layer not in layers or factor not in (*PEFT_FACTORS, "alpha"):
            return None
        if factor == "lora_up":
            weight = weight * (weights[f"{layer}.alpha"] / weight.shape[1])
        if factor in PEFT_FACTORS:
            found[f"{layers[layer]}.{PEFT_FACTORS[factor]}.weight"] = weight
    return found


def is_kohya(weights: Mapping[str, Tensor]) -> bool:
    """Whether a file has kohya-style keys."""
    return any(name.endswith(".lora_down.weight") for name in weights)


def _kohya_name(prefix: str, layer: str) -> str:
    return prefix + (layer if prefix.endswith(".") else layer.replace(".", "_"))
