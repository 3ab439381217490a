"""The loop: gradients are means over items however they are cut up, and bad steps leave the weights alone."""

from collections.abc import Callable

import pytest
import torch

from finetune.config import Config, Precision
from finetune.data import order
from finetune.errors import TrainingError
from finetune.models import lora
from finetune.records import Dataset
from finetune.tasks.diffusion import DiffusionTask
from finetune.training.accelerator import build_accelerator
from finetune.training.loop import Step, fit
from finetune.training.optim import build_optimizer, learning_rate

CPU = torch.device("cpu")


def run(
    config: Config, dataset: Dataset, *, poison: int | None = None, steps: int = 4
) -> tuple[DiffusionTask, list[Step]]:
    """Train a few steps; the examples of step number `poison` (from 0) become NaN."""
    task = DiffusionTask(config, dataset, CPU)
    accelerator = build_accelerator(Precision.fp32, CPU)
    optimizer = build_optimizer(lora.adapter_parameters(task.model), config.optim)
    task.model, optimizer = accelerator.prepare(task.model, optimizer)
    examples = [example for example in dataset.examples() if not example.held_out]
    buckets = [example.bucket for example in examples]
    trainer = config.trainer

    def batches():
        chunks = order.steps(buckets, effective=trainer.micro_batch * trainer.accumulate, seed=0)
        for number, chunk in zip(range(steps), chunks, strict=False):
            split = order.split(chunk, buckets, trainer.micro_batch)
            micro = [task.collate([(examples[index], visit) for index, visit in part]) for part in split]
            if number == poison:
                micro[0].tensors["clean"].fill_(float("nan"))
            yield micro

    taken = fit(
        task,
        batches(),
        optimizer,
        lambda number: learning_rate(config.optim, number, steps),
        accelerator,
        seed=config.seed,
        start=0,
        clip_norm=trainer.clip_norm,
        max_bad_steps=trainer.max_bad_steps,
    )
    return task, list(taken)


@pytest.mark.parametrize(("micro", "accumulate"), [(4, 1), (2, 2), (8, 1)])
def test_micro_batch_and_accumulation_do_not_change_the_adapter(
    config: Config, make_dataset: Callable[..., Dataset], micro: int, accumulate: int
) -> None:
    dataset = make_dataset()
    effective = micro * accumulate
    config.optim.eps = 1e-3  # with 1e-8 Adam turns rounding of vanishing gradients into full steps
    config.trainer.micro_batch, config.trainer.accumulate = micro, accumulate
    adapter = run(config, dataset)[0].state()
    config.trainer.micro_batch, config.trainer.accumulate = 1, effective
    one_by_one = run(config, dataset)[0].state()
    for name, weight in adapter.items():
        assert torch.linalg.vector_norm(weight - one_by_one[name]) <= 1e-5 * torch.linalg.vector_norm(weight) + 1e-9
    assert any(weight.abs().max() > 1e-3 for name, weight in adapter.items() if "lora_B" in name)


def test_loss_is_the_mean_over_items(config: Config, make_dataset: Callable[..., Dataset]) -> None:
    dataset = make_dataset()
    _, steps = run(config, dataset, steps=1)
    fresh = DiffusionTask(config, dataset, CPU)
    examples = [example for example in dataset.examples() if not example.held_out]
    chunk = next(order.steps([example.bucket for example in examples], effective=4, seed=0))
    alone = [float(fresh.loss(fresh.collate([(examples[index], visit)])).detach()) for index, visit in chunk]
    assert steps[0].items == 4
    assert steps[0].loss == pytest.approx(sum(alone) / 4, rel=1e-5)


def test_a_non_finite_step_is_refused_and_named(config: Config, make_dataset: Callable[..., Dataset]) -> None:
    dataset = make_dataset()
    task, steps = run(config, dataset, poison=0, steps=1)
    assert steps[0].refused is not None
    assert ".png at timestep" in steps[0].refused
    assert "in fp32 on" in steps[0].refused
    fresh = DiffusionTask(config, dataset, CPU).state()
    assert all(torch.equal(weight, fresh[name]) for name, weight in task.state().items())
    _, steps = run(config, dataset, poison=1)
    assert [step.refused is not None for step in steps] == [False, True, False, False]


def test_bad_steps_in_a_row_end_the_run(config: Config, make_dataset: Callable[..., Dataset]) -> None:
    config.trainer.max_bad_steps = 1
    with pytest.raises(TrainingError, match=r"1 steps in a row were not finite.*try a lower optim.lr"):
        run(config, make_dataset(), poison=2)
