"""The loop: gradients are means over items however they are cut up, and bad steps leave the weights alone."""

import re

import pytest
import torch

from finetune import kinds
from finetune.adapters import lora
from finetune.errors import TrainingError
from finetune.training.accelerator import without_cudnn_attention
from tests.unit.conftest import Setting
from tests.unit.training.steps import run

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
    with pytest.raises(TrainingError, match=r"not finite.*; try optim\.lr=0\.0002$") as caught:
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
