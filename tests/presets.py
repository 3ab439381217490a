"""Model presets, and their bases cut short, without weights."""

import copy
import json
import shutil
from functools import cache
from pathlib import Path

from finetune import hub
from finetune.config import compose, recipes
from finetune.config.schema import ModelConfig

LAYERS = ("num_hidden_layers", "num_layers", "num_single_layers", "n_layers")  # by what name a part counts them
PER_BLOCK = ("layers_per_block", "transformer_layers_per_block", "num_res_blocks")


def preset(name: str) -> ModelConfig:
    """A copy of one's own."""
    return copy.deepcopy(_composed(name))


def is_language(name: str) -> bool:
    return "kind: language" in recipes.preset_files()["model"][name].read_text()


@cache
def _composed(name: str) -> ModelConfig:
    return compose.load("pirate_chat" if is_language(name) else "pixar_style", [f"model={name}"]).model


def shortened(base: str, folder: Path) -> Path:
    """The configuration of a base with two layers in each of its parts, or one in each block: all are alike."""
    shutil.copytree(hub.config_folder(base), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in (*folder.glob("config.json"), *folder.glob("*/config.json")):
        settings = json.loads(file.read_text())
        counted = settings.get("text_config", settings)
        counted |= {name: 2 for name in LAYERS if name in counted}
        counted |= {name: 1 for name in PER_BLOCK if name in counted}
        counted |= {"dual_attention_layers": [0]} if "dual_attention_layers" in counted else {}
        settings.pop("layer_types", None)
        file.write_text(json.dumps(settings))
    return folder
