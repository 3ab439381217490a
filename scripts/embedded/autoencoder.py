"""Trains the autoencoder: 128-pixel pictures to 16×16 latents, on renders in many looks.

B pictures, P pixels, C latent channels, H×W latent pixels.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from scripts.embedded.augment import expose, reframe, to_float
from scripts.embedded.crispness import detail, laplacian
from scripts.embedded.fit import Budget, Draw, LossOf, fit
from scripts.embedded.render_sets import Pictures, load_base_sets, load_set
from scripts.embedded.settings import LATENT_CHANNELS, PICTURE_PX, REPOSITORY, SEED, Settings
from scripts.toyworld.looks import HELD_OUT, NAMED

KL_WEIGHT = 1e-6  # only keeps the latents bounded; the diffusion model needs them unit-sized, not Gaussian
# Of each channel's own deviation. A sampler never hits latents exactly: no detail may hide in tiny differences.
LATENT_NOISE = 0.05
EDGE_WEIGHT = 1.0
DETAIL_WEIGHT = 4.0
DETAIL_PX = 9  # about an eye
WIDEST = 0.1  # deviation of a posterior, of its channel's own
ANCHOR_WEIGHT = 1.0  # latents of flat pictures then drift by 0.026 of a deviation, measured on one H200
ENCODE_BATCH = 200
BATCH = 16  # a picture has so many pixels that more of them make a step dearer, not better


def new_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        # Wide where pixels are few: 0.11 s to decode a picture on one CPU core, 0.09 s at half the weights.
        block_out_channels=(32, 64, 128, 160),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        sample_size=PICTURE_PX,
        scaling_factor=1.0,  # `whiten` puts the scale into the weights
    )


def autoencoder_folder(work: Path) -> Path:
    return work / "autoencoder"


def train_autoencoder(settings: Settings) -> None:
    """From scratch, or from the shipped one where that is kept: flat pictures then keep their latents, so that the
    shipped diffusion model can be trained on."""
    renders = load_base_sets(settings)
    torch.manual_seed(SEED)
    vae, anchor = new_autoencoder(), None
    if goes_on := "autoencoder" in settings.kept:
        vae = AutoencoderKL.from_pretrained(autoencoder_folder(settings.work))
        anchor = AutoencoderKL.from_pretrained(REPOSITORY / "finetune" / "embedded" / "diffusion" / "vae")
        anchor.float().to(settings.device)
    vae.to(settings.device)
    fitted = fit(
        vae,
        batches(renders, settings.batch(BATCH), anchor),
        loss_with(vae),
        name="autoencoder",
        budget=Budget(settings.minutes["autoencoder"] * 60, settings.tiny_steps),
        lr=4e-4 if goes_on else 8e-4,
        checkpoint=settings.work / "checkpoints" / "autoencoder.pt",
        seed=SEED,
        pause_at=settings.pause_at,
        bf16=settings.on_gpu,
        compiles=settings.on_gpu,
    )
    if not fitted.done:
        return
    some = renders.images[torch.randperm(len(renders.images), device=renders.images.device)[:4000]]
    if not goes_on:
        latents_NCHW = encode_all(vae, some)
        whiten(vae, latents_NCHW.mean((0, 2, 3)), latents_NCHW.std((0, 2, 3)))
    narrow(vae, some[:200])
    vae.save_pretrained(autoencoder_folder(settings.work))
    print_restoration(settings, vae, "autoencoder")


def batches(renders: Pictures, batch: int, anchor: AutoencoderKL | None = None) -> Draw:
    """Draws (pictures -1…1 [B, 3, P, P], noise [B, C, H, W]).

    With an anchor also its latents of the pictures, and whether each picture is flat: 0 or 1 [B].
    """
    renders_N3PP = renders.images
    flat_N = torch.tensor([float(look == NAMED["flat"]) for look in renders.looks], device=renders_N3PP.device)

    @torch.no_grad()
    def draw(generator: torch.Generator) -> tuple[Tensor, ...]:
        rows = torch.randint(len(renders_N3PP), (batch,), device=renders_N3PP.device, generator=generator)
        pictures = to_float(renders_N3PP[rows])
        changed = expose(reframe(pictures[batch // 2 :], generator, zoom=1.4, shift=0.1), generator, most=0.25)
        target_B3PP = 2.0 * torch.cat([pictures[: batch // 2], changed]) - 1.0
        size = (batch, LATENT_CHANNELS, PICTURE_PX // 8, PICTURE_PX // 8)
        drawn = target_B3PP, torch.randn(size, device=renders_N3PP.device, generator=generator)
        return drawn if anchor is None else (*drawn, anchor.encode(target_B3PP).latent_dist.mean, flat_N[rows])

    return draw


def loss_with(vae: AutoencoderKL) -> LossOf:
    def loss_of(target_B3PP: Tensor, noise_BCHW: Tensor, *anchored: Tensor) -> Tensor:
        posterior = vae.encode(target_B3PP.to(vae.dtype)).latent_dist
        mean_BCHW, logvar_BCHW = posterior.mean.float(), posterior.logvar.float()
        variance_BCHW = logvar_BCHW.exp()
        latents_BCHW = noisy(mean_BCHW, variance_BCHW, noise_BCHW)
        decoded_B3PP = vae.decode(latents_BCHW.to(vae.dtype)).sample.float()
        divergence_B = 0.5 * (mean_BCHW**2 + variance_BCHW - 1.0 - logvar_BCHW).sum((1, 2, 3))
        loss = picture_loss(decoded_B3PP, target_B3PP) + KL_WEIGHT * divergence_B.mean()
        return loss + ANCHOR_WEIGHT * drift(mean_BCHW, *anchored) if anchored else loss

    return loss_of


def noisy(mean_BCHW: Tensor, variance_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
    """Draws from the posterior, with the noise of an imperfect sampler on top."""
    spread_C11 = LATENT_NOISE * mean_BCHW.detach().std((0, 2, 3), correction=0).view(-1, 1, 1)
    return mean_BCHW + (variance_BCHW + spread_C11**2).sqrt() * noise_BCHW


def drift(mean_BCHW: Tensor, anchor_BCHW: Tensor, flat_B: Tensor) -> Tensor:
    """Mean squared difference of the flat pictures' latents from the anchor's; 0 where none is flat."""
    squared_B = ((mean_BCHW - anchor_BCHW) ** 2).mean((1, 2, 3))
    return (flat_B * squared_B).sum() / flat_B.sum().clamp_min(1.0)


def picture_loss(decoded_B3PP: Tensor, target_B3PP: Tensor) -> Tensor:
    """L1 of pixels, and of horizontal and vertical differences, at full, half and quarter size.

    The differences make edges count, and pixels count more where much happens in little space: an eye is a few dark
    pixels that plain L1 would smear.
    """
    error, weight = decoded_B3PP - target_B3PP, detail_weight(target_B3PP)
    loss = (weight * error.abs()).mean()
    for scale in (1, 2, 4):
        coarse = error if scale == 1 else functional.avg_pool2d(error, scale)
        loss = loss + EDGE_WEIGHT * (coarse.diff(dim=2).abs().mean() + coarse.diff(dim=3).abs().mean())
        if scale > 1:
            loss = loss + coarse.abs().mean()
    return loss


def detail_weight(target_B3PP: Tensor) -> Tensor:
    """[B, 1, P, P], from 1 in empty parts to several times that at eyes; the mean of all is 1."""
    contrast_B1PP = (target_B3PP - box_mean(target_B3PP)).abs().amax(1, keepdim=True)
    weight_B1PP = 1.0 + DETAIL_WEIGHT * box_mean(contrast_B1PP)
    return weight_B1PP / weight_B1PP.mean()


def box_mean(images_BCPP: Tensor) -> Tensor:
    return functional.avg_pool2d(images_BCPP, DETAIL_PX, 1, DETAIL_PX // 2, count_include_pad=False)


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images_N3PP: Tensor) -> Tensor:
    """Latents [N, C, H, W] of uint8 pictures: the posterior's mean, times the scaling factor."""
    latents = [
        vae.encode(2.0 * to_float(images) - 1.0).latent_dist.mean * vae.config.scaling_factor
        for images in images_N3PP.split(ENCODE_BATCH)
    ]
    return torch.cat(latents)


@torch.no_grad()
def decode_all(vae: AutoencoderKL, latents_NCHW: Tensor) -> Tensor:
    """Pictures [N, 3, P, P] with values 0…1."""
    pictures = [vae.decode(latents / vae.config.scaling_factor).sample for latents in latents_NCHW.split(ENCODE_BATCH)]
    return (torch.cat(pictures) / 2 + 0.5).clamp(0.0, 1.0)


@torch.no_grad()
def whiten(vae: AutoencoderKL, mean_C: Tensor, std_C: Tensor) -> None:
    """Give every latent channel zero mean and unit variance by rewriting the two 1×1 convolutions around it.

    StableDiffusionPipeline knows one scaling factor and no shift, so both go into the weights, exactly: the encoder's
    last convolution yields (mean - m) / s and its log variance less 2 log s, the decoder's first one undoes it.
    """
    channels = len(mean_C)
    out_of_encoder, into_decoder = vae.quant_conv, vae.post_quant_conv
    if not isinstance(out_of_encoder, nn.Conv2d) or not isinstance(into_decoder, nn.Conv2d):
        raise TypeError("whitening needs an autoencoder with quant_conv and post_quant_conv")
    out_of_encoder.weight[:channels] /= std_C.view(-1, 1, 1, 1)
    out_of_encoder.bias[:channels] = (out_of_encoder.bias[:channels] - mean_C) / std_C
    out_of_encoder.bias[channels:] -= 2.0 * std_C.log()
    into_decoder.bias += torch.einsum("oixy,i->o", into_decoder.weight, mean_C)
    into_decoder.weight *= std_C.view(1, -1, 1, 1)


@torch.no_grad()
def narrow(vae: AutoencoderKL, images_N3PP: Tensor) -> None:
    """Bring the posterior of every channel to at most `WIDEST`.

    A channel that the decoder makes nothing of keeps the prior's width, many times its own deviation. Whoever trains on
    draws from the posterior, as LoRA trainers do, would see nothing but noise in it.
    """
    spread_C = vae.encode(2.0 * to_float(images_N3PP) - 1.0).latent_dist.std.mean((0, 2, 3))
    assert isinstance(vae.quant_conv, nn.Conv2d)
    assert vae.quant_conv.bias is not None
    vae.quant_conv.bias[len(spread_C) :] -= 2.0 * (spread_C / WIDEST).clamp_min(1.0).log()


def reconstruction_psnr(decoded_N3PP: Tensor, images_N3PP: Tensor) -> float:
    """Mean over pictures, in decibel."""
    error_N = ((decoded_N3PP - to_float(images_N3PP)) ** 2).mean((1, 2, 3))
    return float((-10.0 * error_N.clamp_min(1e-10).log10()).mean())


def restoration(settings: Settings, vae: AutoencoderKL) -> dict[str, float]:
    """On unseen renders of the flat look and of those held out: PSNR, and shares of their detail and Laplacian."""
    figures = {}
    for name in ("flat", *HELD_OUT):
        images_N3PP = load_set(settings, f"{name}-unseen").images
        renders, decoded = to_float(images_N3PP), decode_all(vae, encode_all(vae, images_N3PP))
        figures[f"psnr_{name}_db"] = round(reconstruction_psnr(decoded, images_N3PP), 2)
        figures[f"detail_{name}"] = round(detail(decoded) / detail(renders), 3)
        figures[f"laplacian_{name}"] = round(laplacian(decoded) / laplacian(renders), 3)
    return figures


def print_restoration(settings: Settings, vae: AutoencoderKL, name: str) -> None:
    print(f"{name}: {restoration(settings, vae)}", flush=True)
