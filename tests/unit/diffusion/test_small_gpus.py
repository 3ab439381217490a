"""Text encoders and images on a GPU that is too small for them: fewer at once, then another way, then an error."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.config.schema import ModelConfig
from finetune.diffusion import pipeline, tiling
from finetune.diffusion.image_sampler import ImageSampler, images_at_once
from finetune.diffusion.pipeline import TextEncoder, load_backbone
from tests.tiny_families import save_family

pytestmark = pytest.mark.sampled
CPU = torch.device("cpu")
TEXTS = [f"{count} red robots" for count in range(5)]
JOBS = [(TEXTS[seed % 2], seed) for seed in range(5)]
SIZE = {"width": 64, "height": 64, "steps": 2, "guidance": 2.0}


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    return save_family(tmp_path / "base", "sd")


def limit(owner: TextEncoder | ImageSampler, function: str, fits: Callable[[Any], bool]) -> None:
    """Give a function of the owner's family a GPU that has room for what `fits` says of its second argument."""
    work = getattr(owner.family, function)

    def tried(first: Any, second: Any, *others: Any) -> Any:
        if not fits(second):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return work(first, second, *others)

    owner.family = replace(owner.family, **{function: tried})


@pytest.mark.parametrize("room", [1, 2])
def test_texts_are_read_fewer_at_once(model: ModelConfig, capfd: pytest.CaptureFixture[str], room: int) -> None:
    expected = TextEncoder(model, CPU).encode(TEXTS)
    encoder = TextEncoder(model, CPU)
    limit(encoder, "encode", lambda texts: len(texts) <= room)
    found = encoder.encode(TEXTS)
    assert [item["embedding"].shape for item in found] == [item["embedding"].shape for item in expected]
    assert all(torch.allclose(a["embedding"], b["embedding"], atol=1e-5) for a, b in zip(found, expected, strict=True))
    assert encoder.adaptive_batch.batch_size == room
    assert "memory" not in capfd.readouterr().err


def test_text_encoders_that_do_not_fit_work_in_main_memory(
    model: ModelConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = TextEncoder(model, CPU).encode(TEXTS)
    encoder = TextEncoder(model, CPU)
    limit(encoder, "encode", lambda texts: not encoder.adaptive_batch.fallbacks)
    found = encoder.encode(TEXTS)
    assert all(torch.allclose(a["embedding"], b["embedding"], atol=1e-5) for a, b in zip(found, expected, strict=True))
    said = "the text encoders don't fit the GPU: they work in CPU memory, which is slower\n"
    assert capfd.readouterr().err.count(said) == 1


def test_text_encoders_that_do_not_even_load_work_in_main_memory(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = TextEncoder(model, CPU).encode(TEXTS)

    class Full:
        """The pipeline of a base whose text encoders are larger than the GPU."""

        def __init__(self, pipeline: Any) -> None:
            self.pipeline, self.places = pipeline, []

        def __getattr__(self, name: str) -> Any:
            return getattr(self.pipeline, name)

        def to(self, device: Any) -> Any:
            self.places.append(torch.device(device).type)
            if torch.device(device).type == "cuda":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return self.pipeline.to(device)

    load = pipeline.load_pipeline
    monkeypatch.setattr(pipeline, "load_pipeline", lambda *args, **options: Full(load(*args, **options)))
    encoder = TextEncoder(model, torch.device("cuda"))
    found = encoder.encode(TEXTS)
    assert encoder.pipeline.places == ["cuda", "cpu"]
    assert all(torch.equal(a["embedding"], b["embedding"]) for a, b in zip(found, expected, strict=True))


def drawn(image_sampler: ImageSampler, model: ModelConfig) -> Sequence[Any]:
    return [np.asarray(image) for image in image_sampler.generate(load_backbone(model, torch.float32), JOBS, **SIZE)]


@pytest.mark.parametrize("room", [1, 2])
def test_fewer_pictures_at_once_are_the_same_pictures(
    model: ModelConfig, capfd: pytest.CaptureFixture[str], room: int
) -> None:
    image_sampler = ImageSampler(model, TEXTS, "", CPU, torch.float32)
    expected = drawn(image_sampler, model)
    limit(image_sampler, "decode", lambda latents: len(latents) <= room)
    found = drawn(image_sampler, model)
    assert len(found) == len(JOBS)
    assert all(np.abs(a.astype(int) - b.astype(int)).max() <= 1 for a, b in zip(found, expected, strict=True))
    assert "the GPU is too small for 5 at once; drawing 2\n" in capfd.readouterr().err
    assert image_sampler.adaptive_batch.batch_size == room
    assert not tiling.is_tiled(image_sampler.vae)


def test_a_picture_that_does_not_fit_is_decoded_in_tiles(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tiling, "TILE", 32)
    image_sampler = ImageSampler(model, TEXTS, "", CPU, torch.float32)
    expected = drawn(image_sampler, model)
    sizes: list[int] = []
    decode = image_sampler.vae.decoder.forward
    monkeypatch.setattr(
        image_sampler.vae.decoder, "forward", lambda z, *args: (sizes.append(z.shape[-1]), decode(z))[1]
    )
    limit(image_sampler, "decode", lambda latents: tiling.is_tiled(image_sampler.vae))
    found = drawn(image_sampler, model)
    assert [image.shape for image in found] == [image.shape for image in expected]
    assert max(sizes) < 64 // 2 ** (len(image_sampler.vae.config.block_out_channels) - 1)
    said = capfd.readouterr().err
    assert said.endswith("drawing 1\nthe GPU is too small for an image; decoding in tiles\n")
    assert image_sampler.vae.use_slicing
    assert len(image_sampler.generate(load_backbone(model, torch.float32), JOBS[:1], **SIZE)) == 1
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("tile", "tiled"), [(32, True), (64, False)])
def test_a_card_that_is_too_small_for_one_picture_is_an_error(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tile: int, tiled: bool
) -> None:
    """Tiles that are as large as the image aren't tried. The backbone isn't held on to."""
    monkeypatch.setattr(tiling, "TILE", tile)
    image_sampler = ImageSampler(model, TEXTS, "", CPU, torch.float32)
    limit(image_sampler, "decode", lambda latents: False)
    with pytest.raises(torch.OutOfMemoryError):
        drawn(image_sampler, model)
    assert ("decoding in tiles" in capfd.readouterr().err) == tiled
    assert image_sampler.pipeline.unet is None


def test_an_autoencoder_that_does_not_come_to_the_card_lets_go_of_the_backbone(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_sampler = ImageSampler(model, TEXTS, "", CPU, torch.float32)
    to = image_sampler.vae.to

    def full(place: Any) -> Any:
        if place == CPU:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return to(place)

    monkeypatch.setattr(image_sampler.vae, "to", full)
    with pytest.raises(torch.OutOfMemoryError):
        drawn(image_sampler, model)
    assert image_sampler.pipeline.unet is None


def test_a_host_without_memory_is_no_small_card(model: ModelConfig) -> None:
    encoder = TextEncoder(model, CPU)

    def full(*_: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    encoder.family = replace(encoder.family, encode=full)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        encoder.encode(TEXTS)


def test_an_autoencoder_with_tiles_of_its_own_keeps_them(tmp_path: Path) -> None:
    vae: Any = pipeline.load_vae_model(save_family(tmp_path / "base", "qwen_image"))
    before = vae.tile_sample_min_height
    tiling.enable_tiling(vae)
    tiling.set_slicing(vae, 1, 64 * 64)
    assert vae.use_tiling
    assert vae.tile_sample_min_height == before


def test_small_images_are_drawn_several_at_once() -> None:
    asked = {(64, 1): 8, (128, 2): 8, (256, 2): 4, (512, 1): 1, (512, 4): 4, (1024, 2): 2, (1024, 20): 8}
    assert {sides: images_at_once(*sides) for sides in asked} == asked
