"""An autoencoder for tests, random and of a few weights."""

import torch
from diffusers import AutoencoderKL


def tiny_autoencoder(halvings: int = 1, channels: int = 4) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * (halvings + 1),
        up_block_types=("UpDecoderBlock2D",) * (halvings + 1),
        block_out_channels=(8,) * (halvings + 1),
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=1.0,
    ).eval()
