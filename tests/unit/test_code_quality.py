"""Format, lint, types and the direction of imports, as in pre-commit, and rules of this code that no tool has."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.config.model_kinds import MODEL_KINDS
from tests.conftest import ROOT

BIN = Path(sys.executable).parent
PACKAGE = ROOT / "finetune"
LONGEST_FILE, LONGEST_LOOP = 400, 150  # lines
KNOW_THE_KINDS = ("kinds.py", "config/model_kinds.py")
TAKE_THE_CONFIG = ("api.py", "cli.py", "config/*.py", "stages/*.py", "kinds.py", "*/kind.py", "reporting/terminal.py")
BUILDERS = {
    "diffusion/encode.py": {"inputs", "build"},
    "language/tokenize.py": {"inputs", "build"},
    "serving/diffusion.py": {"service"},
    "serving/language.py": {"service"},
    "training/identity.py": {"settings_of"},
}
"""Functions at the head of a file that turn the whole configuration into the values that all others take."""


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "--no-cache", "."],
        ["ruff", "format", "--no-cache", "--check", "."],
        pytest.param(["mypy", "--no-error-summary"], marks=pytest.mark.exhaustive),  # a minute, mostly of torch
        ["lint-imports", "--no-cache"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_tool_is_satisfied(command: list[str]) -> None:
    result = subprocess.run(
        [str(BIN / command[0]), *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_code_files_stay_readable() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {path.name: length for path, length in lengths.items() if length > LONGEST_FILE} == {}
    assert lengths[PACKAGE / "training" / "loop.py"] <= LONGEST_LOOP


def sources() -> Iterator[tuple[str, str]]:
    """Every module's path below the package, and its text."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")


def branches_on_kind(text: str) -> list[int]:
    """Lines that compare the kind of a model, or anything with a kind's name."""
    lines = {
        number for number, line in enumerate(text.splitlines(), 1) if re.search(r"\.kind (==|!=|(in|is|not)\b)", line)
    }
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Compare | ast.MatchValue):
            values = {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)}
            lines |= {node.lineno} if values & MODEL_KINDS.keys() else set()
    return sorted(lines)


def test_branches_on_the_kind_of_model_are_found() -> None:
    assert branches_on_kind('if model.kind == other:\n    pass\nif kind in ("language", x):\n    pass\n') == [1, 3]
    assert branches_on_kind('match kind:\n    case "diffusion":\n        pass\n') == [2]
    assert branches_on_kind('facts = MODEL_KINDS["language"]\nof(config.model.kind)\n') == []


def test_only_the_table_of_kinds_branches_on_the_kind_of_model() -> None:
    found = {path: lines for path, text in sources() if (lines := branches_on_kind(text))}
    assert {path: lines for path, lines in found.items() if path not in KNOW_THE_KINDS} == {}


def takes_config(text: str) -> set[str]:
    """Functions with a parameter, and classes with a field, whose type has the whole `Config` in it."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        annotations: list[ast.expr | None] = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            annotations = [argument.annotation for argument in every if argument]
        elif isinstance(node, ast.ClassDef):
            annotations = [field.annotation for field in node.body if isinstance(field, ast.AnnAssign)]
        if any(re.search(r"\bConfig\b", ast.unparse(each)) for each in annotations if each):
            found.add(node.name)  # type: ignore[attr-defined]
    return found


def test_parameters_of_the_whole_config_are_found() -> None:
    text = "def a(*, config: 'str | Config'): ...\nclass B:\n    config: Config\ndef c(x: ModelConfig) -> Config: ...\n"
    assert takes_config(text) == {"a", "B"}


def test_values_enter_functions_and_not_the_whole_config() -> None:
    """But where they are taken out of it."""
    found = {path: names for path, text in sources() if (names := takes_config(text) - BUILDERS.get(path, set()))}
    allowed = {path.relative_to(PACKAGE).as_posix() for pattern in TAKE_THE_CONFIG for path in PACKAGE.glob(pattern)}
    assert {path: names for path, names in found.items() if path not in allowed} == {}
