"""Fast blocks compute what PEFT's on diffusers' compute: values, gradients, and what training makes of them."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.adapters import lora as adapters
from finetune.config.schema import LoraConfig
from finetune.diffusion import fast_blocks, fast_flux, fast_unet
from finetune.memory import block_offload, checkpointing
from tests.tiny_families import ATTENTION, save_family

pytestmark = pytest.mark.sampled
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2"]
FLUX = ["add_q_proj", "add_v_proj", "to_add_out", "ff_context.net.2", "proj_mlp", "proj_out"]
RANDOM = torch.Generator().manual_seed(0)
NOISY = torch.randn(2, 4, 8, 8, generator=RANDOM)


@pytest.fixture(scope="module")
def unets(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("bases")

    def saved(kind: str) -> Path:
        if not (folder / kind).exists():
            save_family(folder / kind, kind)
        return folder / kind / ("transformer" if kind == "flux" else "unet")

    return saved


def adapted(unet: Path, targets: list[str], *, fast: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A UNet or transformer with adapters that change something."""
    from diffusers import FluxTransformer2DModel, UNet2DConditionModel

    kind: Any = FluxTransformer2DModel if unet.name == "transformer" else UNet2DConditionModel
    model: Any = kind.from_pretrained(unet).requires_grad_(False).to(dtype)
    adapters.inject(model, LoraConfig(rank=4, alpha=6.0), targets, seed=0)
    random = torch.Generator().manual_seed(1)
    for parameter in adapters.adapter_parameters(model):
        parameter.data = torch.randn(parameter.shape, generator=random) / 8
    assert not fast or fast_blocks.install(model, dtype)
    return model.train()


def loss_of(model: Any) -> Tensor:
    random = torch.Generator().manual_seed(2)
    if hasattr(model, "x_embedder"):
        return weighted(of_flux(model, random))
    text = torch.randn(2, 77, model.config.cross_attention_dim, generator=random).to(model.dtype)
    more = {}
    if model.config.addition_embed_type:
        more = {"added_cond_kwargs": {"text_embeds": text[:, 0, :16], "time_ids": torch.ones(2, 6, dtype=text.dtype)}}
    predicted = model(NOISY, torch.tensor([100, 700]), encoder_hidden_states=text, return_dict=False, **more)[0]
    return weighted(predicted)


def of_flux(model: Any, random: torch.Generator) -> Tensor:
    """What it predicts for 5 tokens of text and 12 of an image."""
    sizes = (
        (2, 12, model.config.in_channels),
        (2, 5, model.config.joint_attention_dim),
        (2, model.config.pooled_projection_dim),
    )
    noisy, text, pooled = (torch.randn(size, generator=random).to(model.dtype) for size in sizes)
    places = torch.stack([torch.zeros(12), torch.arange(12) // 4, torch.arange(12) % 4], 1)
    times, guidance = torch.tensor([0.1, 0.7]), torch.full((2,), 3.5)
    predicted: Tensor = model(noisy, text, pooled, times, places, torch.zeros(5, 3), guidance, return_dict=False)[0]
    return predicted


def weighted(predicted: Tensor) -> Tensor:
    return (predicted * torch.linspace(-1, 1, predicted.numel()).view_as(predicted)).sum()


def gradients(model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss_of(model), adapters.adapter_parameters(model)))


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        *itertools.product(("sd", "sdxl", "flux"), (ATTENTION, [*ATTENTION, *FEED_FORWARD], ["ff.net.2"], ["to_k"])),
        ("flux", FLUX),
    ],
    ids=str,
)
def test_values_and_gradients_are_those_of_plain_blocks(
    unets: Callable[[str], Path], kind: str, targets: list[str]
) -> None:
    plain, fast = (adapted(unets(kind), targets, fast=fast) for fast in (False, True))
    torch.testing.assert_close(loss_of(fast), loss_of(plain), rtol=1e-4, atol=1e-4)
    for expected, found in zip(gradients(plain), gradients(fast), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(("kind", "every"), [("sdxl", 0), ("sdxl", 1), ("flux", 0), ("flux", 1)])
def test_twelve_steps_end_where_those_of_plain_blocks_end(unets: Callable[[str], Path], kind: str, every: int) -> None:
    """Copies of the adapters that went stale would pass every comparison of gradients."""
    ends = []
    for fast in (False, True):
        model = adapted(unets(kind), ATTENTION, fast=fast)
        begin = flat(model)
        checkpointing.set_checkpointing(model, every if fast else 0)
        optimizer = torch.optim.AdamW(adapters.adapter_parameters(model), lr=1e-2, fused=True)
        for _ in range(12):
            loss_of(model).square().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(flat(model))
    assert (ends[1] - ends[0]).norm() < 1e-3 * (ends[0] - begin).norm()


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_in_16_bit_gradients_are_no_coarser_than_those_of_plain_blocks(unets: Callable[[str], Path], kind: str) -> None:
    exact, errors = flat_of(gradients(adapted(unets(kind), ATTENTION, fast=False))), []
    for fast in (False, True):
        model = adapted(unets(kind), ATTENTION, fast=fast, dtype=torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            found = flat_of(gradients(model))
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[1] <= 1.25 * errors[0]  # 1.17 where a CPU multiplies in bf16 itself (AVX512-BF16)


class Kernels(TorchDispatchMode):
    """Counts operations that compute something, each of which is a kernel on a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or func.overloadpacket in (torch.ops.aten.detach, torch.ops.aten.empty_like))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_a_step_of_fast_blocks_takes_fewer_kernels(unets: Callable[[str], Path], kind: str) -> None:
    """On a GPU by far fewer: autocast makes fp32 of layer norms there, and residual blocks are a smaller part."""
    counts = []
    for fast in (False, True):
        model = adapted(unets(kind), ATTENTION, fast=fast, dtype=torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False), Kernels() as kernels:
            gradients(model)
        counts.append(kernels.count)
    assert counts[1] < 0.9 * counts[0]


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_without_adapters_the_blocks_are_plain(unets: Callable[[str], Path], kind: str) -> None:
    plain, fast = (adapted(unets(kind), ATTENTION, fast=fast) for fast in (False, True))
    found = []
    for model in (plain, fast):
        with torch.no_grad(), adapters.disabled(model):
            found.append(loss_of(model))
    assert torch.equal(*found)


@pytest.mark.parametrize(("kind", "computing"), [("sd", fast_unet.FastBlock), ("flux", fast_flux.FastDouble)])
def test_blocks_whose_weights_come_for_each_pass_are_plain(
    unets: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, kind: str, computing: Any
) -> None:
    """Their backward pass would look for weights that have left the GPU."""
    plain, fast = (adapted(unets(kind), ATTENTION, fast=fast) for fast in (False, True))
    block_offload.stream(fast, block_offload.find(fast), torch.device("cpu"))
    monkeypatch.setattr(computing, "forward", lambda *_: pytest.fail("a fast block computed"))
    assert torch.equal(flat_of(gradients(fast)), flat_of(gradients(plain)))


@pytest.mark.parametrize("target", ["norm1.linear", "norm1_context.linear", "linear_1"])
def test_adapters_of_what_modulates_get_their_gradients(unets: Callable[[str], Path], target: str) -> None:
    """The blocks of FLUX read what they shift and scale by from layers that may have adapters."""
    plain, fast = (adapted(unets("flux"), [target, "to_q"], fast=fast) for fast in (False, True))
    for expected, found in zip(gradients(plain), gradients(fast), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_what_is_saved_stays_the_same(unets: Callable[[str], Path]) -> None:
    plain, fast = (adapters.adapter_tensors(adapted(unets("sd"), ATTENTION, fast=fast)) for fast in (False, True))
    assert plain.keys() == fast.keys()


def flat(model: nn.Module) -> Tensor:
    return flat_of(adapters.adapter_parameters(model))


def flat_of(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().float().flatten() for tensor in tensors])
