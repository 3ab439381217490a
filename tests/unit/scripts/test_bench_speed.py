"""The speed table's own parts: commands that are valid, a stopwatch that counts steps, figures out of times."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.config import compose
from finetune.config.validate import check
from scripts.bench.speed import WARM_UP, add_limits, cells, rate, table
from scripts.bench.speed_rows import ROWS
from scripts.bench.stopwatch import LATE

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import sys, torch
weight = torch.nn.Parameter(torch.zeros(3))
optimizer = torch.optim.SGD([weight], lr=0.1)
for _ in range(int(sys.argv[1])):
    weight.grad = torch.ones(3)
    optimizer.step()
sys.exit(int(sys.argv[2]))
"""


@pytest.mark.sampled
@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_a_command_that_is_valid(name: str, tmp_path: Path) -> None:
    words = ROWS[name].command(name, tmp_path / "base", tmp_path / "run", tmp_path / "data")
    assert check(compose.load(words[1].removeprefix("conf="), words[2:])) == []


@pytest.mark.sampled
@pytest.mark.parametrize(("code", "clock"), [(0, []), (3, ["--cpu"])])
def test_the_stopwatch_counts_steps_and_ends_as_the_program_does(code: int, clock: list[str], tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    words = [*clock, "--gib", "24", "--out", str(tmp_path / "times.json"), str(tmp_path / "program.py"), "5", str(code)]
    done = subprocess.run([sys.executable, "-m", "scripts.bench.stopwatch", *words], cwd=ROOT, check=False)
    noted = json.loads((tmp_path / "times.json").read_text())
    assert done.returncode == code
    assert len(noted["steps_s"]) == 4
    assert noted["before_s"] > max(noted["steps_s"])


def test_the_stopwatch_ends_what_takes_too_long_and_keeps_what_it_noted(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM.replace("sys.exit", "import time; time.sleep"))
    words = ["--seconds", "8", "--gib", "24", "--out", str(tmp_path / "times.json"), str(tmp_path / "program.py"), "5"]
    command = [sys.executable, "-m", "scripts.bench.stopwatch", *words, "600"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (LATE, "took more than 8 s\n")
    assert len(json.loads((tmp_path / "times.json").read_text())["steps_s"]) == 4


def test_a_rate_is_of_the_median_step_after_the_warm_up() -> None:
    noted = {"steps_s": [9.0] * WARM_UP + [0.5, 0.25, 7.0]}
    assert rate(noted, 4) == 8.0
    assert rate({"steps_s": [1.0]}, 4) is None


LINE: dict[str, Any] = {"row": "sd15-4", "ours": 60.0, "ours_gib": 6.3, "peer": 30.0, "peer_gib": 7.0, "ratio": 2.0}


@pytest.mark.exhaustive
def test_the_share_of_the_limit_is_of_all_products_of_a_step(tmp_path: Path) -> None:
    line = LINE | {"matmul_tflops": 600.0, "hardware": "GPU", "torch": "2.11", "date": "2026-11-29"}
    (tmp_path / "speed.jsonl").write_text(json.dumps(line) + "\n")
    add_limits(tmp_path / "speed.jsonl", tmp_path / "speed.md")
    share = json.loads((tmp_path / "speed.jsonl").read_text())["share_of_limit"]
    # 0.8 TFLOP forward of an image at 512 px, the gradient on inputs as much again, and something for the adapters
    assert share == pytest.approx(60 * 2 * 0.8 / 600, rel=0.15)
    assert f"{share:.0%}" in (tmp_path / "speed.md").read_text()


def test_a_side_that_failed_is_a_dash() -> None:
    whole = LINE | {"share_of_limit": 0.2, "ours_before_s": 25.2, "peer_before_s": 24.0}
    assert cells("sd15-4", whole) == "| `sd15-4` | images | 60.0 | 6.3 | 25 | 30.0 | 7.0 | 24 | 2.00 | 20% | – |"
    failed = whole | {"peer": None, "ratio": None, "peer_before_s": None}
    assert cells("sd15-4", failed) == "| `sd15-4` | images | 60.0 | 6.3 | 25 | – | 7.0 | – | – | 20% | – |"


def test_every_row_is_in_the_table_with_what_bounds_it_and_the_last_line_counts() -> None:
    line = LINE | {"share_of_limit": 0.2, "matmul_tflops": 600.0, "hardware": "GPU", "torch": "2.11", "date": "today"}
    page = table([line | {"ours": 1.0}, line])
    assert page.count("| `sd15-4` | images | 60.0 |") == 1
    for name, row in ROWS.items():
        assert f"| `{name}` | {row.unit} |" in page
        assert row.bound[1:] in page


@pytest.mark.sampled
@pytest.mark.parametrize("name", ROWS)
def test_no_row_drops_anything_at_random(name: str, tmp_path: Path) -> None:
    """Peers don't, and with dropout the fast paths are not taken."""
    words = ROWS[name].command(name, tmp_path / "base", tmp_path / "run", tmp_path / "data")
    assert compose.load(words[1].removeprefix("conf="), words[2:]).lora.dropout == 0


def test_the_page_shows_what_the_lines_say() -> None:
    lines = [json.loads(line) for line in (ROOT / "scripts" / "bench" / "speed.jsonl").read_text().splitlines()]
    assert (ROOT / "docs" / "speed.md").read_text() == table(lines)
