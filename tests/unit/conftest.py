"""A diffusion task on a tiny model with a hand-made data set."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from finetune.config import Config, Device, Precision
from finetune.data.cache import Cache
from finetune.records import Dataset, Example
from tests.tiny_models import save_diffusion

torch.set_num_threads(1)  # tiny tensors: more threads would only wait for one another

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TARGETS = {
    "attention": ATTENTION,
    "wide": [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "time_emb_proj"],
}


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny pipeline."""
    return save_diffusion(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def config(tmp_path: Path, tiny_base: Path) -> Config:
    """A run of a few steps on the CPU, without dropout."""
    config = Config(name="tiny", run_dir=str(tmp_path / "run"))
    config.model.base, config.model.resolution, config.model.bucket_step = str(tiny_base), 32, 16
    config.model.lora_targets = TARGETS
    config.data.folder, config.data.cache = str(tmp_path / "pictures"), str(tmp_path / "cache")
    config.lora.rank, config.lora.dropout = 4, 0.0
    config.optim.lr, config.optim.warmup_steps = 1e-2, 2
    config.trainer.precision, config.hardware.device = Precision.fp32, Device.cpu
    config.trainer.steps, config.trainer.micro_batch, config.trainer.accumulate = 4, 2, 2
    config.trainer.save_every, config.trainer.validate_every, config.trainer.log_every = 2, 2, 1
    config.sample.prompts, config.sample.seeds, config.sample.steps = ["a red robot"], [0], 2
    return config


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., Dataset]:
    """Random latents under hand-made examples, in two aspect buckets."""

    def make(count: int = 10, held_out: int = 2) -> Dataset:
        cache = Cache(tmp_path / "cache")
        random = torch.Generator().manual_seed(1)
        empty = cache.put("0" * 64, {"embedding": torch.zeros(77, 16)})
        examples = []
        for index in range(count):
            bucket = (32, 32) if index % 3 else (48, 16)
            shape = (4, bucket[1] // 4, bucket[0] // 4)
            key = f"{index + 1:064x}"
            latents = {"mean": torch.randn(shape, generator=random), "std": torch.full(shape, 0.1)}
            text = {"embedding": torch.randn((77, 16), generator=random)}
            examples.append(
                Example(
                    key=key,
                    file=f"{index:03d}.png",
                    caption=f"picture {index}",
                    bucket=bucket,
                    crop=(0, 0, *bucket),
                    flipped=False,
                    latents=str(cache.put(key, latents)),
                    text=str(cache.put(f"{index + 1001:064x}", text)),
                    held_out=index < held_out,
                )
            )
        index_file = tmp_path / "dataset.jsonl"
        index_file.write_text("".join(json.dumps(asdict(example)) + "\n" for example in examples))
        return Dataset(str(index_file), count - held_out, held_out, {}, str(empty))

    return make
