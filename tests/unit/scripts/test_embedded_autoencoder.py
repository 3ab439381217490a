"""The autoencoder's losses, its anchor and its crisper decoder, on tiny random models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from scripts.embedded import decoder as decoding
from scripts.embedded.augment import to_float
from scripts.embedded.autoencoder import (
    WIDEST,
    batches,
    decode_all,
    drift,
    encode_all,
    narrow,
    picture_loss,
    whiten,
)
from scripts.embedded.crispness import detail, laplacian
from scripts.embedded.decoder import crispness_gap, loss_with, new_discriminator, train_decoder
from scripts.embedded.fit import Fitted, save_atomically
from scripts.embedded.render_sets import chunk_path, chunk_scenes, chunks_in_turn, load_base_sets, load_set
from scripts.embedded.settings import LATENT_CHANNELS, PICTURE_PX, Settings
from tests.unit.scripts.tiny_autoencoder import tiny_autoencoder


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Of a tiny run whose renders are noise."""
    settings = Settings(tmp_path, tmp_path / "root", "cpu", tiny=True)
    generator = torch.Generator().manual_seed(0)
    for whole, part in chunks_in_turn(settings.sets):
        if whole.name in ("flat", "looks") or not whole.for_training:
            size = (len(chunk_scenes(whole, part)), 3, PICTURE_PX, PICTURE_PX)
            images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
            save_atomically(images, chunk_path(settings.work, whole, part))
    return settings


def test_whitening_normalises_latents_and_leaves_pictures_alone() -> None:
    vae = tiny_autoencoder()
    images = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = encode_all(vae, images)
    decoded = decode_all(vae, before)
    whiten(vae, before.mean((0, 2, 3)), before.std((0, 2, 3)))
    after = encode_all(vae, images)
    torch.testing.assert_close(after.mean((0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(after.std((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(decode_all(vae, after), decoded, atol=1e-4, rtol=0)


def test_a_wide_posterior_is_narrowed_and_its_mean_left_alone() -> None:
    vae = tiny_autoencoder()
    images = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = vae.encode(2.0 * to_float(images) - 1.0).latent_dist
    assert before.std.mean((0, 2, 3)).min() > WIDEST  # untrained
    narrow(vae, images)
    after = vae.encode(2.0 * to_float(images) - 1.0).latent_dist
    torch.testing.assert_close(after.std.mean((0, 2, 3)), torch.full((4,), WIDEST), rtol=1e-3, atol=0)
    torch.testing.assert_close(after.mean, before.mean)


def test_an_error_at_an_eye_costs_more_than_one_in_the_sky() -> None:
    target = torch.zeros(1, 3, 64, 64)
    target[..., 40:48, 40:48] = torch.tensor([1.0, -1.0]).repeat(8, 4)
    at_eye, in_sky = target.clone(), target.clone()
    at_eye[..., 43:45, 43:45] += 0.5
    in_sky[..., 11:13, 11:13] += 0.5
    assert picture_loss(at_eye, target) > 1.2 * picture_loss(in_sky, target)
    assert picture_loss(target, target) == 0.0


@pytest.mark.parametrize("crispness", [detail, laplacian])
def test_a_blurred_picture_is_less_crisp(crispness: Callable[[Tensor], float]) -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert crispness(functional.avg_pool2d(images, 3, 1, 1)) < 0.7 * crispness(images)
    assert crispness(torch.full((1, 3, 32, 32), 0.5)) == pytest.approx(0.0, abs=1e-6)


def test_the_crispness_gap_is_that_of_patches() -> None:
    images_B3PP = torch.rand(2, 3, PICTURE_PX, PICTURE_PX, generator=torch.Generator().manual_seed(0))
    blurred_B3PP = functional.avg_pool2d(images_B3PP, 3, 1, 1)
    assert crispness_gap(images_B3PP, images_B3PP) == 0
    assert crispness_gap(blurred_B3PP, images_B3PP) > 0.1
    halves = [torch.cat(parts, dim=3) for parts in ((images_B3PP, blurred_B3PP), (blurred_B3PP, images_B3PP))]
    assert crispness_gap(*halves) > 0.1  # as crisp in the whole, and in other places


def test_flat_pictures_are_drawn_with_the_anchors_latents(settings: Settings) -> None:
    anchor = tiny_autoencoder(halvings=3, channels=LATENT_CHANNELS)
    target, _, latents, flat = batches(load_base_sets(settings), 16, anchor)(torch.Generator().manual_seed(0))
    assert 0 < flat.sum() < 16
    with torch.no_grad():
        torch.testing.assert_close(latents, anchor.encode(target).latent_dist.mean)
    moved = latents + 0.5
    assert drift(latents, latents, flat) == 0.0
    assert drift(moved, latents, flat) == pytest.approx(0.25)
    others = torch.where(flat.bool().view(-1, 1, 1, 1), latents, moved)
    assert drift(others, latents, flat) == 0.0
    assert drift(moved, latents, torch.zeros(16)) == 0.0


def test_the_decoder_and_its_discriminator_learn_against_each_other() -> None:
    """Each side's gradient is that of its own loss: the other side's loss reaches none of its weights."""
    torch.manual_seed(0)
    decoder, discriminator = nn.Conv2d(4, 3, 3, padding=1), new_discriminator()
    target, latents = torch.rand(4, 3, 32, 32) * 2 - 1, torch.randn(4, 4, 32, 32)
    loss_with(decoder, discriminator)(target, latents).backward()
    found = [weight.grad.clone() for weight in discriminator.parameters() if weight.grad is not None]
    discriminator.zero_grad()
    made = decoder(latents).detach()
    wrong = functional.relu(1 - discriminator(target)).mean() + functional.relu(1 + discriminator(made)).mean()
    wrong.backward()
    for one, weight in zip(found, discriminator.parameters(), strict=True):
        torch.testing.assert_close(one, weight.grad)
    assert decoder.weight.grad is not None
    both = decoder.weight.grad.clone()
    decoder.zero_grad()
    picture_loss(decoder(latents), target).backward()
    assert not torch.allclose(both, decoder.weight.grad)


@pytest.mark.exhaustive
def test_a_crisper_decoder_leaves_the_latents_as_they_were(settings: Settings) -> None:
    folder = settings.work / "autoencoder"
    before = tiny_autoencoder(halvings=3, channels=LATENT_CHANNELS)
    before.save_pretrained(folder)
    train_decoder(settings)
    after = AutoencoderKL.from_pretrained(folder)
    images = load_set(settings, "pixar-unseen").images
    latents = encode_all(before, images)
    assert torch.equal(encode_all(after, images), latents)
    assert not torch.equal(decode_all(after, latents), decode_all(before, latents))
    train_decoder(settings)  # finished: only loads
    again = AutoencoderKL.from_pretrained(folder)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in after.state_dict().items())


@pytest.mark.parametrize("steps", [0, 2])
def test_a_paused_decoder_leaves_what_it_has_learnt(
    settings: Settings, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = settings.work / "autoencoder"
    tiny_autoencoder(halvings=3, channels=LATENT_CHANNELS).save_pretrained(folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()

    def paused(model: nn.Module, *_args: Any, **_kwargs: Any) -> Fitted:
        for weight in model.parameters():
            weight.data += steps
        return Fitted(steps=steps, seconds=1.0, loss=1.0, done=False)

    monkeypatch.setattr(decoding, "fit", paused)
    train_decoder(settings)
    assert (weights.read_bytes() != before) == (steps > 0)
