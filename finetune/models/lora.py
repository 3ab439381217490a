"""LoRA on a module through PEFT: inject, read, write, and every file format an adapter is handed out in."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import ModelError

ADAPTER = "default"  # PEFT's own default name


def inject(
    model: nn.Module, *, rank: int, alpha: float, dropout: float, targets: Sequence[str], seed: int
) -> nn.Module:
    """Put fp32 adapters of that rank on every layer whose name ends with one of `targets`.

    The update starts at zero. Raises ModelError if no layer matches.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), init_lora_weights=True
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, model, adapter_name=ADAPTER)
        except ValueError as error:
            raise ModelError(
                f"no layer of the base matches lora targets {list(targets)}; try another lora.targets"
            ) from error
    for parameter in adapter_parameters(model):
        parameter.data = parameter.data.float()  # small updates vanish in 16 bit
    return model


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What is trained, in a fixed order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def counts(model: nn.Module) -> tuple[int, int]:
    """Trainable parameters, all parameters."""
    return sum(p.numel() for p in adapter_parameters(model)), sum(p.numel() for p in model.parameters())


def live(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's own tensors under PEFT's names (`…lora_A.weight`), not copies."""
    named = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {name.removeprefix("module.").replace(f".{ADAPTER}.", "."): parameter.detach() for name, parameter in named}


def state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights under PEFT's names, fp32 copies on the CPU."""
    return {name: weight.float().cpu().clone().contiguous() for name, weight in sorted(live(model).items())}


def load_state(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Put an adapter's weights into a model with injected adapters. Raises ModelError if names or shapes differ."""
    from peft import set_peft_model_state_dict

    own = state(model)
    if own.keys() != weights.keys():
        odd = sorted(own.keys() ^ weights.keys())
        raise ModelError(f"{source} does not fit: {len(odd)} layers differ, first {odd[0]}; was lora.targets changed?")
    for name, weight in weights.items():
        if weight.shape != own[name].shape:
            raise ModelError(
                f"{source} does not fit: {name} is {tuple(weight.shape)}, here {tuple(own[name].shape)}; "
                "set lora.rank to match"
            )
    set_peft_model_state_dict(model, dict(weights), adapter_name=ADAPTER)


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
    return {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}


def save_peft(model: nn.Module, folder: Path, weights: Mapping[str, Tensor], base: str) -> None:
    """Write a PEFT folder that `PeftModel.from_pretrained` reads."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config: Any = model.peft_config[ADAPTER]  # type: ignore[index]
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(folder)
    named = {f"base_model.model.{name}": weight for name, weight in weights.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def save_diffusers(
    model: nn.Module, folder: Path, weights: Mapping[str, Tensor], name: str = "pytorch_lora_weights.safetensors"
) -> Path:
    """Write `name`, which `pipeline.load_lora_weights` reads; alpha travels in its metadata."""
    from diffusers import StableDiffusionPipeline

    folder.mkdir(parents=True, exist_ok=True)
    StableDiffusionPipeline.save_lora_weights(
        folder,
        # PEFT's names for every layer: diffusers' converter renames only some, and its loader judges by the first
        unet_lora_layers=dict(weights),
        weight_name=name,
        unet_lora_adapter_metadata=model.peft_config[ADAPTER].to_dict(),  # type: ignore[index,union-attr]
    )
    return folder / name


def save_kohya(file: Path, weights: Mapping[str, Tensor], alpha: float, metadata: Mapping[str, str]) -> Path:
    """Write one safetensors file with kohya-style keys, as other programs read it."""
    from diffusers.utils import convert_state_dict_to_kohya
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    named = convert_state_dict_to_kohya({f"unet.{name}": weight for name, weight in weights.items()})
    for name in named:
        if name.endswith(".alpha"):  # the converter writes the rank here, whatever alpha was
            named[name] = torch.tensor(float(alpha))
    save_file({name: weight.contiguous() for name, weight in named.items()}, file, metadata=dict(metadata))
    return file
