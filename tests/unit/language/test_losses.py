"""The chunked loss is plain cross entropy, in value and gradient, without its memory."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune.language import losses
from finetune.language.losses import Head, logits, summed_cross_entropy

N, D, V = 37, 16, 101
CHUNK_TOKENS = 8  # N is no multiple of it


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_BYTES", CHUNK_TOKENS * 4 * V)


def draw(hidden: torch.dtype, weight: torch.dtype, tokens: int = N) -> tuple[Tensor, Head, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(tokens, D, generator=generator).to(hidden).requires_grad_()
    head = Head(torch.randn(V, D, generator=generator).to(weight))
    return hidden_ND, head, torch.randint(V, (tokens,), generator=generator)


def with_bias(head: Head) -> Head:
    return replace(head, bias=torch.linspace(-2, 2, V).to(head.weight.dtype))


VARIANTS = {
    "plain": lambda head: head,
    "bias": with_bias,
    "scale": lambda head: replace(head, scale=0.25),
    "softcap": lambda head: replace(head, softcap=3.0),
    "all": lambda head: replace(with_bias(head), softcap=3.0, scale=0.25),
}


def plain_loss(hidden_ND: Tensor, head: Head, targets_N: Tensor) -> Tensor:
    logits_NV = torch.nn.functional.linear(hidden_ND, head.weight, head.bias).float() * head.scale
    if head.softcap is not None:
        logits_NV = torch.tanh(logits_NV / head.softcap) * head.softcap
    return torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum")


def value_and_gradient(loss: Tensor, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
    (gradient_ND,) = torch.autograd.grad(loss, hidden_ND)
    return loss.detach(), gradient_ND


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("dtype", "relative", "absolute"),
    [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 2e-2, 2e-2), (torch.float16, 2e-3, 2e-3)],
)
def test_value_and_gradient_are_those_of_plain_cross_entropy(
    variant: str, dtype: torch.dtype, relative: float, absolute: float
) -> None:
    hidden_ND, head, targets_N = draw(dtype, dtype)
    head = VARIANTS[variant](head)
    loss, gradient_ND = value_and_gradient(summed_cross_entropy(hidden_ND, head, targets_N), hidden_ND)
    expected_loss, expected_ND = value_and_gradient(plain_loss(hidden_ND, head, targets_N), hidden_ND)

    assert (loss.dtype, gradient_ND.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)  # summed in fp32 whatever the product's dtype
    torch.testing.assert_close(gradient_ND, expected_ND, rtol=relative, atol=absolute)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_is_the_numerical_one(variant: str) -> None:
    hidden_ND, head, targets_N = draw(torch.float64, torch.float64, tokens=11)
    head = VARIANTS[variant](head)
    assert torch.autograd.gradcheck(lambda states_ND: summed_cross_entropy(states_ND, head, targets_N), hidden_ND)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_what_the_loss_is_taken_of(variant: str) -> None:
    hidden_ND, head, targets_N = draw(torch.bfloat16, torch.bfloat16)
    head = VARIANTS[variant](head)
    logits_NV = logits(head, hidden_ND)
    assert (logits_NV.shape, logits_NV.dtype) == ((N, V), torch.float32)
    loss = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum")
    torch.testing.assert_close(summed_cross_entropy(hidden_ND, head, targets_N), loss, rtol=1e-5, atol=0)


def test_scale_acts_before_the_cap() -> None:
    head = Head(torch.tensor([[10.0]]), softcap=2.0, scale=3.0)
    assert logits(head, torch.tensor([[1.0]])).item() == pytest.approx(2.0)  # 2 tanh(30 / 2), not 3 · 2 tanh(10 / 2)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_ND, head, targets_N = draw(torch.float32, torch.float32)
    in_chunks = value_and_gradient(summed_cross_entropy(hidden_ND, head, targets_N), hidden_ND)
    monkeypatch.setattr(losses, "CHUNK_BYTES", 1)  # less than a token: still one at a time
    one_by_one = value_and_gradient(summed_cross_entropy(hidden_ND, head, targets_N), hidden_ND)
    torch.testing.assert_close(in_chunks, one_by_one)


def test_upstream_gradient_scales_and_the_graph_can_be_kept() -> None:
    hidden_ND, head, targets_N = draw(torch.float32, torch.float32)
    loss = summed_cross_entropy(hidden_ND, head, targets_N)
    (once_ND,) = torch.autograd.grad(loss, hidden_ND, retain_graph=True)
    (thrice_ND,) = torch.autograd.grad(loss * 3, hidden_ND, retain_graph=True)
    (again_ND,) = torch.autograd.grad(loss, hidden_ND)
    torch.testing.assert_close(thrice_ND, once_ND * 3)
    assert torch.equal(again_ND, once_ND)


def test_a_loss_scale_beyond_fp16_does_not_overflow() -> None:
    hidden_ND, head, targets_N = draw(torch.float16, torch.float16)
    loss = summed_cross_entropy(hidden_ND, replace(head, scale=1e-3), targets_N)
    (gradient_ND,) = torch.autograd.grad(loss * 2**17, hidden_ND)
    assert gradient_ND.isfinite().all()
    assert gradient_ND.any()


def test_confident_tokens_keep_their_gradient_in_bf16() -> None:
    """p - 1 = -0.001 is lost if p is rounded to bf16 first, whose step there is 0.004."""
    hidden_ND = torch.tensor([[1.0]], dtype=torch.bfloat16, requires_grad=True)
    head = Head(torch.tensor([[7.0], [0.0]], dtype=torch.bfloat16))
    loss = summed_cross_entropy(hidden_ND, head, torch.tensor([0]))
    (gradient_ND,) = torch.autograd.grad(loss, hidden_ND)
    assert gradient_ND.item() == pytest.approx(-7 * torch.sigmoid(torch.tensor(-7.0)).item(), rel=0.01)


@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16])
def test_autocast_names_the_dtype_of_the_product(hidden: torch.dtype) -> None:
    hidden_ND, head, targets_N = draw(hidden, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, ours_ND = value_and_gradient(summed_cross_entropy(hidden_ND, head, targets_N), hidden_ND)
        plain, plain_ND = value_and_gradient(plain_loss(hidden_ND, head, targets_N), hidden_ND)
    assert (ours.dtype, ours_ND.dtype) == (torch.float32, hidden)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours_ND, plain_ND, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("weight", [torch.float16, torch.bfloat16])
def test_a_half_head_takes_fp32_states_in_its_own_dtype(weight: torch.dtype) -> None:
    hidden_ND, head, targets_N = draw(torch.float32, weight)
    loss, gradient_ND = value_and_gradient(summed_cross_entropy(hidden_ND, head, targets_N), hidden_ND)
    rounded_ND = hidden_ND.detach().to(weight).requires_grad_()
    plain, plain_ND = value_and_gradient(plain_loss(rounded_ND, head, targets_N), rounded_ND)
    assert gradient_ND.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient_ND, plain_ND.float(), rtol=2e-2, atol=2e-2)


def test_no_tokens_give_a_zero_that_can_be_differentiated() -> None:
    hidden_ND = torch.randn(5, D, requires_grad=True)
    _, head, _ = draw(torch.float32, torch.float32)
    none_N = torch.zeros(5, dtype=torch.bool)
    loss = summed_cross_entropy(hidden_ND[none_N], head, torch.zeros(0, dtype=torch.int64))
    assert loss.item() == 0
    loss.backward()
    assert hidden_ND.grad is not None
    assert not hidden_ND.grad.any()


class Largest(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation made, views of `weight` aside."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.elements = 0
        self.known = weight.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() != self.known:
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.mark.parametrize("variant", VARIANTS)
def test_neither_all_logits_nor_a_weight_gradient_ever_exist(variant: str) -> None:
    hidden_ND, head, targets_N = draw(torch.bfloat16, torch.bfloat16)
    head = VARIANTS[variant](head)
    with Largest(head.weight) as plain:
        plain_loss(hidden_ND, head, targets_N).backward()
    with Largest(head.weight) as ours:
        summed_cross_entropy(hidden_ND, head, targets_N).backward()
    assert plain.elements == N * V
    assert ours.elements == CHUNK_TOKENS * V < D * V < N * V


def test_without_gradients_none_is_computed() -> None:
    hidden_ND, head, targets_N = draw(torch.float32, torch.float32)
    products = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.mm.default:
                products.append(func)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Products():
        loss = summed_cross_entropy(hidden_ND, head, targets_N)
    assert not loss.requires_grad
    assert len(products) == -(-N // CHUNK_TOKENS)  # one a chunk, where the gradient would take a second


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_head_that_asks_for_a_gradient_gets_it(part: str) -> None:
    hidden_ND, head, targets_N = draw(torch.float32, torch.float32)
    head = with_bias(head)
    trained = getattr(head, part).requires_grad_()
    found = torch.autograd.grad(summed_cross_entropy(hidden_ND, head, targets_N), (hidden_ND, trained))
    plain = torch.nn.functional.cross_entropy(logits(head, hidden_ND), targets_N, reduction="sum")
    for gradient, expected in zip(found, torch.autograd.grad(plain, (hidden_ND, trained)), strict=True):
        torch.testing.assert_close(gradient, expected)
