"""What only a GPU can show: that memory really runs out, and that the fallbacks really save some."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from finetune.config.schema import Autotune, Config, Device, OptimConfig, Optimizer, Precision
from finetune.memory import block_offload
from finetune.run.records import Dataset, Run
from finetune.stages.train import train
from finetune.training import checkpoint
from finetune.training.loop import Step
from finetune.training.optim import build_optimizer, load_state
from finetune.training.trainer import Trainer
from tests.conftest import ROOT
from tests.unit.conftest import Setting
from tests.unit.training.small_gpu import Gpu

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's convolutions add up in no fixed order; TF32 would make much of that."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def crowded(config: Config) -> Config:
    """Two steps of 256 images in one forward pass of each bucket, on the GPU and nothing else."""
    config.hardware.device, config.trainer.precision = Device.cuda, Precision.fp32
    config.trainer.steps, config.trainer.micro_batch, config.trainer.accumulate = 2, 256, 1
    config.trainer.validate_every, config.sample.previews, config.optim.eps = 0, 0, 1e-3
    config.trainer.autotune = Autotune.off
    return config


def test_a_gpu_that_is_too_small_trains_the_same_adapter(
    crowded: Config, make_dataset: Callable[..., Dataset], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dataset = make_dataset()
    crowded.run_dir = str(tmp_path / "roomy")
    train(crowded, dataset)  # the libraries' own memory is taken now
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    crowded.run_dir = str(tmp_path / "measured")
    roomy = train(crowded, dataset)
    peak = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((before + 0.6 * (peak - before)) / total)
    try:
        crowded.run_dir = str(tmp_path / "small")
        small = train(crowded, dataset)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert roomy.oom_fallbacks == ""
    assert small.oom_fallbacks.startswith("micro-batch ")
    said = capfd.readouterr().err
    assert any(line.startswith("step 1: memory ran out") and "micro-batch" in line for line in said.splitlines())
    assert (small.steps, small.items) == (roomy.steps, roomy.items) == (2, 512)
    one, other = (checkpoint.load(Path(run.checkpoint)).adapter for run in (roomy, small))
    assert all(torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-5) for name in one)


def alike(one: Run, other: Run) -> bool:
    """Whether two runs trained the same adapter but for rounding."""
    first, second = (checkpoint.load(Path(run.checkpoint)).adapter for run in (one, other))
    return all(torch.allclose(first[name], second[name], rtol=1e-3, atol=1e-5) for name in first)


@pytest.fixture
def on_gpu(setting: Setting) -> Setting:
    """A run of either kind on the GPU."""
    config = setting.config
    config.hardware.device, config.trainer.precision, config.optim.eps = Device.cuda, Precision.fp32, 1e-3
    config.trainer.autotune = Autotune.off
    return setting


def test_offloaded_blocks_train_draw_and_resume_as_on_the_gpu(
    on_gpu: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config, dataset = on_gpu.config, on_gpu.dataset
    config.run_dir = str(tmp_path / "resident")
    resident = train(config, dataset)
    monkeypatch.setattr(block_offload, "WEIGHTS_SHARE", 0.0)
    config.run_dir, config.model.offload, config.trainer.steps = str(tmp_path / "away"), True, 2
    config.optim.schedule = type(config.optim.schedule).constant
    train(config, dataset)
    config.trainer.steps = 4
    away = train(config, dataset)
    config.run_dir, config.model.offload = str(tmp_path / "constant"), False
    assert "stay in CPU memory" in capfd.readouterr().err
    assert alike(away, train(config, dataset))
    assert resident.steps == away.steps == 4


def test_the_last_fallback_offloads_blocks(on_gpu: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, dataset = on_gpu.config, on_gpu.dataset
    config.run_dir = str(tmp_path / "roomy")
    roomy = train(config, dataset)
    away: list[bool] = []
    stream = block_offload.stream
    monkeypatch.setattr(block_offload, "stream", lambda *arguments: (stream(*arguments), away.append(True)))
    Gpu(lambda *_: bool(away), "backward").install(monkeypatch)
    config.run_dir = str(tmp_path / "full")
    full = train(config, dataset)
    fallbacks = "trainer.activation_checkpointing=1, trainer.offload_activations=true, model.offload=true"
    assert full.oom_fallbacks == f"micro-batch 1 instead of 2, {fallbacks}"
    assert alike(full, roomy)


def test_offloaded_activations_train_the_same_with_less_on_the_gpu(
    crowded: Config, make_dataset: Callable[..., Dataset], tmp_path: Path
) -> None:
    dataset, peaks, runs = make_dataset(), [], []
    for away in (False, False, True):  # the first one takes the libraries' own memory, which stays
        crowded.run_dir, crowded.trainer.offload_activations = str(tmp_path / str(len(runs))), away
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        runs.append(train(crowded, dataset))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert alike(runs[1], runs[2])
    assert peaks[2] < 0.7 * peaks[1]


def test_paged_states_are_paged_again_after_a_checkpoint(tmp_path: Path) -> None:
    def built() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 2**18, device="cuda"))
        return parameter, build_optimizer([parameter], OptimConfig(name=Optimizer.paged_adamw8bit, lr=1e-2))

    def step(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer, number: int) -> None:
        parameter.grad = torch.randn(2**18, generator=torch.Generator().manual_seed(number)).to("cuda")
        optimizer.step()

    parameter, optimizer = built()
    for number in range(3):
        step(parameter, optimizer, number)
    assert optimizer.state[parameter]["state1"].is_paged
    torch.cuda.synchronize()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again, restored = built()
    again.data.copy_(parameter.data)
    load_state(restored, torch.load(tmp_path / "optimizer.pt", map_location="cpu", weights_only=True))
    assert restored.state[again]["state1"].is_paged
    for number in (3, 4):
        step(parameter, optimizer, number)
        step(again, restored, number)
    assert torch.equal(parameter, again)


@pytest.mark.parametrize("autotune", [Autotune.auto, Autotune.check])
def test_training_takes_what_was_planned_and_tried(
    crowded: Config, make_dataset: Callable[..., Dataset], tmp_path: Path, autotune: Autotune
) -> None:
    crowded.trainer.autotune, crowded.trainer.validate_every, crowded.sample.previews = autotune, 1, 1
    crowded.trainer.accumulate = 2
    dataset = make_dataset()
    runs = []
    for name in ("first", "second"):  # the first one takes the libraries' own memory
        crowded.run_dir = str(tmp_path / name)
        runs.append(train(crowded, dataset))
    _, run = runs
    assert run.oom_fallbacks == ""
    assert run.dry_run_gib is not None
    assert run.planned_gib is not None  # libraries' workspaces are most of what this small model takes
    assert 0 < run.planned_gib < run.dry_run_gib
    assert run.measured_gib == pytest.approx(run.dry_run_gib, rel=0.02)


def test_a_gpu_that_is_too_small_is_noticed_before_the_first_step(
    crowded: Config, make_dataset: Callable[..., Dataset], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The plan counts what is free; the limit of a process is something that it doesn't know of."""
    dataset = make_dataset()
    crowded.trainer.fast = False  # graphs would go where there is no room for them
    crowded.trainer.autotune, crowded.run_dir = Autotune.check, str(tmp_path / "roomy")
    roomy = train(crowded, dataset)
    torch.cuda.empty_cache()
    assert roomy.measured_gib is not None
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.6 * roomy.measured_gib * 2**30 / total)
    try:
        crowded.run_dir = str(tmp_path / "small")
        capfd.readouterr()
        small = train(crowded, dataset)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    said = capfd.readouterr().err
    lines = [line for line in said.splitlines() if "memory ran out" in line]
    assert lines
    others = [line for line in lines if not (line.startswith("autotune: ") and "micro-batch" in line)]
    assert not others, "in a step that counts"
    assert alike(roomy, small)


def test_a_long_run_holds_as_much_at_its_end_as_at_its_beginning(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,000 steps with validation, previews and checkpoints now and then: the GPU's memory, and the process's own."""
    config = setting.config
    config.hardware.device, config.trainer.steps, config.run_dir = Device.cuda, 2000, str(tmp_path / "long")
    config.trainer.save_every, config.trainer.validate_every, config.sample.every = 500, 100, 500
    config.trainer.log_every, config.lora.dropout = 10, 0.1
    held: dict[int, tuple[int, int, int]] = {}
    after_step = Trainer.after_step

    def watched(trainer: Trainer, step: Step) -> None:
        after_step(trainer, step)
        if step.number in (50, 950, 1950):  # at the beginning the allocator and the libraries still grow
            resident = psutil.Process().memory_info().rss
            held[step.number] = torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), resident

    monkeypatch.setattr(Trainer, "after_step", watched)
    train(config, setting.dataset)
    (allocated, reserved, _), (_, _, middle), (allocated_end, reserved_end, end) = (held[at] for at in (50, 950, 1950))
    assert allocated_end == pytest.approx(allocated, rel=0.01)
    assert reserved_end == pytest.approx(reserved, rel=0.01)
    assert end < 1.01 * middle


def test_segments_grow() -> None:
    """In a process of its own: torch reads the setting once."""
    program = (
        "import finetune, torch; tensor = torch.empty(2**24, device='cuda'); "
        "print(any(segment['is_expandable'] for segment in torch.cuda.memory._snapshot()['segments']))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
