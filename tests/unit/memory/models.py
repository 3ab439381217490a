"""Tiny models of each sort of blocks, with adapters, and their gradients."""

from collections.abc import Callable

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from finetune.adapters import lora
from finetune.config.schema import LoraConfig
from tests.tiny_language_models import SIZES, build


def unet() -> nn.Module:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
    )


def language(architecture: str = "llama", layers: int = 3) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = build(architecture, SIZES | {"vocab_size": 64, "num_hidden_layers": layers, "pad_token_id": 0})
    return model


def images(model: nn.Module) -> Tensor:
    random = torch.Generator().manual_seed(1)
    latents, text = torch.randn(2, 4, 8, 8, generator=random), torch.randn(2, 5, 16, generator=random)
    found: Tensor = model(latents, torch.tensor([3, 500]), encoder_hidden_states=text, return_dict=False)[0]
    return found


def joint(model: nn.Module) -> Tensor:
    random = torch.Generator().manual_seed(1)
    latents, text = torch.randn(2, 4, 8, 8, generator=random), torch.randn(2, 5, 16, generator=random)
    pooled = torch.randn(2, 16, generator=random)
    found: Tensor = model(latents, text, pooled, torch.tensor([3, 500]), return_dict=False)[0]
    return found


def tokens(model: nn.Module) -> Tensor:
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor], list[str]]] = {
    "unet": (unet, images, ["to_q", "to_v", "conv1"]),
    "transformer": (transformer, joint, ["to_q", "to_v"]),
    "llama": (language, tokens, ["q_proj", "down_proj"]),
}


def adapted(make: Callable[[], nn.Module], targets: list[str]) -> nn.Module:
    """The model with adapters that change it and drop inputs, in training mode."""
    model = make().requires_grad_(False)
    lora.inject(model, LoraConfig(rank=4, alpha=8, dropout=0.3), targets, seed=0)
    random = torch.Generator().manual_seed(2)
    for parameter in lora.adapter_parameters(model):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=random)
    return model.train()


def gradients(model: nn.Module, output: Callable[[nn.Module], Tensor]) -> list[Tensor]:
    torch.manual_seed(7)
    model.zero_grad()
    output(model).square().sum().backward()
    return [parameter.grad.clone() for parameter in lora.adapter_parameters(model) if parameter.grad is not None]
