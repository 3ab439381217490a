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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from finetune.run.receipts import load_record
from finetune.run.records import Adapter, Run
from tests.conftest import ROOT
from tests.tiny_language_models import save_language
from tests.tiny_models import save_diffusion
from tests.unit.conftest import conversations

pytestmark = pytest.mark.exhaustive

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

# Behind the words of a command of the page: tiny models, and no more than it is there to show.
SHORT = [
    "hardware.device=cpu",  # the first: a plan for a GPU goes without it
    "data.cache=cache",
    "sample.prompts=[]",
    "trainer.validate_every=0",
    "trainer.patience=0",
]
IMAGES = [*SHORT, "model.base=base", "model.resolution=32", "model.bucket_step=16", "data.folder=images"]
CHATS = [
    *SHORT,
    "model.base=llama",
    "data.file=conversations.jsonl",
    "data.length=256",
    "data.workers=1",
    "export.checkpoint=last",
]
COMMANDS = """
import contextlib, gc, io, json, sys
from pathlib import Path
import torch
import finetune
from finetune import cli
from tests.tiny_families import save_family

torch.set_num_threads(1)
save_family(Path("aura_flow"), "aura_flow")
gc.freeze()  # the libraries, as tests/conftest.py does
answers = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(words)
    answers.append((code, out.getvalue(), err.getvalue()))
answers.append((0, finetune.layers("smoke", ["run_dir=runs/optimiser"])._repr_html_(), ""))
print(json.dumps(answers))
"""
# Each in a process of its own, which finds the heavy libraries imported: a command line, or a module to import.
FORKS = """
import contextlib, importlib, io, json, os, sys, traceback
import torch, diffusers, transformers, peft, hydra, bitsandbytes

answers = []
for package, words in json.loads(sys.argv[1]):
    read, write = os.pipe()
    if os.fork() == 0:
        sys.path.insert(0, package)
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                if len(words) == 1:
                    importlib.import_module(words[0])
                else:
                    importlib.import_module("finetune.cli").main(words)
        except Exception:
            traceback.print_exc(file=said)
        os.write(write, said.getvalue()[-4000:].encode())
        os._exit(0)
    os.close(write)
    answers.append(os.fdopen(read, encoding="utf-8").read())
    os.wait()
print(json.dumps(answers))
"""


@dataclass(frozen=True)
class Block:
    """Code of the page for a file. line: the beginning of the one above or below which it goes; empty: a whole file."""

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


def copied(source: Path, tree: Path, how: Callable[[str, str], object]) -> Path:
    """The package without its weights, which it finds by a link."""
    for name in COPIED:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_dir():
            ignored = shutil.ignore_patterns(Path(WEIGHTS).name)
            shutil.copytree(source / name, tree / name, copy_function=how, ignore=ignored)
        else:
            how(str(source / name), str(tree / name))
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


def save_git(folder: Path) -> Path:
    """A GIT captioner of some 10,000 parameters: reads 32x32 pixels, says some of `WORDS`."""
    from transformers import BertTokenizer, CLIPImageProcessorPil, GitConfig, GitForCausalLM

    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "pad_token_id": 0}
    control = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GitForCausalLM(GitConfig(vision_config=sizes | {"image_size": 32, "patch_size": 16}, **text, **control))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_images(folder: Path, *, captioned: bool) -> Path:
    folder.mkdir()
    for colour in ("red", "green", "blue"):
        Image.new("RGB", (64, 64), colour).save(folder / f"{colour}.png")
        if captioned:
            (folder / f"{colour}.txt").write_text(f"a {colour} wall")
    return folder


def test_the_page_counts_its_places() -> None:
    counted = {section: {block.place for block in blocks(section)} for section in sections()}
    places = {
        section: [place for place in found if not place.startswith("tests/")] for section, found in counted.items()
    }
    assert {section: len(found) for section, found in places.items()} == PLACES
    table = re.findall(r"^\| \[(.*)\]\(.*\) \| (\d) \|", PAGE, re.MULTILINE)
    assert {what[0].upper() + what[1:]: int(count) for what, count in table} == PLACES
    fenced = re.findall(r"^```\w+$", PAGE, re.MULTILINE)
    assert len(fenced) == sum(len(blocks(section)) for section in PLACES), "a block does not say where it goes"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package as it is."""
    return copied(ROOT, tmp_path_factory.mktemp("packages") / "as-it-is", shutil.copy2)


@dataclass(frozen=True)
class Extended:
    """Where the commands of the page ran, with all six extensions, and what each said: code, output, messages."""

    folder: Path
    said: Mapping[str, tuple[int, str, str]]

    def run(self, name: str) -> Run:
        """The record of a training."""
        record = load_record(self.folder / "runs" / name, "train", Run)
        assert record is not None, self.said[name]
        return record


@pytest.fixture(scope="module")
def extended(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Extended:
    folder = tmp_path_factory.mktemp("extended")
    tree = copied(package, folder / "package", os.link)
    for section in PLACES:
        for block in blocks(section):
            block.apply(tree)
    save_diffusion(folder / "base")
    save_git(folder / "git")
    save_language(folder / "llama")
    save_images(folder / "images", captioned=True)
    save_images(folder / "bare", captioned=False)
    (folder / "conversations.jsonl").write_text(conversations(8), encoding="utf-8")
    plan, family = commands("A family of image models")
    own = ["model.base=aura_flow", "model.quantize=none", "model.resolution=64", "model.bucket_step=32"]
    jobs = {
        "help": ["--help"],
        "plan": [*plan, *SHORT[1:], "data.folder=images", "caption=git_base", "caption.model=git"],
        "family": [*family, *IMAGES, *own],
        "plain": ["train", "conf=smoke", *IMAGES],
        "optimiser": [*commands("An optimiser")[0], *IMAGES],
        "weighting": [*commands("A loss weighting")[0], *IMAGES],
        "format": [*commands("An export format")[0], *CHATS],
        "captioner": [*commands("A captioner")[0], *IMAGES, "data.folder=bare", "caption.model=git"],
        "command": commands("A command")[0],
    }
    runs = {"command": "optimiser"}  # it looks at that training
    words = [
        [*typed, f"run_dir=runs/{runs.get(name, name)}"] if name != "help" else typed for name, typed in jobs.items()
    ]
    answers = python(COMMANDS, json.dumps(words), cwd=folder, PYTHONPATH=str(tree))
    return Extended(folder, dict(zip([*jobs, "notebook"], map(tuple, answers), strict=True)))


@pytest.mark.parametrize("name", ["plan", "family", "optimiser", "weighting", "format", "captioner", "command"])
def test_every_command_of_the_page_runs(extended: Extended, name: str) -> None:
    code, out, messages = extended.said[name]
    assert code == 0, out + messages


def test_the_family_is_planned_and_trained(extended: Extended) -> None:
    assert "fal/AuraFlow-v0.3" in extended.said["plan"][1]
    assert extended.run("family").steps == 2
    adapter = load_record(extended.folder / "runs/family", "export", Adapter)
    assert adapter is not None
    assert set(adapter.files) == {"peft", "diffusers", "kohya"}
    names = load_file(extended.folder / "runs/family/adapter/peft/adapter_model.safetensors")
    assert any("single_transformer_blocks" in name for name in names)


def test_the_optimiser_is_the_one_in_use(extended: Extended) -> None:
    file = extended.folder / extended.run("optimiser").checkpoint / "optimizer.pt"
    states = torch.load(file, weights_only=True)["state"].values()
    assert states
    assert all(state.keys() == {"momentum"} for state in states)


def test_the_weighting_changes_the_loss(extended: Extended) -> None:
    plain, weighted = extended.run("plain"), extended.run("weighting")
    assert plain.first_loss == extended.run("optimiser").first_loss  # the same images, noise and timesteps
    assert weighted.first_loss > 0
    assert weighted.first_loss != pytest.approx(plain.first_loss, rel=0.01)


def test_the_export_format_is_written_and_compared(extended: Extended) -> None:
    adapter = load_record(extended.folder / "runs/format", "export", Adapter)
    assert adapter is not None
    assert 0 <= adapter.differences["peft_bf16"] < 0.05
    whole, half = (
        load_file(extended.folder / "runs/format/adapter" / adapter.files[name] / "adapter_model.safetensors")
        for name in ("peft", "peft_bf16")
    )
    assert {weight.dtype for weight in half.values()} == {torch.bfloat16}
    assert all(torch.equal(weight.bfloat16(), half[name]) for name, weight in whole.items())
    page = (extended.folder / "runs/format/report.html").read_text(encoding="utf-8")
    assert "peft_bf16" in page


def test_the_captioners_words_are_beside_the_images(extended: Extended) -> None:
    lines = (extended.folder / "bare/metadata.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"].removesuffix(", pixar style").split() for line in lines]
    assert len(texts) == 3
    assert all(words and set(words) <= set(WORDS) for words in texts)


def test_the_command_is_listed_answers_and_holds_no_folder(extended: Extended) -> None:
    assert "list the layers that the adapter changes most" in extended.said["help"][1]
    title, checkpoint, *changes = extended.said["command"][1].splitlines()
    trained = Path(extended.run("optimiser").checkpoint).relative_to(extended.folder)
    assert (title, checkpoint.strip()) == ("layers", f"checkpoint: {trained}")
    figures = [float(line.rpartition(": ")[2]) for line in changes]
    assert figures == sorted(figures, reverse=True)
    assert figures[-1] > 0
    assert all(line.split(":")[0].strip() in extended.said["notebook"][1] for line in changes)


TRAIN = ["train", "conf=smoke", "data.folder=images", "run_dir=run"]
LEFT_OUT = [  # section, the place that is left out, what is typed or imported then, and what it says
    (0, "finetune/diffusion/families/aura_flow.py", [*TRAIN, "model=aura_flow"], "model.family must be one of flux, "),
    (
        0,
        "finetune/architectures/aura_flow",
        ["plan", *TRAIN[1:], "model=aura_flow", "model.quantize=none"],
        "configuration of fal/AuraFlow",
    ),
    (0, "conf/model/aura_flow.yaml", [*TRAIN, "model=aura_flow"], "no model preset called 'aura_flow'"),
    (1, "finetune/training/optim.py", ["finetune.training.optim"], "OPTIMIZERS has no entry for lion"),
    (1, "finetune/config/schema.py", ["finetune.training.optim"], "Optimizer.lion"),
    (2, "finetune/diffusion/objectives.py", ["finetune.diffusion.task"], "WEIGHTINGS has no entry for debiased"),
    (2, "finetune/config/schema.py", ["finetune.diffusion.task"], "Weighting.debiased"),
    (3, "finetune/language/export.py", ["finetune.language.export"], "WRITERS has no entry for peft_bf16"),
    (3, "finetune/config/schema.py", ["finetune.language.export"], "ExportFormat.peft_bf16"),
    (
        4,
        "finetune/diffusion/captioner.py",
        ["caption", *TRAIN[1:], "caption=git_base", "caption.model=git"],
        "git model",
    ),
    (4, "conf/caption/git_base.yaml", [*TRAIN, "caption=git_base"], "no caption preset called 'git_base'"),
    (5, "finetune/stages/layers.py", ["finetune"], "the command layers of stages.COMMANDS has no module stages/layers"),
    (5, "finetune/stages/__init__.py", ["finetune"], "stages.COMMANDS has no row for stages/layers.py"),
]


def test_a_place_that_is_left_out_is_named(package: Path, tmp_path: Path) -> None:
    left_out = [(list(PLACES)[section], place) for section, place, *_ in LEFT_OUT]
    assert left_out == [
        (section, place)
        for section in PLACES
        for place in dict.fromkeys(block.place for block in blocks(section))
        if not place.startswith("tests/")
    ]
    save_git(tmp_path / "git")
    save_images(tmp_path / "images", captioned=False)
    jobs = []
    for number, (section, place, words, _) in enumerate(LEFT_OUT):
        tree = copied(package, tmp_path / "packages" / str(number), os.link)
        for block in blocks(list(PLACES)[section]):
            if block.place != place:
                block.apply(tree)
        jobs.append((str(tree), words))
    for (_, place, _, expected), said in zip(LEFT_OUT, python(FORKS, json.dumps(jobs), cwd=tmp_path), strict=True):
        assert expected in said, f"without {place}: {said}"
