"""What is known of torch without its import, and what a process of its own answers."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune.workstation import torch_build

REACHES = """
class cuda:
    current_device = staticmethod(lambda: None)
    get_arch_list = staticmethod(lambda: ["sm_89"])
    device_count = staticmethod(lambda: 1)
"""
REFUSED = (
    REACHES
    + """
    @staticmethod
    def current_device():
        raise RuntimeError("CUDA unknown error\\nand more")
"""
)


def installed(code: str, folder: Path, patch: pytest.MonkeyPatch, cuda: str | None = "13.0") -> None:
    """A package called torch that this process and its children find first."""
    (folder / "torch").mkdir()
    (folder / "torch/__init__.py").write_text(code)
    (folder / "torch/version.py").write_text(f"__version__ = '2.13.0'\ncuda = {cuda!r}\n")
    patch.syspath_prepend(str(folder))
    patch.setenv("PYTHONPATH", str(folder))
    patch.delitem(sys.modules, "torch")


def test_a_machine_is_read_without_an_import_of_torch() -> None:
    script = "import sys; from finetune.workstation import facts; print(facts.read()['torch'], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    known = {"version": torch.__version__, "cuda": torch.version.cuda}
    assert str(known)[1:-1] in done.stdout
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        (REACHES, {"architectures": ["sm_89"], "gpus": 1, "error": None}),
        (REFUSED, {"architectures": ["sm_89"], "gpus": 0, "error": "CUDA unknown error"}),
        ("import no_such_library", {"error": "ModuleNotFoundError: No module named 'no_such_library'"}),
        ("import os; os.abort()", {"error": "ended with -6"}),
    ],
)
def test_a_build_with_cuda_is_asked(
    code: str, answer: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(code, tmp_path, monkeypatch)
    nothing = {"architectures": [], "gpus": 0, "error": None}
    assert torch_build.ask()() == {"version": "2.13.0", "cuda": "13.0"} | nothing | answer


def test_a_driver_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed("import time; time.sleep(600)", tmp_path, monkeypatch)
    monkeypatch.setattr(torch_build, "PATIENCE_S", 0.1)
    found = torch_build.ask()()
    assert (found["gpus"], found["error"]) == (0, "no answer within 0.1 s")


def test_a_torch_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[-1:])
    assert torch_build.ask()() == {
        "version": "not installed", "cuda": None, "architectures": [], "gpus": 0, "error": None
    }  # fmt: skip
