"""What is read of the kernel's files, in all their forms."""

import os
from pathlib import Path
from typing import Any

import pynvml
import pytest

from finetune.workstation import containers, facts, linux, nvml, versions
from tests.unit.workstation.gpus import GEFORCE, stand_in

GIB = 2**30


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel that says what is written into a folder."""
    monkeypatch.setattr(linux, "PROC", tmp_path / "proc")
    monkeypatch.setattr(linux, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(linux, "PCI", tmp_path / "pci")
    return tmp_path


IN_A_SLICE = {
    "proc/self/cgroup": "0::/finetune.slice/run-1.scope\n",
    "cgroup/finetune.slice/memory.max": f"{48 * GIB}",
    "cgroup/finetune.slice/cpu.max": "800000 100000",
    "cgroup/finetune.slice/run-1.scope/memory.max": "max",
    "cgroup/finetune.slice/run-1.scope/cpu.max": "max 100000",
}
IN_A_CONTAINER = {"proc/self/cgroup": "0::/\n", "cgroup/memory.max": f"{8 * GIB}", "cgroup/cpu.max": "150000 100000"}
VERSION_1 = {
    "proc/self/cgroup": "4:memory:/docker/1234\n3:cpu,cpuacct:/docker/1234\n0::/\n",
    "cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}",
    "cgroup/cpu/cpu.cfs_quota_us": "50000",
    "cgroup/cpu/cpu.cfs_period_us": "100000",
}
WITHOUT = {
    "proc/self/cgroup": "4:memory:/\n3:cpu,cpuacct:/\n0::/\n",
    "cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
    "cgroup/cpu/cpu.cfs_quota_us": "-1",
    "cgroup/cpu/cpu.cfs_period_us": "100000",
}


@pytest.mark.parametrize(
    ("files", "memory", "cpus"),
    [(IN_A_SLICE, 48, 8), (IN_A_CONTAINER, 8, 1.5), (VERSION_1, 4, 0.5), (WITHOUT, None, None), ({}, None, None)],
)
def test_the_tightest_limit_above_this_process_counts(
    kernel: Path, files: dict[str, str], memory: float | None, cpus: float | None
) -> None:
    write(kernel, files)
    limit = linux.memory_limit()
    assert (limit and limit / GIB, linux.cpu_quota()) == (memory, cpus)


def test_card_and_slot_are_told_apart(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = kernel / "devices" / "pci0000:00" / "0000:00:01.1" / "0000:01:00.0"
    write(card, {"max_link_width": "16\n", "../max_link_width": "8\n"})
    (kernel / "pci").mkdir()
    (kernel / "pci" / "0000:01:00.0").symlink_to(card)
    assert linux.lanes("00000000:01:00.0") == {"card_width": 16, "slot_width": 8}
    address = pynvml.nvmlPciInfo_t(busId=b"00000000:01:00.0")
    stand_in(monkeypatch, GEFORCE | {"nvmlDeviceGetPciInfo": address})
    pcie = nvml.read()["gpus"][0]["pcie"]
    assert (pcie["card_width"], pcie["slot_width"], pcie["card_generation"]) == (16, 8, None)
    write(card, {"../max_link_width": "255\n"})  # a bridge of a virtual machine
    assert linux.lanes("00000000:01:00.0") == {"card_width": 16, "slot_width": None}
    assert linux.lanes("00000000:02:00.0") == {"card_width": None, "slot_width": None}


RECORDS = [
    "6,900,3600000000,-;usb 1-1: new device\n",
    "3,901,3600000000,-;NVRM: Xid (PCI:0000:01:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.\n",
    "3,902,7200000000,c,more=x;NVRM: Xid (0000:41:00): 31, pid=1234, name=python3, Ch 00000008\n SUBSYSTEM=pci\n",
]


def test_xids_are_found_in_the_kernels_log() -> None:
    assert linux.xids_of(RECORDS, now_s=9000.0) == [
        {"bus": "0000:01:00", "code": 79, "hours_ago": 1.5},
        {"bus": "0000:41:00", "code": 31, "hours_ago": 0.5},
    ]


def test_a_log_that_may_not_be_read_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = linux.xids()
    assert found is None or all(row["hours_ago"] >= 0 for row in found)
    log = tmp_path / "kmsg"
    log.write_text(RECORDS[1])
    monkeypatch.setattr(linux, "KERNEL_LOG", log)
    assert [row["code"] for row in linux.xids() or []] == [79]
    log.unlink()
    assert linux.xids() is None


def test_the_kernel_knows_whether_its_clock_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    assert linux.clock_synchronized() in (True, False, None)
    for error, right in ((1000, True), (16_000_000, False)):

        class Library:
            def adjtimex(self, state: Any, error: int = error) -> int:
                state._obj.maxerror = error
                return 5  # TIME_ERROR, which chrony leaves as it is

        monkeypatch.setattr(linux.ctypes, "CDLL", lambda _, library=Library: library())
        assert linux.clock_synchronized() is right
    monkeypatch.setattr(linux.ctypes, "CDLL", lambda _: object())
    assert linux.clock_synchronized() is None


def test_the_processor_has_a_name(kernel: Path) -> None:
    assert facts.processor().endswith(" CPU")
    write(kernel, {"proc/cpuinfo": "processor : 0\nmodel name : AMD EPYC\n"})
    assert facts.processor() == "AMD EPYC"


def test_containers_get_gpus_by_a_hook_or_by_a_description(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "DEVICE_FOLDERS", (tmp_path / "cdi",))
    monkeypatch.setenv("PATH", str(tmp_path))

    def program(name: str) -> None:
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)

    assert containers.read() == {"engines": [], "gpu_support": False}
    program("docker")
    assert containers.read() == {"engines": ["docker"], "gpu_support": False}
    write(tmp_path, {"cdi/nvidia.yaml": "cdiVersion: 0.6.0\n"})
    assert containers.read() == {"engines": ["docker"], "gpu_support": True}
    monkeypatch.setattr(containers, "DEVICE_FOLDERS", ())
    program("nvidia-container-runtime-hook")
    assert containers.read() == {"engines": ["docker"], "gpu_support": True}


@pytest.mark.parametrize(
    ("tested", "newer"), [("2.13.0", False), ("2.11.0", False), ("1.99", True), ("999", False), ("", False)]
)
def test_a_major_version_more_than_tested_is_newer(
    tested: str, newer: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "constraints.txt"
    file.write_text(f"# as tested\ntorch=={tested}\n" if tested else "")
    monkeypatch.setattr(versions, "TESTED", (tmp_path / "nowhere.txt", file))
    torch = versions.read()["torch"]
    assert (torch["tested"], torch["newer"]) == (tested or None, newer)


def test_before_version_1_the_second_number_is_the_major_one() -> None:
    assert versions._step("0.41.0") > versions._step("0.40.2") == versions._step("0.40.0")
    assert versions._step("5.18.1") == versions._step("5.17")


def test_the_tested_versions_are_those_of_this_folder() -> None:
    found = versions.read()
    assert all(package["tested"] for package in found.values()), found


def test_models_of_another_user_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"models--a--b/blobs/1234": "", "models--a--b/refs/main": ""})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert facts.hub()["unreadable"] == []
    allowed = os.access  # root may read everything, so the answer is planted
    monkeypatch.setattr(facts.os, "access", lambda path, mode: Path(path).name != "1234" and allowed(path, mode))
    assert facts.hub()["unreadable"] == ["models--a--b/blobs/1234"]
