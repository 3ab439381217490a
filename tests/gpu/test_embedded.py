"""The embedded models, trained and sampled on a GPU in 16 bit: they do what they do in fp32 on a CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import finetune
from finetune import kinds
from finetune.config.schema import Config, ModelConfig, Precision, Quantize
from finetune.diffusion.image_sampler import ImageSampler
from finetune.diffusion.pipeline import load_backbone
from finetune.memory.device import pick_device
from finetune.training.accelerator import build_accelerator
from scripts import measure_style
from scripts.embedded.evaluate import content_figures, held_out_scenes
from scripts.embedded.readers import load_reader
from scripts.toyworld.captions import caption, read_caption
from scripts.toyworld.output import dataset_scenes
from tests.conftest import ROOT

pytestmark = pytest.mark.gpu

DIFFUSION, TALK = ROOT / "datasets" / "pixar_style", ROOT / "datasets" / "pirate_chat" / "conversations.jsonl"
HELD_OUT = 16  # examples whose losses are compared
UNLIKE_FP32 = {(Precision.bf16, Quantize.none): 2e-2, (Precision.fp16, Quantize.none): 5e-3}
NF4_LOSS = 0.25  # relative: four bits of a small model lose a good deal


def settings(tmp_path: Path, *more: str) -> list[str]:
    return [f"run_dir={tmp_path / 'run'}", f"data.cache={tmp_path / 'cache'}", "hardware.device=cuda", *more]


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """Half of the example images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for file in sorted(DIFFUSION.glob("*.jpg"))[:20]:
        (folder / file.name).write_bytes(file.read_bytes())
    return settings(tmp_path, f"data.folder={folder}")


@pytest.fixture
def talk(tmp_path: Path) -> list[str]:
    return settings(tmp_path, f"data.file={TALK}", "data.workers=2")


def loaded(recipe: str, words: list[str]) -> tuple[Config, Any]:
    return finetune.load(recipe, words), finetune.dataset(recipe, words)


def losses(config: Config, data: Any, precision: Precision, quantize: Quantize) -> list[float]:
    """Per item, one example at a time, with fixed noise; adapters change nothing yet."""
    config.trainer.precision, config.model.quantize, config.lora.dropout = precision, quantize, 0.0
    device = pick_device(config.hardware.device)
    task = kinds.of(config).build_task(config, data, device)
    accelerator = build_accelerator(precision, device)
    draws = next(iter(task.steps(effective=HELD_OUT, start=0)))
    found = []
    for draw in draws:
        batch = task.collate([draw]).to(device)
        with torch.no_grad(), accelerator.autocast():
            found.append(float(task.loss(batch)) / batch.items)
    return found


@pytest.mark.parametrize(("precision", "quantize"), list(UNLIKE_FP32))
def test_losses_of_images_follow_fp32(images: list[str], precision: Precision, quantize: Quantize) -> None:
    config, data = loaded("pixar_style", images)
    expected = losses(config, data, Precision.fp32, Quantize.none)
    found = losses(config, data, precision, quantize)
    assert np.mean(found) == pytest.approx(np.mean(expected), rel=UNLIKE_FP32[precision, quantize])
    assert found == pytest.approx(expected, rel=2 * UNLIKE_FP32[precision, quantize])


@pytest.mark.parametrize(
    ("precision", "quantize"), [*UNLIKE_FP32, (Precision.bf16, Quantize.nf4), (Precision.bf16, Quantize.int8)]
)
def test_losses_of_conversations_follow_fp32(talk: list[str], precision: Precision, quantize: Quantize) -> None:
    config, data = loaded("pirate_chat", talk)
    expected = losses(config, data, Precision.fp32, Quantize.none)
    found = losses(config, data, precision, quantize)
    tolerance = UNLIKE_FP32.get((precision, quantize), NF4_LOSS)
    assert np.mean(found) == pytest.approx(np.mean(expected), rel=tolerance)


@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp16])
def test_a_style_trained_in_16_bit_on_a_gpu_is_the_style(
    images: list[str], tmp_path: Path, precision: Precision
) -> None:
    """The whole line: captions, encoding, training, export and samples on the GPU, and what readers see in the end."""
    result = finetune.train("pixar_style", [*images, f"trainer.precision={precision.name}"])
    assert result.captions is not None
    read = [[(said.kind, said.colour) for said in read_caption(item.text).things] for item in result.captions.items]
    true = [[(thing.kind, thing.colour) for thing in scene.things] for scene in dataset_scenes(40)[:20]]
    assert sum(one != other for one, other in zip(read, true, strict=True)) <= 2
    assert max(result.adapter.differences.values()) <= 1e-5
    assert result.run.skipped_steps < 10  # fp16 looks for its scale
    found = measure_style.measure(tmp_path / "run", prompts=40)
    assert found["flat_without_adapter"] >= 0.95
    assert found["style"] >= 0.9
    assert found["thing_and_colour"] >= 0.85


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_samples_in_16_bit_show_what_the_prompt_says(dtype: torch.dtype) -> None:
    """Pixels may differ from those of fp32: twenty steps make much of a rounded one."""
    base, device = ModelConfig(base="embedded:diffusion"), torch.device("cuda")
    scenes = held_out_scenes(measure_style.FIRST_SEED, 24)
    jobs = [(caption(scene), index) for index, scene in enumerate(scenes)]
    image_sampler = ImageSampler(base, [prompt for prompt, _ in jobs], "", device, dtype)
    backbone = load_backbone(base, dtype, device)
    images = measure_style.stacked(
        image_sampler.generate(backbone, jobs, width=128, height=128, steps=20, guidance=2.0)
    )
    found = content_figures(load_reader(measure_style.READERS / "content.safetensors"), images, scenes)
    assert measure_style.style_share(images, "flat") >= 0.95
    assert min(found["thing"], found["colour"]) >= 0.9


def test_a_voice_trained_on_nf4_in_bf16(talk: list[str], tmp_path: Path) -> None:
    words = [*talk, "model.quantize=nf4", "trainer.precision=bf16", "optim=adamw8bit", "trainer.steps=100"]
    result = finetune.train("pirate_chat", words)
    run = result.run
    assert run.first_validation is not None
    assert run.best_validation is not None
    assert run.best_validation < 0.5 * run.first_validation
    assert result.adapter.differences["peft"] <= 1e-5
    weights = load_file(Path(result.adapter.folder) / "peft" / "adapter_model.safetensors")
    assert all(bool(weight.isfinite().all()) and weight.any() for weight in weights.values())
