"""Fast layers on a GPU: the kernels give what torch's operations give, and the arithmetic is no coarser than PEFT's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.adapters import lora as adapters
from finetune.config.schema import LoraConfig, ModelConfig, Quantize
from finetune.language import causal_lm, fast_layers, varlen_attention
from finetune.language.fast_kernels import Plain

pytestmark = pytest.mark.gpu
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPU = torch.device("cuda")
LENGTH = 320


@pytest.mark.parametrize("shape", [(7, 3, 24), (64, 32, 128), (3, 5, 80)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_are_torchs_operations(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    from finetune.language import triton_kernels as kernels

    count, heads, channels = shape
    random = torch.Generator(GPU).manual_seed(0)
    x, dy, gate = (torch.randn(count, heads * channels, generator=random, device=GPU).to(dtype) for _ in range(3))
    weight = torch.rand(heads * channels, generator=random, device=GPU).to(dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.02, "atol": 0.02}
    for name, inputs in {
        "rms_norm": (x, weight, 1e-5),
        "rms_norm_backward": (dy, x, weight, 1e-5),
        "swiglu": (x, gate),
    }.items():
        torch.testing.assert_close(getattr(kernels, name)(*inputs), getattr(Plain, name)(*inputs), **tolerance)
    angles = torch.rand(count, channels // 2, generator=random, device=GPU)
    cos, sin = (torch.cat([part, part], -1).to(dtype) for part in (angles.cos(), angles.sin()))
    for back in (False, True):
        found, expected = (x.view(shape).clone() for _ in range(2))
        kernels.rotate_(found, cos, sin, back)
        Plain.rotate_(expected, cos, sin, back)
        torch.testing.assert_close(found, expected, **tolerance)
    changed = [[value.clone() for value in (dy, x, gate)] for _ in range(2)]
    kernels.swiglu_backward_(*changed[0])
    Plain.swiglu_backward_(*changed[1])
    for found, expected in zip(*changed, strict=True):
        torch.testing.assert_close(found, expected, **tolerance)


def gradients(base: Path, dtype: torch.dtype, quantize: Quantize, *, fast: bool) -> Tensor:
    """Of all adapters, as one, in fp32."""
    model: Any = causal_lm.load_model(ModelConfig(kind="language", base=str(base), quantize=quantize), dtype, GPU)
    adapters.inject(model, LoraConfig(dropout=0.0, rank=8, alpha=16.0), ALL, seed=0)
    random = torch.Generator().manual_seed(1)
    for parameter in adapters.adapter_parameters(model):
        parameter.data = (torch.randn(parameter.shape, generator=random) / 16).to(GPU)
    assert not fast or fast_layers.install(model, dtype)
    ids = torch.randint(0, 512, (2, LENGTH), generator=random)
    positions = torch.cat([torch.arange(200), torch.arange(LENGTH - 200)]).expand(2, -1)
    segments = (torch.arange(LENGTH) >= 200).long().expand(2, -1)
    with torch.autocast("cuda", dtype=dtype, enabled=dtype is not torch.float32):
        states = causal_lm.packed_hidden_states(model.train(), ids.to(GPU), positions.to(GPU), segments)
        weights = torch.randn(states.shape, generator=random).to(GPU)
        total = (states.float() * weights).sum()
    if dtype is torch.bfloat16:
        assert varlen_attention.is_enabled(model)
    found = torch.autograd.grad(total, adapters.adapter_parameters(model))
    return torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.parametrize("quantize", [Quantize.none, Quantize.nf4])
def test_gradients_are_no_coarser_than_pefts(tmp_path: Path, quantize: Quantize) -> None:
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=512, max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    exact = gradients(tmp_path, torch.float32, quantize, fast=False)
    errors = {
        fast: float((gradients(tmp_path, torch.bfloat16, quantize, fast=fast) - exact).norm() / exact.norm())
        for fast in (False, True)
    }
    assert errors[True] <= 1.1 * errors[False] < 0.1
