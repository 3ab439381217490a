"""Recomputed blocks: which ones they are, and that gradients don't change by a bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from finetune.adapters import lora
from finetune.config.schema import LoraConfig
from finetune.errors import ModelError
from finetune.memory import checkpointing
from tests.tiny_language_models import CHATS, SIZES, _model

torch.set_num_threads(1)


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
    model: nn.Module = _model(architecture, SIZES | {"vocab_size": 64, "num_hidden_layers": layers, "pad_token_id": 0})
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


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_stay_bit_for_bit_with_dropout(name: str, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    make, output, targets = MODELS[name]
    model = adapted(make, targets)
    expected = gradients(model, output)
    assert expected
    assert any(bool(gradient.any()) for gradient in expected)
    calls: list[Any] = []
    real = checkpointing.checkpoint
    monkeypatch.setattr(checkpointing, "checkpoint", lambda *a, **k: calls.append(a[0]) or real(*a, **k))
    checkpointing.set_checkpointing(model, every)
    found = gradients(model, output)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    blocks = len(_numbers(model))
    assert len(calls) == -(-blocks // every)
    again = gradients(model, output)  # the same blocks in every step
    assert len(calls) == 2 * -(-blocks // every)
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))


def _numbers(model: nn.Module) -> dict[nn.Module, int]:
    guard: Any = next(module for module in model.modules() if hasattr(module, "gradient_checkpointing"))
    found: dict[nn.Module, int] = guard._gradient_checkpointing_func.numbers
    return found


def test_blocks_are_what_the_libraries_recompute() -> None:
    for (make, output, targets), counted in zip(MODELS.values(), (11, 3, 3), strict=True):
        model = adapted(make, targets)
        checkpointing.set_checkpointing(model, 1)
        gradients(model, output)
        numbers = _numbers(model)
        assert list(numbers.values()) == list(range(counted)), type(model)
        assert all(isinstance(block, nn.Module) for block in numbers)


def test_0_takes_recomputing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(language, ["q_proj"])
    checkpointing.set_checkpointing(model, 1)
    checkpointing.set_checkpointing(model, 0)
    monkeypatch.setattr(checkpointing, "checkpoint", lambda *_, **__: pytest.fail("recomputed"))
    gradients(model, tokens)


@pytest.mark.parametrize("architecture", CHATS)
def test_every_language_model_has_blocks(architecture: str) -> None:
    model = language(architecture, layers=2)
    checkpointing.set_checkpointing(model, 2)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(
        ModelError, match=r"Linear has no blocks that can be recomputed; try trainer.activation_checkpointing=0"
    ):
        checkpointing.set_checkpointing(nn.Linear(2, 2), 1)
    checkpointing.set_checkpointing(nn.Linear(2, 2), 0)
