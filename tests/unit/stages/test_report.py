"""The report: one page, complete in itself, from whatever part of a run there is."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune.config.describe import as_dict
from finetune.config.schema import Config
from finetune.errors import RunError
from finetune.run import rundir
from finetune.run.receipts import load_receipt, load_record, receipt_path, save_receipt
from finetune.run.records import METRICS, Adapter, Answer, Answers, Caption, CaptionSet, Dataset, Report, Run
from finetune.stages.report import report
from finetune.stages.sample import sample
from finetune.stages.train import train
from tests.unit.reporting.records import run_record, text_set

EVIL = "a robot <script>alert(1)</script> & \"friends\" <img src=x onerror='alert(2)'>"
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Tags in order, with their attributes; refuses tags that are closed in the wrong order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def sections(self) -> list[str | None]:
        return [attributes.get("id") for tag, attributes in self.tags if tag == "section"]


def read(config: Config) -> Page:
    return Page(Path(report(config).file).read_text(encoding="utf-8"))


def save(config: Config, stage: str, record: object) -> None:
    save_receipt(Path(config.run_dir), stage, record, input_hash=stage, seconds=1.5, figures={"images": 2})


def add_captions(config: Config) -> None:
    folder = Path(config.data.folder)
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (600, 400), "teal").save(folder / "a.jpg")
    items = (Caption("a.jpg", EVIL, "user"), Caption("gone.jpg", "it went", "generated"))
    save(config, "caption", CaptionSet(str(folder), items))


def add_samples(config: Config, *, pairs: int = 2, side: int = 32, prompt: str = "a red robot") -> None:
    folder = Path(config.run_dir) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(pairs):
        names = {"file": f"{number}-tuned.png", "base_file": f"{number}-base.png"}
        for name in names.values():
            Image.effect_noise((side, side), 80).convert("RGB").save(folder / name)
        lines.append(json.dumps({"prompt": prompt, "seed": number, **names}))
    (folder / "samples.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def add_answers(run_dir: Path, *, temperature: float = 0.0, adapter: str = "", pairs: int = 1) -> None:
    folder = run_dir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"temperature": temperature, "max_new_tokens": 48, "adapter": adapter or str(run_dir / "adapter/peft")}
    lines = [
        json.dumps({"prompt": prompt, "seed": seed, "base": "I am well.", "tuned": f"Ahoy! {EVIL}"} | settings)
        for prompt in ("How are you?", EVIL)
        for seed in range(pairs)
    ]
    (folder / "samples.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")


@pytest.fixture
def talk(tmp_path: Path) -> Config:
    """What a finished run on conversations leaves."""
    config = Config(name="pirate", run_dir=str(tmp_path / "talk"))
    config.model.kind, config.model.base = "language", "tiny"
    run_dir = Path(config.run_dir)
    rundir.write_config(as_dict(config), run_dir)
    save(config, "dataset", text_set())
    save(config, "train", run_record(run_dir, unit="tokens", items=56_960, best_step=4))
    save(config, "export", Adapter(str(run_dir / "adapter"), {"peft": "peft"}, {"peft": 0.0}, "tiny", ""))
    lines = [
        {"step": step, "loss/step": 2.0 - 0.1 * step, "train/tokens_per_s": 7000.0}
        | {"validation/mean": 1.0 / (step + 1), "validation/perplexity": 8.5 - step}
        for step in range(5)
    ]
    (run_dir / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    add_answers(run_dir)
    return config


@pytest.fixture
def trained(config: Config, make_dataset: Callable[..., Dataset]) -> Config:
    dataset = make_dataset()
    save(config, "dataset", dataset)
    train(config, dataset)
    rundir.write_config(as_dict(config), Path(config.run_dir))
    return config


def test_a_whole_run_on_one_page(trained: Config) -> None:
    add_captions(trained)
    add_samples(trained)
    save(trained, "export", Adapter(trained.run_dir, {"peft": "peft"}, {"peft": 1e-7}, "tiny", "toy style"))
    page = read(trained)
    assert page.sections() == ["images", "curves", "captions", "data", "stages", "adapter", "configuration"]
    assert [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"] == [
        "Training loss: loss against step",
        "Validation loss: mean squared error against step",
        "Validation by noise level (high t: noisy): change since step 0, % against step",
        "Learning rate: rate against step",
        "Gradient norm: norm before clipping against step",
        "Speed: images/s against step",
        "Memory: GiB in use against step",
    ]
    for words in ("In 4 steps the training loss", " and the validation loss ", "images/s"):
        assert words in page.text
    for words in ("a red robot", "seed 1", "toy style", "1.0e-07", "it went", "rank: 4", "diffusers", "trained on"):
        assert words in page.text
    assert load_record(Path(trained.run_dir), "report", Report) == Report(str(Path(trained.run_dir) / "report.html"))


def test_nothing_is_fetched_and_nothing_runs(trained: Config) -> None:
    add_captions(trained)
    add_samples(trained, prompt=EVIL)
    page = read(trained)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base", "form"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("src") or "data:image/").startswith("data:image/")
        assert (attributes.get("href") or "#").startswith("#")
        assert tag != "img" or attributes["src"] != "x"
    assert page.text.count("<script>alert(1)</script>") == 2
    text = (Path(trained.run_dir) / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import|https?:", re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL))


def test_whatever_is_missing_is_left_out(config: Config) -> None:
    Path(config.run_dir).mkdir()
    page = read(config)
    assert page.sections() == ["configuration"]
    assert "No run has finished in this folder yet." in page.text


def test_a_run_without_validation_or_samples(config: Config, make_dataset: Callable[..., Dataset]) -> None:
    config.trainer.validate_every = 0
    train(config, make_dataset())
    page = read(config)
    assert page.sections() == ["curves", "stages", "configuration"]
    assert "alidation" not in page.text


def test_what_an_earlier_command_drew_is_not_shown_for_a_run_without_prompts(trained: Config) -> None:
    add_samples(trained)
    assert "images" in read(trained).sections()
    trained.sample.prompts = []
    sample(trained, None)
    page = read(trained)
    assert "images" not in page.sections()
    assert "samples 0" in page.text
    assert (Path(trained.run_dir) / "samples" / "samples.jsonl").exists()


def test_without_held_out_images_the_page_says_so(config: Config, make_dataset: Callable[..., Dataset]) -> None:
    dataset = make_dataset(held_out=0)
    save(config, "dataset", dataset)
    train(config, dataset)
    assert "on training examples" in read(config).text


def test_pictures_that_are_gone_are_said_to_be(trained: Config) -> None:
    add_samples(trained)
    (Path(trained.run_dir) / "samples" / "0-base.png").unlink()
    (Path(trained.run_dir) / "samples" / "1-tuned.png").write_bytes(b"torn")
    page = read(trained)
    assert page.text.count("image is gone") == 2
    assert sum(tag == "img" for tag, _ in page.tags) == 2


def test_many_large_pictures_stay_under_five_megabytes(config: Config) -> None:
    add_samples(config, pairs=62, side=200)
    folder = Path(config.data.folder)
    folder.mkdir()
    for number in range(62):
        Image.effect_noise((400, 300), 90).save(folder / f"{number}.jpg")
    save(config, "caption", CaptionSet(str(folder), tuple(Caption(f"{n}.jpg", "text", "user") for n in range(62))))
    page = read(config)
    assert (Path(config.run_dir) / "report.html").stat().st_size < 5_000_000
    assert "2 more in the samples folder" in page.text
    assert "2 more in metadata.jsonl" in page.text


def test_samples_of_another_adapter_are_named(trained: Config, tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    add_samples(trained)
    info = PngInfo()
    for key, value in {"steps": "25", "guidance": "4.0", "adapter": str(tmp_path / "other" / "peft")}.items():
        info.add_itxt(key, value)
    Image.new("RGB", (8, 8)).save(Path(trained.run_dir) / "samples" / "0-tuned.png", pnginfo=info)
    page = read(trained)
    assert "25 denoising steps, guidance 4.0" in page.text
    assert "Made with another adapter than this run's" in page.text


def test_a_second_report_takes_the_place_of_the_first(trained: Config) -> None:
    before = Path(report(trained).file).read_bytes()
    assert "report" not in Page(before.decode()).sections()
    again = Path(report(trained).file).read_bytes()
    assert before == again
    receipt = load_receipt(Path(trained.run_dir), "report")
    assert receipt is not None
    assert receipt.figures["bytes"] == len(again)


def test_a_run_on_conversations_on_one_page(talk: Config) -> None:
    page = read(talk)
    assert page.sections() == ["answers", "curves", "data", "stages", "adapter", "configuration"]
    assert [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"] == [
        "Training loss: loss against step",
        "Validation loss: nats per token against step",
        "Perplexity: perplexity against step",
        "Speed: tokens/s against step",
    ]
    for words in (
        "In 4 steps the training loss fell by 50.0 % and the validation loss fell by 25.0 %.",
        "0.4000 → 0.3000",
        "8.50 → 4.50",
        "7,120 tokens/s",
        "greedy decoding, at most 48 tokens per answer",
        "I am well.",
        "How are you?",
        "88 packs",
    ):
        assert words in page.text
    assert page.text.count("<script>alert(1)</script>") == 3, "as text: once as a prompt, twice as an answer"
    assert "image" not in page.text.split("config.yaml, every value resolved")[0].replace("images 2", "")
    assert sum(tag == "mark" for tag, _ in page.tags) == 2, "a word of the note, and the answer of the row"
    receipt = load_receipt(Path(talk.run_dir), "report")
    assert receipt is not None
    assert receipt.figures["pairs"] == 2


def test_without_held_out_conversations_the_page_says_so(talk: Config) -> None:
    save(talk, "dataset", text_set(validation=0, preview=""))
    page = read(talk)
    assert "on training examples" in page.text
    assert not [tag for tag, _ in page.tags if tag == "mark"]


def test_answers_say_how_they_were_written(talk: Config, tmp_path: Path) -> None:
    add_answers(Path(talk.run_dir), temperature=0.7, adapter=str(tmp_path / "other" / "peft"), pairs=40)
    page = read(talk)
    assert "temperature 0.7, at most 48 tokens" in page.text
    assert "Made with another adapter than this run's" in page.text
    assert "20 more in the samples folder" in page.text


def test_a_run_without_perplexity_or_data_set_still_has_its_sentence(talk: Config) -> None:
    (Path(talk.run_dir) / METRICS).unlink()
    receipt_path(Path(talk.run_dir), "dataset").unlink()
    save(talk, "train", run_record(Path(talk.run_dir), unit="tokens", best_step=None))
    page = read(talk)
    assert "the validation loss fell by 25.0 %." in page.text
    assert "8.50" not in page.text
    assert page.sections() == ["answers", "stages", "adapter", "configuration"]
    assert load_record(Path(talk.run_dir), "train", Run) is not None


def test_a_damaged_receipt_is_named(trained: Config) -> None:
    receipt_path(Path(trained.run_dir), "dataset").write_text("{")
    with pytest.raises(RunError, match=r"dataset\.json is damaged"):
        report(trained)


@pytest.mark.parametrize(
    "line",
    [
        *("{broken", "[]", "5", "null", '{"file": "a.png"}', '{"prompt": 5, "seed": 0, "base": "", "tuned": ""}'),
        '{"prompt": "p", "seed": "<b>", "base": "", "tuned": ""}',
        '{"prompt": "p", "seed": 0, "file": "../../mine.png", "base_file": "a.png"}',  # somebody's own image
        '{"prompt": "p", "seed": 0, "file": "/etc/passwd", "base_file": "a.png"}',
    ],
)
def test_a_damaged_list_of_samples_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "samples.jsonl").write_text(f"{line}\n")
    with pytest.raises(RunError, match=r"samples.jsonl is damaged .*delete it and run `finetune sample`"):
        report(Config(name="mine", run_dir=str(tmp_path)))


def test_a_text_with_other_line_ends_is_one_line(talk: Config) -> None:
    file = Path(talk.run_dir) / "samples" / "samples.jsonl"
    row = {"prompt": "a\u2028b\x85c", "seed": 0, "base": "x\u2029y", "tuned": "z"}
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert "x\u2029y" in read(talk).text


def test_nothing_of_a_strangers_run_folder_is_taken_for_html(talk: Config) -> None:
    """Every text that the page shows, in every file that it is made of."""
    run_dir, markup = Path(talk.run_dir), "<b title='x'>&\""

    def worse(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                f"{key}{markup}" if key in ("peft", "torch", "images") else key: worse(v) for key, v in value.items()
            }
        return [worse(item) for item in value] if isinstance(value, list) else _text(value)

    def _text(value: Any) -> Any:
        return f"{value}{markup}" if isinstance(value, str) else value

    for file in (run_dir / "receipts").glob("*.json"):
        receipt = json.loads(file.read_text())
        files = receipt["record"].get("files")
        changed = worse(receipt) | {"stage": receipt["stage"]}
        if files:
            changed["record"]["files"] = files
        for name in ("folder", "checkpoint", "index"):
            if name in receipt["record"]:
                changed["record"][name] = receipt["record"][name]
        file.write_text(json.dumps(changed))
    settings = as_dict(talk)
    settings["name"], settings["lora"]["rank"], settings["model"]["base"] = markup, markup, markup
    rundir.write_config(settings, run_dir)
    lines = [json.loads(line) | {"adapter": markup, "temperature": markup} for line in _lines(run_dir)]
    (run_dir / "samples" / "samples.jsonl").write_text("".join(json.dumps(worse(line)) + "\n" for line in lines))
    metrics = {"step": 1, f"train/{markup}_per_s": 1.0, f"validation/t={markup}": 1.0, "loss/step": 1.0}
    (run_dir / METRICS).write_text(json.dumps(metrics) + "\n")
    page = read(talk)
    assert "<b title=" not in (run_dir / "report.html").read_text(encoding="utf-8")
    assert page.text.count("<b title='x'>&\"") > 10


def _lines(run_dir: Path) -> list[str]:
    return (run_dir / "samples" / "samples.jsonl").read_text().splitlines()


def test_a_copied_run_knows_its_own_adapter(talk: Config, tmp_path: Path) -> None:
    """As an earlier version wrote it, with the run folder as it was called then, and as it is written now."""
    run_dir, moved = Path(talk.run_dir), tmp_path / "moved"
    for own, other in (
        (str(run_dir / "adapter/peft"), str(tmp_path / "x")),
        ("adapter/peft", "/elsewhere/adapter/peft"),
    ):
        folder = str(run_dir / "samples") if own != "adapter/peft" else "samples"
        for adapter, said in ((own, False), (other, True)):
            add_answers(run_dir, adapter=adapter)
            shutil.rmtree(moved, ignore_errors=True)
            save(talk, "sample", Answers(folder, f"{folder}/answers.md", (Answer("p", 0, "a", "b"),)))
            receipt = json.loads(receipt_path(run_dir, "sample").read_text())
            receipt["record"]["folder"] = folder
            receipt_path(run_dir, "sample").write_text(json.dumps(receipt))
            shutil.copytree(run_dir, moved)
            copied = replace(talk, run_dir=str(moved))
            assert ("Made with another adapter" in read(copied).text) == said, adapter
