"""What `finetune doctor --load` measures, and what is made of it: each planted fault is found, and nothing else."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from finetune.errors import ConfigError, ModelError
from finetune.memory import device, quantize
from finetune.workstation import alerts, disk_speed, facts, history, kernels, load, load_checks, nvml
from finetune.workstation.checks import judge
from finetune.workstation.nvml import POWER_CAP
from finetune.workstation.verdicts import Facts, Verdict
from tests.conftest import Answer
from tests.unit.workstation.gpus import AT_WORK, stand_in
from tests.unit.workstation.test_checks import HEALTHY, WITHOUT_CUDA, changed, verdicts

Cli = Callable[..., Answer]
CPU = torch.device("cpu")
FILE_BYTES = 16 << 20


def sample(**others: Any) -> Facts:
    return {
        "clock_mhz": 2520, "power_w": 446.0, "temperature_c": 71, "memory_temperature_c": None,
        "throttling": [POWER_CAP], "generation": 4, "width": 16,
    } | others  # fmt: skip


GPU = {
    "index": 0, "number": 0, "uuid": "GPU-0", "dtype": "bfloat16", "copy_gb_per_s": 25.4, "tflops": 151.0, "wrong": 0,
    "error": None, "full": False,
    # A load begins with a link and clocks that are still asleep, and with one reason for it.
    "samples": [sample(clock_mhz=210, generation=1, throttling=["hardware slowdown"]), *[sample()] * 49],
}  # fmt: skip
WORKING = ("nf4", "int8", "adamw8bit"), ("flash", "memory-efficient", "cuDNN")
LOAD: Facts = {
    "seconds": 5.0,
    "busy": 0.1,
    "gpus": [GPU],
    "cpu": {"name": "AMD Ryzen 9", "threads": 16, "gflops": 1400.0, "wrong": 0, "error": None, "throttled": 0},
    "disks": [
        {"places": ["outputs"], "way": "own", "mb_per_s": 3400, "random_per_s": 90_000},
        {"places": ["downloaded models"], "way": "own", "mb_per_s": 540, "random_per_s": 40_000},
    ],
    "kernels": dict(zip(("bitsandbytes", "attention"), (dict.fromkeys(names, "") for names in WORKING), strict=True)),
}


LOADED = HEALTHY | {"load": LOAD}
LOADED["records"] = {
    figure.key: {"value": figure.value, "time": 0.0, "versions": history.versions(LOADED)}
    for figure in history.figures(LOADED)
}


def loaded(**places: Any) -> Facts:
    """A healthy machine under load, with others in places such as `gpus__0__wrong`."""
    return changed(LOADED, **{f"load__{place}": value for place, value in places.items()})


def test_a_healthy_machine_raises_no_alarm_under_load() -> None:
    found = verdicts(loaded())
    assert [id_ for id_, verdict in found.items() if verdict is not Verdict.ok] == [
        "ecc-0", "remapped-rows-0", "load-memory-heat-0",  # what a GeForce does not have
    ]  # fmt: skip
    assert len(found) == len(verdicts(HEALTHY)) + 14 + 7


HOT = [sample(throttling=["heat (driver)"])] * 4 + [sample()] * 46
FAULTS = [
    ("load-products-0", Verdict.bad, {"gpus__0__wrong": 3}),
    ("load-link-0", Verdict.warn, {"gpus__0__samples": [sample(generation=3)] * 50}),
    ("load-link-0", Verdict.warn, {"gpus__0__samples": [sample(width=8)] * 50}),
    ("load-throttling-0", Verdict.bad, {"gpus__0__samples": HOT}),
    ("load-clock-0", Verdict.warn, {"gpus__0__samples": [sample(clock_mhz=600, throttling=[])] * 50}),
    ("load-temperature-0", Verdict.warn, {"gpus__0__samples": [sample(), sample(temperature_c=88)]}),
    ("load-memory-heat-0", Verdict.warn, {"gpus__0__samples": [sample(memory_temperature_c=104)]}),
    ("cpu-products", Verdict.bad, {"cpu__wrong": 1}),
    ("cpu-throttling", Verdict.warn, {"cpu__throttled": 12}),
    ("bitsandbytes", Verdict.bad, {"kernels__bitsandbytes__nf4": "no kernel image is available"}),
    ("attention", Verdict.bad, {"kernels__attention": dict.fromkeys(WORKING[1], "No available kernel")}),
]


@pytest.mark.parametrize(("id_", "verdict", "places"), FAULTS, ids=[f"{row[0]}-{n}" for n, row in enumerate(FAULTS)])
def test_a_fault_is_found_and_nothing_else(id_: str, verdict: Verdict, places: dict[str, Any]) -> None:
    before = verdicts(loaded())
    (check,) = [check for check in judge(loaded(**places)) if check.verdict is not before[check.id]]
    assert (check.id, check.verdict) == (id_, verdict)
    assert check.limit
    assert check.source
    assert check.cost
    assert check.cure


@pytest.mark.parametrize(
    ("places", "slow"),
    [
        ({"gpus__0__tflops": 80.0}, {"load-speed-0", "slower-speed-0"}),
        ({"gpus__0__tflops": 132.0}, {"slower-speed-0"}),
        ({"gpus__0__copy_gb_per_s": 9.0}, {"load-copies-0", "slower-copies-0"}),
        ({"cpu__gflops": 1230.0}, {"slower-cpu"}),
        ({"disks__0__mb_per_s": 180}, {"read-outputs", "slower-read-outputs"}),
        ({"disks__0__random_per_s": 50_000}, {"slower-random-outputs"}),
        ({"disks__1__mb_per_s": 350}, {"slower-read-models"}),
        ({"disks__1__random_per_s": 160}, {"read-models", "slower-random-models"}),
    ],
)
def test_what_is_slow_is_found_by_its_limit_and_by_the_record(places: dict[str, Any], slow: set[str]) -> None:
    before = verdicts(loaded())
    assert {id_ for id_, verdict in verdicts(loaded(**places)).items() if verdict is not before[id_]} == slow


def test_every_check_of_a_load_has_its_fault() -> None:
    of_load = set(verdicts(loaded())) - set(verdicts(HEALTHY))
    found = {id_ for id_, *_ in FAULTS} | {"load-speed-0", "load-copies-0", "read-outputs", "read-models"}
    assert {id_ for id_ in of_load if not id_.startswith("slower-")} == found


@pytest.mark.parametrize(("full", "verdict"), [(False, Verdict.bad), (True, Verdict.unknown)])
def test_a_gpu_that_fails_under_load_is_bad_and_one_that_is_full_is_unknown(full: bool, verdict: Verdict) -> None:
    broken = {name: GPU[name] for name in ("index", "number", "uuid", "dtype", "samples")}
    found = judge(loaded(gpus=[broken | {"error": "CUDA error: unspecified launch failure", "full": full}]))
    (check,) = [check for check in found if check.id.startswith("load-")]
    assert (check.id, check.verdict) == ("load-products-0", verdict)
    assert "unspecified launch failure" in check.fact


def test_what_can_not_be_told_under_load_is_never_well() -> None:
    unseen = changed(loaded(gpus__0__samples=[]), nvml={"driver": "580", "cuda": 13000, "gpus": []})
    of_the_gpu = {id_: verdict for id_, verdict in verdicts(unseen).items() if id_.startswith("load-")}
    assert of_the_gpu.pop("load-products-0") is Verdict.ok
    assert len(of_the_gpu) == 7
    assert set(of_the_gpu.values()) == {Verdict.unknown}
    assert verdicts(loaded(cpu__throttled=None))["cpu-throttling"] is Verdict.unknown
    assert (
        verdicts(loaded(disks__0={"places": ["outputs"], "error": "no direct read"}))["read-outputs"] is Verdict.unknown
    )


def test_without_a_gpu_it_says_what_it_can_not_tell() -> None:
    facts = loaded(gpus=[]) | {"nvml": {"error": "NVML Shared Library Not Found"}, "torch": WITHOUT_CUDA}
    (check,) = [check for check in judge(facts) if check.id == "gpu-under-load"]
    assert check.verdict is Verdict.unknown
    assert "torch reaches no GPU" in check.fact
    broken = loaded(gpus=[], kernels__bitsandbytes__nf4="none for a CPU")
    assert verdicts(broken)["bitsandbytes"] is Verdict.warn


def test_limits_of_heat_are_those_of_the_monitor() -> None:
    limits = {rule.name: f"{rule.limit:.0f} °C" for rule in alerts.load()}
    shown = {check.id: check.limit for check in load_checks.judge(loaded())}
    assert (shown["load-temperature-0"], shown["load-memory-heat-0"]) == (limits["GpuWarm"], limits["GpuMemoryHot"])


def test_a_product_that_differs_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    rates, wrong = load.products(CPU, torch.float32, 64, 0.01)
    assert min(rates) > 0
    assert wrong == 0
    multiply = torch.matmul

    def flip(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> None:
        multiply(left, right, out=out)
        out[5, 7] += 1.0

    monkeypatch.setattr(load, "BATCH_S", 0.01)
    monkeypatch.setattr(torch, "matmul", flip)
    rates, wrong = load.products(CPU, torch.float32, 64, 0.0)
    assert wrong == len(rates) == 1


def test_a_gpu_is_sampled_ten_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, AT_WORK | {"nvmlDeviceGetCurrPcieLinkGeneration": 4, "nvmlDeviceGetCurrPcieLinkWidth": 8})
    monkeypatch.setattr(load, "SAMPLE_S", 0.001)
    with load.sampled(0) as samples:
        while len(samples) < 3:
            pass
    assert samples[0] == {
        "clock_mhz": 2520, "power_w": 402.123, "temperature_c": 71, "memory_temperature_c": 88,
        "throttling": [POWER_CAP], "generation": 4, "width": 8,
    }  # fmt: skip
    count = len(samples)
    with load.sampled(None) as none:
        assert none == []
    assert len(samples) == count  # the watcher has ended

    def refuse(*_: Any) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", refuse)
    assert nvml.at_work(0) == {}


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that torch and NVML know; what it computes is planted, since there is none (tests/gpu has the real one)."""
    stand_in(monkeypatch, AT_WORK)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="0"))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(device, "pick_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(load, "copies", lambda _: [25.4e9])
    monkeypatch.setattr(load, "products", lambda *_: ([151e12], 0))


@pytest.mark.usefixtures("one_gpu")
def test_a_gpu_is_known_by_its_uuid_and_its_failures_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    other = HEALTHY["nvml"]["gpus"][0]
    known = [other | {"index": 0, "uuid": "GPU-1"}, other | {"index": 1, "uuid": "GPU-0"}]
    found = load.of_gpu(0, 1.0, known)
    assert found.keys() == GPU.keys()
    assert (found["index"], found["number"], found["tflops"], found["copy_gb_per_s"]) == (1, 0, 151.0, 25.4)
    assert load.of_gpu(0, 1.0, [])["index"] is None
    for error, full in ((torch.OutOfMemoryError("CUDA out of memory"), True), (RuntimeError("CUDA error: x"), False)):

        def fail(_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(load, "copies", fail)
        found = load.of_gpu(0, 1.0, known)
        assert (found["full"], found["error"]) == (full, str(error))
        (check,) = [check for check in judge(loaded(gpus=[found])) if check.id.startswith("load-")]
        assert check.id == "load-products-1"


@pytest.mark.usefixtures("one_gpu")
def test_a_gpu_that_says_nothing_of_itself_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("CUDA error: initialization error\nmore")

    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    found = load.of_gpu(0, 1.0, HEALTHY["nvml"]["gpus"])
    assert (found["number"], found["index"], found["error"]) == (0, None, "CUDA error: initialization error more")
    assert verdicts(loaded(gpus=[found]))["load-products-0"] is Verdict.bad


@pytest.fixture
def small_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(disk_speed, "FILE_BYTES", FILE_BYTES)
    monkeypatch.setattr(disk_speed, "RANDOM_S", 0.1)


@pytest.mark.usefixtures("small_file")
@pytest.mark.parametrize("way", ["own", "fio"])
def test_a_disk_is_read_and_nothing_is_left(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "own":
        monkeypatch.setattr(disk_speed.shutil, "which", lambda _: None)
    elif not shutil.which("fio"):
        pytest.skip("fio is not installed")
    found = disk_speed.read(tmp_path)
    if "error" not in found:  # a file system in memory has no reads that pass memory by
        assert found["way"] == way
        assert found["mb_per_s"] > 0
        assert found["random_per_s"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_file")
def test_a_disk_that_can_not_be_measured_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "No such file" in disk_speed.read(tmp_path / "gone")["error"]

    memory = Path("/dev/shm")
    if memory.is_dir():
        monkeypatch.setattr(disk_speed.shutil, "which", lambda _: None)
        found = disk_speed.read(memory)  # a file system in memory: old kernels know no direct read of it
        assert "error" in found or found["mb_per_s"] > 0
    monkeypatch.setattr(disk_speed, "FILE_BYTES", 1 << 60)
    assert "too little free space" in disk_speed.read(tmp_path)["error"]


def test_libraries_that_do_not_work_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    found = kernels.read(CPU)
    assert found["bitsandbytes"] == {"nf4": "", "int8": ""}
    assert found["attention"]["flash"] == ""

    def fail(*_: Any) -> None:
        raise ModelError("libbitsandbytes_cpu.so is missing")

    monkeypatch.setattr(quantize, "prove", fail)
    plain = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *heads: plain(*heads) * (2 if torch.backends.cuda.flash_sdp_enabled() else 1),
    )
    found = kernels.read(CPU)
    assert set(found["bitsandbytes"].values()) == {"libbitsandbytes_cpu.so is missing"}
    assert found["attention"]["flash"] == "another result than plain products"


@pytest.mark.usefixtures("small_file")
def test_this_machine_is_loaded_and_judged(finetune_cli: Cli) -> None:
    answer = finetune_cli("doctor", "--load", "1", "--json")
    rows = {row["id"]: row for row in json.loads(answer.out)}
    assert {"cpu-products", "cpu-throttling", "read-outputs", "bitsandbytes", "attention"} <= rows.keys()
    assert "GFLOP/s" in rows["cpu-products"]["fact"]
    if not torch.cuda.is_available():
        assert rows["gpu-under-load"]["verdict"] == "unknown"


@pytest.mark.usefixtures("small_file")
def test_a_measurement_that_fails_takes_no_other_along(finetune_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("input dtypes must be the same")

    monkeypatch.setattr(torch, "matmul", fail)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fail)
    answer = finetune_cli("doctor", "--load", "1", "--json")
    rows = {row["id"]: row for row in json.loads(answer.out)}
    for id_, verdict in (("cpu-products", "bad"), ("attention", "bad" if torch.cuda.is_available() else "warn")):
        assert (rows[id_]["verdict"], rows[id_]["fact"]) == (verdict, "input dtypes must be the same")
    assert {"bitsandbytes", "read-outputs", "ram"} <= rows.keys()
    assert "slower-cpu" not in rows
    assert answer.code == 2


@pytest.mark.parametrize("seconds", ["0", "-1", "soon", "1e9", "nan"])
def test_other_times_are_refused(finetune_cli: Cli, seconds: str) -> None:
    answer = finetune_cli("doctor", f"--load={seconds}")
    assert answer.code == ConfigError.exit_code
    assert f"{seconds} is not from 1 to 3600 seconds" in answer.errors[0]


def test_facts_of_a_load_are_plain(monkeypatch: pytest.MonkeyPatch, small_file: None) -> None:
    monkeypatch.setattr(kernels, "read", lambda _: LOAD["kernels"])
    found = load.read(0.01, facts.read())
    assert json.loads(json.dumps(found)) == found
    assert found.keys() == LOAD.keys()
    assert found["cpu"].keys() == LOAD["cpu"].keys()
