"""Every family of image models, from a folder of images to an adapter that diffusers loads, on tiny models."""

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import finetune
from finetune.adapters import formats
from finetune.config.schema import Config, Device, ExportFormat, Precision
from finetune.diffusion import families, pipeline
from finetune.diffusion.families import family
from finetune.diffusion.families.spec import MASK
from finetune.errors import Interrupted
from finetune.run.records import Result
from tests import cutting
from tests.tiny_families import save_family

pytestmark = pytest.mark.exhaustive
torch.set_num_threads(1)

INTERRUPTED = {"sdxl", "flux"}  # a UNet and a transformer
UNREAD = {"sd3", "flux2"}  # diffusers skips every layer of their kohya-style files


@pytest.fixture(scope="module", params=families.names())
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of three steps on four images of two shapes."""
    folder = tmp_path_factory.mktemp(request.param)
    config = Config(name="tiny", run_dir=str(folder / "run"), model=save_family(folder / "base", request.param))
    (folder / "images").mkdir()
    for number, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (64, 64) if number % 2 else (96, 64), colour).save(folder / "images" / f"{colour}.png")
        (folder / "images" / f"{colour}.txt").write_text("a wall " + "painted " * number + colour)
    config.data.folder, config.data.cache = str(folder / "images"), str(folder / "cache")
    config.lora.rank, config.lora.alpha = 2, 3.0  # alpha != rank: converters like to mix them up
    config.optim.lr, config.optim.warmup_steps = 1e-2, 0
    config.trainer.precision, config.hardware.device = Precision.fp32, Device.cpu
    config.trainer.steps, config.trainer.micro_batch, config.trainer.accumulate = 3, 2, 1
    config.trainer.save_every = config.trainer.validate_every = 2
    config.sample.prompts, config.sample.seeds, config.sample.steps = ["a red wall"], [0], 2
    config.sample.previews = 0
    return config


@pytest.fixture(scope="module")
def result(config: Config) -> Result:
    return finetune.train(config)


def test_a_folder_of_images_becomes_an_adapter_and_samples(config: Config, result: Result) -> None:
    assert result.run.steps == 3
    assert set(result.adapter.files) == {export_format.name for export_format in config.export.formats}
    assert all(difference <= 1e-5 for difference in result.adapter.differences.values())
    for sample in result.samples.items:
        for name in (sample.file, sample.base_file):
            with Image.open(Path(result.samples.folder) / name) as image:
                assert image.size == (64, 64)
    assert (Path(result.samples.folder) / result.samples.grid).is_file()


def test_an_interrupted_run_gives_the_same_adapter(config: Config, result: Result, tmp_path: Path) -> None:
    if config.model.family not in INTERRUPTED:
        pytest.skip("tested with a UNet and a transformer: resuming does not depend on the family")
    cut = copy.deepcopy(config)
    cut.run_dir, cut.export.formats = str(tmp_path / "cut"), [ExportFormat.peft]
    with cutting.cut(1), pytest.raises(Interrupted):
        finetune.train(cut)
    continued = finetune.train(cut)
    ours, whole = (formats.read_peft_folder(Path(one.adapter.folder) / "peft") for one in (continued, result))
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


@pytest.mark.parametrize("export_format", [ExportFormat.diffusers, ExportFormat.kohya], ids=lambda each: each.name)
def test_the_librarys_own_loader_reads_the_file(config: Config, result: Result, export_format: ExportFormat) -> None:
    spec, folder = family(config.model.family), Path(result.adapter.folder)
    loaded_into = pipeline.load_pipeline(config.model, dict.fromkeys((*spec.text_parts, "vae")))
    backbone = getattr(loaded_into, spec.backbone)
    unread = export_format is ExportFormat.kohya and config.model.family in UNREAD
    with contextlib.suppress(ValueError) if unread else contextlib.nullcontext():
        loaded_into.load_lora_weights(folder, weight_name=result.adapter.files[export_format.name])
    if unread:
        assert not any("lora" in name for name, _ in backbone.named_parameters())
        return
    base = pipeline.load_backbone(config.model, torch.float32)
    untuned = output(config, base)
    ours = output(config, pipeline.load_adapter(config.model, base, folder / "peft"))
    assert difference(output(config, backbone), ours) < 1e-5
    assert difference(untuned, ours) > 1e-4


@torch.no_grad()
def output(config: Config, backbone: Any) -> Tensor:
    """What a backbone predicts for fixed random latents and texts, at two noise levels."""
    spec, random = family(config.model.family), torch.Generator().manual_seed(0)
    latents_BChw = torch.randn((2, spec.latent_channels(backbone.config), 16, 16), generator=random)
    text = {
        name: torch.ones(2, *shape) if name == MASK else torch.randn((2, *shape), generator=random)
        for name, shape in sorted(spec.text_shapes(backbone.config).items())
    }
    return spec.predict(backbone.eval(), latents_BChw, torch.tensor([100, 800]), text)


def difference(one: Tensor, other: Tensor) -> float:
    """Relative to the other one's size."""
    return float((one - other).norm() / other.norm())
