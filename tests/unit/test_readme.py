"""README, docs, CI and the package say the same: commands compose, names exist, links lead somewhere."""

import ast
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from finetune.config import compose, describe, recipes
from finetune.config.validate import check
from finetune.video import COMMANDS as VIDEO
from finetune.video.settings import KINDS, parse
from finetune.workstation import COMMANDS as MACHINE
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAIN = (
    "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e . "
    "&& .venv/bin/python -m finetune train conf=pixar_style"
)
TEST = 'python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e ".[test]" && .venv/bin/python -m pytest'
LONGEST_README = 110  # lines
# What is read by users; docs/decisions/ and the changelog may name what no longer exists.
PAGES = {str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
LINKED = {
    str(path.relative_to(ROOT)): path
    for path in (*PAGES.values(), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*/*.md"))
}
# Its commands and code are run in a package that has what the page adds: test_extending.py.
AS_IT_IS = [page for page in PAGES if page != "docs/extending.md"]
PLACEHOLDERS = {"NAME", "RECIPE"}
SUFFIXES = {"py", "md", "yaml", "json", "jsonl", "safetensors", "txt", "png", "html"}  # data.py is a file, not a key


def text_of(page: str) -> str:
    return PAGES[page].read_text(encoding="utf-8")


def shown_recipes(text: str) -> dict[str, str]:
    """Recipes that a page shows, by name: blocks of YAML whose first line is `# conf/NAME.yaml: …`."""
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    return {found[1]: block for block in blocks if (found := re.match(r"# conf/(\w+)\.yaml", block))}


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Every indented `finetune COMMAND …` line of a page: the command and the words behind it."""
    found = []
    for line in text.splitlines():
        if line.startswith("    ") and (command := re.search(r"(?:^|\s)finetune ([a-z]+) (.*)$", line)):
            found.append((command[1], shlex.split(command[2])))
    return found


def composed(words: list[str]) -> list[str]:
    """Problems of a command line's configuration; of a sweep its first job counts."""
    overrides = [word for word in words if not word.startswith("-")]
    if "--multirun" in words:
        overrides = [word if "[" in word else word.split(",")[0] for word in overrides]
    named = {word.partition("=")[0] for word in overrides}
    if "run_dir" in named and "conf" not in named:  # of a run, whose folder is in no page
        return check(compose.apply(compose.load("smoke"), overrides))
    (recipe,) = (word.removeprefix("conf=") for word in overrides if word.startswith("conf="))
    return check(compose.load(recipe, [word for word in overrides if not word.startswith("conf=")]))


def test_readme_has_both_commands_on_lines_of_their_own() -> None:
    lines = [line.strip() for line in README.splitlines()]
    assert TRAIN in lines
    assert TEST in lines


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= LONGEST_README, "move details to a page in docs/"


def test_ci_runs_what_the_readme_says() -> None:
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111
    lines = script.read_text(encoding="utf-8").splitlines()
    assert "set -euo pipefail" in lines
    assert TEST in lines
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_constraints_pin_every_direct_dependency_and_no_place() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "://" not in text
    assert "\ntorch==2.13.0\n" in text
    pinned = {line.split("==")[0] for line in text.splitlines() if "==" in line}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    names = {re.split(r"[<>=!~ ;\[]", line)[0].lower().replace("_", "-") for line in needed}
    assert names <= pinned
    assert not [name for name in pinned if re.match(r"nvidia-(?!ml-py)|cuda-|triton", name)]


def test_pre_commit_runs_the_tools_that_the_tests_run() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert {hook["entry"].split(" -")[0] for hook in hooks} == {"ruff format", "ruff check", "mypy", "lint-imports"}


def test_pages_say_how_to_get_what_is_not_installed_at_first() -> None:
    python = re.search(r"Python (3\.\d+) to 3\.(\d+)", README)
    assert python
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == f">={python[1]},<3.{int(python[2]) + 1}"
    assert 'pip install -c constraints.txt -e ".[gguf]"' in text_of("docs/chats.md")
    assert "gguf" in project["optional-dependencies"]
    notebooks = [path for path in (ROOT / "scripts").glob("*.ipynb") if "IPython" in path.read_text(encoding="utf-8")]
    assert notebooks  # they import what no dependency brings
    assert "pip install -c constraints.txt jupyterlab" in text_of("docs/recipes.md")


def test_the_pages_show_every_command() -> None:
    shown = {command for page in PAGES for command, _ in commands(text_of(page))}
    assert {"train", "plan", "caption", "sample"} <= shown


@pytest.mark.parametrize("page", AS_IT_IS)
def test_commands_and_recipes_of_a_page_compose(page: str, workdir: Path) -> None:
    """Each as a user types it, with the recipes that the page shows in ./conf."""
    (workdir / "conf").mkdir()
    shown = shown_recipes(text_of(page))
    for name, recipe in shown.items():
        (workdir / "conf" / f"{name}.yaml").write_text(recipe, encoding="utf-8")
    for name in shown:
        assert check(compose.load(name, [])) == [], name
    for command, words in commands(text_of(page)):
        if command in VIDEO:
            assert parse(KINDS[command], command, words)  # raises what is wrong
        else:
            assert command in MACHINE or composed(words) == [], f"finetune {command} {shlex.join(words)}"


@pytest.mark.parametrize("page", AS_IT_IS)
def test_python_of_a_page_composes(page: str) -> None:
    for block in re.findall(r"```python\n(.*?)```", text_of(page), re.DOTALL):
        compile(block, page, "exec")
    for recipe, overrides in re.findall(r'finetune\.\w+\("(\w+)"(?:, overrides=(\[[^\]]*\]))?\)', text_of(page)):
        assert check(compose.load(recipe, ast.literal_eval(overrides or "[]"))) == []


@pytest.mark.parametrize("page", AS_IT_IS)
def test_recipes_and_presets_that_a_page_names_exist(page: str) -> None:
    text = text_of(page)
    assert set(re.findall(r"\bconf=(\w+)", text)) <= {
        *(*recipes.recipe_files(), *recipes.video_files(), *shown_recipes(text), *PLACEHOLDERS)
    }
    presets = recipes.preset_files()
    named = set(re.findall(rf"(?<![\w.])({'|'.join(presets)})=(\w+)", text))
    for table in re.findall(r"^\| `model=` \|.*\n(?:\|.*\n)+", text, re.MULTILINE):
        cells = [line.split("|")[1] for line in table.splitlines()[2:]]
        named |= {("model", name) for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert [f"{group}={name}" for group, name in sorted(named) if name not in presets[group]] == []


@pytest.mark.parametrize("page", AS_IT_IS)
def test_keys_that_a_page_names_exist(page: str) -> None:
    keys = set(re.findall(rf"(?<![\w/.])((?:{'|'.join(describe.sections())})\.(\w+))", text_of(page)))
    assert [problem for key, end in keys if end not in SUFFIXES and (problem := describe.key_problem(key))] == []


@pytest.mark.parametrize("page", LINKED)
def test_links_of_a_page_lead_somewhere(page: str) -> None:
    file = LINKED[page]
    text = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
        if target.startswith(("http://", "https://")):
            continue
        there = (file.parent / target).resolve() if target else file
        assert there.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(anchor_of, headings), f"{page}: {target}#{anchor}"


def anchor_of(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_page_is_in_the_index() -> None:
    index = text_of("docs/README.md")
    assert [page for page in PAGES if page.startswith("docs/") and f"]({Path(page).name})" not in index] == [
        "docs/README.md"
    ]
