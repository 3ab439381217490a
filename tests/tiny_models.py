"""Tiny random models of the real classes, built in code and saved in the ordinary layout: under a second, offline."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.tiny_tokenizers import clip_tokenizer


def save_diffusion(folder: Path, *, prediction_type: str = "epsilon", seed: int = 0, whole: bool = False) -> Path:
    """A StableDiffusionPipeline of some 50,000 parameters: 32x32 pixels, 8x8 latents of 4 channels.

    whole: with every kind of block that Stable Diffusion has, for tests of their names and their order; takes twice the
    time.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = clip_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32) if whole else (16,),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D") if whole else ("CrossAttnDownBlock2D",),
            mid_block_type="UNetMidBlock2DCrossAttn" if whole else None,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D") if whole else ("UpBlock2D",),
            cross_attention_dim=16,
            attention_head_dim=8,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=77,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False, steps_offset=1)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def save_captioner(folder: Path, *, seed: int = 0) -> Path:
    """A BLIP captioner of some 10,000 parameters: reads 32x32 pixels, says random words, always the same ones."""
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessorPil

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *["a", "red", "blue", "robot", "cat", "in", "the", "woods", "at", "sea", "small", "big"],
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {
        "vocab_size": len(tokenizer),
        "encoder_hidden_size": 16,
        "max_position_embeddings": 64,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.cls_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = sizes | {"image_size": 32, "patch_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BlipForConditionalGeneration(
            BlipConfig(text_config=text, vision_config=vision, projection_dim=16, image_text_hidden_size=16)
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def change_weights(folder: Path) -> None:
    """Other numbers under the same names, in the first file of weights."""
    file = next(path for path in sorted(folder.rglob("*.safetensors")) if "vae" not in path.parts)
    save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
