"""`finetune monitor`: the machine's figures as lines of JSON, alerts about them, and a page for Prometheus."""

import argparse
import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError
from finetune.reading import at_home
from finetune.run.plain import first_line
from finetune.run.progress import say
from finetune.workstation import alerts, facts, nvml, samples
from finetune.workstation.alerts import Alert, Watch
from finetune.workstation.flags import Flags
from finetune.workstation.samples import METRICS, Sample
from finetune.workstation.slow_runs import SlowRuns

EVERY_S, LEAST_S, FIRST_S = 60.0, 0.5, 0.2
LOG_BYTES, LOGS = 10_000_000, 5  # a week of samples each at one a minute and one GPU
PATIENCE_S = 30.0  # with a command or a webhook; no sample is taken meanwhile
STDERR = 2
HOST = "127.0.0.1"  # the page has no password


def main(words: Sequence[str]) -> int:
    """Watch until `--for` is over: the exit code is 2 if a critical alert fired, else 1 if a warning did, else 0.

    Raises ConfigError for other words, unreadable rules, a port that is taken and a package that is missing.
    """
    options = _options(words)
    host = socket.gethostname()

    def tell(alert: Alert) -> None:
        say(alert.line())
        if options.command:
            _tried(f"--command {options.command}", lambda: _run(options.command, alert.line()))
        if options.webhook:
            _tried(f"--webhook {options.webhook}", lambda: _post(options.webhook, alert, host))

    rules = alerts.load(at_home(options.rules)) if options.rules else alerts.load()
    log = _to_file(at_home(options.log)) if options.log else _print
    with _published(options.port) as publish:

        def keep(sample: Sample) -> None:
            publish(sample)
            log(sample)

        return watch(rules, every_s=options.every, for_s=options.for_s, keep=keep, tell=tell)


def watch(
    rules: list[alerts.Rule],
    *,
    every_s: float,
    for_s: float | None,
    keep: Callable[[Sample], object],
    tell: Callable[[Alert], object],
) -> int:
    """Hand every sample to `keep`, and to `tell` every alert that begins or ends and every slow step of a run that
    trains; the weight of the worst alert.

    for_s: how long, in seconds; None is for ever.
    """
    import psutil

    watched, slow, worst, number = Watch(rules), SlowRuns(facts.PLACES["outputs"]), 0, 0
    with nvml.opened() as error:
        psutil.cpu_percent()
        time.sleep(FIRST_S)  # the CPUs' time is counted from one look to the next
        begun = time.monotonic()
        while for_s is None or number * every_s <= for_s:
            time.sleep(max(0.0, begun + number * every_s - time.monotonic()))
            sample = samples.look()
            if number == 0 and (absent := samples.missing(sample)):
                say(_can_not_tell(absent, error))
            keep(sample)
            for alert in (*watched.see(sample, number * every_s), *slow.see()):
                worst = max(worst, alert.rule.severity.value)
                tell(alert)
            passed = int((time.monotonic() - begun) // every_s)  # after a slow notice, what is past is not made up for
            number = max(number, passed) + 1
    return worst


def _options(words: Sequence[str]) -> argparse.Namespace:
    parser = Flags("monitor")
    parser.add_argument("--every", metavar="SECONDS", type=_seconds, default=EVERY_S)
    parser.add_argument("--for", metavar="SECONDS", type=_seconds, default=None, dest="for_s")
    for flag, value in (("--log", "FILE"), ("--rules", "FILE"), ("--command", "COMMAND"), ("--webhook", "URL")):
        parser.add_argument(flag, metavar=value, default="")
    parser.add_argument("--port", metavar="PORT", type=int, default=0)
    return parser.parse_args(words)


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if LEAST_S <= float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not {LEAST_S} seconds or more")


def _can_not_tell(absent: Sequence[str], error: str) -> str:
    """What is missing on this machine, and why where NVML says it."""
    of_gpus = [name for name in METRICS if METRICS[name][0] == "gpu"]
    if set(of_gpus) <= set(absent):
        absent = [f"GPUs ({error or 'there is none'})", *(name for name in absent if name not in of_gpus)]
    return f"cannot tell here: {', '.join(absent)}"


def _as_line(sample: Sample) -> str:
    """One sample as JSON; a metric of which there is only one is a number."""
    plain = {name: values.get("", values) for name, values in sample.items()}
    return json.dumps({"time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"} | plain)


def _print(sample: Sample) -> None:
    print(_as_line(sample), flush=True)


def _to_file(file: Path) -> Callable[[Sample], None]:
    """Appends samples. A full file becomes FILE.1, that FILE.2, and so on; a disk that is full ends nothing."""

    def keep(sample: Sample) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.exists() and file.stat().st_size >= LOG_BYTES:
                _rotate(file)
            with open(file, "a", encoding="utf-8") as log:
                log.write(_as_line(sample) + "\n")
        except OSError as error:
            say(f"warning: cannot write {file} ({error.strerror}); this sample is lost")

    return keep


def _rotate(file: Path) -> None:
    for number in reversed(range(LOGS - 1)):
        older = file.with_name(f"{file.name}.{number}") if number else file
        if older.exists():
            os.replace(older, file.with_name(f"{file.name}.{number + 1}"))


def _tried(way: str, notify: Callable[[], object]) -> None:
    """A notice that fails is said, and the watch goes on."""
    try:
        notify()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        say(f"warning: {way} failed ({first_line(error)})")


def _run(command: str, line: str) -> None:
    """Through the shell, with the alert as its input, as `mail` takes it. What it prints is no sample."""
    subprocess.run(command, shell=True, input=line + "\n", text=True, check=True, timeout=PATIENCE_S, stdout=STDERR)


def _post(url: str, alert: Alert, host: str) -> None:
    """As JSON; chat servers show the field `text`."""
    rule = alert.rule
    body = {
        "text": f"{host}: {alert.line()}",
        "host": host,
        "alert": rule.name,
        "severity": rule.severity.name,
        "firing": alert.firing,
        "metric": rule.metric,
        "which": alert.which,
        "value": alert.value,
    }
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE_S):
        pass


@contextmanager
def _published(port: int) -> Iterator[Callable[[Sample], None]]:
    """A page for Prometheus, `http://127.0.0.1:PORT/metrics`, with the last sample; none for port 0."""
    latest: list[Sample] = [{}]

    def publish(sample: Sample) -> None:
        latest[0] = sample

    if not port:
        yield publish
        return
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError as error:
        raise ConfigError(f"--port needs {error.name}; type: pip install 'finetune[workstation]'") from error
    registry = CollectorRegistry()
    registry.register(_Collector(latest))
    try:
        server, thread = start_http_server(port, HOST, registry)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on port {port} ({first_line(error)}); try another: --port 9402") from error
    say(f"metrics for Prometheus: http://{HOST}:{port}/metrics")
    try:
        yield publish
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Collector:
    """Hands the last sample to Prometheus's library."""

    def __init__(self, latest: list[Sample]) -> None:
        self.latest = latest

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for name, values in self.latest[0].items():
            label, help_text = METRICS[name]
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            metric = family(name, help_text, labels=[label] if label else [])
            for which, value in values.items():
                metric.add_metric([which] if label else [], value)
            yield metric
