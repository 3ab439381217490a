"""The files for Prometheus and Grafana fit together, and show what the monitor tells."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.workstation.alerts import RULES, load
from finetune.workstation.samples import METRICS
from tests.conftest import ROOT

FOLDER = RULES.parent
PORT = 9402
UNITS = {"celsius": "celsius", "watts": "watt", "joules": "joule", "ratio": "percentunit", "hertz": "hertz"}
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
BOARD = json.loads((FOLDER / "dashboard.json").read_text())
PANELS = BOARD["panels"]
every_panel = pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def mounted(service: str) -> dict[str, str]:
    """Path in the container -> file of this folder."""
    rows = [row.split(":") for row in COMPOSE["services"][service]["volumes"]]
    return {inside: there.removeprefix("./") for there, inside, *_ in rows if there.startswith("./")}


def expressions(panel: dict[str, Any]) -> list[str]:
    return [target["expr"] for target in panel["targets"]]


def metrics_of(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:finetune_\w+|ALERTS)\b", expression))


def test_every_file_is_mounted_once_and_for_reading() -> None:
    files = [name for service in COMPOSE["services"] for name in mounted(service).values()]
    assert sorted([*files, "compose.yaml"]) == sorted(path.name for path in FOLDER.iterdir())
    rows = [row for service in COMPOSE["services"].values() for row in service["volumes"]]
    assert all(row.endswith(":ro") for row in rows if row.startswith("./"))
    assert {row.split(":")[0] for row in rows if not row.startswith("./")} == set(COMPOSE["volumes"])


def test_services_are_pinned_and_stay_on_this_machine() -> None:
    prometheus, grafana = COMPOSE["services"]["prometheus"], COMPOSE["services"]["grafana"]
    for service in (prometheus, grafana):
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"])
        assert service["network_mode"] == "host"
        assert not {"privileged", "ports", "user", "cap_add"} & set(service)
    assert "--web.listen-address=127.0.0.1:9090" in prometheus["command"]
    assert grafana["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    assert all(isinstance(value, str) for value in grafana["environment"].values())


def test_paths_in_the_containers_are_those_that_are_mounted() -> None:
    config = next(word for word in COMPOSE["services"]["prometheus"]["command"] if word.startswith("--config.file="))
    assert mounted("prometheus")[config.partition("=")[2]] == "prometheus.yaml"
    assert [mounted("prometheus")[path] for path in read("prometheus.yaml")["rule_files"]] == ["alerts.yaml"]
    [provider] = read("dashboards.yaml")["providers"]
    home = COMPOSE["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert mounted("grafana")[home] == "dashboard.json"
    assert Path(home).parent.as_posix() == provider["options"]["path"]


def test_prometheus_asks_the_port_that_the_page_names() -> None:
    [scraped] = read("prometheus.yaml")["scrape_configs"]
    assert scraped["static_configs"] == [{"targets": [f"127.0.0.1:{PORT}"]}]
    assert f"--port {PORT}" in (ROOT / "docs" / "monitor.md").read_text(encoding="utf-8")
    assert f"--port {PORT}" in (FOLDER / "compose.yaml").read_text()


def test_grafana_has_the_source_that_the_panels_name() -> None:
    [source] = read("datasource.yaml")["datasources"]
    assert source["url"] == "http://127.0.0.1:9090"
    wanted = {"type": source["type"], "uid": source["uid"]}
    for panel in PANELS:
        assert [panel["datasource"], *(target["datasource"] for target in panel["targets"])] == [wanted] * (
            len(panel["targets"]) + 1
        )


def test_every_metric_and_the_alerts_are_shown() -> None:
    shown = set().union(*(metrics_of(expression) for panel in PANELS for expression in expressions(panel)))
    assert shown == {*METRICS, "ALERTS"}


@every_panel
def test_a_panel_has_the_unit_of_its_metrics(panel: dict[str, Any]) -> None:
    unit = panel["fieldConfig"]["defaults"].get("unit", "none")
    for expression in expressions(panel):
        [metric] = metrics_of(expression)
        assert metric.endswith("_total") == expression.startswith(("rate(", "increase("))
        if "bytes_per_second" in metric or expression.startswith("rate("):
            assert unit == "Bps"
        elif metric.endswith("_bytes"):
            assert unit == "bytes"
        else:
            assert unit == next((UNITS[part] for part in metric.split("_") if part in UNITS), "none")


@every_panel
def test_a_legend_tells_several_apart(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        if "legendFormat" in target:
            [metric] = metrics_of(target["expr"])
            label = METRICS[metric][0]
            assert re.findall(r"{{(\w+)}}", target["legendFormat"]) == ([label] if label else [])
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_panels_lie_side_by_side() -> None:
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in PANELS)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)


@every_panel
def test_lines_in_a_panel_are_the_limits_of_the_rules(panel: dict[str, Any]) -> None:
    steps = panel["fieldConfig"]["defaults"].get("thresholds", {"steps": []})["steps"]
    drawn = {step["value"] for step in steps if step["value"] is not None}
    metric = next(iter(metrics_of(expressions(panel)[0])))
    assert drawn <= {rule.limit for rule in load() if rule.metric == metric}


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    text = (FOLDER / "prometheus.yaml").read_text().replace("/etc/prometheus/alerts.yaml", str(RULES))
    (tmp_path / "prometheus.yaml").write_text(text)
    command = ["promtool", "check", "config", "--lint-fatal", str(tmp_path / "prometheus.yaml")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
