"""Puts the trained parts together as the package ships them: Hugging Face folders, fp16 safetensors of limited size."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import BlipForConditionalGeneration, BlipProcessor, CLIPTextModel, CLIPTokenizer

from scripts.embedded.autoencoder import autoencoder_folder
from scripts.embedded.captioner import captioner_folder
from scripts.embedded.diffusion import diffusion_folder, new_scheduler
from scripts.embedded.settings import Settings
from scripts.embedded.vocabularies import save_clip_tokenizer

SHIPPED = torch.float16
MAX_SHARD = "14MB"
MAX_FILE_MIB = 15
MODELS = ("diffusion", "captioner", "detector")  # the language model is made by a script of its own
MAX_TOTAL_MIB = 62


def export(settings: Settings) -> None:
    """Write finetune/embedded/{diffusion,captioner} below the root and check what a reader of them relies on."""
    trained = diffusion_folder(settings.work)
    export_diffusion(
        settings.embedded / "diffusion",
        vae=AutoencoderKL.from_pretrained(autoencoder_folder(settings.work)),
        unet=UNet2DConditionModel.from_pretrained(trained / "unet"),
        text_encoder=CLIPTextModel.from_pretrained(trained / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(trained / "tokenizer"),
        scheduler=new_scheduler(),
    )
    if "captioner" not in settings.kept:
        source = captioner_folder(settings.work)
        export_model(
            settings.embedded / "captioner",
            model=BlipForConditionalGeneration.from_pretrained(source),
            processor=BlipProcessor.from_pretrained(source),
        )
    settle_files(settings.embedded)


def export_diffusion(
    folder: Path,
    *,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    scheduler: DPMSolverMultistepScheduler,
) -> None:
    clear(folder)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(dtype=SHIPPED)
    pipeline.save_pretrained(folder, max_shard_size=MAX_SHARD)
    save_clip_tokenizer(tokenizer, folder / "tokenizer")
    load_as_fp32(folder / "text_encoder")
    loaded = StableDiffusionPipeline.from_pretrained(folder)
    dtypes = {name: part.dtype for name, part in loaded.components.items() if hasattr(part, "dtype")}
    if set(dtypes.values()) != {torch.float32}:
        raise TypeError(f"{folder} loads in mixed precision: {dtypes}")
    for part in ("vae", "unet", "text_encoder"):
        check_finite(folder / part)


def export_model(folder: Path, *, model: Any, processor: Any) -> None:
    clear(folder)
    model.to(SHIPPED).save_pretrained(folder, max_shard_size=MAX_SHARD)
    load_as_fp32(folder)
    processor.save_pretrained(folder)
    check_finite(folder)


def load_as_fp32(folder: Path) -> None:
    """Ask transformers for fp32 when nobody says otherwise.

    It would take the files' fp16, which CPUs compute slowly, and which would not fit the fp32 that diffusers takes.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "dtype" in part:
            part["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")


def clear(folder: Path) -> None:
    """Start from nothing: a shard left over from an earlier export would be shipped with the new ones."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def check_finite(folder: Path) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if not tensor.isfinite().all():
                raise ValueError(f"{path}: {name} holds values that fp16 cannot; train that part again")


def settle_files(embedded: Path) -> None:
    paths = [path for name in MODELS for path in (embedded / name).rglob("*") if path.is_file()]
    sizes = {path: path.stat().st_size / 2**20 for path in paths}
    for path, mib in sizes.items():
        path.chmod(0o644)  # safetensors writes files that only their owner can read
        if mib > MAX_FILE_MIB:
            raise ValueError(f"{path} has {mib:.1f} MiB; a shipped file may have {MAX_FILE_MIB}")
    total_mib = sum(sizes.values())
    if total_mib > MAX_TOTAL_MIB:
        raise ValueError(f"{embedded} has {total_mib:.1f} MiB; the shipped models may have {MAX_TOTAL_MIB}")
    print(f"export: {total_mib:.1f} MiB in {embedded}", flush=True)


def parameter_millions(folder: Path) -> float:
    """Parameters in the weight files of one model's folder, in millions."""
    return sum(tensor.numel() for path in folder.glob("*.safetensors") for tensor in load_file(path).values()) / 1e6
