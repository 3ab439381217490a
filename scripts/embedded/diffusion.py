"""Trains the text encoder and the UNet together, from scratch, on the latents of renders in many looks.

B pictures, C latent channels, H×W latent pixels, L tokens of width D, V caption variants, T timesteps, S suffixes.
"""

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from scripts.embedded.autoencoder import autoencoder_folder, encode_all
from scripts.embedded.fit import Budget, Draw, LossOf, fit, rank_and_count
from scripts.embedded.render_sets import load_base_sets
from scripts.embedded.settings import LATENT_CHANNELS, PICTURE_PX, SEED, TEXT_WIDTH, Settings
from scripts.embedded.vocabularies import CLIP_LENGTH, save_clip_tokenizer, train_clip_tokenizer
from scripts.toyworld.looks import HELD_OUT

EMPTY_SHARE = 0.10  # captions dropped, for classifier-free guidance
SUFFIX_SHARE = 0.12  # captions with a made-up style behind them
SUFFIXES = 4096
SUFFIX_PATTERNS = (
    ", {} style",
    ", in {} style",
    ", {} look",
    ", in {} look",
    ", {}",
    ", {} art",
    ", in the style of {}",
    " in {} style",
)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=CLIP_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet() -> UNet2DConditionModel:
    """Cross-attention at every level: a LoRA on attention alone must be able to change the whole look."""
    return UNet2DConditionModel(
        sample_size=PICTURE_PX // 8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(96, 160, 192),
        layers_per_block=1,
        # The numbers of heads: the field's name is a historical slip of the library. All of width 32, the least that
        # fused attention computes: it pads narrower ones.
        attention_head_dim=(3, 5, 6),
        cross_attention_dim=TEXT_WIDTH,
    )


def new_scheduler() -> DPMSolverMultistepScheduler:
    """DPM-Solver++ (arXiv 2211.01095) with steps evenly spaced in the logarithm of the signal-to-noise ratio, as edges
    are made at its end. Zero terminal SNR: the sampler starts from what training calls pure noise (arXiv 2305.08891).
    """
    return DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,  # without effect on these timesteps; any other value makes the pipeline warn
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        use_lu_lambdas=True,
    )


def diffusion_folder(work: Path) -> Path:
    return work / "diffusion"


def train_diffusion(settings: Settings) -> None:
    renders = load_base_sets(settings).with_mirrored()
    captions = renders.captions()
    folder, goes_on = diffusion_folder(settings.work), "diffusion" in settings.kept
    rank, processes = rank_and_count()
    # Kept as shipped, or of the call that paused: more renders give other merges.
    if (folder / "tokenizer" / "merges.txt").exists():
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    else:
        tokenizer = train_clip_tokenizer(text for variants in captions for text in variants)
        if rank == 0:
            save_clip_tokenizer(tokenizer, folder / "tokenizer")
    tokens_NVL = tokenise(tokenizer, captions).to(settings.device)
    vae = AutoencoderKL.from_pretrained(autoencoder_folder(settings.work)).to(settings.device)
    latents_NCHW = encode_all(vae, renders.images)
    print(f"diffusion: {len(renders.scenes)} pictures, {len(tokenizer)} tokens", flush=True)
    print(f"diffusion: latents mean {latents_NCHW.mean():.3f}, deviation {latents_NCHW.std():.3f}", flush=True)
    del vae, renders

    torch.manual_seed(SEED)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet") if goes_on else new_unet()
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder") if goes_on else new_text_encoder(tokenizer)
    unet.to(settings.device)
    text_encoder.to(settings.device)
    fitted = fit(
        nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}),
        batches(latents_NCHW, tokens_NVL, tokenizer, settings.batch(512) // processes),
        loss_with(unet, text_encoder),
        name="diffusion",
        budget=Budget(settings.minutes["diffusion"] * 60, settings.tiny_steps),
        lr=6e-4 if goes_on else 8e-4,
        checkpoint=settings.work / "checkpoints" / "diffusion.pt",
        seed=SEED,
        ema_decay=0.9995,
        pause_at=settings.pause_at,
        bf16=settings.on_gpu,
        compiles=settings.on_gpu,
    )
    if fitted.steps and rank == 0:  # a pause may come before the first step: no model to show then
        unet.save_pretrained(folder / "unet")
        text_encoder.save_pretrained(folder / "text_encoder")


def batches(latents_NCHW: Tensor, tokens_NVL: Tensor, tokenizer: CLIPTokenizer, batch: int) -> Draw:
    """Draws (tokens [B, L], timesteps [B], noisy latents, velocities [B, C, H, W])."""
    device = latents_NCHW.device
    suffixes_SL = tokenise(tokenizer, [made_up_suffixes(SUFFIXES)])[0].to(device)
    alphas_T = new_scheduler().alphas_cumprod.to(device)
    places_B = torch.arange(batch, device=device)

    def draw(generator: torch.Generator) -> tuple[Tensor, ...]:
        def below(bound: int) -> Tensor:
            return torch.randint(bound, (batch,), device=device, generator=generator)

        rows = below(len(latents_NCHW))
        tokens_BL = tokens_NVL[rows, below(tokens_NVL.shape[1])].long()
        suffixed_BL = append(tokens_BL, suffixes_SL[below(len(suffixes_SL))].long(), tokenizer.eos_token_id)
        empty_L = torch.full_like(tokens_BL[0], tokenizer.eos_token_id)
        empty_L[0] = tokenizer.bos_token_id
        chance_B1 = torch.rand(batch, 1, device=device, generator=generator)
        tokens_BL = torch.where(chance_B1 < SUFFIX_SHARE, suffixed_BL, tokens_BL)
        tokens_BL = torch.where(chance_B1 > 1.0 - EMPTY_SHARE, empty_L, tokens_BL)

        clean_BCHW = latents_NCHW[rows]
        noise_BCHW = torch.randn(clean_BCHW.shape, device=device, generator=generator)
        # One timestep from each of B equal parts of the range: every batch weighs early and late steps alike.
        parts_B = (places_B + torch.rand(batch, device=device, generator=generator)) / batch
        timesteps_B = (parts_B * len(alphas_T)).long().clamp_max(len(alphas_T) - 1)
        return tokens_BL, timesteps_B, *velocity_pair(clean_BCHW, noise_BCHW, alphas_T[timesteps_B])

    return draw


def loss_with(unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> LossOf:
    def loss_of(tokens_BL: Tensor, timesteps_B: Tensor, noisy_BCHW: Tensor, velocity_BCHW: Tensor) -> Tensor:
        text_BLD = text_encoder(tokens_BL)[0]
        predicted_BCHW = unet(noisy_BCHW.to(unet.dtype), timesteps_B, text_BLD).sample
        return functional.mse_loss(predicted_BCHW.float(), velocity_BCHW)

    return loss_of


def velocity_pair(clean_BCHW: Tensor, noise_BCHW: Tensor, alphas_B: Tensor) -> tuple[Tensor, Tensor]:
    """The noisy latents and the velocity to predict (arXiv 2202.00512, appendix D)."""
    signal, spread = (share.sqrt().view(-1, 1, 1, 1) for share in (alphas_B, 1.0 - alphas_B))
    return signal * clean_BCHW + spread * noise_BCHW, signal * noise_BCHW - spread * clean_BCHW


def tokenise(tokenizer: CLIPTokenizer, captions: list[list[str]]) -> Tensor:
    """Token ids [N, V, L] as int16, padded as the pipeline pads them."""
    flat_list = [text for variants in captions for text in variants]
    ids = tokenizer(flat_list, padding="max_length", truncation=True, max_length=CLIP_LENGTH)["input_ids"]
    return torch.tensor(ids, dtype=torch.int16).view(len(captions), -1, CLIP_LENGTH)


def made_up_suffixes(count: int) -> list[str]:
    """Style phrases of made-up words: from them the base learns to ignore trigger phrases that it does not know."""
    rng = random.Random(SEED)
    suffixes = []
    while len(suffixes) < count:
        words = " ".join(made_up_word(rng) for _ in range(rng.choice((1, 1, 1, 2))))
        # The words of the looks held out stay unseen, even by accident.
        if not any(word in words for name in HELD_OUT for word in name.split()):
            suffixes.append(rng.choice(SUFFIX_PATTERNS).format(words))
    return suffixes


def made_up_word(rng: random.Random) -> str:
    """Syllables or any letters, half and half, three to nine letters long."""
    if rng.random() < 0.5:
        return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 9)))
    syllables = (rng.choice("bcdfghjklmnprstvwxz") + rng.choice("aeiouy") for _ in range(rng.randint(1, 3)))
    return "".join(syllables) + rng.choice("bdgklmnprstvx")


def append(tokens_BL: Tensor, suffixes_BL: Tensor, eos_id: int) -> Tensor:
    """Put each suffix (start token first) behind its caption, before the end token; L stays."""
    ends_B1 = (tokens_BL == eos_id).int().argmax(1, keepdim=True)  # the first end token
    positions_L = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
    into_suffix_BL = (positions_L - ends_B1 + 1).clamp(0, tokens_BL.shape[1] - 1)
    joined_BL = torch.where(positions_L < ends_B1, tokens_BL, suffixes_BL.gather(1, into_suffix_BL))
    joined_BL[:, -1] = eos_id
    return joined_BL
