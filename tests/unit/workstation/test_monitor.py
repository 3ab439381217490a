"""What `finetune monitor` reads, writes, publishes and reports."""

import json
import os
import socket
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest
from prometheus_client.parser import text_string_to_metric_families

from finetune.errors import ConfigError
from finetune.run import room, slow_steps
from finetune.workstation import monitor, nvml, samples
from finetune.workstation.alerts import Alert, Rule, Severity, load
from finetune.workstation.samples import METRICS, look
from tests.conftest import Answer
from tests.ports import free_port
from tests.unit.workstation.gpus import AT_WORK, GEFORCE, stand_in

Cli = Callable[..., Answer]
BRIEFLY = ("--every", "0.5", "--for", "0.5")


def test_a_gpu_at_work_is_read_in_base_units(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, AT_WORK)
    with nvml.opened() as error:
        found = {name: values["0"] for name, values in look().items() if name.startswith("finetune_gpu_")}
    assert error == ""
    assert found == {
        "finetune_gpu_temperature_celsius": 71,
        "finetune_gpu_memory_temperature_celsius": 88,
        "finetune_gpu_power_watts": 402.123,
        "finetune_gpu_power_limit_watts": 450.0,
        "finetune_gpu_energy_joules_total": 1234.567,
        "finetune_gpu_utilization_ratio": 0.97,
        "finetune_gpu_memory_used_bytes": 2**29,
        "finetune_gpu_memory_size_bytes": 24 * 2**30,
        "finetune_gpu_fan_ratio": 0.62,
        "finetune_gpu_clock_hertz": 2520e6,
        "finetune_gpu_memory_clock_hertz": 2520e6,
        "finetune_gpu_pcie_received_bytes_per_second": 1.5e6,
        "finetune_gpu_pcie_sent_bytes_per_second": 1.5e6,
        "finetune_gpu_throttled": 0.0,
        "finetune_gpu_power_capped": 1.0,
        "finetune_gpu_lost": 0.0,
    }
    assert {name for name in METRICS if METRICS[name][0] == "gpu"} == found.keys()


def test_what_a_driver_does_not_tell_is_absent_and_named(
    monkeypatch: pytest.MonkeyPatch, finetune_cli: Cli, workdir: Path
) -> None:
    stand_in(monkeypatch, GEFORCE)
    with nvml.opened():
        sample = look()
    assert sample["finetune_gpu_throttled"] == {"0": 1.0}
    assert "finetune_gpu_power_watts" not in sample
    answer = finetune_cli("monitor", *BRIEFLY)
    assert answer.errors[0].startswith("cannot tell here: finetune_gpu_temperature_celsius, ")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCurrentClocksEventReasons", pynvml.nvmlDeviceGetFanSpeed)
    with nvml.opened():
        assert "finetune_gpu_throttled" not in look()


@pytest.mark.parametrize("handle", [True, False])
def test_a_gpu_that_is_lost_is_told(monkeypatch: pytest.MonkeyPatch, handle: bool) -> None:
    stand_in(monkeypatch, {"nvmlInit": None, "nvmlShutdown": None, "nvmlDeviceGetCount": 2})
    if handle:
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    with nvml.opened():
        found = {name: values for name, values in look().items() if name.startswith("finetune_gpu_")}
    assert found == {"finetune_gpu_lost": {"0": 1.0, "1": 1.0}}


def test_a_driver_that_is_lost_takes_nothing_else_along(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, AT_WORK)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", pynvml.nvmlDeviceGetPciInfo)  # refuses
    with nvml.opened():
        sample = look()
    assert not [name for name in sample if name.startswith("finetune_gpu_")]
    assert sample["finetune_memory_size_bytes"][""] == psutil.virtual_memory().total


def test_without_a_gpu_it_says_so_and_watches_the_rest(
    monkeypatch: pytest.MonkeyPatch, finetune_cli: Cli, workdir: Path
) -> None:
    def refuse() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    monkeypatch.setattr(psutil, "sensors_temperatures", dict)
    monkeypatch.setattr(psutil, "disk_io_counters", lambda: None)  # as in some containers
    answer = finetune_cli("monitor", *BRIEFLY)
    assert answer.code == 0
    absent = "finetune_cpu_temperature_celsius, finetune_disk_read_bytes_total, finetune_disk_written_bytes_total"
    assert answer.errors == [f"cannot tell here: GPUs (NVML Shared Library Not Found), {absent}"]
    rows = [json.loads(line) for line in answer.out.splitlines()]
    assert len(rows) == 2
    assert rows[0]["finetune_memory_size_bytes"] == psutil.virtual_memory().total
    assert rows[0]["finetune_disk_free_bytes"].keys() == {"outputs", "downloaded models"}
    assert 0 <= rows[1]["finetune_cpu_utilization_ratio"] <= 1


def test_the_hottest_cpu_sensor_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    celsius = {"k10temp": (61.5, 70.25), "nvme": (99.0,)}
    sensors = {chip: [SimpleNamespace(current=value) for value in values] for chip, values in celsius.items()}
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: sensors)
    assert look()["finetune_cpu_temperature_celsius"] == {"k10temp": 70.25}


def test_a_disk_that_can_not_be_read_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "usage", lambda path: None)
    assert "finetune_disk_free_bytes" in samples.missing(look())


def test_a_full_log_is_put_aside(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = monitor._to_file(Path("logs/monitor.jsonl"))
    keep({"finetune_swap_used_bytes": {"": 0}})
    monkeypatch.setattr(monitor, "LOG_BYTES", Path("logs/monitor.jsonl").stat().st_size)
    for number in range(1, 8):
        keep({"finetune_swap_used_bytes": {"": number}})
    found = {file.name: json.loads(file.read_text())["finetune_swap_used_bytes"] for file in Path("logs").iterdir()}
    assert found == {"monitor.jsonl": 7} | {f"monitor.jsonl.{number}": 7 - number for number in range(1, 5)}


def test_a_log_that_can_not_be_written_ends_nothing(finetune_cli: Cli, workdir: Path) -> None:
    Path("file").touch()
    answer = finetune_cli("monitor", *BRIEFLY, "--log", "file/monitor.jsonl")
    assert answer.code == 0
    warnings = [line for line in answer.errors if line.startswith("warning: cannot write file/monitor.jsonl (")]
    assert len(warnings) == 2


RULES = """groups: [{name: mine, rules: [
{alert: Always, expr: finetune_memory_size_bytes > 0, for: 0s, labels: {severity: SEVERITY},
 annotations: {summary: it has memory}}]}]"""


@pytest.mark.parametrize(("severity", "code"), [("warning", 1), ("critical", 2)])
def test_an_alert_is_a_line_a_command_and_the_exit_code(
    finetune_cli: Cli, workdir: Path, severity: str, code: int
) -> None:
    Path("mine.yaml").write_text(RULES.replace("SEVERITY", severity))
    answer = finetune_cli("monitor", *BRIEFLY, "--rules", "mine.yaml", "--command", "cat >> told", "--log", "log.jsonl")
    assert answer.code == code
    size = f"{psutil.virtual_memory().total / 1e9:.1f} GB"
    line = f"{severity}: Always: {size} is above 0 B for 0 s (finetune_memory_size_bytes); it has memory"
    assert line in answer.errors
    assert Path("told").read_text() == f"{line}\n"
    assert len(Path("log.jsonl").read_text().splitlines()) == 2
    assert answer.out == ""


@contextmanager
def receiver() -> Iterator[tuple[str, list[Any]]]:
    """The address of a server, and what is posted to it."""
    received: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook", received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_an_alert_is_posted_when_it_begins_and_when_it_is_over(workdir: Path) -> None:
    rule = Rule("Hot", "finetune_gpu_temperature_celsius", True, 83, 0, Severity.warning, "it is hot")
    with receiver() as (url, received):
        for alert in (Alert(rule, "1", 84.5, firing=True), Alert(rule, "1", None, firing=False)):
            monitor._post(url, alert, "desk")
    assert received[0] == {
        "text": f"desk: {Alert(rule, '1', 84.5, firing=True).line()}",
        "host": "desk",
        "alert": "Hot",
        "severity": "warning",
        "firing": True,
        "metric": "finetune_gpu_temperature_celsius",
        "which": "1",
        "value": 84.5,
    }
    assert (received[1]["text"], received[1]["firing"]) == ("desk: over: Hot, gpu 1, which is no longer told", False)


def test_the_command_line_posts(finetune_cli: Cli, workdir: Path) -> None:
    Path("mine.yaml").write_text(RULES.replace("SEVERITY", "warning"))
    with receiver() as (url, received):
        finetune_cli("monitor", *BRIEFLY, "--rules", "mine.yaml", "--webhook", url)
    assert [(row["alert"], row["host"]) for row in received] == [("Always", socket.gethostname())]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--command", "exit 3"), "warning: --command exit 3 failed (Command 'exit 3' returned non-zero"),
        (("--webhook", "http://127.0.0.1:1/x"), "warning: --webhook http://127.0.0.1:1/x failed (<urlopen error "),
        (("--webhook", "nonsense"), "warning: --webhook nonsense failed (unknown url type: 'nonsense')"),
    ],
)
def test_a_notice_that_fails_ends_nothing(finetune_cli: Cli, workdir: Path, words: tuple[str, ...], why: str) -> None:
    Path("mine.yaml").write_text(RULES.replace("SEVERITY", "warning"))
    answer = finetune_cli("monitor", *BRIEFLY, "--rules", "mine.yaml", *words)
    assert answer.code == 1
    assert [line for line in answer.errors if line.startswith(why)]
    assert len(answer.out.splitlines()) == 2


def test_prometheus_reads_the_last_sample(monkeypatch: pytest.MonkeyPatch, workdir: Path) -> None:
    stand_in(monkeypatch, AT_WORK)
    port = free_port()
    with monitor._published(port) as publish, nvml.opened():
        sample = look()
        publish(sample)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
            families = list(text_string_to_metric_families(page.read().decode()))
    found = {row.name: dict[str, float]() for family in families for row in family.samples}
    for family in families:
        for row in family.samples:
            found[row.name][next(iter(row.labels.values()), "")] = row.value
            assert set(row.labels) == {label for label in (METRICS[row.name][0],) if label}
    assert found == sample
    assert {family.type for family in families if family.name + "_total" in METRICS} == {"counter"}


def test_a_port_that_is_taken_is_named(finetune_cli: Cli, workdir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        answer = finetune_cli("monitor", *BRIEFLY, "--port", str(taken.getsockname()[1]))
    assert answer.code == ConfigError.exit_code
    assert answer.errors[-1].startswith("error: cannot listen on port ")
    assert finetune_cli("monitor", *BRIEFLY, "--port", "99999").code == ConfigError.exit_code


def test_without_the_package_it_is_named(finetune_cli: Cli, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    answer = finetune_cli("monitor", *BRIEFLY, "--port", "9402")
    assert answer.code == ConfigError.exit_code
    assert answer.errors == ["error: --port needs prometheus_client; type: pip install 'finetune[workstation]'"]


USAGE = "usage: finetune monitor [--every SECONDS] [--for SECONDS] [--log FILE] [--rules FILE] [--command COMMAND]"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("conf=pixar_style",), "unrecognized arguments: conf=pixar_style"),
        (("--every", "0.1"), "argument --every: 0.1 is not 0.5 seconds or more"),
        (("--for", "ever"), "argument --for: ever is not 0.5 seconds or more"),
        (("--port", "x"), "argument --port: invalid int value: 'x'"),
    ],
)
def test_other_words_are_refused(finetune_cli: Cli, words: tuple[str, ...], why: str) -> None:
    answer = finetune_cli("monitor", *words)
    assert answer.code == ConfigError.exit_code
    assert len(answer.errors) == 1
    assert answer.errors[0].startswith(f"error: {why}; {USAGE}")


def test_an_alert_is_told_after_its_time_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a whole watch: a hot GPU for six minutes, at one sample a minute."""
    clock = [0.0]
    monkeypatch.setattr(monitor.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(monitor.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    stand_in(monkeypatch, AT_WORK | {"nvmlDeviceGetTemperature": 86})
    told: list[tuple[str, float]] = []
    kept: list[Any] = []
    code = monitor.watch(
        [rule for rule in load() if rule.metric == "finetune_gpu_temperature_celsius"],
        every_s=60,
        for_s=360,
        keep=kept.append,
        tell=lambda alert: told.append((alert.rule.name, round(clock[0]))),
    )
    assert told == [("GpuWarm", 60), ("GpuHot", 300)]
    assert (code, len(kept)) == (2, 7)


def test_slow_steps_of_a_run_that_trains_are_alerts(
    finetune_cli: Cli, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that were noted before the watch began too, and each once; not those of a run that is over."""
    slow = {slow_steps.SECONDS: 12.0, slow_steps.USUAL_S: 2.0}
    for name, pid in (("pixar_style", os.getpid()), ("over", 2**22 + 1)):
        run = Path("outputs", name)
        run.mkdir(parents=True)
        (run / ".lock.json").write_text(json.dumps({"pid": pid}))
        (run / "metrics.jsonl").write_text(json.dumps({"step": 20, slow_steps.OTHERS_CPU: 0.8} | slow) + "\n")
    look = samples.look

    def train_on() -> samples.Sample:
        for file in Path("outputs").glob("*/metrics.jsonl"):
            with open(file, "a") as log:
                log.write(json.dumps({"step": 21 + file.read_text().count("\n"), "loss/step": 0.5}) + "\n")
        return look()

    monkeypatch.setattr(samples, "look", train_on)
    answer = finetune_cli("monitor", "--every", "0.5", "--for", "1", "--command", "cat > told.txt")
    assert answer.code == 1
    line = (
        "warning: SlowStep, run pixar_style: step 20 took 12 s, 6 times the usual 2 s; "
        "other programs took 80% of the CPUs"
    )
    assert [each for each in answer.errors if "SlowStep" in each] == [line]
    assert Path("told.txt").read_text() == line + "\n"


def test_what_a_slow_notice_has_missed_is_not_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, looks = [0.0], list[float]()
    monkeypatch.setattr(monitor.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(monitor.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    rule = Rule("Always", "finetune_memory_size_bytes", True, 0, 0, Severity.warning, "")

    def slow(_: Alert) -> None:
        clock[0] += 130

    monitor.watch([rule], every_s=60, for_s=300, keep=lambda _: looks.append(clock[0] - monitor.FIRST_S), tell=slow)
    assert [round(look_s) for look_s in looks] == [0, 180, 240, 300]
