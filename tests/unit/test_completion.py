"""What the Tab key makes of a command line: what the program offers, and what a real bash then types."""

import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.config import recipes
from finetune.stages import COMMANDS
from finetune.video import COMMANDS as VIDEO
from finetune.workstation import COMMANDS as MACHINE

Cli = Callable[..., Any]
SCRIPT = Path(sys.executable).with_name("finetune")
installed = pytest.mark.skipif(not SCRIPT.exists(), reason="finetune is not installed here")
ENVIRONMENT = {**os.environ, "PATH": f"{SCRIPT.parent}:{os.environ['PATH']}", "INPUTRC": os.devnull, "TERM": "dumb"}
BEGIN, END = "\x01", "\x05"  # Ctrl-A and Ctrl-E: the cursor goes to the begin and the end of the line


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("finetune ", {*COMMANDS, *VIDEO, *MACHINE, "--help", "--version"}),
        ("finetune tr", {"train"}),
        ("finetune train conf=", {f"conf={name}" for name in recipes.recipe_files()}),
        ("finetune train conf=pix", {"conf=pixar_style", "conf=pixar_style_sd15", "conf=pixar_style_sdxl"}),
        ("finetune train conf=pixar_style lora.ra", {"lora.rank="}),
        ("finetune train lora.ra", {"lora.rank="}),
        ("finetune train conf=smoke lora=", {"lora=all_linear", "lora=default", "lora=r32"}),
        ("finetune train conf=smoke data.folder=", set()),  # bash completes paths
        ("finetune annotate ra", {"rate="}),
        ("finetune annotate conf=toy", {"conf=toy_video"}),
        ("finetune frames video=", set()),
    ],
)
def test_what_is_offered(finetune_cli: Cli, monkeypatch: pytest.MonkeyPatch, line: str, offered: set[str]) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    answer = finetune_cli("-sc", "query=bash")
    assert (answer.code, set(answer.out.splitlines())) == (0, offered)


def test_what_stands_behind_the_cursor_does_not_count(finetune_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_LINE", "finetune tr conf=smoke")
    monkeypatch.setenv("COMP_POINT", str(len("finetune tr")))
    assert finetune_cli("-sc", "query=bash").out == "train\n"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("data.folder=", {"data.folder=pics/", "data.folder=plan.txt"}),
        ("data.folder=pi", {"data.folder=pics/"}),
        ("data.folder=./pics/", {"data.folder=./pics/two words.png", "data.folder=./pics/b/"}),
        ("data.file=~/", {"data.file=~/pics/", "data.file=~/plan.txt"}),
        ("run_dir=nowhere/", set()),
    ],
)
def test_paths_where_the_shell_completes_none(
    finetune_cli: Cli, workdir: Path, monkeypatch: pytest.MonkeyPatch, typed: str, offered: set[str]
) -> None:
    (workdir / "pics" / "b").mkdir(parents=True)
    for name in ("pics/two words.png", "plan.txt", ".hidden"):
        (workdir / name).write_text("")
    monkeypatch.setenv("HOME", str(workdir))
    monkeypatch.setenv("COMP_LINE", f"finetune train conf=smoke {typed}")
    answer = finetune_cli("-sc", "query=fish")
    assert (answer.code, set(answer.out.splitlines())) == (0, offered)


@installed
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("tr", "train"),
        ("train conf=smo", "conf=smoke"),
        ("train conf=smoke lora=all", "lora=all_linear"),
        ("train lora.ra", "lora.rank="),
        ("train conf=smoke data.folder=my", "data.folder=my images/"),
        ('train conf=smoke data.folder="my', "data.folder=my images/"),
        ("train conf=smoke data.folder=my\\ images/t", "data.folder=my images/two words/"),
        ("train conf=smoke data.file=it", "data.file=it's.jsonl"),
        ("train conf=smoke model.base=\\$", "model.base=$(touch ran)"),
    ],
)
def test_what_a_real_bash_types(workdir: Path, typed: str, expected: str) -> None:
    (workdir / "my images" / "two words").mkdir(parents=True)
    for name in ("it's.jsonl", "$(touch ran)"):
        (workdir / name).write_text("")
    words = in_bash(workdir, [f"finetune {typed}\t{BEGIN}printf '<%s>\\n' {END}\n"])
    assert words[-1] == expected
    assert not (workdir / "ran").exists()


@installed
def test_completion_may_be_taken_back(workdir: Path) -> None:
    shown = in_bash(workdir, ['eval "$(finetune -sc uninstall=bash)"\n', "complete -p finetune; printf '<%s>\\n' $?\n"])
    assert shown == ["1"]


def in_bash(folder: Path, lines: list[str]) -> list[str]:
    """What an interactive bash prints in angle brackets for what is typed, with completion installed."""
    outer, inner = pty.openpty()
    command = ["bash", "--norc", "--noprofile", "-i"]
    with subprocess.Popen(
        command, cwd=folder, env=ENVIRONMENT, stdin=inner, stdout=inner, stderr=inner, start_new_session=True
    ):
        os.close(inner)
        out = ""
        for typed in ['eval "$(finetune -sc install=bash)"\n', *lines]:
            os.write(outer, f"{typed} echo en''d\n".encode())
            shown = ""
            while not re.search(r"^end\r?$", shown, re.MULTILINE):
                shown += os.read(outer, 4096).decode(errors="replace")
            out += shown
        os.write(outer, b"exit\n")
    os.close(outer)
    return re.findall(r"^<(.*)>\r?$", out, re.MULTILINE)
