"""Measure what a style recipe on the embedded base does, with readers that never saw a sample.

python scripts/measure_style.py RUN_DIR [--prompts 100]: draws prompts of combinations that the base never met, with the
trigger phrase, base and tuned from the same noise, and prints the shares that the readers in tests/readers read right.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetune.config.schema import ModelConfig
from finetune.diffusion.image_sampler import ImageSampler
from finetune.diffusion.pipeline import load_adapter, load_backbone
from scripts.embedded.evaluate import content_figures, held_out_scenes, share
from scripts.embedded.readers import load_reader, read
from scripts.toyworld.captions import caption
from scripts.toyworld.scene import Scene

READERS = Path(__file__).resolve().parents[1] / "tests" / "readers"
FIRST_SEED = 95_000_000  # scenes that no training set holds
BASE = ModelConfig(base="embedded:diffusion")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--trigger", default="pixar style")
    given = parser.parse_args()
    figures = measure(
        given.run_dir / "adapter" / "peft",
        prompts=given.prompts,
        steps=given.steps,
        guidance=given.guidance,
        trigger=given.trigger,
    )
    print(json.dumps(figures, indent=2))


def measure(adapter: Path, *, prompts: int, steps: int, guidance: float, trigger: str) -> dict[str, dict[str, float]]:
    """For base and tuned: shares of samples read as "pixar" and "flat", and of those whose content is read right."""
    scenes = held_out_scenes(FIRST_SEED, prompts)
    jobs = [(f"{caption(scene)}, {trigger}", index) for index, scene in enumerate(scenes)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    image_sampler = ImageSampler(BASE, [prompt for prompt, _ in jobs], "", device, torch.float32)
    figures = {}
    for name in ("base", "tuned"):
        backbone = load_backbone(BASE, torch.float32)
        backbone = (load_adapter(BASE, backbone, adapter) if name == "tuned" else backbone).to(device)
        images = image_sampler.generate(backbone, jobs, width=128, height=128, steps=steps, guidance=guidance)
        figures[name] = shares(images, scenes)
    return figures


def shares(images: Sequence[Any], scenes: Sequence[Scene]) -> dict[str, float]:
    """What the readers make of PIL images of these scenes, as shares of all."""
    images_N3PP = torch.stack([torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) for image in images])
    style = read(load_reader(READERS / "style.safetensors"), images_N3PP)["style"]
    return {
        "pixar": share([label == "pixar" for label in style]),
        "flat": share([label == "flat" for label in style]),
        **content_figures(load_reader(READERS / "content.safetensors"), images_N3PP, list(scenes)),
    }


if __name__ == "__main__":
    main()
