"""A base in a single file: trained, interrupted, resumed, exported and sampled, as from its folder."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import finetune
from finetune.adapters import formats
from finetune.config.schema import Config, Device, ExportFormat, Precision
from finetune.errors import Interrupted
from tests import cutting
from tests.single_files import save_single_file
from tests.tiny_families import save_family

torch.set_num_threads(1)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    model = save_family(tmp_path / "base", "sd")
    config = Config(name="tiny", run_dir=str(tmp_path / "folder"), model=replace(model, resolution=32))
    (tmp_path / "images").mkdir()
    for colour in ("red", "green"):
        Image.new("RGB", (32, 32), colour).save(tmp_path / "images" / f"{colour}.png")
        (tmp_path / "images" / f"{colour}.txt").write_text(f"a {colour} wall")
    config.data.folder, config.data.cache = str(tmp_path / "images"), str(tmp_path / "cache")
    config.lora.rank, config.optim.lr, config.optim.warmup_steps = 2, 1e-2, 0
    config.trainer.precision, config.hardware.device = Precision.fp32, Device.cpu
    config.trainer.steps, config.trainer.micro_batch, config.trainer.accumulate = 3, 2, 1
    config.trainer.validate_every, config.optim.schedule = 0, type(config.optim.schedule).constant
    config.sample.prompts, config.sample.seeds, config.sample.steps, config.sample.previews = ["a red wall"], [0], 1, 1
    return config


@pytest.mark.exhaustive
def test_a_run_from_a_file_is_the_run_from_its_folder(config: Config, tmp_path: Path) -> None:
    every = config.export.formats
    config.export.formats = [ExportFormat.peft]
    whole = finetune.train(config)
    file = save_single_file(tmp_path / "base", tmp_path / "base.safetensors", "sd")
    for weights in (tmp_path / "base").rglob("*.safetensors"):
        weights.unlink()  # configuration and tokenizer stay
    single = copy.deepcopy(config)
    single.run_dir, single.export.formats = str(tmp_path / "file"), every
    single.model = replace(config.model, base=str(file), parts=str(tmp_path / "base"))
    with cutting.cut(1), pytest.raises(Interrupted):
        finetune.train(single)
    result = finetune.train(single)
    assert result.run.steps == 3
    assert all(difference <= 1e-5 for difference in result.adapter.differences.values())
    ours, theirs = (formats.read_peft_folder(Path(one.adapter.folder) / "peft") for one in (result, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for one, other in zip(result.samples.items, whole.samples.items, strict=True):
        for name in ("file", "base_file"):
            drawn, wanted = (
                Image.open(Path(samples.samples.folder) / getattr(item, name)).tobytes()
                for samples, item in ((result, one), (whole, other))
            )
            assert drawn == wanted
    assert finetune.train(single).run == result.run  # every stage is up to date
