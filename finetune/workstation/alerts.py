"""Thresholds with durations: Prometheus's rule files, as far as they compare one metric with a number."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError
from finetune.reading import read_text
from finetune.run.plain import UNREADABLE, first_line
from finetune.run.progress import size_text
from finetune.workstation.samples import METRICS, Sample

RULES = Path(__file__).parent / "monitoring" / "alerts.yaml"
UP = "up"  # Prometheus's own, of each machine that it asks
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
COMPARISON = re.compile(r"(?P<metric>\w+) (?P<sign>[<>]) (?P<limit>-?\d+(\.\d+)?)")
DURATION = re.compile(r"(?P<count>\d+)(?P<unit>[smhd])")


class Severity(Enum):
    """In the order of weight."""

    warning = 1
    critical = 2


@dataclass(frozen=True)
class Rule:
    """Fires where `metric` has been above (or below) `limit` for `for_s` seconds without a break."""

    name: str
    metric: str
    above: bool
    limit: float
    for_s: float
    severity: Severity
    summary: str

    def holds(self, value: float) -> bool:
        return value > self.limit if self.above else value < self.limit


@dataclass(frozen=True)
class Alert:
    """firing: false once it is over. which: the GPU, place, sensor or run; empty where there is only one. words: what
    happened, where it is more than a value beyond a limit."""

    rule: Rule
    which: str
    value: float | None
    firing: bool
    words: str = ""

    def line(self) -> str:
        """ "critical: GpuHot, gpu 0: 87 °C is above 85 °C for 300 s (…); …"."""
        rule = self.rule
        label = METRICS[rule.metric][0] if rule.metric in METRICS else "run"
        where = f", {label} {self.which}" if self.which else ""
        if not self.firing:
            return f"over: {rule.name}{where}{'' if self.value is not None else ', which is no longer told'}"
        if self.words:
            return f"{rule.severity.name}: {rule.name}{where}: {self.words}"
        value, limit = _with_unit(rule.metric, self.value or 0), _with_unit(rule.metric, rule.limit)
        held = f"{value} is {'above' if rule.above else 'below'} {limit} for {rule.for_s:g} s"
        return f"{rule.severity.name}: {rule.name}{where}: {held} ({rule.metric}); {rule.summary}"


def _with_unit(metric: str, value: float) -> str:
    if metric.endswith("_bytes"):
        return size_text(value)
    return f"{value:g} °C" if metric.endswith("_celsius") else f"{value:g}"


@dataclass
class Watch:
    """Which rules hold since when, and which of them have fired; `see` is given every sample in turn."""

    rules: list[Rule]
    since: dict[tuple[str, str], float] = field(default_factory=dict)
    firing: dict[tuple[str, str], Rule] = field(default_factory=dict)

    def see(self, sample: Sample, now_s: float) -> list[Alert]:
        """What begins and what is over with this sample. A value that is no longer told is over too."""
        return [alert for rule in self.rules for alert in self._of(rule, sample.get(rule.metric, {}), now_s)]

    def _of(self, rule: Rule, values: dict[str, float], now_s: float) -> Iterator[Alert]:
        for which, value in values.items():
            key = rule.name, which
            if rule.holds(value):
                since = self.since.setdefault(key, now_s)
                if now_s - since >= rule.for_s and key not in self.firing:
                    self.firing[key] = rule
                    yield Alert(rule, which, value, firing=True)
        for name, which in [key for key in self.since if key[0] == rule.name]:
            value_now = values.get(which)
            if value_now is None or not rule.holds(value_now):
                del self.since[name, which]
                if self.firing.pop((name, which), None):
                    yield Alert(rule, which, value_now, firing=False)


def load(file: Path = RULES) -> list[Rule]:
    """The rules of a file. Raises ConfigError for one that can't be read or has a rule of another form."""
    import yaml

    try:
        groups = yaml.safe_load(read_text(file))["groups"]
        return [_rule(row) for group in groups for row in group["rules"]]
    except (*UNREADABLE, yaml.YAMLError) as error:
        raise ConfigError(f"{file} can't be used as rules ({first_line(error)}); {RULES} is an example") from error


def _rule(row: dict[str, Any]) -> Rule:
    """Raises ValueError, KeyError and the like for a rule of another form."""
    compared, duration = COMPARISON.fullmatch(str(row["expr"])), DURATION.fullmatch(str(row.get("for", "0s")))
    if not compared or compared["metric"] not in (*METRICS, UP):
        raise ValueError(f"{row['alert']}: expr must be METRIC > NUMBER or METRIC < NUMBER of a metric that there is")
    if not duration:
        raise ValueError(f"{row['alert']}: for must be a number with s, m, h or d, such as 5m")
    severity = str(row["labels"]["severity"])
    if severity not in Severity.__members__:
        raise ValueError(f"{row['alert']}: severity must be {' or '.join(Severity.__members__)}")
    return Rule(
        name=str(row["alert"]),
        metric=compared["metric"],
        above=compared["sign"] == ">",
        limit=float(compared["limit"]),
        for_s=float(duration["count"]) * SECONDS[duration["unit"]],
        severity=Severity[severity],
        summary=str(row["annotations"]["summary"]),
    )
