"""Renders the training and test sets in chunks, cached as uint8, and loads them back.

N pictures of 3×P×P pixels.
"""

import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.embedded.fit import save_atomically
from scripts.embedded.settings import BASE_SETS, CAPTION_VARIANTS, PICTURE_PX, RenderSet, Settings
from scripts.toyworld.captions import caption, styled
from scripts.toyworld.crowd import Crowd, sample_crowd
from scripts.toyworld.looks import ALIKE, HELD_OUT, STYLES, Look, training_look
from scripts.toyworld.render import render
from scripts.toyworld.scene import Scene, held_out, mirrored, sample_scene

CHUNK_SEEDS = 128  # two batches of a GPU; small, so that a spent budget is noticed soon
HELD_OUT_SHARE = 0.15  # of crowds; other sets have the looks held out on their own
GPU_WORKERS = 5  # on each: tracing leaves gaps between its kernels that another process fills

Chunk = tuple[RenderSet, int]
Job = Callable[[Settings, RenderSet, int, str], None]
PathOf = Callable[[Path, RenderSet, int], Path]


@dataclass(frozen=True)
class Pictures:
    """A set in memory: images [N, 3, P, P] as uint8 on the device, and the scene (or crowd) and the look of each."""

    images: Tensor
    scenes: list[Any]
    looks: list[Look]

    def captions(self) -> list[list[str]]:
        """Every variant of every picture's caption with its look, [N][CAPTION_VARIANTS]."""
        return [
            [styled(caption(scene, variant), look, variant) for variant in range(CAPTION_VARIANTS)]
            for scene, look in zip(self.scenes, self.looks, strict=True)
        ]

    def with_mirrored(self) -> "Pictures":
        """These and their mirror images, in the words that fit them. Twice the pictures for no rendering."""
        return join([self, Pictures(self.images.flip(3), [mirrored(scene) for scene in self.scenes], self.looks)])

    def only(self, wanted: Callable[[Scene, Look], bool]) -> "Pictures":
        """The pictures whose scene and look are wanted."""
        keep = [index for index, pair in enumerate(zip(self.scenes, self.looks, strict=True)) if wanted(*pair)]
        rows = torch.tensor(keep, device=self.images.device)
        return Pictures(self.images[rows], [self.scenes[index] for index in keep], [self.looks[i] for i in keep])


def render_sets(settings: Settings) -> None:
    """Render what is missing, set by set in turn, so that a spent budget leaves every set in proportion."""
    deadline = min(time.time() + settings.minutes["render"] * 60, settings.pause_at)
    work_off(settings, render_chunk, chunks_in_turn(settings.sets), chunk_path, deadline, name="render")


def work_off(settings: Settings, job: Job, chunks: list[Chunk], path_of: PathOf, deadline: float, *, name: str) -> None:
    """Do `job` for every chunk whose file is missing, until the deadline.

    Several processes take chunks from one queue: a few on the GPU, one on each CPU core that is left.
    """
    gpus = torch.cuda.device_count() if settings.device == "cuda" else 0
    workers = [f"cuda:{index}" for index in range(gpus)] * GPU_WORKERS
    workers += ["cpu"] * max(1, (os.cpu_count() or 1) - len(workers) - 1)
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    queue: Queue[Chunk | None] = context.Queue()
    missing = [chunk for chunk in chunks if not path_of(settings.work, *chunk).exists()]
    if not missing:
        return
    for entry in [*missing, *[None] * len(workers)]:
        queue.put(entry)
    processes = [
        context.Process(target=take_chunks, args=(settings, job, device, queue, deadline)) for device in workers
    ]
    started = time.monotonic()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"a process of {name} ended with exit code {process.exitcode}")
    left = sum(not path_of(settings.work, *chunk).exists() for chunk in missing)
    print(f"{name}: {len(missing) - left} chunks in {time.monotonic() - started:.0f} s, {left} left out", flush=True)


def take_chunks(settings: Settings, job: Job, device: str, queue: "Queue[Chunk | None]", deadline: float) -> None:
    """Work until the queue ends. Test sets are never cut short: figures need the same pictures each time."""
    if device == "cpu":
        torch.set_num_threads(1)
    while (chunk := queue.get()) is not None:
        if not chunk[0].for_training or time.time() <= deadline:
            job(settings, *chunk, device)


def render_chunk(settings: Settings, whole: RenderSet, part: int, device: str) -> None:
    scenes = chunk_scenes(whole, part)
    pictures = render(scenes, set_looks(whole, scenes), PICTURE_PX, device).cpu()
    save_atomically(pictures, chunk_path(settings.work, whole, part))


def chunks_in_turn(sets: tuple[RenderSet, ...]) -> list[Chunk]:
    """All (set, chunk) pairs, ordered by the share of their own set that precedes them; test sets first."""
    keyed = []
    for whole in sets:
        parts = -(-whole.seeds // CHUNK_SEEDS)
        keyed += [(whole.for_training, part / parts, whole.first_seed, whole, part) for part in range(parts)]
    return [(whole, part) for _, _, _, whole, part in sorted(keyed, key=lambda entry: entry[:3])]


def chunk_scenes(whole: RenderSet, part: int) -> list[Any]:
    """Scenes, or the crowds of a crowded set."""
    first = whole.first_seed + part * CHUNK_SEEDS
    stop = min(first + CHUNK_SEEDS, whole.first_seed + whole.seeds)
    if whole.crowded:
        return [sample_crowd(seed) for seed in range(first, stop)]
    scenes = [sample_scene(seed, things=whole.things) for seed in range(first, stop)]
    return [scene for scene in scenes if not (whole.for_training and held_out(scene))]


def set_looks(whole: RenderSet, scenes: list[Scene] | list[Crowd]) -> list[Look]:
    return [look_of(whole, scene.seed) for scene in scenes]


def look_of(whole: RenderSet, seed: int) -> Look:
    if whole.look is not None:
        return STYLES[whole.look]
    if not whole.for_training:  # every look in turn
        return STYLES[list(STYLES)[(seed - whole.first_seed) * len(STYLES) // whole.seeds]]
    if whole.crowded:
        rng = random.Random(f"embedded crowd look {seed // ALIKE}")
        if rng.random() < HELD_OUT_SHARE:
            return rng.choice(list(HELD_OUT.values()))
    return training_look(seed)


def chunk_path(work: Path, whole: RenderSet, part: int) -> Path:
    return work / "renders" / f"{whole.name}-{part:03d}.pt"


def load_set(settings: Settings, name: str) -> Pictures:
    """The rendered part of a set, on the device."""
    whole = next(entry for entry in settings.sets if entry.name == name)
    images: list[Tensor] = []
    scenes: list[Scene] = []
    for part in range(-(-whole.seeds // CHUNK_SEEDS)):
        path = chunk_path(settings.work, whole, part)
        if path.exists():
            images.append(torch.load(path))
            scenes += chunk_scenes(whole, part)
    if not images:
        raise FileNotFoundError(f"no renders of '{name}' in {settings.work / 'renders'}; run the phase 'render' first")
    return Pictures(torch.cat(images).to(settings.device), scenes, set_looks(whole, scenes))


def load_base_sets(settings: Settings) -> Pictures:
    return join([load_set(settings, name) for name in BASE_SETS])


def join(sets: list[Pictures]) -> Pictures:
    return Pictures(
        torch.cat([pictures.images for pictures in sets]),
        [scene for pictures in sets for scene in pictures.scenes],
        [look for pictures in sets for look in pictures.looks],
    )


def share_weights(counts: Iterable[int], shares: Iterable[float]) -> Tensor:
    """How often to draw each picture of sets of so many, so that a set comes as often as its share says."""
    pairs = zip(counts, shares, strict=True)
    return torch.cat([torch.full((count,), share / count) for count, share in pairs])
