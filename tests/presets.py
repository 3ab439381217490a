"""Model presets, and their bases cut short, without weights."""

import json
import shutil
from pathlib import Path

from finetune import hub
from finetune.config import compose, recipes
from finetune.config.schema import ModelConfig


def preset(name: str) -> ModelConfig:
    of_language = "kind: language" in recipes.preset_files()["model"][name].read_text()
    return compose.load("pirate_chat" if of_language else "pixar_style", [f"model={name}"]).model


def shortened(base: str, folder: Path) -> Path:
    """The configuration of a base with two of its layers, or one in each block of a UNet: all are alike."""
    shutil.copytree(hub.config_folder(base), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in (folder / "config.json", folder / "transformer" / "config.json"):
        if file.exists():
            settings = json.loads(file.read_text())
            counted = settings.get("text_config", settings)
            counted |= dict.fromkeys(("num_hidden_layers", "num_layers", "num_single_layers", "n_layers"), 2)
            counted |= {"dual_attention_layers": [0]} if "dual_attention_layers" in counted else {}
            settings.pop("layer_types", None)
            file.write_text(json.dumps({key: settings[key] for key in settings}))
    unet = folder / "unet" / "config.json"
    if unet.exists():
        single = {"layers_per_block": 1, "transformer_layers_per_block": 1}
        unet.write_text(json.dumps(json.loads(unet.read_text()) | single))
    return folder
