"""Looks: named ones can be told apart, none of training comes near those held out, the example data keeps its look."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from scripts.toyworld.captions import VARIANTS, Mention, caption, read_caption, styled
from scripts.toyworld.looks import (
    ALIKE,
    HELD_OUT,
    LEAST_DISTANCE,
    NAMED,
    PIXAR,
    UNNAMED_SHARE,
    Look,
    distance,
    random_look,
    to_held_out,
    training_look,
)
from scripts.toyworld.output import dataset_scenes
from scripts.toyworld.render import render
from scripts.toyworld.scene import sample_scene

DATASET = Path(__file__).resolve().parents[3] / "datasets" / "pixar_style"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def training_looks() -> list[Look]:
    """Of 10,000 runs of training scenes."""
    return [training_look(500_000_000 + ALIKE * k) for k in range(10_000)]


def test_no_training_look_comes_near_one_held_out(training_looks: list[Look]) -> None:
    for name, held_out in HELD_OUT.items():
        nearest = min(training_looks, key=lambda look: distance(look, held_out))
        assert distance(nearest, held_out) >= LEAST_DISTANCE, f"{name} is near {nearest}"
    assert min(to_held_out(look) for look in NAMED.values()) >= LEAST_DISTANCE


def test_no_training_caption_holds_a_word_of_a_look_held_out(training_looks: list[Look]) -> None:
    said = " ".join(styled("", look, k % VARIANTS) for k, look in enumerate(training_looks))
    for word in ("pixar", "motion", "stained"):
        assert word not in said


def test_training_sees_every_named_look_and_every_parameter_value(training_looks: list[Look]) -> None:
    assert set(NAMED.values()) <= set(training_looks)
    unnamed = [look for look in training_looks if look not in NAMED.values()]
    assert len(unnamed) / len(training_looks) == pytest.approx(UNNAMED_SHARE, abs=0.02)
    for field in fields(Look):
        if isinstance(getattr(PIXAR, field.name), str):
            # What the look held out consists of is known, only never all of it together.
            assert getattr(PIXAR, field.name) in {getattr(look, field.name) for look in unnamed}


def test_a_seed_names_one_look_and_neighbours_share_it() -> None:
    assert [training_look(k) for k in range(64)] == [training_look(k) for k in range(64)]
    assert len({training_look(k) for k in range(ALIKE)}) == 1
    assert random_look(random.Random(3)) == random_look(random.Random(3))
    assert random_look(random.Random(3)) != random_look(random.Random(4))


def test_distance_counts_what_differs() -> None:
    assert distance(PIXAR, PIXAR) == 0.0
    assert distance(Look(), Look(material="felt", outline=0.016)) == pytest.approx(1.5)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("variant", range(VARIANTS))
def test_a_caption_with_a_look_still_says_what_it_shows(name: str, variant: int) -> None:
    for scene in (sample_scene(k) for k in range(40)):
        plain = caption(scene, variant)
        text = styled(plain, NAMED[name], variant)
        assert (text == plain) == (name == "flat")
        reading = read_caption(text)
        assert reading.things == tuple(Mention(thing.kind, thing.colour) for thing in scene.things)
        assert reading.setting == scene.setting


def test_an_unnamed_look_is_told_by_its_parameters() -> None:
    look = Look("soft", "felt", line="black", outline=0.016)
    assert styled("a cat", look) == "a cat, soft shading, made of felt, thick black outlines"
    assert styled("a cat", look, 1) == "a cat, made of felt, thick black outlines"
    assert styled("a cat", Look(palette="warm"), 1) == "a cat, warm colours"


def test_looks_of_one_kind_are_drawn_like_each_alone() -> None:
    scenes, looks = [sample_scene(k) for k in range(3)], [NAMED["comic"], NAMED["felt"], NAMED["felt"]]
    alone = [render([scene], [look], 48) for scene, look in zip(scenes, looks, strict=True)]
    assert torch.equal(render(scenes, looks, 48), torch.cat(alone))


@pytest.mark.exhaustive
def test_named_looks_are_told_apart_by_simple_statistics() -> None:
    """The nearest mean of a few statistics over other scenes names the look of most pictures."""
    scenes = [sample_scene(k, things=1) for k in range(20)]
    seen = {name: statistics(render(scenes, name, 64, supersample=1)) for name in (*NAMED, *HELD_OUT)}
    # Relative to the same scene in all looks: what is left is the look.
    middle = torch.stack(list(seen.values())).mean(0)
    apart = {name: values - middle for name, values in seen.items()}
    spread = torch.cat(list(apart.values())).std(0)
    means = torch.stack([values[:10].mean(0) for values in apart.values()]) / spread
    right = [
        (torch.cdist(values[10:] / spread, means).argmin(1) == index).float().mean()
        for index, values in enumerate(apart.values())
    ]
    assert torch.stack(right).mean() > 0.75
    assert min(right) >= 0.4, dict(zip(apart, right, strict=True))


def statistics(images_N3PP: Tensor) -> Tensor:
    """Brightness, colourfulness, detail at four scales, and what share is dark or near white, [N, F]."""
    images = images_N3PP.float() / 255
    grey = images.mean(1, keepdim=True)
    rows = [images.mean((2, 3)), images.std((2, 3)), (images - grey).abs().mean((1, 2, 3))[:, None]]
    for scale in (1, 2, 4, 8):
        coarse = avg_pool2d(grey, scale)
        rows += [coarse.diff(dim=axis).abs().mean((1, 2, 3))[:, None] for axis in (2, 3)]
    centre = grey[..., 16:48, 16:48]
    rows += [(centre < 0.15).float().mean((1, 2, 3))[:, None], (grey > 0.9).float().mean((1, 2, 3))[:, None]]
    rows += [
        grey[..., :3, :].mean((1, 2, 3))[:, None],
        (centre.diff(dim=3).abs() > 0.25).float().mean((1, 2, 3))[:, None],
    ]
    return torch.cat(rows, dim=1)


@pytest.mark.sampled
@pytest.mark.parametrize("number", [1, 8])
def test_the_example_data_is_what_the_renderer_draws(number: int) -> None:
    """At a quarter of its size, within what compression and fewer rays change; slightly other looks are further."""
    shipped = Image.open(DATASET / f"{number:03d}.jpg")
    shipped_3PP = avg_pool2d(torch.from_numpy(np.asarray(shipped).copy()).permute(2, 0, 1).float(), 4)

    def error(look: Look) -> float:
        drawn_3PP = render([dataset_scenes(40)[number - 1]], [look], 128)[0].float()
        return float((shipped_3PP - drawn_3PP).abs().mean())

    assert error(PIXAR) < 2.5
    for change in ({"warmth": 0.2}, {"height": 0.9}, {"softness": 0.5}, {"focus": 0.8}):
        assert error(PIXAR) < error(replace(PIXAR, **change)), change
