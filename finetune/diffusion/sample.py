"""Draw a recipe's prompts with the base and with the tuned model, side by side."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from finetune.config.schema import ModelConfig, SampleConfig
from finetune.diffusion.image_sampler import ImageSampler, images_at_once
from finetune.diffusion.pipeline import load_adapter, load_backbone
from finetune.memory.device import release_memory
from finetune.run.progress import plural, progress, say, shortened
from finetune.run.records import Sample

CELL = 192  # pixels an image takes in the grid, if it is smaller than that
GAP = 8
TEXT = 15  # font size of prompts and headings


def sample(
    model: ModelConfig,
    settings: SampleConfig,
    adapter: Path,
    adapter_name: str,
    references: Sequence[Any],
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    vram_gib: float,
) -> tuple[str, tuple[Sample, ...]]:
    """Every prompt and seed, base and tuned from the same noise, as PNGs into `folder`, and `grid.png` of all pairs.

    Prompt, seed, steps, guidance and adapter (`adapter_name`) are in each PNG's metadata, prompt and seed in
    `samples.jsonl` too. references: PIL images of the data set, shown above the grid as far as one row holds them.
    Returns the grid's name and the samples with file names relative to `folder`.
    """
    image_sampler = ImageSampler(model, settings.prompts, settings.negative, device, dtype)
    for prompt, tail in image_sampler.truncated.items():
        words = plural(len(tail.split()), "word")
        say(f"warning: the prompt {shortened(prompt, 60)} is truncated: {words} dropped: {shortened(tail)}")
    jobs = [(prompt, seed) for prompt in settings.prompts for seed in settings.seeds]
    drawn: dict[str, list[Any]] = {}
    side, count = model.resolution, images_at_once(model.resolution, len(settings.seeds))
    with progress("sample", 2 * len(jobs), unit="images") as bar:
        for kind in ("tuned", "base"):  # an adapter that can't be used is reported before anything is drawn
            backbone = load_backbone(model, dtype, device, vram_gib=vram_gib)
            if kind == "tuned":
                backbone = load_adapter(model, backbone, adapter)
            drawn[kind] = []
            for start in range(0, len(jobs), count):
                part = jobs[start : start + count]
                drawn[kind] += image_sampler.generate(
                    backbone, part, width=side, height=side, steps=settings.steps, guidance=settings.guidance
                )
                bar.advance(len(part))
            del backbone
            release_memory()  # two of them don't fit every GPU
    items = []
    for index, (prompt, seed) in enumerate(jobs):
        names = {kind: f"{index:03d}-seed{seed}-{kind}.png" for kind in drawn}
        for kind, name in names.items():
            facts = {
                "prompt": prompt,
                "negative_prompt": settings.negative,
                "seed": str(seed),
                "steps": str(settings.steps),
                "guidance": str(settings.guidance),
                "base": model.base,
                "adapter": adapter_name if kind == "tuned" else "",
            }
            save_png(drawn[kind][index], folder / name, facts)
        items.append(Sample(prompt, seed, names["tuned"], names["base"]))
    lines = [
        json.dumps({"prompt": item.prompt, "seed": item.seed, "file": item.file, "base_file": item.base_file})
        for item in items
    ]
    (folder / "samples.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    rows = [
        (prompt, [(drawn["base"][i], drawn["tuned"][i]) for i, job in enumerate(jobs) if job[0] == prompt])
        for prompt in dict.fromkeys(settings.prompts)
    ]
    grid(rows, references).save(folder / "grid.png")
    return "grid.png", tuple(items)


def grid(rows: Sequence[tuple[str, Sequence[tuple[Any, Any]]]], references: Sequence[Any] = ()) -> Any:
    """One image: per prompt a line of text and its (base, tuned) pairs, each half named; two prompts side by side.

    references: what the tuned images should look like, in a row above.
    """
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    font = ImageFont.load_default(TEXT)
    cell = max(CELL, max(image.width for _, pairs in rows for pair in pairs for image in pair))
    pairs_wide = max(len(pairs) for _, pairs in rows)
    columns = 2 if len(rows) > 1 else 1
    block = pairs_wide * (2 * cell + GAP) + GAP
    line = cell + 2 * TEXT + 4 * GAP
    width = columns * block + (columns + 1) * GAP
    first = cell + TEXT + 4 * GAP if references else 0
    sheet = Image.new("RGB", (width, first + -(-len(rows) // columns) * line + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    if references:
        pen.text((GAP, GAP), "some images of the data set", fill="black", font=font)
    for number, image in enumerate(references[: (width - GAP) // (cell + GAP)]):
        shown = ImageOps.fit(image, (cell, cell), Image.Resampling.LANCZOS)
        sheet.paste(shown, (GAP + number * (cell + GAP), TEXT + 2 * GAP))
    for index, (prompt, pairs) in enumerate(rows):
        left, top = GAP + (index % columns) * (block + GAP), first + GAP + (index // columns) * line
        pen.text((left, top), _fitting(prompt, font, block), fill="black", font=font)
        for number, pair in enumerate(pairs):
            for half, (name, image) in enumerate(zip(("base", "tuned"), pair, strict=True)):
                x = left + number * (2 * cell + GAP) + half * cell
                sheet.paste(image.resize((cell, cell), Image.Resampling.LANCZOS), (x, top + 2 * TEXT + GAP))
                pen.text((x + 2, top + TEXT + GAP - 2), name, fill="gray", font=font)
    return sheet


def _fitting(text: str, font: Any, width: int) -> str:
    """The text in one line, cut with an ellipsis where it is wider than `width` pixels."""
    text = shortened(text, width)  # no letter is narrower than a pixel, and measuring thousands takes minutes
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def save_png(image: Any, file: Path | BinaryIO, facts: dict[str, str]) -> None:
    """Write a PNG with `facts` as its metadata."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in facts.items():
        info.add_itxt(key, value)
    image.save(file, "PNG", pnginfo=info)
