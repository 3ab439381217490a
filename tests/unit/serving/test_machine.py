"""What the page about the machine is told."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from finetune.run import rundir
from finetune.serving import machine
from finetune.serving.machine import Machine
from finetune.serving.runs import Runs
from finetune.workstation import facts
from tests.unit.serving.test_runs import make_run
from tests.unit.workstation.gpus import AT_WORK, stand_in
from tests.unit.workstation.test_checks import changed


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A healthy machine with two faults, and a GPU in use; an entry for each time that it is read."""
    calls: list[Any] = []

    def read() -> Any:
        calls.append(None)
        return changed(swappiness=60, hub__writable=False, nvml__gpus__0__used_gib=9.0, governor=None)

    monkeypatch.setattr(facts, "read", read)
    monkeypatch.setattr(machine, "FIRST_S", 0.0)
    return calls


def checked(seen: Machine) -> dict[str, Any]:
    """As it is told once the checks are done."""
    seen.now()
    for thread in threading.enumerate():
        if thread.name == "doctor":
            thread.join()
    return seen.now()


def test_findings_come_the_worst_first_and_are_looked_for_now_and_then(
    read: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Machine(Runs(tmp_path))
    health = checked(seen)["health"]
    assert [each["id"] for each in health["findings"] if each["verdict"] != "unknown"] == ["model-cache", "swappiness"]
    assert "cpu-governor" in [each["id"] for each in health["findings"][2:]]
    assert "vm.swappiness=10" in health["findings"][1]["cure"]
    assert health["checks"] > 20
    checked(seen)
    assert len(read) == 1
    monkeypatch.setattr(machine, "HEALTH_S", 0.0)
    checked(seen)
    assert len(read) > 1


def test_what_the_gpu_does_and_for_whom(read: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = [
        SimpleNamespace(pid=os.getpid(), usedGpuMemory=3 * 2**30),
        SimpleNamespace(pid=2**22 + 1, usedGpuMemory=None),
    ]
    stand_in(monkeypatch, AT_WORK | {"nvmlDeviceGetComputeRunningProcesses": programs})
    found = checked(Machine(Runs(tmp_path)))
    assert found["sample"]["finetune_gpu_power_watts"] == {"0": 402.123}
    assert found["sample"]["finetune_cpu_utilization_ratio"].keys() == {""}
    assert found["limits"]["finetune_gpu_temperature_celsius"] == 83
    assert found["no_gpu"] == ""
    (gpu,) = found["gpus"]
    assert gpu["name"] == "NVIDIA GeForce RTX 4090"
    own, other = gpu["programs"]
    assert (own["own"], own["mib"]) == (True, 3072)
    assert other == {"pid": 2**22 + 1, "name": None, "mib": None, "own": False}


@pytest.mark.parametrize("handle", [{}, {"nvmlDeviceGetHandleByIndex": 0}])
def test_a_gpu_that_tells_nothing_is_shown(
    handle: dict[str, Any], read: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, {"nvmlInit": None, "nvmlShutdown": None, "nvmlDeviceGetCount": 1} | handle)
    found = checked(Machine(Runs(tmp_path)))
    assert (found["gpus"], found["no_gpu"]) == ([{"name": None, "programs": []}], "")
    assert found["sample"]["finetune_gpu_lost"] == {"0": 1.0}


def test_a_driver_without_a_gpu_is_told(read: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, {"nvmlInit": None, "nvmlShutdown": None, "nvmlDeviceGetCount": 0})
    assert checked(Machine(Runs(tmp_path)))["no_gpu"] == "the driver has none"


def test_without_a_driver_it_says_why(read: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    found = checked(Machine(Runs(tmp_path)))
    assert (found["gpus"], found["no_gpu"]) == ([], "NVML Shared Library Not Found")


def test_runs_at_work_are_named_and_many_pages_cost_one_look(
    read: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("going", "stopped"):
        run = make_run(tmp_path, name, losses=[2.0, 1.0])
        if name == "going":
            (run / rundir.OWNER).write_text(f'{{"pid": {os.getpid()}, "since": "now"}}')
    seen = Machine(Runs(tmp_path))
    found = checked(seen)
    assert [(run["name"], run["step"], run["steps"]) for run in found["runs"]] == [("going", 1, 9)]
    monkeypatch.setattr(machine, "EVERY_S", float("inf"))
    assert seen.now()["sample"] is seen.now()["sample"]
