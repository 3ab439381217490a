"""Fast layers compute what PEFT's on transformers' compute: values, gradients, and what training makes of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.adapters import lora as adapters
from finetune.config.schema import LoraConfig, LoraInit, ModelConfig, Quantize
from finetune.language import causal_lm, fast_kernels, fast_layers
from finetune.memory import checkpointing
from finetune.training import fast_linear
from tests.tiny_language_models import save_language

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CPU = torch.device("cpu")
IDS = torch.randint(5, 60, (2, 24), generator=torch.Generator().manual_seed(0))
SEGMENTS = torch.tensor([[0] * 9 + [1] * 15, [0] * 24])
POSITIONS = torch.tensor([[*range(9), *range(15)], [*range(24)]])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder, made = tmp_path_factory.mktemp("bases"), {}

    def base(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = save_language(folder / architecture, architecture)
        return made[architecture]

    return base


def adapted(
    base: Path, targets: list[str], *, quantize: Quantize = Quantize.none, fast: bool, **lora: Any
) -> nn.Module:
    """A base with adapters that change something."""
    model = causal_lm.load_model(ModelConfig(kind="language", base=str(base), quantize=quantize), torch.float32, CPU)
    adapters.inject(model, LoraConfig(dropout=0.0, rank=4, alpha=6.0, **lora), targets, seed=0)
    random = torch.Generator().manual_seed(1)
    for parameter in adapters.adapter_parameters(model):
        parameter.data = torch.randn(parameter.shape, generator=random) / 8
    assert not fast or fast_layers.install(model, torch.float32)
    return model.train()


def loss_of(model: nn.Module) -> Tensor:
    states_BLD = causal_lm.packed_hidden_states(model, IDS, POSITIONS, SEGMENTS)
    return (states_BLD * torch.linspace(-1, 1, states_BLD.numel()).view_as(states_BLD)).sum()


def gradients(model: nn.Module) -> list[Tensor]:
    parameters = adapters.adapter_parameters(model)
    return list(torch.autograd.grad(loss_of(model), parameters))


@pytest.mark.sampled
@pytest.mark.parametrize("quantize", [Quantize.none, Quantize.nf4])
@pytest.mark.parametrize("targets", [ALL, ["q_proj", "v_proj"], ["down_proj"]], ids=["all", "attention", "down"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "mistral_sliding"])
def test_values_and_gradients_are_those_of_plain_layers(
    bases: Callable[[str], Path], architecture: str, targets: list[str], quantize: Quantize
) -> None:
    plain, fast = (adapted(bases(architecture), targets, quantize=quantize, fast=fast) for fast in (False, True))
    torch.testing.assert_close(loss_of(fast), loss_of(plain), rtol=1e-5, atol=1e-3)
    for expected, found in zip(gradients(plain), gradients(fast), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("every", [0, 1, 2])  # nothing, blocks, and blocks and feed-forward layers made again
def test_twelve_steps_end_where_those_of_plain_layers_end(bases: Callable[[str], Path], every: int) -> None:
    """Copies of the adapters that went stale would pass every comparison of gradients."""
    ends = []
    for fast in (False, True):
        model = adapted(bases("llama"), ALL, fast=fast, rslora=True)
        begin = flat(model)
        checkpointing.set_checkpointing(model, every if fast else 0)
        parameters = adapters.adapter_parameters(model)
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, fused=True)
        for _ in range(12):
            loss_of(model).square().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(flat(model))
    assert (ends[1] - ends[0]).norm() < 1e-3 * (ends[0] - begin).norm()


@pytest.mark.parametrize(("every", "expected"), [(0, 0), (1, 2), (2, 1)])
def test_checkpointed_blocks_are_computed_again(
    bases: Callable[[str], Path], every: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(bases("llama"), ALL, fast=True)
    checkpointing.set_checkpointing(model, every)
    passes, product = [], fast_layers.Projections.forward
    monkeypatch.setattr(fast_layers.Projections, "forward", lambda *inputs: (passes.append(1), product(*inputs))[1])
    loss_of(model).backward()
    assert len(passes) == 2 + expected


def flat(model: nn.Module) -> Tensor:
    """All adapters as they are now."""
    return torch.cat([parameter.detach().flatten() for parameter in adapters.adapter_parameters(model)])


def start(base: Path) -> list[Tensor]:
    return [
        parameter.detach() for parameter in adapters.adapter_parameters(adapted(base, ALL, fast=False, rslora=True))
    ]


def test_what_is_saved_stays_the_same(bases: Callable[[str], Path]) -> None:
    plain, fast = (adapters.adapter_tensors(adapted(bases("llama"), ALL, fast=fast)) for fast in (False, True))
    assert plain.keys() == fast.keys()


def test_without_adapters_and_in_writing_the_layers_are_plain(bases: Callable[[str], Path]) -> None:
    plain, fast = (adapted(bases("llama"), ALL, fast=fast).eval() for fast in (False, True))
    with torch.no_grad():
        for model in (plain, fast):
            with adapters.disabled(model):
                model.without = loss_of(model)
            model.written = model.generate(IDS[1:], max_new_tokens=8, do_sample=False)
    assert torch.equal(fast.without, plain.without)
    assert torch.equal(fast.written, plain.written)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "phi3"])
def test_layers_of_another_kind_stay(bases: Callable[[str], Path], architecture: str) -> None:
    targets = ["down_proj"]
    model = adapted(bases(architecture), targets, fast=False)
    before = gradients(model)
    assert not fast_layers.install(model, torch.float32)
    assert all(map(torch.equal, gradients(model), before))


def test_layers_that_drop_attention_stay(bases: Callable[[str], Path]) -> None:
    model: Any = adapted(bases("llama"), ALL, fast=False)
    for layer in model.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.1
    assert not fast_layers.install(model, torch.float32)


@pytest.mark.parametrize(
    ("model", "lora", "dtype", "named"),
    [
        (ModelConfig(), LoraConfig(dropout=0.1), torch.bfloat16, "lora.dropout=0.1"),
        (ModelConfig(), LoraConfig(dropout=0, dora=True), torch.bfloat16, "lora.dora=true"),
        (ModelConfig(), LoraConfig(dropout=0, init=LoraInit.pissa), torch.bfloat16, "lora.init=pissa"),
        (ModelConfig(quantize=Quantize.int8), LoraConfig(dropout=0), torch.bfloat16, "model.quantize=int8"),
        (ModelConfig(offload=True), LoraConfig(dropout=0), torch.bfloat16, "model.offload=true"),
        (ModelConfig(), LoraConfig(dropout=0), torch.float16, "trainer.precision=fp16"),
        (ModelConfig(quantize=Quantize.nf4), LoraConfig(dropout=0), torch.bfloat16, ""),
    ],
)
def test_the_setting_in_the_way_is_named(model: ModelConfig, lora: LoraConfig, dtype: torch.dtype, named: str) -> None:
    assert fast_linear.reason_against(model, lora, dtype) == named


def test_kernels_compute_what_autograd_does() -> None:
    random = torch.Generator().manual_seed(0)
    x, dy, gate, up = (torch.randn(6, 16, generator=random, requires_grad=True) for _ in range(4))
    weight = torch.rand(16, generator=random)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
    torch.testing.assert_close(fast_kernels.rms_norm(x.detach(), weight, 1e-6), normed.detach())
    (expected,) = torch.autograd.grad(normed, x, dy)
    torch.testing.assert_close(fast_kernels.rms_norm_backward(dy.detach(), x.detach(), weight, 1e-6), expected)
    active = nn.functional.silu(gate) * up
    torch.testing.assert_close(fast_kernels.swiglu(gate.detach(), up.detach()), active.detach())
    on_gate, on_up = torch.autograd.grad(active, (gate, up), dy)
    parts = [value.detach().clone() for value in (dy, gate, up)]
    fast_kernels.swiglu_backward_(*parts)
    for found, wanted in zip(parts, (active.detach(), on_gate, on_up), strict=True):
        torch.testing.assert_close(found, wanted)
    turned = torch.randn(6, 2, 8, generator=random)
    angles = torch.rand(6, 4, generator=random)
    cos, sin = (torch.cat([value, value], -1) for value in (angles.cos(), angles.sin()))
    there = turned.clone()
    fast_kernels.rotate_(there, cos, sin)
    assert not torch.allclose(there, turned)
    fast_kernels.rotate_(there, cos, sin, back=True)
    torch.testing.assert_close(there, turned)
