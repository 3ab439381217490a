"""Fast blocks of UNets on a GPU: the kernels give what torch's operations give, and the arithmetic is no coarser than
that of diffusers' blocks with PEFT."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from finetune.adapters import lora as adapters
from finetune.diffusion.fast_kernels import Plain
from tests.tiny_families import ATTENTION, save_family
from tests.unit.diffusion.test_fast_blocks import adapted, flat_of, of_flux, weighted

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shape", [(7, 24), (64, 5120), (3, 1030)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_are_torchs_operations(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from finetune.diffusion import triton_kernels as kernels

    random = torch.Generator("cuda").manual_seed(0)
    wide_NJ = torch.randn(shape, generator=random, device="cuda").to(dtype)
    dy_NI = torch.randn(shape[0], shape[1] // 2, generator=random, device="cuda").to(dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(kernels.geglu(wide_NJ), Plain.geglu(wide_NJ), **tolerance)
    changed = [[dy_NI.clone(), wide_NJ.clone()] for _ in range(2)]
    kernels.geglu_backward_(*changed[0])
    Plain.geglu_backward_(*changed[1])
    for found, expected in zip(*changed, strict=True):
        torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("shape", [(2, 7, 3, 16), (1, 33, 24, 128), (2, 5, 3, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_are_normed_and_turned_as_by_torchs_operations(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    from finetune.diffusion import triton_kernels as kernels

    random = torch.Generator("cuda").manual_seed(0)
    x, dy = (torch.randn(shape, generator=random, device="cuda").to(dtype) for _ in range(2))
    weight = torch.linspace(0.5, 2, shape[3], device="cuda").to(dtype)
    angles = torch.randn(shape[1], shape[3] // 2, generator=random, device="cuda").repeat_interleave(2, 1)
    rest = weight, angles.cos(), angles.sin(), 1e-6
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(kernels.turn(x, *rest), Plain.turn(x, *rest), **tolerance)
    torch.testing.assert_close(kernels.turn_backward(dy, x, *rest), Plain.turn_backward(dy, x, *rest), **tolerance)


def gradients(model: nn.Module, dtype: torch.dtype) -> Tensor:
    """Of all adapters, as one, in fp32."""
    if hasattr(model, "x_embedder"):
        with torch.device("cuda"), torch.autocast("cuda", dtype=dtype, enabled=dtype is not torch.float32):
            loss = weighted(of_flux(model.cuda(), torch.Generator("cuda").manual_seed(2)))
        return flat_of(torch.autograd.grad(loss, adapters.adapter_parameters(model)))
    random = torch.Generator().manual_seed(2)
    noisy, text = (torch.randn(shape, generator=random).cuda() for shape in ((2, 4, 16, 16), (2, 77, 32)))
    more = {"text_embeds": text[:, 0, :16].to(dtype), "time_ids": torch.ones(2, 6, device="cuda").to(dtype)}
    with torch.autocast("cuda", dtype=dtype, enabled=dtype is not torch.float32, cache_enabled=False):
        predicted = model.cuda()(
            noisy, torch.tensor([100, 700]).cuda(), encoder_hidden_states=text.to(dtype), return_dict=False,
            added_cond_kwargs=more,
        )[0]  # fmt: skip
    weights = torch.linspace(-1, 1, predicted.numel(), device="cuda").view_as(predicted)
    found = torch.autograd.grad((predicted.float() * weights).sum(), adapters.adapter_parameters(model))
    return flat_of(found)


@pytest.mark.parametrize(("kind", "part"), [("sdxl", "unet"), ("flux", "transformer")])
def test_gradients_are_no_coarser_than_those_of_plain_blocks(tmp_path: Path, kind: str, part: str) -> None:
    save_family(tmp_path, kind)
    targets = [*ATTENTION, "ff.net.0.proj", "ff.net.2"]
    exact = gradients(adapted(tmp_path / part, targets, fast=False), torch.float32)
    assert 0 < exact.norm() < torch.inf
    errors = []
    for fast in (False, True):
        found = gradients(adapted(tmp_path / part, targets, fast=fast, dtype=torch.bfloat16), torch.bfloat16)
        assert found.isfinite().all(), f"fast={fast}"
        errors.append(float((found - exact).norm() / exact.norm()))
    plain, fast_ones = errors
    assert fast_ones < 0.3
    assert fast_ones <= 1.1 * plain
