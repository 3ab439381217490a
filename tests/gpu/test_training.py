"""What only a GPU can show: 16-bit arithmetic, the loss scaler, 8-bit optimiser states, resuming, NVML."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from finetune import kinds
from finetune.adapters import lora
from finetune.config.schema import Config, Device, Optimizer, Precision
from finetune.diffusion.families import flux
from finetune.memory.device import memory_limit, pick_device, pick_precision
from finetune.run.records import Dataset
from finetune.stages.export import export
from finetune.stages.train import train
from finetune.training import checkpoint
from finetune.training.accelerator import build_accelerator, without_cudnn_attention
from finetune.training.loop import fit
from finetune.training.tracking import Tracker
from tests.unit.training.steps import fallbacks, prepared

pytestmark = pytest.mark.gpu


@pytest.fixture
def on_gpu(config: Config) -> Config:
    """The tiny run of the unit tests, on the GPU."""
    config.hardware.device = Device.cuda
    return config


def losses(config: Config, dataset: Dataset, precision: Precision) -> list[float]:
    """Loss of every training image, one by one, with a freshly injected adapter."""
    config.trainer.precision = precision
    device = pick_device(Device.cuda)
    task = kinds.of(config).build_task(config, dataset, device)
    accelerator = build_accelerator(precision, device)
    values = []
    for example in dataset.examples():
        with torch.no_grad(), accelerator.autocast():
            values.append(float(task.loss(task.collate([(example, 0)]).to(device))))
    return values


@pytest.mark.parametrize(("precision", "tolerance"), [(Precision.bf16, 2e-2), (Precision.fp16, 5e-3)])
def test_16_bit_losses_follow_fp32(
    on_gpu: Config, make_dataset: Callable[..., Dataset], precision: Precision, tolerance: float
) -> None:
    dataset = make_dataset()
    assert losses(on_gpu, dataset, precision) == pytest.approx(losses(on_gpu, dataset, Precision.fp32), rel=tolerance)


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16, Precision.fp16])
@pytest.mark.parametrize("optimizer", list(Optimizer))
def test_every_precision_and_optimiser_trains_exports_and_resumes(
    on_gpu: Config, make_dataset: Callable[..., Dataset], precision: Precision, optimizer: Optimizer
) -> None:
    on_gpu.trainer.precision, on_gpu.optim.name, on_gpu.lora.dropout = precision, optimizer, 0.1
    dataset = make_dataset()
    run = train(on_gpu, dataset)
    assert run.steps == 4
    on_gpu.trainer.steps = 6
    run = train(on_gpu, dataset)
    assert run.steps == 6
    assert run.last_loss < 2
    assert max(export(on_gpu, run).differences.values()) <= 1e-5


def test_a_resumed_run_equals_an_uninterrupted_one_on_the_gpu(
    on_gpu: Config, make_dataset: Callable[..., Dataset], tmp_path: Path
) -> None:
    on_gpu.trainer.precision, on_gpu.lora.dropout = Precision.bf16, 0.1
    on_gpu.optim.schedule = type(on_gpu.optim.schedule).constant  # more steps later must not change the early rates
    dataset = make_dataset()
    adapters = []
    for name, legs in (("whole", (6,)), ("legs", (2, 4, 6))):
        on_gpu.run_dir = str(tmp_path / name)
        for steps in legs:
            on_gpu.trainer.steps = steps
            train(on_gpu, dataset)
        adapters.append(checkpoint.load(checkpoint.at(tmp_path / name / "checkpoints", 6)).adapter)
    whole, legs_ = adapters
    assert all(torch.equal(whole[name], legs_[name]) for name in whole)


def test_the_fp16_scaler_skips_an_overflow_and_goes_on(on_gpu: Config, make_dataset: Callable[..., Dataset]) -> None:
    on_gpu.trainer.precision = Precision.fp16
    dataset = make_dataset()
    task, accelerator, optimizer = prepared(on_gpu, dataset)
    before = lora.state(task.model)
    examples = list(dataset.examples())

    collate = task.collate

    def overflowing(draws):
        batch = collate(draws)
        if draws[0][1] == 0:
            batch.tensors["clean"].fill_(float("inf"))
        return batch

    task.collate = overflowing
    scale = accelerator.scaler.get_scale()
    steps = []
    for step in fit(
        task,
        iter([[(examples[0], number)] for number in range(3)]),
        optimizer,
        lambda _: 1e-2,
        accelerator,
        fallbacks=fallbacks(task, on_gpu),
        seed=0,
        start=0,
        clip_norm=1.0,
        max_bad_steps=1,
    ):
        steps.append(step)
        if step.number == 1:
            assert all(torch.equal(weight, before[name]) for name, weight in lora.state(task.model).items())
    assert [step.skip_reason is not None for step in steps] == [True, False, False]
    assert "in fp16 on 000.png" in str(steps[0].skip_reason)
    assert accelerator.scaler.get_scale() < scale
    assert not all(torch.equal(weight, before[name]) for name, weight in lora.state(task.model).items())


def test_the_best_precision_of_the_gpu_is_picked() -> None:
    device = pick_device(Device.auto)
    assert device.type == "cuda"
    expected = Precision.bf16 if torch.cuda.is_bf16_supported(including_emulation=False) else Precision.fp16
    assert pick_precision(Precision.auto, device) is expected


def test_nvml_answers_for_the_gpu_in_use(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, 0, pick_device(Device.cuda))
    values = tracker.hardware()
    tracker.close()
    assert values["system/gpu_power_w"] > 10
    assert 0 <= values["system/gpu_utilisation_percent"] <= 100


def test_a_memory_limit_holds() -> None:
    device = pick_device(Device.cuda)
    with memory_limit(device, 1.0), pytest.raises(torch.OutOfMemoryError):
        torch.empty(2 * 2**30, dtype=torch.uint8, device=device)
    torch.empty(2 * 2**30, dtype=torch.uint8, device=device)


def test_attention_as_large_as_that_of_flux_has_gradients() -> None:
    """One block of either kind at full width, 512 tokens of text and 512 px."""
    accelerator = build_accelerator(Precision.bf16, pick_device(Device.cuda))
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 24, "attention_head_dim": 128}
    with accelerator.device:
        model = FluxTransformer2DModel(**sizes, guidance_embeds=True).bfloat16().requires_grad_(False)
        text = {"embedding": torch.randn(2, flux.T5_TOKENS, 4096), "pooled": torch.randn(2, 768)}
        noisy_BChw, timesteps_B = torch.randn(2, 16, 64, 64), torch.tensor([737.0, 237.0])
    embedding = text["embedding"].requires_grad_()
    with without_cudnn_attention(), accelerator.autocast():
        flux.predict(model, noisy_BChw, timesteps_B, text).float().square().mean().backward()
    assert embedding.grad is not None
    assert embedding.grad.isfinite().all()
    assert embedding.grad.any()
