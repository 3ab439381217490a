"""The benchmarks' own parts: bases with random weights that load like real ones, commands, figures."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config import compose
from finetune.config.schema import ModelConfig
from finetune.config.validate import check
from finetune.diffusion.image_sampler import ImageSampler
from finetune.diffusion.pipeline import load_backbone
from finetune.language.causal_lm import load_model, load_tokenizer
from scripts.bench.bases import save
from scripts.bench.memory import (
    CASES,
    ROOT,
    STEPS,
    Case,
    candidates_for,
    chosen_cases,
    command,
    figures,
    planned_a_second,
    planned_gib,
    speeds,
    table,
)
from tests.tiny_families import save_family
from tests.tiny_language_models import save_language

CPU = torch.device("cpu")
LINES = [json.loads(line) for line in (ROOT / "scripts" / "bench" / "memory.jsonl").read_text().splitlines()]
MEASURED = [line for line in LINES if "measured_gib" in line]


@pytest.mark.sampled
@pytest.mark.parametrize("kind", ["sd3", "flux2", "qwen_image"])
def test_a_pipeline_of_random_weights_loads_like_a_real_one(kind: str, tmp_path: Path) -> None:
    model = save_family(tmp_path / "architecture", kind)
    count = save(tmp_path / "architecture", tmp_path / "base", CPU)
    model.base = str(tmp_path / "base")
    backbone = load_backbone(model, torch.bfloat16)
    assert 0 < sum(weight.numel() for weight in backbone.parameters()) < count
    image_sampler = ImageSampler(model, ["a red robot"], "", CPU, torch.float32)
    assert image_sampler.generate(backbone.float(), [("a red robot", 0)], width=64, height=64, steps=1, guidance=1.0)


def test_a_language_model_of_random_weights_loads_like_a_real_one(tmp_path: Path) -> None:
    count = save(save_language(tmp_path / "architecture", "llama"), tmp_path / "base", CPU)
    model = load_model(ModelConfig(kind="language", base=str(tmp_path / "base")), torch.float32, CPU)
    assert sum(weight.numel() for weight in model.parameters()) == count
    assert load_tokenizer(str(tmp_path / "base")).chat_template


@pytest.mark.sampled
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_is_a_command_that_is_valid(case: object, tmp_path: Path) -> None:
    words = command(case, tmp_path / "base", tmp_path / "run", tmp_path / "images")  # type: ignore[arg-type]
    recipe = words[0].removeprefix("conf=")
    config = compose.load(recipe, words[1:])
    assert check(config) == []
    assert config.trainer.steps == STEPS


def test_a_case_that_there_is_not_is_named() -> None:
    with pytest.raises(SystemExit, match="no case nothing"):
        chosen_cases(["sd15-512-16", "nothing"])


def test_the_page_shows_what_the_lines_say() -> None:
    """As generated: every measured case with its difference, and those that failed by name."""
    assert (ROOT / "docs" / "memory.md").read_text() == table(LINES)
    assert all("planned_gib" in line for line in MEASURED)


def error(line: dict[str, Any]) -> float:
    """Of the committed plan, relative to what was measured."""
    return float(line["planned_gib"]) / float(line["measured_gib"]) - 1


@pytest.mark.parametrize("line", MEASURED, ids=lambda line: line["name"])
def test_the_plan_says_what_was_measured(line: dict[str, Any]) -> None:
    assert abs(error(line)) <= 0.12


def test_plan_and_dry_run_are_mostly_closer() -> None:
    assert statistics.median(abs(error(line)) for line in MEASURED) <= 0.05
    assert statistics.median(abs(line["dry_run_gib"] / line["measured_gib"] - 1) for line in MEASURED) <= 0.02


@pytest.mark.exhaustive
@pytest.mark.parametrize("preset", ["sd15", "flux2_klein", "llama2_7b"])
def test_the_committed_plans_are_those_of_today(preset: str) -> None:
    """One case of a UNet, a transformer and a language model: a trace takes seconds."""
    line = next(line for line in MEASURED if line["preset"] == preset)
    case = Case(line["name"], preset, line["vram_gib"], tuple(line["overrides"]))
    assert planned_gib(*candidates_for(case)) == pytest.approx(line["planned_gib"], rel=0.005)


@pytest.mark.exhaustive
def test_the_committed_speeds_are_those_of_today() -> None:
    """Of one: they hang on a few constants."""
    line = next(line for line in MEASURED if line["name"] == "llama2-7b-2048-bf16-10gb")
    assert planned_a_second(*candidates_for(chosen_cases([line["name"]])[0])) == pytest.approx(
        line["planned_a_second"], rel=0.005
    )


def test_figures_come_from_the_receipts(tmp_path: Path) -> None:
    (tmp_path / "receipts").mkdir()
    receipt = {"stage": "train", "seconds": 12.0, "figures": {"dry_run_gib": 3.4, "measured_gib": 3.5}}
    (tmp_path / "receipts" / "train.json").write_text(json.dumps(receipt))
    assert figures(tmp_path) == {
        "stages": {"train": 12.0},
        "dry_run_gib": 3.4,
        "measured_gib": 3.5,
    }
    assert figures(tmp_path / "nowhere") == {"stages": {}}


def test_speeds_count_padding(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "train/tokens_per_s": 30.0, "train/padding": 0.25},
        {"step": 2, "train/tokens_per_s": 50.0, "loss/step": 1.0},
        {"step": 3, "loss/step": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert speeds(tmp_path) == [40.0, 50.0]
    assert speeds(tmp_path / "nowhere") == []
