"""README, CI and the package say the same words."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import yaml

from finetune.config import compose, describe, recipes
from finetune.config.validate import check
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAIN = (
    "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e . "
    "&& .venv/bin/python -m finetune train conf=pixar_style"
)
TEST = 'python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e ".[test]" && .venv/bin/python -m pytest'


def test_readme_has_both_commands_on_lines_of_their_own() -> None:
    lines = [line.strip() for line in README.splitlines()]
    assert TRAIN in lines
    assert TEST in lines


def test_ci_runs_what_the_readme_says() -> None:
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111
    lines = script.read_text(encoding="utf-8").splitlines()
    assert "set -euo pipefail" in lines
    assert TEST in lines
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_recipes_that_the_readme_names_exist() -> None:
    assert set(re.findall(r"\bconf=(\w+)", README)) <= {*recipes.recipe_files(), "NAME", "RECIPE", "mine"}


def test_constraints_pin_every_direct_dependency_and_no_place() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "://" not in text
    assert "\ntorch==2.13.0\n" in text
    pinned = {line.split("==")[0] for line in text.splitlines() if "==" in line}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    names = {re.split(r"[<>=!~ ;\[]", line)[0].lower().replace("_", "-") for line in wanted}
    assert names <= pinned
    assert not [name for name in pinned if re.match(r"nvidia-(?!ml-py)|cuda-|triton", name)]


def test_pre_commit_runs_the_tools_that_the_tests_run() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert {hook["entry"].split(" -")[0] for hook in hooks} == {"ruff format", "ruff check", "mypy", "lint-imports"}


def test_readme_says_how_to_get_what_is_not_installed_at_first() -> None:
    python = re.search(r"Python (3\.\d+) to 3\.(\d+)", README)
    assert python
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == f">={python[1]},<3.{int(python[2]) + 1}"
    assert "[gguf]" in README
    assert "gguf" in project["optional-dependencies"]
    notebooks = [path for path in (ROOT / "scripts").glob("*.ipynb") if "IPython" in path.read_text(encoding="utf-8")]
    assert notebooks  # they import what no dependency brings
    assert "pip install -c constraints.txt jupyterlab" in README


def test_keys_that_the_readme_names_exist() -> None:
    keys = set(re.findall(r"\b((?:data|sample|trainer|lora|optim|export|caption|model)\.\w+)=", README))
    assert {"trainer.restart", "data.skip_bad", "export.dialects"} <= keys
    assert [problem for key in keys if (problem := describe.key_problem(key))] == []


def test_the_way_to_ones_own_base_can_be_typed(workdir: Path) -> None:
    """Every command of the page composes, with the recipe that it shows."""
    page = (ROOT / "docs" / "own_base.md").read_text(encoding="utf-8")
    (workdir / "conf").mkdir()
    recipe = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert recipe
    (workdir / "conf" / "mine_flux.yaml").write_text(recipe[1])
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith("    finetune ")]
    assert {words[1] for words in commands} == {"train", "plan", "sample"}
    for _, _, name, *overrides in commands:
        config = compose.load(name.removeprefix("conf="), overrides)
        assert check(config) == []
        assert config.model.base
