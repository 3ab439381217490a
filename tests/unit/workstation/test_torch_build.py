"""What is known of torch without its import, what is asked once, and how many GPUs the driver shows."""

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.workstation import torch_build

KNOWS = """
class cuda:
    get_arch_list = staticmethod(lambda: ["sm_89"])
"""
NOTHING = {"broken": None, "architectures": [], "gpus": None, "error": None}


def installed(code: str, folder: Path, patch: pytest.MonkeyPatch, cuda: str | None = "13.0") -> Path:
    """A package called torch that this process and its children find first; its library."""
    library = folder / "torch/lib/libtorch_cuda.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"code")
    (folder / "torch/__init__.py").write_text(code)
    (folder / "torch/version.py").write_text(f"__version__ = '2.13.0'\ncuda = {cuda!r}\n")
    patch.syspath_prepend(str(folder))
    patch.setenv("PYTHONPATH", str(folder))
    patch.delitem(sys.modules, "torch")
    return library


def driver(code: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """A program that is asked in place of the driver; torch is asked as ever."""
    program, started = folder / "driver.py", torch_build._started
    program.write_text(code)
    real = torch_build.__file__

    def start(question: str, environment: Any) -> Any:
        patch.setattr(torch_build, "__file__", str(program) if question == "gpus" else real)
        return started(question, environment)

    patch.setattr(torch_build, "_started", start)


ONE_GPU = """print('{"gpus": 1}')"""


def test_a_machine_is_read_without_an_import_of_torch() -> None:
    script = "import sys; from finetune.workstation import facts; print(facts.read()['torch'], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    known = {"version": torch.__version__, "cuda": torch.version.cuda}
    assert str(known)[1:-1] in done.stdout
    assert done.stdout.endswith("False\n")


def test_a_build_says_once_what_it_has_code_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, memory = installed(KNOWS, tmp_path, monkeypatch), tmp_path / "state/torch.json"
    driver(ONE_GPU, tmp_path, monkeypatch)
    known = {"version": "2.13.0", "cuda": "13.0", "broken": None, "architectures": ["sm_89"], "gpus": 1, "error": None}
    assert torch_build.ask(memory, gpus=True)() == known
    (tmp_path / "torch/__init__.py").write_text(KNOWS.replace("sm_89", "sm_90"))
    assert torch_build.ask(memory, gpus=True)() == known  # it is not imported again
    library.write_bytes(b"other code")
    assert torch_build.ask(memory, gpus=True)() == known | {"architectures": ["sm_90"]}
    memory.write_text("{")
    assert torch_build.ask(memory, gpus=True)()["architectures"] == ["sm_90"]
    assert json.loads(memory.read_text())["build"][:2] == ["2.13.0", str(library)]


def test_what_can_not_be_kept_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(KNOWS, tmp_path, monkeypatch)
    driver(ONE_GPU, tmp_path, monkeypatch)
    (tmp_path / "state").write_text("a file in the folder's place")
    for _ in range(2):
        assert torch_build.ask(tmp_path / "state/torch.json", gpus=True)()["architectures"] == ["sm_89"]


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("import os; os.abort()", "ended with -6"),
    ],
)
def test_a_build_that_can_not_be_imported_says_why(
    code: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(code, tmp_path, monkeypatch)
    driver(ONE_GPU, tmp_path, monkeypatch)
    found = torch_build.ask(tmp_path / "torch.json", gpus=True)()
    assert found == {"version": "2.13.0", "cuda": "13.0"} | NOTHING | {"gpus": 1, "broken": why}
    assert not (tmp_path / "torch.json").exists()


@pytest.mark.parametrize(
    ("code", "why"),
    [("import time; time.sleep(600)", "no answer within 2 s"), ("import os; os.abort()", "ended with -6")],
)
def test_a_driver_that_hangs_or_crashes_shows_no_gpu(
    code: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(KNOWS, tmp_path, monkeypatch)
    driver(code, tmp_path, monkeypatch)
    monkeypatch.setattr(torch_build, "PATIENCE_S", 2.0)
    found = torch_build.ask(tmp_path / "torch.json", gpus=True)()
    assert (found["gpus"], found["error"], found["architectures"]) == (0, why, ["sm_89"])


def two_gpus(status: int) -> Any:
    """CUDA's own library with two GPUs, as ctypes has it; status: what it answers."""

    def count(found: Any) -> int:
        found._obj.value = 2
        return 0

    def explain(_: int, text: Any) -> None:
        text._obj.value = b"no CUDA-capable device is detected" if status == 100 else None

    return SimpleNamespace(cuInit=lambda _: status, cuDeviceGetCount=count, cuGetErrorString=explain)


@pytest.mark.parametrize(
    ("status", "found"),
    [
        (0, {"gpus": 2}),
        (100, {"gpus": 0, "error": "no CUDA-capable device is detected"}),
        (999, {"gpus": 0, "error": "CUDA error 999"}),
    ],
)
def test_the_driver_is_asked(status: int, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: two_gpus(status))
    assert torch_build._gpus() == found


def test_a_driver_that_is_not_there_leaves_the_gpus_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(KNOWS, tmp_path, monkeypatch)
    monkeypatch.setattr(torch_build, "DRIVER", "libno_such_driver.so.1")
    found = torch_build._gpus()
    assert found["gpus"] is None
    assert "libno_such_driver.so.1" in found["error"]


@pytest.mark.parametrize(("cuda", "gpus"), [(None, True), ("13.0", False)])
def test_without_cuda_or_a_gpu_nothing_is_asked(
    cuda: str | None, gpus: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed("raise AssertionError", tmp_path, monkeypatch, cuda)
    found = torch_build.ask(tmp_path / "torch.json", gpus=gpus)()
    assert found == {"version": "2.13.0", "cuda": cuda} | NOTHING


def test_a_torch_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[-1:])
    found = torch_build.ask(tmp_path / "torch.json", gpus=True)()
    assert found == {"version": "not installed", "cuda": None} | NOTHING
