"""The figures of a style recipe: each is what it says, on pictures whose answer is known."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch import Tensor

from finetune.config.schema import ModelConfig
from finetune.diffusion.pipeline import load_backbone
from scripts.embedded.augment import gaussian, to_float
from scripts.embedded.evaluate import held_out_scenes
from scripts.embedded.readers import load_reader
from scripts.measure_style import (
    FIGURES,
    READERS,
    look_of,
    loss_ratio,
    measure,
    novelty,
    told_apart,
    training_images,
)
from scripts.toyworld.output import write_dataset
from scripts.toyworld.render import render


@pytest.fixture(scope="module")
def renders() -> Tensor:
    return render(held_out_scenes(1, 48), "flat", 64, supersample=1.5)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that learnt nothing, from two images, of which one was held out."""
    write_dataset(tmp_path / "images", style="pixar", count=2, size=128)
    run = tmp_path / "run"
    backbone = load_backbone(ModelConfig(base="embedded:diffusion"), torch.float32)
    get_peft_model(backbone, LoraConfig(r=2, target_modules=["to_q"])).save_pretrained(run / "adapter" / "peft")
    settings = {
        "caption": {"trigger": "pixar style"},
        "sample": {"steps": 2, "guidance": 2.0},
        "data": {"folder": str(tmp_path / "images")},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    rows = [
        {"file": f"00{number}.jpg", "crop": [0, 0, 128, 128], "held_out": number == 2, "caption": ""}
        for number in (1, 2)
    ]
    (run / "dataset.jsonl").write_text("\n".join(map(json.dumps, rows)))
    curves = [{"step": 1, "loss/smoothed": 0.4}, {"step": 2, "loss/smoothed": 0.2, "validation/mean": 0.3}]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in curves))
    return run


@pytest.mark.exhaustive
def test_every_figure_is_measured(run_dir: Path) -> None:
    figures = measure(run_dir, prompts=2)
    assert list(figures) == list(FIGURES)
    assert figures["validation_over_training"] == 1.5
    shares = {name for name in FIGURES if name not in ("crispness", "validation_over_training", "novelty")}
    assert all(figures[name] in (0.0, 0.25, 0.5, 0.75, 1.0) for name in shares)
    assert figures["crispness"] > 0
    assert figures["novelty"] > 0


@pytest.mark.exhaustive
def test_a_classifier_tells_blurred_renders_from_renders_and_these_not_from_one_another(renders: Tensor) -> None:
    blurred = (255 * gaussian(to_float(renders), 1.0)).round().to(torch.uint8)
    known, unseen = renders[:16], renders[32:]
    assert told_apart((known, blurred[:16]), (unseen, blurred[32:])) >= 0.9
    assert 0.25 <= told_apart((known, renders[16:32]), (unseen[:8], unseen[8:])) <= 0.75


def test_copies_of_training_images_are_nothing_new(renders: Tensor) -> None:
    content = load_reader(READERS / "content.safetensors")
    trained, unseen = renders[:8], renders[8:16]
    assert novelty(content, trained, unseen, trained) == pytest.approx(0.0, abs=1e-3)
    assert novelty(content, unseen, unseen, trained) == pytest.approx(1.0)


def test_a_run_without_held_out_images_has_no_loss_ratio(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/smoothed": 0.4}\n')
    assert loss_ratio(tmp_path) == {}


def test_held_out_images_are_not_trained_on(run_dir: Path) -> None:
    images = training_images(run_dir, run_dir.parent / "images")
    assert images.shape == (1, 3, 128, 128)


def test_a_trigger_names_its_look() -> None:
    assert look_of("pixar style") == "pixar"
    assert look_of("in stained glass") == "stained glass"
    with pytest.raises(ValueError, match="the trigger must name one of pixar, stop motion, stained glass, got 'zorp'"):
        look_of("zorp")


def test_a_folder_without_a_finished_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no finished run; give the folder that `finetune train` printed"):
        measure(tmp_path, prompts=1)
