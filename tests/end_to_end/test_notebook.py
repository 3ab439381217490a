"""The notebooks run from their first cell to their last, and keep the better adapter for the reason that they give."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pyarrow
import pyarrow.parquet
import pytest
from nbclient import NotebookClient
from PIL import Image, ImageDraw

from tests.conftest import ROOT
from tests.tiny_language_models import save_language
from tests.tiny_models import save_diffusion
from tests.unit.conftest import conversations

IMAGES, CHAT = ROOT / "scripts" / "retrain.ipynb", ROOT / "scripts" / "retrain_chat.ipynb"
TIME_LIMIT_S = 300


def draw(folder: Path, count: int, colour: str) -> None:
    """Discs on white, each with its caption: no captioner is needed."""
    folder.mkdir()
    for number in range(count):
        image = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(image).ellipse((8, 8, 30 + number, 30 + number), fill=colour)
        image.save(folder / f"{colour}-{number}.png")
        (folder / f"{colour}-{number}.txt").write_text(f"a {colour} disc, pixar style")


def small(tmp_path: Path) -> list[str]:
    """Settings with which the recipe takes seconds."""
    settings = [f"data.folder={tmp_path / 'first'}", f"data.cache={tmp_path / 'cache'}", "hardware.device=cpu"]
    settings += ["trainer.steps=3", "trainer.micro_batch=2", "trainer.validate_every=2", "optim.warmup_steps=0"]
    settings += ["sample.steps=1", "sample.seeds=[0]", "sample.previews=0", "export.formats=[peft,diffusers]"]
    settings += ['\'sample.prompts=["a red disc, pixar style","a blue disc, pixar style"]\'']
    settings += [f"model.base={save_diffusion(tmp_path / 'tiny')}", "model.resolution=32", "model.bucket_step=16"]
    return settings


def outputs(notebook: Any, kind: str) -> str:
    """Everything of one MIME type that the cells showed, in order."""
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(output["data"][kind] for output in shown if kind in output.get("data", {}))


def execute(notebook: Path, where: Path) -> Any:
    """The notebook with its outputs, run in the folder `where`."""
    cells = nbformat.read(notebook, as_version=4)
    resources = {"metadata": {"path": str(where)}}
    return NotebookClient(cells, timeout=TIME_LIMIT_S, kernel_name="python3", resources=resources).execute()


@pytest.mark.exhaustive
def test_retraining_a_chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = conversations(40).splitlines(keepends=True)
    for name, part in (("first", lines[:30]), ("more", lines[30:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    settings = f"data.file={tmp_path / 'first.jsonl'} data.cache={tmp_path / 'cache'} hardware.device=cpu"
    settings += f" model.base={save_language(tmp_path / 'tiny')} data.length=192 data.workers=1"
    settings += " trainer.steps=4 trainer.micro_batch=1 trainer.save_every=2 trainer.validate_every=2 sample.previews=0"
    settings += " export.formats=[peft] sample.max_new_tokens=8"
    for name, value in {"ADDED": tmp_path / "more.jsonl", "STEPS": 4, "OVERRIDES": settings}.items():
        monkeypatch.setenv(f"RETRAIN_{name}", str(value))
    html = outputs(execute(CHAT, tmp_path), "text/html")
    out = tmp_path / "outputs"
    rows = json.loads((out / "pirate_chat_2" / "receipts" / "dataset.json").read_text())["record"]
    assert rows["train"] + rows["validation"] == 40
    metrics = [json.loads(line) for line in (out / "pirate_chat_2" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["validation/mean"] for line in metrics if "validation/mean" in line]
    better = "pirate_chat_2" if min(losses[1:]) < losses[0] else "pirate_chat"
    file = Path("peft", "adapter_model.safetensors")
    assert (out / "pirate_chat_best" / file).read_bytes() == (out / better / "adapter" / file).read_bytes()
    assert f"{min(losses):.5f} against" in (out / "pirate_chat_best" / "WHY.md").read_text()
    for words in ("Training loss", "old adapter", "<mark>"):
        assert words in html


def _sharegpt(messages: list[dict[str, str]]) -> dict[str, Any]:
    turns = [{"from": {"user": "human"}.get(turn["role"], "gpt"), "value": turn["content"]} for turn in messages]
    return {"conversations": turns}


def _pairs(messages: list[dict[str, str]]) -> dict[str, str]:
    return {"prompt": messages[0]["content"], "completion": messages[1]["content"]}


def _csv(rows: list[dict[str, str]], file: Path) -> None:
    with open(file, "w", newline="") as stream:
        writer = csv.DictWriter(stream, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)


KINDS_OF_FILE: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Path], Any]]] = {
    "messages.jsonl": (
        lambda messages: {"messages": messages},
        lambda rows, file: file.write_text("\n".join(map(json.dumps, rows))),  # no line end at its end
    ),
    "pairs.csv": (_pairs, _csv),
    "pairs.parquet": (_pairs, lambda rows, file: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)),
    'it\'s "ShareGPT", [1]=ä.json': (_sharegpt, lambda rows, file: file.write_text(json.dumps(rows, indent=1))),
}


@pytest.mark.sampled
@pytest.mark.parametrize("added", KINDS_OF_FILE)
@pytest.mark.parametrize("first", ["messages.jsonl", "pairs.csv"])
def test_conversations_are_added_whatever_kind_of_file_they_are_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, added: str
) -> None:
    talks = [json.loads(line)["messages"] for line in conversations(40).splitlines()]
    files = []
    for folder, name, part in (("first", first, talks[:30]), ("more", added, talks[30:])):
        row, write = KINDS_OF_FILE[name]
        (tmp_path / folder).mkdir()
        files.append(tmp_path / folder / name)
        write([row(messages) for messages in part], files[-1])
    settings = f"data.file={files[0]} data.cache={tmp_path / 'cache'} hardware.device=cpu"
    settings += f" model.base={save_language(tmp_path / 'tiny')} data.length=192 data.workers=1"
    for name, value in {"ADDED": files[1], "OVERRIDES": settings}.items():
        monkeypatch.setenv(f"RETRAIN_{name}", str(value))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in nbformat.read(CHAT, as_version=4).cells:
        if cell.cell_type == "code" and cell.id in ("c1", "c5", "c7"):  # parameters, adding, the data set
            exec(cell.source, names)
    rows = json.loads((tmp_path / "outputs" / "pirate_chat_2" / "receipts" / "dataset.json").read_text())["record"]
    assert rows["train"] + rows["validation"] == 40


@pytest.fixture
def executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    draw(tmp_path / "first", 4, "red")
    draw(tmp_path / "more", 3, "blue")
    for name, value in {"PICTURES": tmp_path / "more", "STEPS": 4, "OVERRIDES": " ".join(small(tmp_path))}.items():
        monkeypatch.setenv(f"RETRAIN_{name}", str(value))
    return execute(IMAGES, tmp_path)


@pytest.mark.exhaustive
def test_retraining(executed: Any, tmp_path: Path) -> None:
    out = tmp_path / "outputs"
    captions = json.loads((out / "pixar_style_2" / "receipts" / "caption.json").read_text())["record"]["items"]
    assert [item["file"] for item in captions] == [
        *(f"added/blue-{number}.png" for number in range(3)),
        *(f"red-{number}.png" for number in range(4)),
    ]
    trained = json.loads((out / "pixar_style_2" / "receipts" / "train.json").read_text())["record"]
    assert trained["steps"] == 4
    assert (out / "pixar_style" / "report.html").exists()  # it wasn't there, so the notebook trained it first
    lines = [json.loads(line) for line in (out / "pixar_style_2" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["validation/mean"] for line in lines if "validation/mean" in line]
    better = "pixar_style_2" if losses[-1] < losses[0] else "pixar_style"
    best = out / "pixar_style_best"
    for file in ("peft/adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        assert (best / file).read_bytes() == (out / better / "adapter" / file).read_bytes()
    assert f"{min(losses[0], losses[-1]):.5f} against" in (best / "WHY.md").read_text()
    html = outputs(executed, "text/html")
    assert "7 images" in html
    assert "Training loss" in html
    assert "old adapter" in html
    assert html.count("a blue disc, pixar style<br>seed 0") == 1


@pytest.mark.parametrize("notebook", [IMAGES, CHAT], ids=lambda path: path.stem)
def test_the_notebooks_are_stored_without_outputs(notebook: Path) -> None:
    cells = nbformat.read(notebook, as_version=4).cells
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]
