"""Hand a diffusion adapter out in every dialect, and prove each file by loading it into a fresh base."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.config import Config, Dialect
from finetune.errors import ExportError
from finetune.models import adapters, lora
from finetune.models.device import pick_device
from finetune.models.diffusion import load_unet
from finetune.progress import say
from finetune.records import Run, hash_of

USAGE = """from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("{base}")
pipeline.load_lora_weights("adapter", weight_name="pytorch_lora_weights.safetensors")
"""
PROBE_SEED = 20240131  # any fixed number: the inputs of the comparison


def write(
    config: Config, run: Run, weights: dict[str, Tensor], averaged: dict[str, Tensor] | None, folder: Path
) -> tuple[dict[str, str], dict[str, float]]:
    """Write the adapter into `folder` in each of `export.dialects`, and its average, if there is one, in diffusers'.

    Returns the files by dialect (relative to `folder`) and, by dialect, ‖loaded − trained‖ / ‖trained‖ of the UNet's
    output in fp32 on fixed inputs. Raises ExportError if one is over `export.tolerance`.
    """
    device = pick_device(config.hardware.device)
    trained = _with_adapter(config, weights).to(device)
    files: dict[str, str] = {}
    for dialect in config.export.dialects:
        if dialect is Dialect.peft:
            lora.save_peft(trained, folder / "peft", weights, config.model.base)
            files["peft"] = "peft"
        elif dialect is Dialect.diffusers:
            files["diffusers"] = lora.save_diffusers(trained, folder, weights).name
        else:
            file = folder / f"{config.name}.safetensors"
            files["kohya"] = lora.save_kohya(file, weights, config.lora.alpha, _metadata(config, run)).name
    probe = _probe(trained, device)
    reference = probe(trained)
    effect = _relative(probe(load_unet(config.model.base, torch.float32).to(device)), reference)
    if effect <= config.export.tolerance:
        say(f"export: the adapter changes the output by only {effect:.1e}; was it trained long enough?")
    differences = {}
    for dialect_name, file_name in files.items():
        loaded = load(load_unet(config.model.base, torch.float32), folder / file_name).to(device)
        differences[dialect_name] = _relative(probe(loaded), reference)
        if not differences[dialect_name] <= config.export.tolerance:  # NaN fails too
            raise ExportError(
                f"the {dialect_name} adapter {folder / file_name} does not reproduce the trained one: "
                f"relative difference {differences[dialect_name]:.1e}, allowed {config.export.tolerance:.1e} "
                "(export.tolerance)"
            )
    if averaged is not None:
        files["ema"] = lora.save_diffusers(trained, folder, averaged, "pytorch_lora_weights_ema.safetensors").name
    return files, differences


def load(unet: nn.Module, path: Path) -> nn.Module:
    """The UNet with an adapter in any dialect: a PEFT folder, or a diffusers or kohya-style safetensors file.

    Raises ModelError if the adapter is missing, damaged, or made for another base.
    """
    from diffusers import StableDiffusionPipeline

    adapters.require(path)
    if path.is_dir():
        return adapters.attach(unet, path).get_base_model()  # type: ignore[no-any-return]
    weights = lora.read_weights(path)  # names a damaged file better than the libraries do
    with adapters.fitting(path):
        state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
            dict(weights) if _is_kohya(weights) else str(path), return_lora_metadata=True, unet_config=None
        )
        StableDiffusionPipeline.load_lora_into_unet(state, alphas, unet, metadata=metadata)
    return unet.eval()


def _is_kohya(weights: dict[str, Tensor]) -> bool:
    return any(name.endswith(".lora_down.weight") for name in weights)


def _with_adapter(config: Config, weights: dict[str, Tensor]) -> nn.Module:
    """The trained module in fp32, rebuilt from the base and the checkpoint's weights."""
    model = lora.inject(
        load_unet(config.model.base, torch.float32),
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        dropout=config.lora.dropout,
        targets=config.model.lora_targets[config.lora.targets],
        seed=config.seed,
    )
    lora.load_state(model, weights, "the checkpoint")
    return model.eval()


def _probe(unet: Any, device: torch.device) -> Callable[[nn.Module], Tensor]:
    """A function that gives any UNet of this shape the same fixed inputs: two noise levels, random text embeddings."""
    random = torch.Generator().manual_seed(PROBE_SEED)
    side = unet.config.sample_size
    side = side if isinstance(side, int) else side[0]
    latents_BChw = torch.randn((2, unet.config.in_channels, side, side), generator=random).to(device)
    text_BLD = torch.randn((2, 77, unet.config.cross_attention_dim), generator=random).to(device)
    timesteps_B = torch.tensor([100, 800], device=device)

    @torch.no_grad()
    def run(model: nn.Module) -> Tensor:
        output: Tensor = model(latents_BChw, timesteps_B, encoder_hidden_states=text_BLD, return_dict=False)[0]
        return output

    return run


def _relative(value: Tensor, reference: Tensor) -> float:
    return float(torch.linalg.vector_norm(value - reference) / torch.linalg.vector_norm(reference))


def _metadata(config: Config, run: Run) -> dict[str, str]:
    """What a stranger who finds the file needs; the ss_ keys are those other programs show."""
    return {
        "recipe": config.name,
        "base": config.model.base,
        "rank": str(config.lora.rank),
        "alpha": str(config.lora.alpha),
        "trigger_phrase": config.caption.trigger,
        "training_hash": run.training_hash,
        "steps": str(run.steps),
        "adapter_id": hash_of(config.name, run.training_hash)[:16],
        "ss_base_model_version": config.model.base,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.lora.rank),
        "ss_network_alpha": str(config.lora.alpha),
        "ss_output_name": config.name,
    }
