"""The command of the README, run once as a user types it, and everything that it leaves behind."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import finetune
from finetune.config.describe import as_dict
from finetune.diffusion.sample import CELL, GAP, TEXT
from finetune.hub import resolve
from finetune.run import rundir
from finetune.run.plain import from_plain
from finetune.run.receipts import load_record
from finetune.run.records import Adapter, CaptionSet, Dataset, Report, Run, Sample, Samples
from scripts.toyworld.captions import read_caption
from scripts.toyworld.output import dataset_scenes
from tests.conftest import ROOT
from tests.end_to_end import command
from tests.end_to_end.command import Finished

IMAGES = 40
TRIGGER = "pixar style"
# The recipe's own settings but for these. Whole it takes three minutes of a core.
SHORT = ("trainer.steps=25", "sample.steps=4", "sample.seeds=[0]")
# About half of the recipe's steps bring the style with room to spare, a third do not.
STYLED = ("trainer.steps=100", "sample.steps=6", "sample.prompts=[]")
FIGURE_PROMPTS = 10


@dataclass(frozen=True)
class First:
    """The first command in a folder of its own that holds the example images and nothing else."""

    work: Path
    ended: Finished
    images: dict[str, str]
    hub_requests: int

    @property
    def data(self) -> Path:
        return self.work / "datasets" / "pixar_style"

    @property
    def run_dir(self) -> Path:
        return self.work / "outputs" / "pixar_style"

    @property
    def config(self) -> dict[str, Any]:
        return dict(yaml.safe_load((self.run_dir / "config.yaml").read_text(encoding="utf-8")))

    def record(self, stage: str, kind: type[Any]) -> Any:
        return load_record(self.run_dir, stage, kind)


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory) -> First:
    work = tmp_path_factory.mktemp("first") / "work"
    before = command.contents(_copied_images(work))
    connections: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as hub:
        threading.Thread(target=_refuse_all, args=(hub, connections), daemon=True).start()
        address = f"http://127.0.0.1:{hub.getsockname()[1]}"
        # No model hub but this one, which would notice; an empty cache, so that nothing of this machine's can help.
        environment = {"HF_ENDPOINT": address, "HF_HOME": str(work.parent / "hub"), "HF_HUB_OFFLINE": "0"}
        ended = command.run("train", "conf=pixar_style", *SHORT, cwd=work, **environment)
        requested = len(connections)
    return First(work, ended, before, requested)


def _copied_images(work: Path) -> Path:
    data = work / "datasets" / "pixar_style"
    data.mkdir(parents=True)
    for image in sorted((ROOT / "datasets" / "pixar_style").glob("*.jpg")):
        shutil.copy(image, data)
    return data


def _refuse_all(server: socket.socket, connections: list[Any]) -> None:
    while True:
        try:
            connection, address = server.accept()
        except OSError:  # closed at the end
            return
        connections.append(address)
        connection.close()


@pytest.fixture(scope="session")
def events(first: First) -> EventAccumulator:
    everything = {"images": 0, "scalars": 0, "tensors": 0}
    return EventAccumulator(str(first.run_dir / "tensorboard" / first.run_dir.name), size_guidance=everything).Reload()


# -- how it ended ----------------------------------------------------------------------------------------------------


def test_it_ends_well_within_its_means(first: First) -> None:
    assert first.ended.code == 0, first.ended.err
    assert "Traceback" not in first.ended.err
    assert "error" not in first.ended.err
    assert "warning" not in first.ended.err
    assert first.ended.peak_gib < 3
    # Three minutes of two cores; time on the clock would tell more about what else the machine is doing.
    assert first.ended.cpu_s < 360


def test_no_hub_is_asked(first: First) -> None:
    assert first.hub_requests == 0


def test_the_images_are_untouched_and_nothing_else_is_made(first: First) -> None:
    kept = {path: content for path, content in command.contents(first.data).items() if path in first.images}
    assert kept == first.images
    assert {path.name for path in first.data.iterdir() if path.suffix != ".jpg"} == {"metadata.jsonl"}
    assert {path.name for path in first.work.iterdir()} == {"datasets", "outputs"}
    assert {path.name for path in (first.work / "outputs").iterdir()} == {"pixar_style", ".cache"}


def test_every_long_step_shows_its_progress_in_plain_lines(first: First) -> None:
    steps = first.config["trainer"]["steps"]
    images = 2 * len(first.config["sample"]["prompts"]) * len(first.config["sample"]["seeds"])
    for done in (
        f"caption: {IMAGES}/{IMAGES} images, ",
        f"captions: {IMAGES + 1}/{IMAGES + 1} captions, ",  # and the empty one
        f"images: {IMAGES}/{IMAGES} images, ",
        f"train: {steps}/{steps} steps, ",
        f"sample: {images}/{images} images, ",
    ):
        assert [line for line in first.ended.err.splitlines() if line.startswith(done)], done
    run = first.record("train", Run)
    share = run.trainable / run.total
    assert f"train: {run.trainable:,} of {run.total:,} parameters ({share:.2%})" in first.ended.err
    assert "\x1b" not in first.ended.err + first.ended.out  # no terminal, no colours


def test_the_table_fits_eighty_columns(first: First) -> None:
    table, _, following = first.ended.out.partition("\nnext\n")
    lines = table.splitlines()
    assert max(map(len, lines)) <= 80
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[1:]}
    assert rows["stage"] == "caption dataset train export sample report rest total"
    seconds = [int(word) for word in rows["seconds"].split()]
    assert seconds[-1] == pytest.approx(sum(seconds[:-1]), abs=4)
    assert re.fullmatch(r"[\d.]+ images/s", rows["speed"])
    assert re.fullmatch(r"memory [\d.]+ GiB", rows["peak"])
    run = first.record("train", Run)
    assert rows["loss"].startswith(f"{run.first_loss:.4f} → {run.last_loss:.4f} ")
    for name in ("adapter", "grid", "report"):
        assert (first.work / rows[name]).exists()
    assert len(following.splitlines()) == 2


# -- what it left ----------------------------------------------------------------------------------------------------


def test_every_image_has_a_true_caption_with_the_trigger_phrase_at_its_end(first: First) -> None:
    texts = command.captions(first.data)
    assert list(texts) == [f"{number:03d}.jpg" for number in range(1, IMAGES + 1)]
    wrong = {}
    for (name, text), scene in zip(texts.items(), dataset_scenes(IMAGES), strict=True):
        assert text.endswith(f", {TRIGGER}")
        assert text.count(TRIGGER) == 1
        said = [(mention.kind, mention.colour) for mention in read_caption(text).things]
        if said != [(thing.kind, thing.colour) for thing in scene.things]:
            wrong[name] = text
    assert len(wrong) <= IMAGES // 10, wrong  # the captioner is good for 90 % of unseen images in this style
    sources = {item.source for item in first.record("caption", CaptionSet).items}
    assert sources == {"generated"}


def test_the_run_folder_is_complete(first: First) -> None:
    steps = first.config["trainer"]["steps"]
    for name in (
        "config.yaml",
        *(f"receipts/{stage}.json" for stage in ("caption", "dataset", "train", "export", "sample", "report")),
        f"checkpoints/step-{steps:06d}/adapter.safetensors",
        f"checkpoints/step-{steps:06d}/optimizer.pt",
        "adapter/README.md",
        "adapter/peft/adapter_config.json",
        "adapter/peft/adapter_model.safetensors",
        "adapter/pytorch_lora_weights.safetensors",
        "adapter/pixar_style.safetensors",
        "samples/grid.png",
        "samples/samples.jsonl",
        "metrics.jsonl",
        "report.html",
    ):
        assert (first.run_dir / name).stat().st_size > 0, name
    assert list((first.run_dir / "tensorboard").rglob("events.out.tfevents.*"))
    left = {path.name for path in first.run_dir.rglob("*") if path.name.startswith(".")}
    assert left <= {".lock"}  # nothing half written


def test_receipts_hold_inputs_versions_and_figures(first: First) -> None:
    for stage in ("caption", "dataset", "train", "export", "sample", "report"):
        receipt = json.loads((first.run_dir / "receipts" / f"{stage}.json").read_text())
        assert re.fullmatch("[0-9a-f]{64}", receipt["input_hash"])
        assert receipt["seconds"] > 0
        assert receipt["versions"]["torch"] == version("torch")
        assert receipt["figures"]


def test_the_configuration_is_the_one_that_python_gives(first: First, tmp_path: Path) -> None:
    rundir.write_config(as_dict(finetune.load("pixar_style", SHORT)), tmp_path)
    assert (first.run_dir / "config.yaml").read_bytes() == (tmp_path / "config.yaml").read_bytes()


def test_the_data_set_holds_every_image_once(first: First) -> None:
    record = first.record("dataset", Dataset)
    lines = [json.loads(line) for line in (first.run_dir / "dataset.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == [f"{number:03d}.jpg" for number in range(1, IMAGES + 1)]
    assert sum(line["held_out"] for line in lines) == record.validation > 0
    assert record.train + record.validation == IMAGES
    assert {line["file"]: line["caption"] for line in lines} == command.captions(first.data)


def test_training_lowers_the_loss(first: First) -> None:
    run = first.record("train", Run)
    assert run.steps == first.config["trainer"]["steps"]
    assert run.skipped_steps == 0
    assert run.last_loss < run.first_loss
    assert run.best_validation is not None
    assert run.first_validation is not None
    assert run.best_validation < run.first_validation


def test_metrics_have_a_line_for_every_step(first: First) -> None:
    lines = [json.loads(line) for line in (first.run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = list(range(1, first.config["trainer"]["steps"] + 1))
    assert [line["step"] for line in lines if "loss/step" in line] == steps


# -- the adapter -----------------------------------------------------------------------------------------------------


def test_three_formats_reproduce_the_trained_module(first: First) -> None:
    adapter = first.record("export", Adapter)
    assert set(adapter.files) == set(adapter.differences) == {"peft", "diffusers", "kohya"}
    assert all(0 <= difference <= 1e-5 for difference in adapter.differences.values())
    assert adapter.trigger == TRIGGER


def test_the_libraries_own_loaders_read_all_three_alike(first: First) -> None:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from peft import PeftModel

    base, folder = resolve("embedded:diffusion"), first.run_dir / "adapter"

    def bare() -> Any:
        return UNet2DConditionModel.from_pretrained(base, subfolder="unet").float()

    def through_a_pipeline(name: str) -> Any:
        pipeline = StableDiffusionPipeline.from_pretrained(base).to(torch.float32)
        pipeline.load_lora_weights(folder, weight_name=name)
        return pipeline.unet

    random = torch.Generator().manual_seed(0)
    unet = bare()
    latents_BChw = torch.randn((2, unet.config.in_channels, 16, 16), generator=random)
    text_BLD = torch.randn((2, 77, unet.config.cross_attention_dim), generator=random)

    @torch.no_grad()
    def output(model: Any) -> torch.Tensor:
        result: torch.Tensor = model.eval()(latents_BChw, torch.tensor([200, 700]), text_BLD, return_dict=False)[0]
        return result

    def difference(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one - other).norm() / other.norm())

    untuned = output(unet)
    tuned = output(PeftModel.from_pretrained(bare(), str(folder / "peft")))
    assert difference(untuned, tuned) > 1e-2
    for name in ("pytorch_lora_weights.safetensors", "pixar_style.safetensors"):
        assert difference(output(through_a_pipeline(name)), tuned) <= 1e-5, name


def test_the_single_file_describes_itself(first: First) -> None:
    with safe_open(first.run_dir / "adapter" / "pixar_style.safetensors", framework="pt") as file:
        metadata, names = file.metadata(), list(file.keys())
    lora = first.config["lora"]
    assert metadata["recipe"] == "pixar_style"
    assert metadata["base"] == "embedded:diffusion"
    assert metadata["trigger_phrase"] == TRIGGER
    assert (metadata["rank"], float(metadata["alpha"])) == (str(lora["rank"]), lora["alpha"])
    assert metadata["training_hash"] == first.record("train", Run).training_hash
    assert {name.split(".", 1)[1] for name in names} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert all(name.startswith("lora_unet_") for name in names)


# -- TensorBoard -----------------------------------------------------------------------------------------------------


def steps_of(events: EventAccumulator, tag: str) -> list[int]:
    return [point.step for point in events.Scalars(tag)]


def every(interval: int, steps: int) -> list[int]:
    return sorted({*range(interval, steps + 1, interval), steps})


def test_curves_can_be_read_back(first: First, events: EventAccumulator) -> None:
    trainer = first.config["trainer"]
    steps = trainer["steps"]
    for tag in ("loss/step", "loss/smoothed", "train/learning_rate", "train/gradient_norm"):
        assert steps_of(events, tag) == list(range(1, steps + 1)), tag
    for tag in ("train/images_per_s", "system/memory_gib"):
        assert steps_of(events, tag) == every(trainer["log_every"], steps), tag
    assert all(point.value > 0 for point in events.Scalars("train/images_per_s"))
    assert all(0 < point.value < 3 for point in events.Scalars("system/memory_gib"))
    rates = [point.value for point in events.Scalars("train/learning_rate")]
    assert max(rates) == pytest.approx(first.config["optim"]["lr"], rel=1e-3)


def test_validation_is_there_by_noise_level(first: First, events: EventAccumulator) -> None:
    trainer = first.config["trainer"]
    levels = [tag for tag in events.Tags()["scalars"] if re.fullmatch(r"validation/t=\d+", tag)]
    assert len(levels) == 5
    due = {0, *every(trainer["validate_every"], trainer["steps"]), *every(trainer["save_every"], trainer["steps"])}
    for tag in ("validation/mean", *levels):
        assert steps_of(events, tag) == sorted(due), tag
    mean = events.Scalars("validation/mean")[-1].value
    assert mean == pytest.approx(np.mean([events.Scalars(tag)[-1].value for tag in levels]), rel=1e-5)


def test_previews_are_there_at_the_first_and_the_last_step(first: First, events: EventAccumulator) -> None:
    sample, resolution = first.config["sample"], first.config["model"]["resolution"]
    prompts = sample["prompts"][: sample["previews"]]
    assert events.Tags()["images"] == [f"samples/{index}: {prompt}" for index, prompt in enumerate(prompts)]
    for tag in events.Tags()["images"]:
        images = events.Images(tag)
        assert {images[0].step, images[-1].step} == {0, first.config["trainer"]["steps"]}
        assert {(image.width, image.height) for image in images} == {(resolution, resolution)}
        assert images[0].encoded_image_string != images[-1].encoded_image_string


def test_configuration_and_hparams_are_there(first: First, events: EventAccumulator) -> None:
    text = events.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    for key in ("lora.rank", "optim.lr", "trainer.steps", "caption.trigger"):
        section, name = key.split(".")
        assert f"{key}: {first.config[section][name]}" in text
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["lora.rank"].number_value == first.config["lora"]["rank"]
    run = first.record("train", Run)
    assert events.Scalars("loss/smoothed")[-1].value == pytest.approx(run.last_loss, rel=1e-4)


# -- images and page -----------------------------------------------------------------------------------------------


def test_every_sample_holds_the_settings_it_was_drawn_with(first: First) -> None:
    sample, resolution = first.config["sample"], first.config["model"]["resolution"]
    folder = first.run_dir / "samples"
    items = first.record("sample", Samples).items
    assert [(item.prompt, item.seed) for item in items] == [
        (prompt, seed) for prompt in sample["prompts"] for seed in sample["seeds"]
    ]
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [from_plain(Sample, line) for line in lines] == list(items)
    for item in items:
        for file, adapter in ((item.file, "adapter/peft"), (item.base_file, "")):
            with Image.open(folder / file) as image:
                assert image.size == (resolution, resolution)
                facts = image.info
            assert facts["prompt"] == item.prompt
            assert facts["seed"] == str(item.seed)
            assert facts["steps"] == str(sample["steps"])
            assert float(facts["guidance"]) == sample["guidance"]
            assert facts["base"] == "embedded:diffusion"
            assert facts["adapter"] == adapter
    assert len({(folder / name).read_bytes() for item in items for name in (item.file, item.base_file)}) == 2 * len(
        items
    )


def test_the_grid_shows_base_beside_tuned_below_images_of_the_data_set(first: First) -> None:
    sample, folder = first.config["sample"], first.run_dir / "samples"
    block = len(sample["seeds"]) * (2 * CELL + GAP) + GAP
    rows, above = -(-len(sample["prompts"]) // 2), CELL + TEXT + 4 * GAP
    with Image.open(folder / "grid.png") as grid:
        assert grid.size == (2 * block + 3 * GAP, above + rows * (CELL + 2 * TEXT + 4 * GAP) + GAP)
        with Image.open(first.data / "006.jpg") as second:  # of 8 of 40 images
            shown = grid.crop((2 * GAP + CELL, 2 * GAP + TEXT, 2 * GAP + 2 * CELL, 2 * GAP + TEXT + CELL))
            expected = second.resize((CELL, CELL), Image.Resampling.LANCZOS)
            assert np.abs(np.asarray(shown, float) - np.asarray(expected, float)).max() <= 2
        item = first.record("sample", Samples).items[0]
        for place, name in enumerate((item.base_file, item.file)):
            left, top = GAP + place * CELL, above + 2 * GAP + 2 * TEXT
            shown = grid.crop((left, top, left + CELL, top + CELL))
            with Image.open(folder / name) as image:
                assert shown.tobytes() == image.resize((CELL, CELL), Image.Resampling.LANCZOS).tobytes()


class Links(HTMLParser):
    """Every tag, and every src, href and the like, of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.found: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = ("src", "href", "srcset", "data", "action", "poster", "background", "xlink:href")
        self.found += [(name, value or "") for name, value in attrs if name in names]


def test_the_report_is_one_page_that_fetches_nothing(first: First) -> None:
    html = (first.run_dir / "report.html").read_text(encoding="utf-8")
    assert Path(first.record("report", Report).file) == first.run_dir / "report.html"
    page = Links()
    page.feed(html)
    outside = [value[:60] for _, value in page.found if not value.startswith(("data:image/", "#"))]
    assert outside == []
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert not re.findall(r"url\(|@import", html)
    images = [value for name, value in page.found if name == "src"]
    pairs = len(first.config["sample"]["prompts"]) * len(first.config["sample"]["seeds"])
    assert len(images) >= 2 * pairs + IMAGES + 8  # base and tuned, every captioned image, and eight beside the samples
    assert html.count('alt="an image of the data set"') == 8
    assert page.tags.count("svg") >= 3
    for words in (
        "pixar_style",
        first.config["sample"]["prompts"][0],
        "trainer:",
        *command.captions(first.data).values(),
    ):
        assert words in html


# -- afterwards ------------------------------------------------------------------------------------------------------


def test_the_same_command_again_skips_what_is_up_to_date(first: First) -> None:
    def state() -> dict[str, str]:
        own = {"report.html", "report.json"}  # the page is written again: it takes a second and may be out of date
        return {
            path: content for path, content in command.contents(first.run_dir).items() if Path(path).name not in own
        }

    before = state()
    again = command.run("train", "conf=pixar_style", *SHORT, cwd=first.work)
    assert again.code == 0, again.err
    steps = first.config["trainer"]["steps"]
    *skipped, report = again.err.splitlines()
    stages = [line.partition(": up to date, skipped")[0] for line in skipped]
    assert stages == ["caption", "dataset", "train", "export", "sample"]
    assert f"{steps} steps" in skipped[2]
    assert report == "report: outputs/pixar_style/report.html"
    assert state() == before
    assert again.cpu_s < first.ended.cpu_s / 4
    seconds = re.compile(r"^seconds .*", re.MULTILINE)  # the report is written again
    assert seconds.sub("", again.out) == seconds.sub("", first.ended.out)


def test_the_suggested_commands_work(first: First, tmp_path: Path) -> None:
    work = shutil.copytree(first.work, tmp_path / "work")
    board, sample = (line.strip() for line in first.ended.out.partition("\nnext\n")[2].splitlines())

    def typed(line: str) -> subprocess.CompletedProcess[str]:
        """In a shell without the environment on its path."""
        elsewhere = [part for part in os.environ["PATH"].split(":") if Path(part) != Path(sys.executable).parent]
        environment = {**os.environ, "PATH": ":".join(elsewhere)}
        return subprocess.run(line, shell=True, cwd=work, env=environment, capture_output=True, text=True, check=False)

    inspected = typed(f"{board} --inspect")
    assert inspected.returncode == 0, inspected.stderr
    assert "loss/smoothed" in inspected.stdout
    drawn = typed(sample)
    assert drawn.returncode == 0, drawn.stderr
    prompt = json.loads(shlex.split(sample)[-1].removeprefix("sample.prompts="))[0]
    assert prompt.endswith(TRIGGER)
    (file,) = (work / "outputs" / "pixar_style" / "samples_more").glob("*/samples.jsonl")
    lines = file.read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == [prompt] * len(first.config["sample"]["seeds"])


@pytest.fixture(scope="session")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """What the readers, which never saw a sample, make of prompts that the base never met."""
    work = tmp_path_factory.mktemp("styled")
    _copied_images(work)
    ended = command.run("train", "conf=pixar_style", *STYLED, cwd=work)
    assert ended.code == 0, ended.err
    words = [str(work / "outputs" / "pixar_style"), "--prompts", str(FIGURE_PROMPTS), "--json"]
    return dict(json.loads(command.script("measure_style.py", *words)))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("figure", "least"), [("flat_without_adapter", 0.95), ("style", 0.90), ("thing_and_colour", 0.85)]
)
def test_the_adapter_draws_in_the_style_what_the_prompt_says(
    figures: dict[str, float], figure: str, least: float
) -> None:
    assert figures[figure] >= least, figures
