"""Schedules, optimisers, averages and checkpoints on disk."""

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch

from finetune.config.schema import OptimConfig, Optimizer, Schedule
from finetune.errors import ConfigError, RunError
from finetune.run import rundir
from finetune.run.hashing import hash_file
from finetune.training import checkpoint
from finetune.training.checkpoint import TrainState
from finetune.training.ema import Ema
from finetune.training.optim import build_optimizer, learning_rate, load_state, optimizer_bytes, require_device

STATE = TrainState({"lora.rank": 4}, step=7, count=28, seconds=1.5, first_loss=0.4, smoothed_loss=0.2)


@pytest.mark.parametrize("schedule", list(Schedule))
def test_rates_warm_up_then_follow_the_schedule(schedule: Schedule) -> None:
    optim = OptimConfig(lr=2.0, schedule=schedule, warmup_steps=10)
    rates = [learning_rate(optim, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(2.0, rel=0.02)
    middle = {Schedule.constant: 2.0, Schedule.linear: 1.0, Schedule.cosine: 1.0}[schedule]
    assert rates[55] == pytest.approx(middle, rel=0.01)
    assert rates[99] == pytest.approx(2.0 if schedule is Schedule.constant else 0.0, abs=0.03)
    assert learning_rate(OptimConfig(lr=2.0, warmup_steps=0), 0, 10) == 2.0


def test_adamw_takes_its_settings_and_8bit_needs_a_gpu() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = build_optimizer([parameter], OptimConfig(lr=0.3, weight_decay=0.2, betas=[0.5, 0.6], eps=1e-3))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (0.3, 0.2, (0.5, 0.6), 1e-3)
    for name in (Optimizer.adamw8bit, Optimizer.paged_adamw8bit):
        with pytest.raises(ConfigError, match=rf"optim.name={name.name} .*optim=adamw"):
            require_device(name, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [(Optimizer.adamw, 8 * 2**17)]
    + [(name, 2 * (2**17 + 4 * 512)) for name in (Optimizer.adamw8bit, Optimizer.paged_adamw8bit)],
)
def test_memory_of_adams_states(name: Optimizer, expected: float) -> None:
    assert optimizer_bytes(name, [torch.empty(2**17)]) == expected
    assert (
        optimizer_bytes(name, [torch.empty(100)]) == 2 * 512
    )  # small tensors keep 32 bits, and take whole blocks of the allocator


def test_8bit_states_continue_bit_for_bit_from_a_checkpoint(tmp_path: Path) -> None:
    """As bitsandbytes computes on the CPU, where paged memory is ordinary memory."""

    def built() -> tuple[torch.nn.Parameter, Any]:
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 8192))
        return parameter, bitsandbytes.optim.PagedAdamW8bit([parameter], lr=1e-2)

    def step(parameter: torch.nn.Parameter, optimizer: Any, number: int) -> None:
        parameter.grad = torch.randn(8192, generator=torch.Generator().manual_seed(number))
        optimizer.step()

    parameter, optimizer = built()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the CPU
        for number in range(3):
            step(parameter, optimizer, number)
        values = optimizer.state[parameter]
        assert values["state1"].dtype == torch.uint8
        values["state1"].is_paged, values["state1"].page_deviceid = True, 0  # as on a GPU
        folder = checkpoint.save(tmp_path, STATE, {"a": parameter.detach()}, optimizer.state_dict(), None)
        back = checkpoint.load(folder)
        again, restored = built()
        again.data.copy_(back.adapter["a"])
        load_state(restored, back.optimizer)
        del values["state1"].is_paged, values["state1"].page_deviceid
        for number in (3, 4):
            step(parameter, optimizer, number)
            step(again, restored, number)
    assert torch.equal(parameter, again)
    for name in ("state1", "state2", "absmax1", "absmax2"):
        assert torch.equal(optimizer.state[parameter][name], restored.state[again][name])


def test_groups_keep_their_scale_through_a_checkpoint_and_a_single_one_is_a_list_of_parameters() -> None:
    def weights() -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]

    optim = OptimConfig(lr=0.3)
    first, second = weights()
    scaled = build_optimizer([{"params": [first]}, {"params": [second], "lr_scale": 4.0}], optim)
    for group in scaled.param_groups:  # as the loop does
        group["lr"] = optim.lr * group.get("lr_scale", 1.0)
    first.grad, second.grad = torch.ones(3), torch.ones(3)
    scaled.step()
    assert second.detach() == pytest.approx(4 * first.detach().numpy(), rel=1e-5)
    again = build_optimizer([{"params": weights()[:1]}, {"params": weights()[:1], "lr_scale": 4.0}], optim)
    again.load_state_dict(scaled.state_dict())
    assert [group.get("lr_scale") for group in again.param_groups] == [None, 4.0]
    plain, single = build_optimizer(weights(), optim), build_optimizer([{"params": weights()}], optim)
    assert plain.state_dict() == single.state_dict()


def test_an_average_follows_its_weights_and_survives_a_checkpoint() -> None:
    weights = {"a": torch.zeros(2)}
    average = Ema(0.5, weights)
    for _ in range(50):
        average.update({"a": torch.ones(2)})
    assert average.weights["a"] == pytest.approx(torch.ones(2).numpy(), abs=1e-6)
    assert not weights["a"].any()
    again = Ema.restore(0.5, average.state(), torch.device("cpu"))
    assert again.updates == 50
    assert torch.equal(again.weights["a"], average.weights["a"])


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    tensors = {"x.lora_A.weight": torch.randn(2, 3)}
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(2)
    optimizer.step()
    folder = checkpoint.save(tmp_path, STATE, tensors, optimizer.state_dict(), None)
    assert folder.name == "step-000007"
    back = checkpoint.load(folder)
    assert back.state == STATE
    assert back.ema is None
    assert torch.equal(back.adapter["x.lora_A.weight"], tensors["x.lora_A.weight"])
    assert torch.equal(back.optimizer["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def test_a_folder_that_cannot_be_written_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, STATE, {"a": torch.ones(1)}, {}, None)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(RunError, match=r"step-000009.*No space left"):
        checkpoint.save(tmp_path, replace(STATE, step=9), {"a": torch.ones(1)}, {}, None)
    assert checkpoint.steps_on_disk(tmp_path) == [7]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000007"]


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.pt", "state.json", "manifest.json"])
@pytest.mark.parametrize(
    "damage", [b"", b"[]", b"null", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"step": "4", "identity": 5}']
)
def test_every_damaged_file_of_a_checkpoint_is_one_line(tmp_path: Path, name: str, damage: bytes) -> None:
    """Whether the manifest knows of it, as after a restore, or not."""
    folder = checkpoint.save(tmp_path, STATE, {"a": torch.ones(1)}, {"state": {}}, None)
    (folder / name).write_bytes(damage)
    for _ in range(2):
        with pytest.raises(RunError, match=r"checkpoint .*step-000007 is damaged .*delete that folder") as error:
            checkpoint.load(folder)
        assert "\n" not in str(error.value)
        if name != "manifest.json":
            hashes = json.loads((folder / "manifest.json").read_text()) | {name: hash_file(folder / name)}
            (folder / "manifest.json").write_text(json.dumps(hashes))


@pytest.mark.parametrize("lacking", ["adapter.safetensors", "optimizer.pt", "state.json"])
def test_a_manifest_that_lacks_a_file_is_damage(tmp_path: Path, lacking: str) -> None:
    folder = checkpoint.save(tmp_path, STATE, {"a": torch.ones(1)}, {}, None)
    hashes = json.loads((folder / "manifest.json").read_text())
    del hashes[lacking]
    (folder / "manifest.json").write_text(json.dumps(hashes))
    with pytest.raises(RunError, match=rf"{lacking} is not in its manifest"):
        checkpoint.load(folder)


def test_a_persons_copies_beside_checkpoints_are_left_alone(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, STATE, {"a": torch.ones(1)}, {}, None)
    for name in ("step-000007 (copy)", "step-best", "step-000003.bak"):
        (tmp_path / name).mkdir()
    assert checkpoint.steps_on_disk(tmp_path) == [7]
    checkpoint.prune(tmp_path, 1, [])
    assert len(list(tmp_path.iterdir())) == 4


def test_a_checkpoint_of_another_user_is_not_called_damaged(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path / "checkpoints", STATE, {"a": torch.ones(1)}, {}, None)
    user = os.geteuid()
    folder.parent.chmod(0)
    try:
        if user == 0:  # who may read everything
            os.seteuid(65534)
        with (
            pytest.raises(RunError, match=r"manifest\.json \(Permission denied\); make it yours") as refused,
            rundir.explained(tmp_path, ""),
        ):
            checkpoint.load(folder)
    finally:
        os.seteuid(user)
        folder.parent.chmod(0o755)
    assert "delete" not in str(refused.value)


def test_a_missing_manifest_is_damage(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, STATE, {"a": torch.ones(1)}, {}, None)
    (folder / "manifest.json").unlink()
    with pytest.raises(RunError, match=r"is damaged"):
        checkpoint.load(folder)
