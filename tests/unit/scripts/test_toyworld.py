"""The toy world: scenes are reproducible, captions can be read back, pictures show what the scene says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from scripts.toyworld.captions import VARIANTS, Mention, caption, read_caption
from scripts.toyworld.looks import STYLES
from scripts.toyworld.output import dataset_scenes, write_dataset
from scripts.toyworld.render import batch_of, picture, render
from scripts.toyworld.scene import (
    COLOURS,
    KINDS,
    PLACES,
    SETTINGS,
    SIZES,
    Scene,
    Thing,
    held_out,
    mirrored,
    sample_scene,
)
from tests.conftest import ROOT

pytestmark = pytest.mark.sampled


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These pictures are too small to share out: on a busy machine the threads would mostly wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _single(kind: str = "cup", colour: str = "red", size: str = "big", setting: str = "meadow", seed: int = 1) -> Scene:
    return Scene((Thing(kind, colour, size, "centre"),), setting, seed)


def _thing_mask(scene: Scene, pixels: int) -> torch.Tensor:
    """Where the flat picture changes when its thing is dyed in another colour: the thing's dyed surface."""
    thing = scene.things[0]
    other = "green" if thing.colour != "green" else "purple"
    dyed = Scene((Thing(thing.kind, other, thing.size, thing.place),), scene.setting, scene.seed)
    one, two = render([scene, dyed], "flat", pixels, supersample=1).int()
    changed: torch.Tensor = (one - two).abs().sum(0) > 60
    return changed


def test_the_vocabulary_is_the_agreed_one() -> None:
    assert (len(KINDS), len(COLOURS), len(SETTINGS)) == (14, 10, 6)


def test_a_seed_names_one_scene() -> None:
    assert [sample_scene(k) for k in range(50)] == [sample_scene(k) for k in range(50)]
    assert len({sample_scene(k) for k in range(50)}) == 50


def test_about_a_third_of_the_scenes_hold_two_different_things_in_different_places() -> None:
    scenes = [sample_scene(k) for k in range(2000)]
    pairs = [scene for scene in scenes if len(scene.things) == 2]
    assert 0.26 < len(pairs) / len(scenes) < 0.34
    assert all(a.kind != b.kind and a.place != b.place for a, b in (scene.things for scene in pairs))


def test_the_number_of_things_can_be_fixed() -> None:
    assert {len(sample_scene(k, things=2).things) for k in range(20)} == {2}
    with pytest.raises(ValueError, match="1 or 2 things"):
        sample_scene(0, things=3)


def test_a_tenth_of_the_combinations_is_held_out() -> None:
    every = [_single(kind, colour, setting=setting) for kind in KINDS for colour in COLOURS for setting in SETTINGS]
    share = sum(map(held_out, every)) / len(every)
    assert 0.07 < share < 0.13


def test_a_pair_is_held_out_when_either_thing_is() -> None:
    for scene in (sample_scene(k, things=2) for k in range(200)):
        alone = [held_out(Scene((thing,), scene.setting, scene.seed)) for thing in scene.things]
        assert held_out(scene) == any(alone)


@pytest.mark.parametrize("variant", range(VARIANTS))
def test_a_caption_reads_back_as_its_scene(variant: int) -> None:
    singles = [_single(kind, colour, setting=setting) for kind in KINDS for colour in COLOURS for setting in SETTINGS]
    for scene in [*singles, *(sample_scene(k, things=2) for k in range(300))]:
        reading = read_caption(caption(scene, variant))
        assert reading.things == tuple(Mention(thing.kind, thing.colour) for thing in scene.things)
        assert reading.setting == scene.setting


def test_the_canonical_caption() -> None:
    scene = Scene((Thing("robot", "red", "small", "left"),), "meadow", 0)
    assert caption(scene) == "a small red robot on the left, in a meadow"
    pair = Scene((Thing("cat", "blue", "big", "left"), Thing("cup", "red", "small", "right")), "beach", 0)
    assert caption(pair) == "a big blue cat and a small red cup, on a beach"
    with pytest.raises(ValueError, match="variant"):
        caption(scene, VARIANTS)


def test_the_reader_is_tolerant() -> None:
    reading = read_caption("There are two Kittens, orange, next to a mug that is purple on the SAND")
    assert reading.things == (Mention("cat", "orange"), Mention("cup", "purple"))
    assert reading.setting == "beach"
    assert read_caption("nothing to see").things == ()


@pytest.mark.parametrize("style", STYLES)
def test_the_same_scene_gives_the_same_bytes(style: str) -> None:
    scenes = [sample_scene(3), sample_scene(4, things=2)]
    first = render(scenes, style, 32)
    assert first.shape == (2, 3, 32, 32)
    assert first.dtype == torch.uint8
    assert torch.equal(first, render(scenes, style, 32))
    assert torch.equal(first[1:], render(scenes[1:], style, 32))  # whatever it is drawn together with


@pytest.mark.parametrize("style", ["flat", "pixar", "crystal", "oil"])
def test_a_batch_shows_what_single_pictures_show(style: str) -> None:
    """A GPU draws scenes together, padded to one another's parts and rays; no picture may leak into the next."""
    scenes = [sample_scene(k, things=1 + k % 2) for k in range(4)]
    together = picture(batch_of(scenes, STYLES[style], 48, 48, torch.device("cpu"))).int()
    apart = render(scenes, style, 48, supersample=1).int()
    assert ((together - apart).abs() > 2).float().mean() < 1e-3


@pytest.mark.parametrize("style", STYLES)
def test_every_kind_shows_in_every_style(style: str) -> None:
    red = render([_single(kind, "red") for kind in KINDS], style, 48, supersample=1).int()
    blue = render([_single(kind, "blue") for kind in KINDS], style, 48, supersample=1).int()
    changed = ((red - blue).abs().sum(1) > 60).float().mean((1, 2))
    assert changed.min() > 0.03, dict(zip(KINDS, changed.tolist(), strict=True))


@pytest.mark.parametrize("colour", COLOURS)
def test_a_flat_body_has_its_named_colour(colour: str) -> None:
    palette = torch.tensor(list(COLOURS.values()))
    for kind in ("cat", "car", "lamp"):
        scene = _single(kind, colour, setting="kitchen")
        picture = render([scene], "flat", 64)[0].int()
        body = picture[:, _thing_mask(scene, 64)]
        nearest = (body.T[:, None] - palette).square().sum(-1).argmin(1)
        assert list(COLOURS)[int(nearest.mode().values)] == colour


@pytest.mark.parametrize("pixels", [48, 96])
@pytest.mark.parametrize(("size", "share"), [("big", 0.61), ("small", 0.39)])
def test_sizes_hold_at_any_resolution(pixels: int, size: str, share: float) -> None:
    rows = _thing_mask(_single("snowman", size=size), pixels).any(1).nonzero()
    dyed = float(rows.max() - rows.min() + 1) / pixels
    assert dyed == pytest.approx(share * 0.83, abs=0.05)  # the hat, a sixth of the height, is not dyed


def test_places_hold() -> None:
    centres = []
    for place in PLACES:
        mask = _thing_mask(Scene((Thing("cup", "red", "small", place),), "snow", 5), 64)
        centres.append(float(mask.any(0).nonzero().float().mean()) / 64)
    assert centres[0] < 0.4 < centres[1] < 0.6 < centres[2]


@pytest.mark.parametrize("place", PLACES)
def test_the_mirror_image_shows_what_the_mirrored_scene_says(place: str) -> None:
    scene = Scene((Thing("cup", "red", "small", place),), "meadow", 1)
    other = mirrored(scene)
    seen = [_thing_mask(one, 64).float().mean(0) @ torch.linspace(-1, 1, 64) for one in (scene, other)]
    assert seen[0].sign() == -seen[1].sign() or place == "centre"
    assert mirrored(other) == scene


def test_two_things_change_sides_and_order_in_the_mirror() -> None:
    scene = sample_scene(3, things=2)
    left, right = mirrored(scene).things
    assert (left.kind, left.place, right.kind, right.place) == (
        scene.things[1].kind,
        "left",
        scene.things[0].kind,
        "right",
    )
    assert mirrored(mirrored(scene)) == scene


def test_unknown_styles_and_tiny_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="style must be one of flat"):
        render([_single()], "fresco", 64)
    with pytest.raises(ValueError, match="at least 16"):
        render([_single()], "flat", 8)


def test_the_data_set_is_spread_evenly_over_the_words() -> None:
    scenes = dataset_scenes(40)
    things = [thing for scene in scenes for thing in scene.things]
    assert len(scenes) == 40
    assert sum(len(scene.things) == 2 for scene in scenes) == 5
    for words, used in (
        (KINDS, [thing.kind for thing in things]),
        (tuple(COLOURS), [thing.colour for thing in things]),
        (SETTINGS, [scene.setting for scene in scenes]),
    ):
        counts = [used.count(word) for word in words]
        assert max(counts) - min(counts) <= 1
    assert {thing.size for thing in things} == set(SIZES)


@pytest.mark.parametrize(
    ("style", "count", "captions"), [("pixar", 40, False), ("stop motion", 20, True), ("stained glass", 12, True)]
)
def test_an_example_data_set_says_how_it_was_made(style: str, count: int, captions: bool, tmp_path: Path) -> None:
    shipped = ROOT / "datasets" / f"{style.replace(' ', '_')}_style"
    folder = tmp_path / shipped.name
    write_dataset(folder, style=style, count=2, size=16, captions=captions)
    texts = ["001.txt", "002.txt"] * captions
    assert sorted(path.name for path in folder.iterdir()) == sorted(["001.jpg", "002.jpg", "README.md", *texts])
    readme = (folder / "README.md").read_text().replace("2 images (16 x 16 ", f"{count} images (512 x 512 ")
    assert readme.replace("--count 2 --size 16", f"--count {count} --size 512") == (shipped / "README.md").read_text()
    assert len([*shipped.glob("*.jpg")]) == count
    written = [path.read_text().strip() for path in sorted(shipped.glob("*.txt"))]
    assert written == [f"{caption(scene)}, {style} style" for scene in dataset_scenes(count) if captions]
