"""The wheel, installed in a clean environment, works from a foreign folder: presets and embedded models included."""

import itertools
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from finetune.config import recipes
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel. No isolation: the build needs no network."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The console script of a new environment that holds the wheel and nothing else.

    Dependencies come from the environment of the tests, behind it on the path: the wheel's `finetune` is found first.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(folder), "install", "-q", "--no-deps", "--no-index", str(wheel)],
        check=True,
        capture_output=True,
    )
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "finetune"


def run(program: Path, *words: str, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(
        [str(program), *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_wheel_holds_configuration_and_embedded_models(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"finetune/conf/{path.relative_to(ROOT / 'conf').as_posix()}" in names
    for path in itertools.chain(
        *(
            (ROOT / "finetune" / part).rglob("*")
            for part in ("embedded", "architectures", "diffusion/tokenizers", "serving/pages")
        )
    ):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.relative_to(ROOT).as_posix() in names
    assert not [name for name in names if name.startswith(("tests/", "scripts/", "datasets/", "outputs/"))]
    assert "finetune/constraints.txt" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_help_from_a_foreign_folder(program: Path, tmp_path: Path) -> None:
    shown = run(program, "--help", cwd=tmp_path)
    assert all(name in shown for name in recipes.recipe_files())


def test_configuration_from_a_foreign_folder(program: Path, tmp_path: Path) -> None:
    shown = yaml.safe_load(run(program, "train", "conf=pixar_style", "--cfg", "job", cwd=tmp_path))
    assert shown["name"] == "pixar_style"
    assert list(tmp_path.iterdir()) == []


def test_the_wheels_own_files_are_used(program: Path, tmp_path: Path) -> None:
    code = "from finetune.config import recipes; print(recipes.conf_dir())"
    shown = run(program.with_name("python"), "-c", code, cwd=tmp_path)
    assert Path(shown.strip()).is_relative_to(program.parent.parent)


def test_a_recipe_of_ones_own_beside_the_wheel(program: Path, tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/mine.yaml").write_text("defaults:\n  - pixar_style\ndata:\n  folder: images\n")
    shown = yaml.safe_load(run(program, "train", "conf=mine", "--cfg", "job", cwd=tmp_path))
    assert (shown["name"], shown["data"]["folder"]) == ("mine", "images")


def test_completion_from_a_foreign_folder(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_LINE", "finetune train conf=smo")
    assert run(program, "-sc", "query=bash", cwd=tmp_path) == "conf=smoke\n"
