"""Whether images can be drawn on a GPU is said before anything is loaded; the GPU here is a pretended one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetune.config.schema import Config, Device, Quantize
from finetune.diffusion import meta
from finetune.errors import ConfigError, ModelError
from finetune.memory import block_offload
from finetune.planning.machine import GIB, Machine
from finetune.serving import image_memory
from finetune.serving.image_memory import encoders_fit
from finetune.stages.serve import serving
from tests.tiny_families import save_family

GPU = Machine("a small GPU", True, 9.0, 0.5, True, 165.2, 82.6, 1008, 20.0, known=True)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return Config(model=save_family(tmp_path_factory.mktemp("base"), "sd"))


def drawing_gib(recipe: Config, adapter_bytes: float = 0.0) -> float:
    return min(image_memory._drawing_gib(recipe.model, recipe.sample, torch.bfloat16, GPU, adapter_bytes))


def fits(recipe: Config, vram_gib: float) -> bool:
    return encoders_fit(recipe.model, recipe.sample, torch.bfloat16, replace(GPU, vram_gib=vram_gib), 0.0)


def test_text_encoders_leave_a_gpu_that_is_full_without_them(
    recipe: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    drawing, encoders = drawing_gib(recipe), block_offload.weight_bytes(meta.text_encoders(recipe.model)) / GIB
    assert fits(recipe, drawing + 1.01 * encoders)
    assert capsys.readouterr().err == ""
    assert not fits(recipe, drawing + 0.99 * encoders)
    assert "the text encoders (0.0 GiB) work in CPU memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("quantize", "offload", "cure"),
    [
        (Quantize.none, False, "model.quantize=nf4"),
        (Quantize.nf4, False, "model.offload=true"),
        (Quantize.nf4, True, "a smaller model.resolution"),
    ],
)
def test_an_image_that_does_not_fit_is_refused_with_what_would_help(
    recipe: Config, quantize: Quantize, offload: bool, cure: str
) -> None:
    config = replace(recipe, model=replace(recipe.model, quantize=quantize, offload=offload))
    with pytest.raises(ConfigError, match=rf"an image of 64×64 takes .* GiB, and a small GPU has 0.1 GiB; try {cure}"):
        fits(config, 0.1)


def test_adapters_that_are_loaded_at_once_count(recipe: Config) -> None:
    assert (drawing_gib(recipe, 2.0**30) - drawing_gib(recipe)) == pytest.approx(1.0)


def test_a_base_that_can_not_be_planned_is_served_all_the_same(
    recipe: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(*_: object) -> torch.nn.Module:
        raise ModelError("this base can't be planned")

    monkeypatch.setattr(meta, "text_encoders", unknown)
    assert fits(recipe, 0.1 + drawing_gib(recipe))
    assert capsys.readouterr().err == "serve: this base can't be planned\n"


def test_serving_a_recipe_asks_first(recipe: Config, tmp_path: Path) -> None:
    config = replace(recipe, run_dir=str(tmp_path / "run"))
    config.hardware = replace(
        config.hardware, gpu="a small GPU", vram_gib=0.1, tflops=165.2, fp32_tflops=82.6, gb_per_s=1008,
        pcie_gb_per_s=20.0, device=Device.auto,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="an image of 64×64 takes"), serving(config):
        pass
