"""The code on an image adapter's card: it loads the model that was trained, from a file that was exported."""

import json
from collections.abc import Sequence

from finetune import hub
from finetune.config.schema import ExportFormat, ModelConfig
from finetune.diffusion.families import family
from finetune.diffusion.pipeline import ADAPTER_FILE

OTHER_PROGRAMS = "# ComfyUI and other programs take the kohya-style file: its strength (alpha) is in it.\n"


def usage(model: ModelConfig, *, formats: Sequence[ExportFormat], kohya_file: str, prompt: str, steps: int) -> str:
    """Python that loads an adapter and draws a prompt, `{base}` to be filled in as `str.format` does.

    formats: that were exported. kohya_file: the name of the kohya-style one.
    """
    pipeline, loader = "DiffusionPipeline", "from_pretrained"
    if hub.single_file(model.base) is not None:
        pipeline, loader = (
            family(model.family).pipeline,
            "from_single_file",
        )  # the others have no loader of single files
    imports, load = _adapter(model, formats, kohya_file)
    side = model.resolution
    return f"""from diffusers import {pipeline}
{imports}
pipeline = {pipeline}.{loader}({{base}})
{load}{OTHER_PROGRAMS if ExportFormat.kohya in formats else ""}
image = pipeline({_text(prompt)}, width={side}, height={side}, num_inference_steps={steps}).images[0]
image.save("image.png")
"""


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
