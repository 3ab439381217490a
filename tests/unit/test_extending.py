"""docs/extending.md: every block is applied to a copy of the package as it stands there, and every command is run.

Two interpreters do all of it: one runs the commands in a copy with every extension, the other one forks for each copy
in which a place is left out.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
BLOCK = re.compile(
    r"^(?:New file `(?P<new>[^`]+)`|In `(?P<file>[^`]+)`, (?P<where>above|below) `(?P<line>[^`]+)`):\n\n"
    r"```\w+\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
PLACES = {
    "A family of image models": 3,
    "An optimiser": 2,
    "A loss weighting": 2,
    "An export format": 2,
    "A captioner": 2,
    "A command": 2,
}
COPIED = ("finetune", "conf", "tests/tiny_families.py", "tests/tiny_models.py", "tests/tiny_tokenizers.py")
WEIGHTS = "finetune/embedded"  # of the package; no extension touches them
WORDS = ["quokka", "zeppelin", "umbra", "fjord", "gyrating", "on"]  # what the tiny GIT knows

ALL_COMMANDS = """
import contextlib, io, json, sys
import torch
import finetune
from finetune import cli
from tests.tiny_families import save_family

torch.set_num_threads(1)
save_family(sys.argv[1], "aura_flow")
answers = []
for words in json.loads(sys.argv[2]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(words)
    answers.append((code, out.getvalue(), err.getvalue()))
overrides = [word for word in words[1:] if not word.startswith("conf=")]
answers.append((0, finetune.layers("smoke", overrides)._repr_html_(), ""))
print(json.dumps(answers))
"""
LEFT_OUT = """
import contextlib, importlib, io, json, os, sys
import torch, diffusers, transformers, peft, hydra, accelerate, datasets, bitsandbytes

answers = []
for tree, words in json.loads(sys.argv[1]):
    read, write = os.pipe()
    if os.fork() == 0:
        sys.path.insert(0, tree)
        err = io.StringIO()
        try:
            with contextlib.redirect_stderr(err):
                if len(words) == 1:
                    importlib.import_module(words[0])
                else:
                    importlib.import_module("finetune.cli").main(words)
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=err)
        os.write(write, err.getvalue()[-4000:].encode())
        os._exit(0)
    os.close(write)
    answers.append(os.fdopen(read, encoding="utf-8").read())
    os.wait()
print(json.dumps(answers))
"""


@dataclass(frozen=True)
class Block:
    """Code of the page for a file. line: the start of the one that it goes above or below; empty: the whole file."""

    file: str
    code: str
    where: str = ""
    line: str = ""

    @property
    def place(self) -> str:
        """A folder of configurations is one place, as code and row in one module are."""
        return re.sub(r"(architectures/\w+)/.*", r"\1", self.file)

    def apply(self, tree: Path) -> None:
        path = tree / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        if not self.line:
            assert not path.exists(), f"{self.file} is there already"
            path.write_text(self.code, encoding="utf-8")
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        (index,) = (index for index, text in enumerate(lines) if text.lstrip().startswith(self.line))
        if self.where == "below":
            lines.insert(index + 1, self.code)
        else:
            lines.insert(index, f"{self.code}\n\n")
        path.unlink()  # a link that copies share
        path.write_text("".join(lines), encoding="utf-8")


def sections() -> dict[str, str]:
    _, *parts = re.split(r"^## (.*)\n", PAGE, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def blocks(section: str) -> list[Block]:
    return [
        Block(found["new"] or found["file"], found["code"], found["where"] or "", found["line"] or "")
        for found in BLOCK.finditer(sections()[section])
    ]


def commands(section: str) -> list[list[str]]:
    lines = (line.strip() for line in sections()[section].splitlines() if line.startswith("    finetune "))
    return [shlex.split(line)[1:] for line in lines]


def copy(tree: Path) -> Path:
    """The package as it is, in links."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns(Path(WEIGHTS).name)
            shutil.copytree(ROOT / name, tree / name, copy_function=os.link, ignore=ignored)
        else:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    (tree / WEIGHTS).symlink_to(ROOT / WEIGHTS)
    return tree


def python(code: str, *arguments: str, cwd: Path, **environment: str) -> Any:
    """What a fresh interpreter prints as JSON in its last line."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


def test_the_page_counts_its_places() -> None:
    counted = {section: {block.place for block in blocks(section)} for section in sections()}
    assert {
        section: len([name for name in found if "tests" not in name]) for section, found in counted.items()
    } == PLACES
    table = re.findall(r"^\| \[(.*)\]\(.*\) \| (\d) \|", PAGE, re.MULTILINE)
    assert {f"{what[0].upper()}{what[1:]}": int(count) for what, count in table} == PLACES
    fenced = re.findall(r"^```\w+$", PAGE, re.MULTILINE)
    assert len(fenced) == sum(len(blocks(section)) for section in PLACES), "a block says not where it goes"
