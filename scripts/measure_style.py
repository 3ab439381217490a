"""Measure what a style recipe on the embedded base does: one table with all figures, for a finished run.

python scripts/measure_style.py RUN_DIR [--prompts 200]: draws prompts that no training saw, compares the samples with
renders of the same scenes, and asks readers that never saw a sample. Run it where the data folder is.

N pictures of 3×P×P pixels, uint8 unless said otherwise.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetune.config.schema import ModelConfig
from finetune.diffusion.image_sampler import ImageSampler
from finetune.diffusion.pipeline import load_adapter, load_backbone
from finetune.run.metrics import read_rows
from finetune.run.rundir import written_config
from scripts.embedded.augment import to_float
from scripts.embedded.crispness import laplacian
from scripts.embedded.evaluate import content_figures, held_out_scenes, share
from scripts.embedded.readers import READER_PX, Reader, features_of, load_reader, read
from scripts.toyworld.captions import caption
from scripts.toyworld.looks import HELD_OUT
from scripts.toyworld.output import DATASET_SUPERSAMPLE
from scripts.toyworld.render import render

READERS = Path(__file__).resolve().parents[1] / "tests" / "readers"
FIRST_SEED, CLASSIFIER_SEED = 95_000_000, 96_000_000  # scenes that no training set holds
BASE = ModelConfig(base="embedded:diffusion")
CROP = 7 / 8  # of the width: shifted crops and mirroring make more of few pictures, and blur none
CLASSIFIER_STEPS, CLASSIFIER_BATCH, CLASSIFIER_LR = 300, 32, 2e-3
CLASSIFIERS = 3  # one alone may have learnt nothing

FIGURES = {
    "style": ("read as the look of the trigger", "at least 0.98"),
    "thing_and_colour": ("thing and colour read right", "at least 0.97"),
    "setting": ("setting read right", "at least 0.95"),
    "crispness": ("mean absolute Laplacian, of that of renders", "0.90 to 1.15"),
    "told_from_renders": ("the best of three fresh classifiers tells samples from renders", "at most 0.75"),
    "validation_over_training": ("held-out loss over training loss", "at most 1.5"),
    "novelty": ("distance to the nearest training image, of that of renders", "at least 1"),
    "flat_without_trigger": ("read as flat, without the trigger", "as the base, 0.99"),
    "flat_without_adapter": ("read as flat, trigger without the adapter", "as the base, 0.99"),
}
"""Each figure's meaning and what it should be. A classifier that guesses is right in 0.5."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    given = parser.parse_args()
    figures = measure(given.run_dir, prompts=given.prompts)
    if given.json:
        print(json.dumps(figures, indent=2))
        return
    print(f"| {given.prompts} unseen prompts | measured | wanted |\n|---|---|---|")
    for name, value in figures.items():
        meaning, wanted = FIGURES[name]
        print(f"| {meaning} | {value:.3f} | {wanted} |")


def measure(run_dir: Path, *, prompts: int) -> dict[str, float]:
    """Every one of FIGURES; without the loss ratio where the run held no image out.

    Raises FileNotFoundError for a folder without an adapter, ValueError for the trigger of another look.
    """
    config = written_config(run_dir)
    if not (run_dir / "adapter" / "peft").is_dir():
        raise FileNotFoundError(f"{run_dir} holds no finished run; give the folder that `finetune train` printed")
    trigger, drawing = config["caption"]["trigger"], config["sample"]
    look = look_of(trigger)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scenes, others = held_out_scenes(FIRST_SEED, prompts), held_out_scenes(CLASSIFIER_SEED, prompts)
    plain = [caption(scene) for scene in scenes]
    triggered, for_classifier = ([f"{caption(scene)}, {trigger}" for scene in part] for part in (scenes, others))
    image_sampler = ImageSampler(BASE, [*plain, *triggered, *for_classifier], "", torch.device(device), torch.float32)

    def samples(backbone: Any, texts: list[str]) -> Tensor:
        jobs, size = [(text, seed) for seed, text in enumerate(texts)], {"width": READER_PX, "height": READER_PX}
        how = {"steps": drawing["steps"], "guidance": drawing["guidance"]}
        return stacked(image_sampler.generate(backbone.to(device), jobs, **size, **how))

    base = load_backbone(BASE, torch.float32)
    untuned = samples(base, triggered)
    tuned = load_adapter(BASE, base, run_dir / "adapter" / "peft")
    made = samples(tuned, triggered)
    rendered, other_renders = (
        render(part, look, READER_PX, device, DATASET_SUPERSAMPLE).cpu() for part in (scenes, others)
    )
    content = load_reader(READERS / "content.safetensors")
    figures = {
        "style": style_share(made, look),
        **content_figures(content, made, scenes),
        "crispness": laplacian(to_float(made)) / laplacian(to_float(rendered)),
        "told_from_renders": told_apart((other_renders, samples(tuned, for_classifier)), (rendered, made), device),
        **loss_ratio(run_dir),
        "novelty": novelty(content, made, rendered, training_images(run_dir, Path(config["data"]["folder"]))),
        "flat_without_trigger": style_share(samples(tuned, plain), "flat"),
        "flat_without_adapter": style_share(untuned, "flat"),
    }
    return {name: round(figures[name], 4) for name in FIGURES if name in figures}


def look_of(trigger: str) -> str:
    """The look that a trigger phrase names."""
    for name in HELD_OUT:
        if name in trigger:
            return name
    raise ValueError(f"the trigger must name one of {', '.join(HELD_OUT)}, got {trigger!r}")


def stacked(images: Sequence[Any]) -> Tensor:
    """PIL images as one tensor."""
    return torch.stack([torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) for image in images])


def style_share(images_N3PP: Tensor, look: str) -> float:
    style = read(load_reader(READERS / "style.safetensors"), images_N3PP)["style"]
    return share([label == look for label in style])


def told_apart(known: tuple[Tensor, Tensor], unseen: tuple[Tensor, Tensor], device: str = "cpu") -> float:
    """How often the best of CLASSIFIERS fresh classifiers is right on two sets of unseen pictures, having learnt from
    two sets of known ones."""
    return max(_told_apart(known, unseen, device, seed) for seed in range(CLASSIFIERS))


def _told_apart(known: tuple[Tensor, Tensor], unseen: tuple[Tensor, Tensor], device: str, seed: int) -> float:
    """By one classifier.

    It has the form of the readers and learns for CLASSIFIER_STEPS, or two steps a picture where that is less, from
    shifted and mirrored crops, both sets in every batch in equal parts; it judges the middle of each unseen picture.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    classifier = Reader({"set": ("first", "second")}).to(device).train()
    batch = min(CLASSIFIER_BATCH // 2, *map(len, known))
    px = round(CROP * known[0].shape[-1])
    spare = known[0].shape[-1] - px
    steps = min(CLASSIFIER_STEPS, 2 * sum(map(len, known)))
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=CLASSIFIER_LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    answers = torch.arange(2, device=device).repeat_interleave(batch)
    for _ in range(steps):
        rows = [torch.randperm(len(part), generator=generator)[:batch] for part in known]
        images_B3PP = torch.cat([part[chosen] for part, chosen in zip(known, rows, strict=True)])
        left, top, mirrored = (int(torch.randint(n, (), generator=generator)) for n in (spare + 1, spare + 1, 2))
        crops_B3PP = images_B3PP[..., top : top + px, left : left + px]
        crops_B3PP = crops_B3PP.flip(3) if mirrored else crops_B3PP
        loss = functional.cross_entropy(classifier(to_float(crops_B3PP.to(device)))["set"], answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    classifier.eval()
    edge = spare // 2
    hits: list[bool] = []
    with torch.no_grad():
        for answer, images_N3PP in enumerate(unseen):
            middle_N3PP = images_N3PP[..., edge : edge + px, edge : edge + px]
            logits_N2 = classifier(to_float(middle_N3PP.to(device)))["set"]
            hits += (logits_N2.argmax(1) == answer).tolist()
    return share(hits)


def loss_ratio(run_dir: Path) -> dict[str, float]:
    """Last validation loss over last smoothed training loss."""
    last = {tag: value for row in read_rows(run_dir) for tag, value in row.values.items()}
    validation = last.get("validation/mean")
    return {} if validation is None else {"validation_over_training": validation / last["loss/smoothed"]}


def training_images(run_dir: Path, folder: Path) -> Tensor:
    """What the run was trained on, cropped and resized as it was."""
    rows = [json.loads(line) for line in (run_dir / "dataset.jsonl").read_text(encoding="utf-8").splitlines()]
    size = (READER_PX, READER_PX)
    images = [
        Image.open(folder / row["file"]).convert("RGB").resize(size, Image.Resampling.LANCZOS, box=row["crop"])
        for row in rows
        if not row["held_out"]
    ]
    return stacked(images)


def novelty(content: Reader, made: Tensor, rendered: Tensor, trained: Tensor) -> float:
    """Mean distance to the nearest training image in the reader's features, over that of unseen renders."""
    features = features_of(content, trained)
    made_N, rendered_N = (torch.cdist(features_of(content, part), features).amin(1) for part in (made, rendered))
    return float(made_N.mean() / rendered_N.mean())


if __name__ == "__main__":
    main()
