"""The tracer against counts by hand: every byte of a few small modules."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finetune.errors import ModelError
from finetune.planning.tracer import Kernel, Trace, Tracer, extrapolated

FLOAT, WIDE = 4, 1024  # bytes of an fp32 number; a side that makes every tensor a multiple of 512 bytes
MATRIX = WIDE * WIDE * FLOAT


def traced(
    model: nn.Module,
    forward: Callable[[Any], Any],
    rows: int = WIDE,
    dtype: torch.dtype = torch.float32,
    *,
    like_cuda: bool = False,
) -> Trace:
    """A training step whose loss is the output's sum."""
    tracer = Tracer(dtype, like_cuda=like_cuda)
    tracer.fakify(model)
    return tracer.step(model, lambda: torch.empty(rows, WIDE), forward, lambda output, _: output.sum())


def evaluated(work: Callable[[], Any], model: nn.Module | None = None) -> Trace:
    tracer = Tracer(torch.float32, like_cuda=False)
    return tracer.run(tracer.fakify(model or nn.Identity()), work)


def test_a_linear_layer() -> None:
    model = nn.Linear(WIDE, WIDE, bias=False)
    trace = traced(model, model)
    assert trace.held == {"adapters": MATRIX, "gradients": MATRIX, "weights": 0}
    # Weight and gradient of earlier micro-batches; the input and, made from it, this one's gradient; the loss and its
    # gradient, a number each. The output is gone by then, and its gradient is that number, repeated.
    assert trace.peak.live == 4 * MATRIX + 2 * 512
    products = [kernel for kernel in trace.kernels if kernel.flops]
    assert [kernel.flops for kernel in products] == [2 * WIDE**3] * 2  # the input requires no gradient
    assert {kernel.moved for kernel in products} == {3 * MATRIX}


def test_a_frozen_layer_keeps_no_input() -> None:
    chain = nn.Sequential(*(nn.Linear(WIDE, WIDE, bias=False).requires_grad_(False) for _ in range(4)))
    trace = traced(chain, lambda inputs: chain(inputs.requires_grad_()))
    assert trace.held["weights"] == 4 * MATRIX
    # The input, and what a product reads and what it writes: on the way there outputs, on the way back gradients.
    assert trace.peak.live == pytest.approx((4 + 3) * MATRIX, abs=2 * 512)


def test_views_share_their_storage() -> None:
    def work() -> None:
        matrix = torch.empty(WIDE, WIDE)
        _views = [matrix.t(), matrix.view(-1), matrix[1:], matrix.unsqueeze(0).expand(3, -1, -1)]

    trace = evaluated(work)
    assert trace.peak.live == MATRIX
    assert len(trace.kernels) == 1


def test_operations_in_place_take_nothing() -> None:
    def work() -> None:
        matrix = torch.empty(WIDE, WIDE)
        matrix.add_(1).mul_(2).relu_()

    trace = evaluated(work)
    assert trace.peak.live == MATRIX
    assert [kernel.name for kernel in trace.kernels][1:] == [
        "aten.add_.Tensor",
        "aten.mul_.Tensor",
        "aten.relu_.default",
    ]


def test_freed_tensors_are_not_counted() -> None:
    def work() -> None:
        matrix = torch.empty(WIDE, WIDE)
        for _ in range(5):
            matrix = matrix + 1

    trace = evaluated(work)
    assert trace.peak.live == 2 * MATRIX
    assert [kernel.live for kernel in trace.kernels] == [MATRIX, *[2 * MATRIX] * 5]


def test_sizes_are_those_of_allocated_blocks() -> None:
    assert evaluated(lambda: torch.empty(1)).peak.live == 512
    assert evaluated(lambda: torch.empty(129)).peak.live == 1024


def test_a_product_onto_a_tensor_is_as_much_arithmetic_as_one_beside_it() -> None:
    def beside() -> None:
        torch.addmm(torch.empty(WIDE, WIDE), torch.empty(WIDE, 8), torch.empty(8, WIDE))

    def onto() -> None:
        torch.empty(WIDE, WIDE).addmm_(torch.empty(WIDE, 8), torch.empty(8, WIDE))

    assert evaluated(beside).flops == evaluated(onto).flops == 2 * WIDE * 8 * WIDE


def test_attention_keeps_no_scores() -> None:
    heads, length, channels = 4, 2048, 64
    one = heads * length * channels * FLOAT

    def work() -> None:
        query, key, value = (torch.empty(1, heads, length, channels) for _ in range(3))
        nn.functional.scaled_dot_product_attention(query, key, value)

    trace = evaluated(work)
    sums = heads * length * FLOAT  # of the softmax, one for each query
    assert trace.peak.live == 4 * one + sums < heads * length * length * FLOAT
    assert trace.flops == 4 * heads * length**2 * channels


def test_a_checkpointed_block_is_computed_twice_and_keeps_its_input_alone() -> None:
    blocks = nn.ModuleList(
        nn.Sequential(nn.Linear(WIDE, WIDE, bias=False), nn.GELU(), nn.Linear(WIDE, WIDE, bias=False)) for _ in range(4)
    ).requires_grad_(False)

    def plain(inputs: Tensor) -> Tensor:
        for block in blocks:
            inputs = block(inputs.requires_grad_() if inputs.is_leaf else inputs)
        return inputs

    def recomputing(inputs: Tensor) -> Any:
        for block in blocks:
            inputs = checkpoint(block, inputs.requires_grad_() if inputs.is_leaf else inputs, use_reentrant=False)
        return inputs

    kept, checkpointed = traced(blocks, plain), traced(blocks, recomputing)
    product = 2 * WIDE**3
    assert kept.flops == 4 * 2 * 2 * product
    # A block's last product isn't repeated: nothing of it is needed.
    assert kept.flops < checkpointed.flops <= 4 * (2 + 2 + 2) * product
    weights = 8 * MATRIX
    # Each block keeps the input of its GELU (and the last ones an output and gradients).
    assert kept.peak.live - weights == pytest.approx((4 + 3) * MATRIX, abs=MATRIX + 4096)
    # Each keeps its input; of one, all is there.
    assert checkpointed.peak.live - weights == pytest.approx((4 + 4) * MATRIX, abs=MATRIX + 4096)


def test_a_shared_weight_is_held_once() -> None:
    first, second = nn.Linear(WIDE, WIDE, bias=False), nn.Linear(WIDE, WIDE, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, second).requires_grad_(False)
    trace = evaluated(lambda: model(torch.empty(1, WIDE)), model)
    assert first.weight is second.weight
    assert trace.held["weights"] == MATRIX


@pytest.mark.parametrize("like_cuda", [True, False])
def test_norms_run_in_fp32_on_a_gpu(like_cuda: bool) -> None:
    norm = nn.LayerNorm(WIDE)

    def forward(inputs: Tensor) -> Tensor:
        found: Tensor = norm(inputs.bfloat16())
        assert found.dtype is (torch.float32 if like_cuda else torch.bfloat16)
        return found

    traced(norm, forward, dtype=torch.bfloat16, like_cuda=like_cuda)


def test_norms_of_checkpointed_blocks_run_in_fp32_too() -> None:
    norm = nn.LayerNorm(WIDE)
    seen = []

    def block(inputs: Tensor) -> Tensor:
        found: Tensor = norm(inputs)
        seen.append(found.dtype)
        return found.sin()  # needs its input in backward, so that the norm is computed again

    traced(norm, lambda inputs: checkpoint(block, inputs.bfloat16(), use_reentrant=False), dtype=torch.bfloat16,
           like_cuda=True)  # fmt: skip
    assert seen == [torch.float32] * 2


def test_dropout_keeps_a_byte_a_number_on_a_gpu() -> None:
    model = nn.Sequential(nn.Linear(WIDE, WIDE, bias=False), *(nn.Dropout(0.5) for _ in range(4)))
    gpu, processor = (traced(model, model, like_cuda=like_cuda) for like_cuda in (True, False))
    assert any(kernel.name == "aten.native_dropout.default" for kernel in gpu.kernels)
    masks = [max(kernel.live for kernel in trace.kernels) for trace in (gpu, processor)]
    assert masks[1] - masks[0] == pytest.approx(4 * MATRIX * (1 - 1 / FLOAT), abs=MATRIX)


def test_the_functions_of_torch_are_restored() -> None:
    before = nn.functional.layer_norm, nn.functional.dropout
    with pytest.raises(ModelError):
        traced(nn.LayerNorm(WIDE), lambda _: 1 / 0, like_cuda=True)
    assert (nn.functional.layer_norm, nn.functional.dropout) == before


def test_what_the_loss_allocates_is_counted_apart() -> None:
    model = nn.Linear(WIDE, WIDE, bias=False)
    tracer = Tracer(torch.float32, like_cuda=False)
    tracer.fakify(model)
    trace = tracer.step(
        model, lambda: torch.empty(WIDE, WIDE), model, lambda output, _: (output.exp() * output.sin()).sum()
    )
    assert max(kernel.of_loss for kernel in trace.kernels) == 3 * MATRIX + 512  # two factors, a product, its sum
    assert all(kernel.of_loss == 0 for kernel in trace.kernels[:2])


def test_another_micro_batch_is_extrapolated_exactly() -> None:
    model = nn.Sequential(*(nn.Linear(WIDE, WIDE) for _ in range(3)))
    two, three, eight = (traced(model, model, rows=512 * count) for count in (2, 3, 8))
    found = extrapolated(two, three, (2, 3), 8)
    assert found.peak.live == pytest.approx(eight.peak.live, rel=1e-6)
    assert found.flops == pytest.approx(eight.flops)
    assert found.launches == eight.launches
    assert extrapolated(two, three, (2, 3), 2).peak.live == two.peak.live


def test_a_stretch_of_other_kernels_is_extrapolated_as_one() -> None:
    def run(count: int) -> Trace:
        middle = [Kernel("chunk", 100.0, 50.0, 10.0, 10.0)] * count
        before, after = Kernel("a", 10.0 * count, 0.0, count, 0.0), Kernel("b", 10.0 * count, 0.0, count, 0.0)
        return Trace({}, (before, *middle, after))

    found = extrapolated(run(2), run(3), (2, 3), 8)
    assert found.launches == 2 + 8
    assert found.flops == 2 * 8 + 8 * 10
    assert found.peak.live == 100.0
    assert extrapolated(run(2), run(3), (2, 3), 1).launches == 2 + 1
