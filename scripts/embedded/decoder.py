"""Trains the decoder alone, against a small discriminator of patches, so that what it restores is crisp.

Losses that count differences make a decoder blur what it is not sure of. One that also has to look real draws an edge
(arXiv 2012.09841, section 3.2); it must also be as crisp as the render, patch by patch. The encoder stays as it is, and
a diffusion model that fits it goes on fitting.

B pictures, P pixels, C latent channels, H×W latent pixels.
"""

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from scripts.embedded.autoencoder import (
    BATCH,
    autoencoder_folder,
    batches,
    box_mean,
    noisy,
    picture_loss,
    print_restoration,
)
from scripts.embedded.crispness import second_differences
from scripts.embedded.fit import Budget, Draw, LossOf, fit
from scripts.embedded.render_sets import load_base_sets
from scripts.embedded.settings import SEED, Settings

# The pull of a decoded picture towards looking real, as a share of the pull towards its own pixels. With 0.4 pixar
# renders come back with 0.88 of their fine detail, with 1.0 with 0.95; 2.5 brings no more.
REALISM_SHARE = 1.0
CRISPNESS_WEIGHT = 1.2  # flat pictures come back 3 % too crisp instead of 9 %, pixar ones 7 % too soft instead of 10 %
LEAST_PULL = 1e-6  # keeps a discriminator that hardly reacts from being made loud


def new_discriminator() -> nn.Sequential:
    """A logit for each patch of 34 pixels: positive where it looks like a render."""
    layers: list[nn.Module] = []
    for before, width, stride in ((3, 48, 2), (48, 96, 2), (96, 192, 1)):
        # None on pixels, whose contrast tells; nor of batches, which are all decoded or all rendered.
        norm = nn.Identity() if before == 3 else nn.GroupNorm(8, width)
        layers += [nn.Conv2d(before, width, 4, stride, 1), norm, nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(192, 1, 4, padding=1))


def train_decoder(settings: Settings) -> None:
    renders = load_base_sets(settings)
    folder = autoencoder_folder(settings.work)
    vae = AutoencoderKL.from_pretrained(folder).to(settings.device)
    print_restoration(settings, vae, "decoder, before")
    vae.requires_grad_(False)
    decoder = nn.Sequential(vae.post_quant_conv, vae.decoder).requires_grad_(True)
    torch.manual_seed(SEED)
    discriminator = new_discriminator().to(settings.device)
    fitted = fit(
        nn.ModuleDict({"decoder": decoder, "discriminator": discriminator}),
        encoded(batches(renders, settings.batch(BATCH)), vae),
        loss_with(decoder, discriminator),
        name="decoder",
        budget=Budget(settings.minutes["decoder"] * 60, settings.tiny_steps),
        lr=3e-4,
        checkpoint=settings.work / "checkpoints" / "decoder.pt",
        seed=SEED,
        betas=(0.5, 0.99),  # each side's target moves with the other
        pause_at=settings.pause_at,
        bf16=settings.on_gpu,
    )
    if fitted.steps:  # of a training that pauses the average so far, which fits the encoder too
        vae.save_pretrained(folder)
        print_restoration(settings, vae, "decoder, after" if fitted.done else "decoder, so far")


def encoded(draw_pictures: Draw, vae: AutoencoderKL) -> Draw:
    """Draws (pictures -1…1 [B, 3, P, P], their noisy latents [B, C, H, W])."""

    @torch.no_grad()
    def draw(generator: torch.Generator) -> tuple[Tensor, ...]:
        target_B3PP, noise_BCHW = draw_pictures(generator)
        with torch.autocast("cuda", torch.bfloat16, enabled=target_B3PP.is_cuda):
            posterior = vae.encode(target_B3PP).latent_dist
        return target_B3PP, noisy(posterior.mean.float(), posterior.var.float(), noise_BCHW)

    return draw


def loss_with(decoder: nn.Module, discriminator: nn.Module) -> LossOf:
    """Both sides' losses in one: neither has a gradient for the other's weights, so one optimiser serves both."""

    def loss_of(target_B3PP: Tensor, latents_BCHW: Tensor) -> Tensor:
        dtype = next(decoder.parameters()).dtype
        decoded_B3PP = decoder(latents_BCHW.to(dtype)).float()
        real, made = (discriminator(images.to(dtype)).float() for images in (target_B3PP, decoded_B3PP.detach()))
        discriminating = functional.relu(1.0 - real).mean() + functional.relu(1.0 + made).mean()
        judge = {name: weight.detach() for name, weight in discriminator.named_parameters()}
        realism = -functional_call(discriminator, judge, (decoded_B3PP.to(dtype),)).float().mean()
        restoring = picture_loss(decoded_B3PP, target_B3PP)
        restoring = restoring + CRISPNESS_WEIGHT * crispness_gap(decoded_B3PP, target_B3PP)
        pulls = [torch.autograd.grad(loss, decoded_B3PP, retain_graph=True)[0].norm() for loss in (restoring, realism)]
        weight = REALISM_SHARE * pulls[0] / (pulls[1] + LEAST_PULL)
        return restoring + weight * realism + discriminating

    return loss_of


def crispness_gap(decoded_B3PP: Tensor, target_B3PP: Tensor) -> Tensor:
    """How far the decoded pictures are from being as crisp as the target in each small patch; 0 where they are."""
    made, wanted = (box_mean(second_differences(images).abs()) for images in (decoded_B3PP, target_B3PP))
    return (made - wanted).abs().mean()
