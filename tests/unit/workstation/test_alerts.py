"""Every rule that is shipped fires at its limit and after its time, here and, where it is installed, in promtool."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from finetune.errors import ConfigError
from finetune.workstation import alerts
from finetune.workstation.alerts import RULES, Alert, Rule, Severity, Watch, load
from finetune.workstation.samples import METRICS

SHIPPED = load()
STEP_S = 10
every_rule = pytest.mark.parametrize("rule", SHIPPED, ids=lambda rule: rule.name)


def beyond(rule: Rule) -> float:
    return rule.limit + 1 if rule.above else rule.limit - 1


def seen(watch: Watch, rule: Rule, *values: float | None, which: str = "0", start_s: float = 0) -> list[list[Alert]]:
    """What each of these values, one every ten seconds, leads to."""
    samples = [{} if value is None else {rule.metric: {which: value}} for value in values]
    return [watch.see(sample, start_s + number * STEP_S) for number, sample in enumerate(samples)]


@every_rule
def test_a_rule_fires_beyond_its_limit_after_its_time_and_once(rule: Rule) -> None:
    steps = int(rule.for_s / STEP_S)
    found = seen(Watch(SHIPPED), rule, *[beyond(rule)] * (steps + 3))
    times = [number for number, each in enumerate(found) if rule.name in {alert.rule.name for alert in each}]
    assert times == [steps]
    [alert] = [alert for alert in found[steps] if alert.rule == rule]
    assert alert == Alert(rule, "0", beyond(rule), firing=True)
    assert alert.line().startswith(f"{rule.severity.name}: {rule.name}")


@every_rule
def test_a_rule_is_silent_at_its_limit(rule: Rule) -> None:
    steps = int(rule.for_s / STEP_S)
    found = seen(Watch([rule]), rule, *[rule.limit] * (steps + 3))
    assert found == [[]] * len(found)


@every_rule
@pytest.mark.parametrize("gap", ["at the limit", "not told"])
def test_a_break_begins_its_time_again_and_ends_the_alert(rule: Rule, gap: str) -> None:
    steps, silence = int(rule.for_s / STEP_S), rule.limit if gap == "at the limit" else None
    watch = Watch([rule])
    found = seen(watch, rule, *[beyond(rule)] * steps, silence, *[beyond(rule)] * (steps + 1), silence, silence)
    told = [(number, alert.firing) for number, each in enumerate(found) for alert in each]
    assert told == [(2 * steps + 1, True), (2 * steps + 2, False)]
    assert found[2 * steps + 2][0].line().startswith(f"over: {rule.name}")
    assert (watch.since, watch.firing) == ({}, {})


def test_gpus_are_watched_apart() -> None:
    [rule] = [rule for rule in SHIPPED if rule.name == "GpuHot"]
    watch = Watch([rule])
    for number in range(31):
        sample = {rule.metric: {"0": 86.0, "1": 60.0 if number < 10 else 90.0}}
        told = [alert.line() for alert in watch.see(sample, number * STEP_S)]
    way = "the GPU stays hot; lower its power limit or stop the run"
    held = "86 °C is above 85 °C for 300 s (finetune_gpu_temperature_celsius)"
    assert told == [f"critical: GpuHot, gpu 0: {held}; {way}"]


@pytest.mark.parametrize(
    ("metric", "shown"),
    [
        ("finetune_gpu_throttled", "1 is above 0.5 for"),
        ("finetune_cpu_temperature_celsius", "1 °C is above 0.5 °C for"),
        ("finetune_swap_used_bytes", "1 B is above 0.5 B for"),
    ],
)
def test_values_have_their_unit(metric: str, shown: str) -> None:
    assert shown in Alert(Rule("A", metric, True, 0.5, 0, Severity.warning, ""), "", 1.0, firing=True).line()


def test_the_limits_are_those_that_the_page_names() -> None:
    """GPU under 83 °C, its memory under 95 °C, and five minutes above 85 °C are serious."""
    limits = {rule.name: (rule.metric, rule.limit, rule.for_s, rule.severity) for rule in SHIPPED}
    assert limits["GpuWarm"] == ("finetune_gpu_temperature_celsius", 83, 60, Severity.warning)
    assert limits["GpuHot"] == ("finetune_gpu_temperature_celsius", 85, 300, Severity.critical)
    assert limits["GpuMemoryHot"][:2] == ("finetune_gpu_memory_temperature_celsius", 95)
    assert len(limits) == len(SHIPPED)
    assert all(rule.metric in METRICS or rule.metric == alerts.UP for rule in SHIPPED)


ROW = """groups: [{name: mine, rules: [{alert: A, expr: EXPR, for: FOR,
 labels: {severity: SEVERITY}, annotations: {summary: s}}]}]"""
GOOD = {"EXPR": "finetune_swap_used_bytes > 1", "FOR": "2h", "SEVERITY": "warning"}


def written(**values: str) -> Path:
    text = ROW
    for name, value in (GOOD | values).items():
        text = text.replace(name, value)
    file = Path("rules.yaml")
    file.write_text(text)
    return file


def test_own_rules_are_read(workdir: Path) -> None:
    [rule] = load(written(EXPR="finetune_memory_available_bytes < 1.5", SEVERITY="critical"))
    assert rule == Rule("A", "finetune_memory_available_bytes", False, 1.5, 7200, Severity.critical, "s")


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"EXPR": "rate(finetune_swap_used_bytes) > 1"}, "A: expr must be METRIC > NUMBER"),
        ({"EXPR": "finetune_nothing > 1"}, "A: expr must be METRIC > NUMBER"),
        ({"FOR": "soon"}, "A: for must be a number with s, m, h or d, such as 5m"),
        ({"SEVERITY": "page"}, "A: severity must be warning or critical"),
        ({"EXPR": "[: }"}, "can't be used as rules"),
    ],
)
def test_rules_of_another_form_are_refused(workdir: Path, values: dict[str, str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        load(written(**values))


@pytest.mark.parametrize("text", [None, "", "groups: [{name: mine}]", "groups: 1"])
def test_a_file_without_rules_is_refused(workdir: Path, text: str | None) -> None:
    if text is not None:
        Path("rules.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"rules.yaml can't be used as rules \(.*\); {RULES} is an example"):
        load(Path("rules.yaml"))


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_prometheus_fires_when_the_monitor_does(tmp_path: Path) -> None:
    tests = []
    for rule in SHIPPED:
        steps, labels = int(rule.for_s / STEP_S), {"gpu": "0"}
        alert = {"exp_labels": labels | {"severity": rule.severity.name}, "exp_annotations": {"summary": rule.summary}}
        series = {"series": f'{rule.metric}{{gpu="0"}}', "values": f"{rule.limit:.0f} {beyond(rule):.0f}x{steps + 1}"}
        times = {0: [], STEP_S * (steps + 1): [alert]} | ({STEP_S * steps: []} if steps else {})
        checks = [{"eval_time": f"{s}s", "alertname": rule.name, "exp_alerts": found} for s, found in times.items()]
        tests.append({"interval": f"{STEP_S}s", "input_series": [series], "alert_rule_test": checks})
    file = tmp_path / "tests.yaml"
    every = {"rule_files": [str(RULES)], "evaluation_interval": f"{STEP_S}s", "tests": tests}
    file.write_text(json.dumps(every))  # JSON is YAML
    for command in (["check", "rules", str(RULES)], ["test", "rules", str(file)]):
        result = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
