"""Export a diffusion adapter in every format, and prove each file by loading it into a fresh base."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune import hub
from finetune.adapters import formats, lora
from finetune.config.schema import Config, ExportFormat, Quantize
from finetune.diffusion.families import family
from finetune.diffusion.families.base import MASK
from finetune.diffusion.pipeline import load_adapter, load_backbone, save_adapter
from finetune.errors import ExportError
from finetune.memory import block_offload
from finetune.memory.device import pick_device, pick_dtype, release_memory, usable_bytes
from finetune.run.hashing import hash_of
from finetune.run.progress import say
from finetune.run.records import Run

USAGE = """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({base})
pipeline.load_lora_weights("adapter", weight_name="pytorch_lora_weights.safetensors")
# ComfyUI and other programs take the kohya-style file: its strength (alpha) is in it.
"""
EMA_FILE = "pytorch_lora_weights_ema.safetensors"
PROBE_SEED = 20240131  # any fixed number: the inputs of the comparison
PROBE_SIDE = 16  # latent pixels
FP32_SHARE = 0.8  # of the memory for weights in fp32; the rest is for what they compute


def write(
    config: Config, run: Run, weights: dict[str, Tensor], averaged: dict[str, Tensor] | None, folder: Path
) -> tuple[dict[str, str], dict[str, float]]:
    """Write the adapter into `folder` in each of `export.formats`, and its average, if there is one, in diffusers'.

    Returns the files by format (relative to `folder`) and, by format, ‖loaded − trained‖ / ‖trained‖ of the
    output in fp32 on fixed inputs. Raises ExportError if one is over `export.tolerance`.
    """
    device = pick_device(config.hardware.device)
    trained = _with_adapter(config, weights, device)
    files: dict[str, str] = {}
    for export_format in config.export.formats:
        if export_format is ExportFormat.peft:
            formats.save_peft(trained, folder / "peft", weights, config.model.base)
            files["peft"] = "peft"
        elif export_format is ExportFormat.diffusers:
            files["diffusers"] = save_adapter(config.model, trained, folder, weights).name
        else:
            file, names = folder / f"{config.name}.safetensors", family(config.model.family).KOHYA
            files["kohya"] = formats.save_kohya(file, weights, names, config.lora.alpha, _metadata(config, run)).name
    if averaged is not None:
        files["ema"] = save_adapter(config.model, trained, folder, averaged, EMA_FILE).name
    probe = _probe(config, device)
    reference = probe(trained)
    del trained  # two of them don't fit every GPU
    release_memory()
    effect = _relative(probe(_base(config, device)), reference)
    if effect <= config.export.tolerance:
        say(f"export: the adapter changes the output by only {effect:.1e}; was it trained long enough?")
    differences = {}
    for format_name, file_name in files.items():
        if format_name == "ema":
            continue
        release_memory()
        loaded = load_adapter(config.model, _base(config, device), folder / file_name)
        differences[format_name] = _relative(probe(loaded), reference)
        del loaded
        if not differences[format_name] <= config.export.tolerance:  # NaN fails too
            raise ExportError(
                f"the {format_name} adapter {folder / file_name} does not reproduce the trained one: "
                f"relative difference {differences[format_name]:.1e}, allowed {config.export.tolerance:.1e} "
                "(export.tolerance)"
            )
    return files, differences


def usage(config: Config) -> str:
    """Python that loads an adapter, `{base}` to be filled in: single files have loaders in their own pipelines only."""
    if hub.single_file(config.model.base) is None:
        return USAGE
    pipeline = family(config.model.family).PIPELINE
    return USAGE.replace("from_pretrained", "from_single_file").replace("DiffusionPipeline", pipeline)


def _base(config: Config, device: torch.device) -> nn.Module:
    """The base to compare on: in fp32, or where that doesn't fit the GPU, as it was trained on."""
    plain, vram_gib = config.model.quantize is Quantize.none, config.hardware.vram_gib
    if plain and block_offload.is_active(config.model, device):  # what doesn't fit stays in CPU memory
        return load_backbone(config.model, torch.float32, device, vram_gib=vram_gib)
    base = load_backbone(config.model, pick_dtype(config.trainer.precision, device), device, vram_gib=vram_gib)
    fits = 4 * sum(weight.numel() for weight in base.parameters()) < FP32_SHARE * usable_bytes(device, vram_gib)
    return base.float() if plain and fits else base


def _with_adapter(config: Config, weights: dict[str, Tensor], device: torch.device) -> nn.Module:
    """The trained module, rebuilt from the base and the checkpoint's weights."""
    model = lora.inject(
        _base(config, device),
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        dropout=config.lora.dropout,
        targets=config.model.lora_targets[config.lora.targets],
        seed=config.seed,
    )
    lora.load_state(model, weights, "the checkpoint")
    return model.eval()


def _probe(config: Config, device: torch.device) -> Callable[[nn.Module], Tensor]:
    """A function that gives any backbone of this base the same random latents and texts, at two noise levels."""
    kind = family(config.model.family)

    @torch.no_grad()
    def run(model: Any) -> Tensor:
        random = torch.Generator().manual_seed(PROBE_SEED)
        shape = (2, kind.latent_channels(model.config), PROBE_SIDE, PROBE_SIDE)
        latents_BChw = torch.randn(shape, generator=random)
        text = {
            name: (torch.ones(2, *shape) if name == MASK else torch.randn((2, *shape), generator=random)).to(device)
            for name, shape in sorted(kind.text_shapes(model.config).items())
        }
        dtype = next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
            predicted = kind.predict(model, latents_BChw.to(device), torch.tensor([100, 800], device=device), text)
        return predicted.float()

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
