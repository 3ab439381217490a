"""The Dockerfile and compose.yaml: clean, without root, and their commands work, as far as this needs no Docker."""

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pynvml
import pytest
import yaml

from finetune.workstation import nvml
from tests.conftest import ROOT
from tests.unit.workstation.gpus import AT_WORK, stand_in

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
IGNORED = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
JOB = COMPOSE["services"]["finetune"]
PAGE = (ROOT / "docs" / "containers.md").read_text(encoding="utf-8")


def instructions() -> list[tuple[str, str]]:
    """Each of the Dockerfile with its words, without comments."""
    lines = [line for line in DOCKERFILE.splitlines() if line and not line.lstrip().startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ")
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in whole.splitlines()]


def named(instruction: str) -> list[str]:
    return [words for name, words in instructions() if name == instruction]


def copied() -> list[str]:
    return [source for words in named("COPY") for source in words.split()[:-1]]


def test_the_linter_finds_nothing(tmp_path: Path) -> None:
    def lint(file: Path) -> subprocess.CompletedProcess[str]:
        hadolint = Path(sys.executable).with_name("hadolint")
        return subprocess.run([hadolint, "--no-color", str(file)], capture_output=True, text=True, check=False)

    result = lint(ROOT / "Dockerfile")
    assert result.returncode == 0, result.stdout
    faulty = tmp_path / "Dockerfile"
    faulty.write_text(DOCKERFILE.replace("--no-cache-dir ", "").replace("python:3.13-slim-bookworm", "python"))
    assert {"DL3006", "DL3042"} <= set(re.findall(r"DL\d+", lint(faulty).stdout))


def test_it_runs_without_root() -> None:
    users = named("USER")
    assert users
    for user in (users[-1], JOB["user"].rpartition(":-")[2].rstrip("}")):
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert JOB["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in JOB["security_opt"]
    assert "privileged" not in JOB


def test_the_image_gets_what_it_copies_and_nothing_else() -> None:
    assert IGNORED[1] == "*"
    kept = [line.removeprefix("!") for line in IGNORED if line.startswith("!")]
    assert sorted(kept) == sorted(copied())
    for source in copied():
        assert (ROOT / source).exists(), source
        assert not any(fnmatch.fnmatch(source, line) for line in IGNORED[2:] if not line.startswith("!"))


def test_python_is_one_that_finetune_runs_on() -> None:
    (image,) = named("FROM")
    version = re.fullmatch(r"python:3\.(\d+)-slim-bookworm", image)
    assert version
    assert f'requires-python = ">=3.11,<3.{int(version[1]) + 1}"' in (ROOT / "pyproject.toml").read_text()


def test_a_job_has_one_gpu_shared_memory_and_limits() -> None:
    resources = JOB["deploy"]["resources"]
    (gpu,) = resources["reservations"]["devices"]
    assert (gpu["driver"], gpu["capabilities"]) == ("nvidia", ["gpu"])
    assert gpu["device_ids"] == ["${FINETUNE_GPU:-0}"]
    assert JOB["shm_size"] == "8gb"
    assert resources["limits"].keys() == {"cpus", "memory", "pids"}
    variables = set(re.findall(r"\${(FINETUNE_\w+)", (ROOT / "compose.yaml").read_text()))
    assert variables == set(re.findall(r"FINETUNE_\w+", PAGE))  # each is explained


def test_folders_of_the_host_are_where_the_program_looks() -> None:
    variables = dict(re.findall(r"(\w+)=(\S+)", " ".join(named("ENV"))))
    targets = {volume["target"]: volume for volume in JOB["volumes"]}
    assert named("WORKDIR")[-1] == "/workspace"
    assert targets.keys() == {"/workspace/outputs", "/workspace/datasets", "/workspace/conf", variables["HF_HOME"]}
    assert [target for target, volume in targets.items() if volume.get("read_only")] == ["/workspace/conf"]
    for volume in targets.values():
        assert volume["bind"] == {"create_host_path": False}
    for name in ("TRITON_CACHE_DIR", "XDG_STATE_HOME"):
        assert variables[name].startswith("/workspace/outputs/.")


def health_check() -> list[str]:
    return [str(word) for word in JOB["healthcheck"]["test"]]


def test_a_well_gpu_is_healthy_and_any_other_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = AT_WORK | {"nvmlDeviceGetFieldValues": []}
    stand_in(monkeypatch, answers)
    assert nvml.fault() == ""
    stand_in(monkeypatch, answers | {"nvmlDeviceGetCount": 0})
    assert nvml.fault() == "there is no GPU"
    stand_in(monkeypatch, answers)
    monkeypatch.setattr(nvml, "_recovery", lambda _: "reset the GPU")
    assert nvml.fault() == "GPU 0: reset the GPU"

    def lost(*_: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lost)
    assert "lost" in nvml.fault().lower()


def test_the_health_check_is_a_command_that_ends() -> None:
    form, program, *words = health_check()
    assert (form, program) == ("CMD", "python")
    result = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    with nvml.opened() as error:
        pass
    assert result.returncode == (1 if error else 0)
    assert result.stderr.strip() == error


def test_systemd_takes_the_slice(tmp_path: Path) -> None:
    found = re.search(r"```ini\n# /etc/systemd/system/(\w+\.slice)\n(.*?)```", PAGE, re.DOTALL)
    assert found
    assert f"--slice={found[1]}" in PAGE
    unit = tmp_path / found[1]
    unit.write_text(found[2])
    sections = [line for line in found[2].splitlines() if line.startswith("[")]
    assert sections == ["[Unit]", "[Slice]"]
    if shutil.which("systemd-analyze"):
        result = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
        assert result.returncode == 0
        assert found[1] not in result.stderr, result.stderr


@pytest.mark.exhaustive
def test_every_command_of_the_image_works_in_a_clean_environment(tmp_path: Path) -> None:
    """The copied files alone, in the order of the Dockerfile. What installs Debian's packages is tried without doing
    it, where there is apt."""
    folder, environment = tmp_path / "opt", tmp_path / "environment"
    folder.mkdir()
    venv.create(environment, with_pip=True)
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    variables |= {"PATH": f"{environment / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}

    def run(*words: str, cwd: Path = folder, codes: tuple[int, ...] = (0,)) -> str:
        result = subprocess.run(words, cwd=cwd, env=variables, capture_output=True, text=True, check=False)
        assert result.returncode in codes, f"{words}\n{result.stdout}\n{result.stderr}"
        return result.stdout

    for name, words in instructions():
        if name == "COPY":
            *sources, target = words.split()
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, folder / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, folder / target)
        elif name == "RUN" and words.startswith("apt-get"):
            install = next(part for part in words.split("&&") if " install " in part)
            if shutil.which("apt-get"):
                run(*shlex.split(install.replace("install", "install --simulate", 1)))
        elif name == "RUN":
            run("bash", "-euc", words)
    work = tmp_path / "work"
    shutil.copytree(ROOT / "datasets" / "pixar_style", work / "datasets" / "pixar_style")
    (program,) = yaml.safe_load(named("ENTRYPOINT")[0])
    (word,) = yaml.safe_load(named("CMD")[0])
    checks = json.loads(run(program, word, "--json", cwd=work, codes=(0, 1, 2)))
    verdicts = {check["id"]: check["verdict"] for check in checks}
    assert (verdicts["packages"], verdicts["tested-versions"]) == ("ok", "ok")
    run(program, "train", "conf=smoke", cwd=work)
    run(*health_check()[1:], cwd=work, codes=(0, 1))
