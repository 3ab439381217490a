"""Adapters: zero at first, named as PEFT names them, refused where they don't fit."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict

from finetune.errors import ModelError
from finetune.models import lora
from finetune.models.diffusion import load_unet

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture
def unet(tiny_base: Path) -> torch.nn.Module:
    return load_unet(str(tiny_base), torch.float32)


def output(unet: torch.nn.Module) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    latents, text = torch.randn((1, 4, 8, 8), generator=random), torch.randn((1, 77, 16), generator=random)
    with torch.no_grad():
        return unet(latents, torch.tensor([500]), encoder_hidden_states=text, return_dict=False)[0]


def test_a_new_adapter_changes_nothing(unet: torch.nn.Module) -> None:
    before = output(unet)
    lora.inject(unet, rank=4, alpha=8, dropout=0.0, targets=ATTENTION, seed=0)
    assert torch.equal(before, output(unet))


def test_only_the_adapter_trains_in_fp32_under_pefts_names(tiny_base: Path) -> None:
    unet = load_unet(str(tiny_base), torch.bfloat16)
    lora.inject(unet, rank=4, alpha=8, dropout=0.0, targets=ATTENTION, seed=0)
    assert {parameter.dtype for parameter in lora.adapter_parameters(unet)} == {torch.float32}
    trainable, total = lora.counts(unet)
    assert trainable == sum(weight.numel() for weight in lora.state(unet).values())
    assert 0 < trainable < total / 2
    assert lora.state(unet).keys() == get_peft_model_state_dict(unet).keys()


def test_the_same_seed_gives_the_same_start_and_leaves_the_global_stream_alone(tiny_base: Path) -> None:
    states = []
    torch.manual_seed(7)
    expected = torch.rand(3)
    for seed in (0, 0, 1):
        torch.manual_seed(7)
        unet = load_unet(str(tiny_base), torch.float32)
        torch.manual_seed(7)
        lora.inject(unet, rank=4, alpha=8, dropout=0.0, targets=ATTENTION, seed=seed)
        assert torch.equal(torch.rand(3), expected)
        states.append(lora.state(unet))
    name = next(name for name in states[0] if "lora_A" in name)
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


def test_no_layer_to_adapt_is_an_error(unet: torch.nn.Module) -> None:
    with pytest.raises(ModelError, match=r"no layer of the base matches lora targets"):
        lora.inject(unet, rank=4, alpha=8, dropout=0.0, targets=["q_proj"], seed=0)


def test_weights_of_another_rank_or_other_layers_are_refused(unet: torch.nn.Module) -> None:
    lora.inject(unet, rank=4, alpha=8, dropout=0.0, targets=ATTENTION, seed=0)
    weights = lora.state(unet)
    name = next(iter(weights))
    with pytest.raises(ModelError, match=r"other does not fit: .* is \(8"):
        lora.load_state(unet, {**weights, name: torch.zeros(8, 3)}, "other")
    weights.pop(name)
    with pytest.raises(ModelError, match=r"other does not fit: 1 layers differ"):
        lora.load_state(unet, weights, "other")


def test_a_missing_and_a_damaged_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gone.safetensors does not exist"):
        lora.read_weights(tmp_path / "gone.safetensors")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match=r"bad.safetensors is damaged"):
        lora.read_weights(bad)
