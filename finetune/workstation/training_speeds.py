"""What `finetune bench` measures of training: steps of the example recipes, and ResNet-50.

Images and conversations are made up in a folder of their own, so that no data set has to be there. B images.
"""

import contextlib
import io
import itertools
import json
import random
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from finetune import kinds
from finetune.config import compose, typed_text
from finetune.config.schema import Precision
from finetune.data.images.ahead import ahead
from finetune.memory.device import DTYPES, peak_gib, pick_precision, release_memory, reset_peak
from finetune.run.records import Caption, CaptionSet
from finetune.training.accelerator import build_accelerator, without_cudnn_attention
from finetune.training.trainer import Trainer
from finetune.workstation.meanwhile import Meanwhile
from finetune.workstation.measuring import Measure, Meter, Speed, now, rounds

RECIPES: dict[str, list[str]] = {"pixar_style": [], "pirate_chat": []}
"""Name -> overrides."""
EXAMPLES = 16  # images, and conversations, that are made up
PHOTO, CROP = (320, 256), 224  # pixels: about an image of ImageNet after its usual reduction, and what ResNet sees
GPU_BATCHES, CPU_BATCHES = (32, 64, 128), (1,)  # of ResNet-50; one image takes two cores a second


def every_measurement(device: torch.device, precision: Precision) -> dict[str, Measure]:
    """By name; each takes a number of repeats."""
    batches = GPU_BATCHES if device.type == "cuda" else CPU_BATCHES
    steps: dict[str, Measure] = {f"train-{each}": partial(lora_steps, recipe=each, device=device) for each in RECIPES}
    return steps | {"resnet50": partial(resnet, batches=batches, device=device, precision=precision)}


def lora_steps(repeats: int, *, recipe: str, device: torch.device) -> Iterator[Speed]:
    """Optimiser steps of an example recipe, with its model, batch and settings, by the trainer."""
    with tempfile.TemporaryDirectory() as scratch, without_cudnn_attention(), torch.random.fork_rng():
        folder = Path(scratch)
        data = {"data.folder": str(folder), "data.file": _conversations(folder / "chats.jsonl")}
        config = compose.load(recipe)
        kind = kinds.of(config)
        own = {kind.FACTS.data_key: data[kind.FACTS.data_key], "run_dir": scratch, "data.cache": scratch}
        config = compose.load(recipe, [*RECIPES[recipe], *typed_text.as_words(own)])
        with contextlib.redirect_stderr(io.StringIO()):  # what is made up is worth no word
            captions = _photos(folder, config.caption.trigger) if kind.FACTS.captioned else None
            task = kind.build_task(config, kind.build_dataset(config, captions), device)
        trainer = Trainer(
            task=task,
            accelerator=build_accelerator(pick_precision(config.trainer.precision, device), device),
            run_dir=folder,
            trainer=config.trainer,
            optim=config.optim,
            sample=config.sample,
            seed=config.seed,
            machine=Meanwhile(device),
            hint="end other programs on this GPU",
        )
        steps, rates, meter = trainer.steps(), [], Meter(device)
        next(steps)  # kernels are chosen, and prefetching begins
        for number, step in zip(rounds(repeats), steps, strict=False):
            if number == 0:
                meter.start()
            else:
                rates.append(step.count / step.seconds)
        trainer.close()
        yield Speed(f"train-{recipe}", f"{task.unit}/s", True, tuple(rates))
        yield from meter.energy(f"train-{recipe}", "step", len(rates))


def resnet(repeats: int, *, batches: tuple[int, ...], device: torch.device, precision: Precision) -> Iterator[Speed]:
    """Iterations of ResNet-50 with random weights on made-up JPEGs: with a batch that is there, and with loading."""
    from transformers import ResNetConfig, ResNetForImageClassification

    model: Any = ResNetForImageClassification(ResNetConfig(num_labels=1000)).to(device)
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    with tempfile.TemporaryDirectory() as scratch:
        files = [str(Path(scratch) / item.file) for item in _photos(Path(scratch)).items]
        for size in batches:
            release_memory()
            yield from _resnet(repeats, size, model, optimizer, files, device, precision)
        loading = []
        for _ in rounds(repeats):
            began = now(device)
            _batch(files, device)
            loading.append(len(files) / (now(device) - began))
        yield Speed("resnet50-loading", "images/s", True, tuple(loading[1:]))


def _resnet(
    repeats: int,
    size: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    files: list[str],
    device: torch.device,
    precision: Precision,
) -> Iterator[Speed]:
    name, named = f"resnet50-b{size}", list(itertools.islice(itertools.cycle(files), size))
    ready_B3HW, meter = _batch(named, device), Meter(device)
    labels_B = torch.zeros(size, dtype=torch.long, device=device)

    def iterations(load: bool) -> list[float]:
        seconds = []
        for number in rounds(repeats):
            if number == 1:
                meter.start()
            began = now(device)
            pixels_B3HW = _batch(named, device) if load else ready_B3HW
            with torch.autocast(device.type, DTYPES[precision], enabled=precision is not Precision.fp32):
                loss: Tensor = model(pixels_B3HW, labels=labels_B).loss
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(now(device) - began)
        return seconds[1:]

    reset_peak(device)
    computing = iterations(load=False)
    yield Speed(name, "iterations/s", True, tuple(1 / each for each in computing))
    yield from meter.utilisation(name)
    yield from meter.energy(name, "iteration", len(computing))
    if device.type == "cuda":
        yield Speed(f"{name}-memory", "GiB", False, (peak_gib(device),))
    yield Speed(f"{name}-with-loading", "iterations/s", True, tuple(1 / each for each in iterations(load=True)))


def _batch(files: list[str], device: torch.device) -> Tensor:
    """B3HW, decoded in threads, cropped and scaled as for ImageNet."""
    pixels = [_pixels(image) for image in ahead(list(enumerate(files)), lambda item: _opened(item[1]))]
    return torch.stack(pixels).to(device, memory_format=torch.channels_last)


def _opened(file: str) -> Image.Image:
    with Image.open(file) as image:
        left, top = (image.width - CROP) // 2, (image.height - CROP) // 2
        return image.convert("RGB").crop((left, top, left + CROP, top + CROP))


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def _photos(folder: Path, trigger: str = "") -> CaptionSet:
    """JPEGs with as much in them as photos have: noise, made soft."""
    items = []
    for number in range(EXAMPLES):
        coarse = (PHOTO[0] // 8, PHOTO[1] // 8)
        bands = [Image.effect_noise(coarse, 60 + number).resize(PHOTO, Image.Resampling.BICUBIC) for _ in range(3)]
        Image.merge("RGB", bands).save(folder / f"{number:02}.jpg", quality=90)
        items.append(Caption(f"{number:02}.jpg", f"image {number}, {trigger}", "user"))
    return CaptionSet(str(folder), tuple(items))


def _conversations(file: Path) -> str:
    """About as long as those of the example."""
    words, lines = ("red", "boats", "cats", "snow", "sea", "many", "three", "beach"), []
    for number in range(4 * EXAMPLES):
        pick = random.Random(number)
        said = [" ".join(pick.choices(words, k=pick.randrange(8, 40))) for _ in range(2)]
        turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)]
        lines.append(json.dumps({"messages": turns}) + "\n")
    file.write_text("".join(lines), encoding="utf-8")
    return str(file)
