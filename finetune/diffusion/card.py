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
    spec, is_file = family(model.family), hub.single_file(model.base) is not None
    pipeline, loader = "DiffusionPipeline", "from_pretrained"
    if is_file:
        pipeline, loader = spec.pipeline, "from_single_file"  # the others have no loader of single files
    if model.quantize is Quantize.none:
        return f"from diffusers import {pipeline}\n", f"pipeline = {pipeline}.{loader}({{base}})\n"
    load = f"{spec.backbone}={spec.backbone}, torch_dtype={dtype}"
    load = f'pipeline = {pipeline}.{loader}({{base}}, {load}).to("cuda")\n'
    if is_file:
        imports = f"""import torch
from diffusers import {pipeline}
from finetune.config.schema import ModelConfig, Quantize
from finetune.diffusion.pipeline import load_backbone  # diffusers doesn't quantise the weights of a single file
"""
        stored = f"family={model.family!r}, parts={_text(model.parts)}, quantize={model.quantize}"
        return imports, (
            f"model = ModelConfig(base={{base}}, {stored})\n"
            f'{spec.backbone} = load_backbone(model, {dtype}, torch.device("cuda"))\n{load}'
        )
    options = f'subfolder="{spec.backbone}", quantization_config=stored, torch_dtype={dtype}'
    return f"import torch\nfrom diffusers import BitsAndBytesConfig, {pipeline}, {spec.backbone_class}\n", (
        f"stored = {quantize.as_code(model.quantize, dtype)}\n"
        f"{spec.backbone} = {spec.backbone_class}.from_pretrained({{base}}, {options})\n{load}"
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
