"""The code on an image adapter's card: it loads the model that was trained, from a file that was exported."""

import json
from collections.abc import Sequence

import torch

from finetune import hub
from finetune.config.schema import ExportFormat, ModelConfig, Quantize
from finetune.diffusion.families import family
from finetune.diffusion.pipeline import ADAPTER_FILE
from finetune.memory import quantize

OTHER_PROGRAMS = "# ComfyUI and other programs take the kohya-style file: its strength (alpha) is in it.\n"


def usage(
    model: ModelConfig,
    *,
    dtype: torch.dtype,
    formats: Sequence[ExportFormat],
    kohya_file: str,
    prompt: str,
    steps: int,
) -> str:
    """Python that loads an adapter and draws a prompt, `{base}` to be filled in as `str.format` does.

    dtype: of the training's arithmetic, in which a quantised base computes. formats: that were exported. kohya_file:
    the name of the kohya-style one.
    """
    base_imports, load_base = _base(model, dtype)
    adapter_imports, load_adapter = _adapter(model, formats, kohya_file)
    side = model.resolution
    return f"""{base_imports}{adapter_imports}
{load_base}{load_adapter}{OTHER_PROGRAMS if ExportFormat.kohya in formats else ""}
image = pipeline({_text(prompt)}, width={side}, height={side}, num_inference_steps={steps}).images[0]
image.save("image.png")
"""


def _base(model: ModelConfig, dtype: torch.dtype) -> tuple[str, str]:
    """What to import to load the base as `pipeline`, and how: stored as the adapter was trained and compared."""
    spec = family(model.family)
    if hub.single_file(model.base) is not None:
        return _single_file(model, dtype)
    if model.quantize is Quantize.none:
        return "from diffusers import DiffusionPipeline\n", "pipeline = DiffusionPipeline.from_pretrained({base})\n"
    options = f'subfolder="{spec.backbone}", quantization_config=stored, torch_dtype={dtype}'
    load = f'{spec.backbone}={spec.backbone}, torch_dtype={dtype}).to("cuda")'
    return f"import torch\nfrom diffusers import BitsAndBytesConfig, DiffusionPipeline, {spec.backbone_class}\n", (
        f"stored = {quantize.as_code(model.quantize, dtype)}\n"
        f"{spec.backbone} = {spec.backbone_class}.from_pretrained({{base}}, {options})\n"
        f"pipeline = DiffusionPipeline.from_pretrained({{base}}, {load}\n"
    )


def _single_file(model: ModelConfig, dtype: torch.dtype) -> tuple[str, str]:
    """Diffusers guesses a file's configuration, fetches no part that it lacks, and doesn't quantise its weights."""
    part = family(model.family).backbone
    source = f"base={{base}}, family={model.family!r}, parts={_text(model.parts)}"
    if model.quantize is Quantize.none:
        imports = (
            "from finetune.config.schema import ModelConfig\nfrom finetune.diffusion.pipeline import load_pipeline\n"
        )
        return imports, f"pipeline = load_pipeline(ModelConfig({source}), {{{{}}}})\n"
    imports = """import torch
from finetune.config.schema import ModelConfig, Quantize
from finetune.diffusion.pipeline import load_backbone, load_pipeline
"""
    return imports, (
        f"model = ModelConfig({source}, quantize={model.quantize})\n"
        f'{part} = load_backbone(model, {dtype}, torch.device("cuda"))\n'
        f'stored = {{{{"default": {dtype}}}}}\n'
        f'pipeline = load_pipeline(model, {{{{"{part}": {part}}}}}, torch_dtype=stored).to("cuda")\n'
    )


def _adapter(model: ModelConfig, formats: Sequence[ExportFormat], kohya_file: str) -> tuple[str, str]:
    """What to import to load the adapter into `pipeline`, and how: as diffusers does it itself, if that is possible."""
    spec = family(model.family)
    backbone = f"pipeline.{spec.backbone}"
    if ExportFormat.diffusers in formats:
        return "", f'pipeline.load_lora_weights("adapter", weight_name="{ADAPTER_FILE}")\n'
    if ExportFormat.kohya in formats and spec.diffusers_reads_kohya:
        return "", f'pipeline.load_lora_weights("adapter", weight_name={_text(kohya_file)})\n'
    if ExportFormat.peft in formats:
        return "from peft import PeftModel\n", f'PeftModel.from_pretrained({backbone}, "adapter/peft")  # changes it\n'
    imports = """from pathlib import Path
from finetune.config.schema import ModelConfig
from finetune.diffusion.pipeline import load_adapter  # diffusers doesn't read the kohya-style file
"""
    file = f'Path("adapter", {_text(kohya_file)})'
    return imports, f'load_adapter(ModelConfig(family="{model.family}"), {backbone}, {file})\n'


def _text(text: str) -> str:
    """A text as Python writes it, safe from `str.format`."""
    return json.dumps(text, ensure_ascii=False).replace("{", "{{").replace("}", "}}")
