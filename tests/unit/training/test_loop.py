"""The loop: gradients are means over items however they are cut up, and bad steps leave the weights alone."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from finetune import kinds
from finetune.adapters import lora
from finetune.config.schema import Config, Precision
from finetune.errors import TrainingError
from finetune.run.records import Dataset
from finetune.training.accelerator import build_accelerator, without_cudnn_attention
from finetune.training.loop import forward_backward
from finetune.training.non_finite import step_unless
from tests.unit.conftest import Setting
from tests.unit.training.steps import draws, fallbacks, prepared, run

pytestmark = pytest.mark.sampled
CPU = torch.device("cpu")


@pytest.mark.parametrize(("micro", "accumulate"), [(4, 1), (2, 2), (8, 1)])
def test_micro_batch_and_accumulation_do_not_change_the_adapter(setting: Setting, micro: int, accumulate: int) -> None:
    config, dataset = setting.config, setting.dataset
    effective = micro * accumulate
    config.optim.eps = 1e-3  # with 1e-8 Adam turns rounding of vanishing gradients into full steps
    config.trainer.micro_batch, config.trainer.accumulate = micro, accumulate
    adapter = lora.state(run(config, dataset)[0].model)
    config.trainer.micro_batch, config.trainer.accumulate = 1, effective
    one_by_one = lora.state(run(config, dataset)[0].model)
    for name, weight in adapter.items():
        assert torch.linalg.vector_norm(weight - one_by_one[name]) <= 1e-5 * torch.linalg.vector_norm(weight) + 1e-9
    assert any(weight.abs().max() > 1e-3 for name, weight in adapter.items() if "lora_B" in name)


def test_loss_is_the_mean_over_items(setting: Setting) -> None:
    config, dataset = setting.config, setting.dataset
    _, steps = run(config, dataset, steps=1)
    other = kinds.of(config).build_task(config, dataset, CPU)
    batches = [other.collate([draw]) for draw in next(iter(other.steps(effective=4, start=0)))]
    alone = [float(other.loss(batch).detach()) for batch in batches]
    assert steps[0].count == sum(batch.count for batch in batches)
    assert steps[0].loss == pytest.approx(sum(alone) / sum(batch.items for batch in batches), rel=1e-5)


def test_a_non_finite_step_is_skipped_and_named(setting: Setting) -> None:
    config, dataset = setting.config, setting.dataset
    task, steps = run(config, dataset, poison=0, steps=1)
    assert steps[0].skip_reason is not None
    assert re.search(r"in fp32 on (\d+\.png at timestep|conversations) \d+", steps[0].skip_reason)
    untrained = lora.state(kinds.of(config).build_task(config, dataset, CPU).model)
    assert all(torch.equal(weight, untrained[name]) for name, weight in lora.state(task.model).items())
    _, steps = run(config, dataset, poison=1)
    assert [step.skip_reason is not None for step in steps] == [False, True, False, False]


def test_bad_steps_in_a_row_end_the_run(setting: Setting) -> None:
    setting.config.trainer.max_bad_steps = 1
    setting.config.optim.lr = 2e-3
    with pytest.raises(
        TrainingError, match=r"^stopped after 1 non-finite step \(trainer\.max_bad_steps\), .*; try optim\.lr=0\.0002$"
    ) as caught:
        run(setting.config, setting.dataset, poison=2)
    assert len(str(caught.value)) < 300


def test_a_run_that_never_took_a_step_does_not_blame_the_rate(setting: Setting) -> None:
    setting.config.trainer.max_bad_steps = 1
    with pytest.raises(TrainingError, match=r"rate is not the cause; leave these examples out$"):
        run(setting.config, setting.dataset, poison=0)


def test_few_examples_of_a_bad_step_are_named(setting: Setting) -> None:
    config, dataset = setting.config, setting.dataset
    config.trainer.accumulate = 4
    _, steps = run(config, dataset, poison=0, steps=1)
    assert steps[0].skip_reason is not None
    assert re.search(r" and \d+ more$", steps[0].skip_reason)


def test_cudnns_attention_is_off_while_anything_trains() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    with without_cudnn_attention():
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()


class Waits(TorchDispatchMode):
    """Counts how often a number of a tensor comes to the host, for which a GPU would be waited for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waiting = (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.equal.default,
            torch.ops.aten.nonzero.default,
        )
        self.count += func in waiting
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_waits_for_its_loss_and_its_norm_alone(
    config: Config, make_dataset: Callable[..., Dataset], accumulate: int
) -> None:
    config.trainer.micro_batch, config.trainer.accumulate = 2, accumulate
    task, accelerator, optimizer = prepared(config, make_dataset())
    batches = [[task.collate(part) for part in task.split(chunk, 2)] for chunk in draws(task, config, 2)]
    for step, made in enumerate(batches):
        with Waits() as waits:
            totals, *_ = forward_backward(
                task, lambda _, made=made: made, optimizer, accelerator, fallbacks(task, config), seed=0, step=step
            )
            norm = accelerator.clip_grad_norm_(task.model.parameters(), 1.0)
            step_unless(optimizer, accelerator, totals.loss, norm)
            optimizer.zero_grad()
    assert waits.count == 2


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bad", ["loss", "norm", ""])
def test_an_optimiser_is_left_as_it_was_by_a_step_that_is_not_finite(fused: bool, bad: str) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    accelerator = build_accelerator(Precision.fp32, torch.device("cpu"))
    optimizer = accelerator.prepare(torch.optim.AdamW([weight], lr=0.1, fused=fused))
    numbers = {name: torch.tensor(math.nan if bad == name else 1.0) for name in ("loss", "norm")}
    for _ in range(2):  # a bad step after a good one
        weight.grad = torch.ones(3)
        step_unless(optimizer, accelerator, torch.tensor(1.0), torch.tensor(1.0))
        before = weight.detach().clone(), optimizer.optimizer.state[weight]["step"].item()
        weight.grad = torch.full((3,), math.nan if bad else 1.0)
        found = step_unless(optimizer, accelerator, **numbers)
        assert math.isnan(found[0] + found[1]) == bool(bad)
        changed = not torch.equal(weight, before[0]), optimizer.optimizer.state[weight]["step"].item() - before[1]
        assert changed == ((False, 0) if bad else (True, 1))
