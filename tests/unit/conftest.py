"""An image and a language task on tiny models, with hand-made data."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config.model_kinds import MODEL_KINDS
from finetune.config.schema import Config, Device, ExportFormat, Precision
from finetune.data.cache import Cache
from finetune.language import tokenize
from finetune.run.records import Dataset, Example, TextSet
from finetune.training.task import Task
from tests.tiny_language_models import save_language
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
def config(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run of a few steps on the CPU, without dropout, validated at two noise levels instead of five."""
    monkeypatch.setattr("finetune.diffusion.task.VALIDATION_LEVELS", (0.1, 0.9))
    return image_config(tmp_path, tiny_base)


def image_config(tmp_path: Path, tiny_base: Path) -> Config:
    config = Config(name="tiny", run_dir=str(tmp_path / "run"))
    config.model.base, config.model.resolution, config.model.bucket_step = str(tiny_base), 32, 16
    config.model.lora_targets = TARGETS
    config.data.folder, config.data.cache = str(tmp_path / "images"), str(tmp_path / "cache")
    config.lora.rank, config.lora.dropout = 4, 0.0
    config.optim.lr, config.optim.warmup_steps = 1e-2, 2
    config.trainer.precision, config.hardware.device = Precision.fp32, Device.cpu
    config.trainer.steps, config.trainer.micro_batch, config.trainer.accumulate = 4, 2, 2
    config.trainer.save_every, config.trainer.validate_every, config.trainer.log_every = 2, 2, 1
    config.sample.prompts, config.sample.seeds, config.sample.steps = ["a red robot"], [0], 1
    return config


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., Dataset]:
    """Random latents under hand-made examples, in two aspect buckets; those held out are in one."""

    def make(count: int = 10, held_out: int = 2) -> Dataset:
        cache = Cache(tmp_path / "cache")
        random = torch.Generator().manual_seed(1)
        empty = cache.put("0" * 64, {"embedding": torch.zeros(77, 16)})
        examples = []
        for index in range(count):
            bucket = (48, 16) if index and index % 3 == 0 else (32, 32)
            shape = (4, bucket[1] // 4, bucket[0] // 4)
            key = f"{index + 1:064x}"
            latents = {"mean": torch.randn(shape, generator=random), "std": torch.full(shape, 0.1)}
            text = {"embedding": torch.randn((77, 16), generator=random)}
            examples.append(
                Example(
                    key=key,
                    file=f"{index:03d}.png",
                    caption=f"image {index}",
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


@pytest.fixture(scope="session")
def tiny_language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama with a chat template."""
    return save_language(tmp_path_factory.mktemp("models") / "llama")


def conversations(count: int) -> str:
    """So many short conversations, one JSON line each."""
    things = ("cats", "boats", "red cups", "trees in the snow")
    turns = [
        [
            {"role": "user", "content": f"How many {things[number % 4]} are {number}?"},
            {"role": "assistant", "content": " ".join(["Arr!"] * (number % 3 + 1)) + f" {number}, matey."},
        ]
        for number in range(count)
    ]
    return "".join(json.dumps({"messages": messages}) + "\n" for messages in turns)


@pytest.fixture
def language_config(tmp_path: Path, tiny_language: Path) -> Config:
    """A run of a few steps on the CPU, without dropout."""
    return talking_config(tmp_path, tiny_language)


def talking_config(tmp_path: Path, tiny_language: Path) -> Config:
    config = Config(name="tiny-language", run_dir=str(tmp_path / "run"))
    config.model.kind, config.model.base = "language", str(tiny_language)
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config.model.lora_targets = {"all_linear": linear}
    file = tmp_path / "conversations.jsonl"
    file.write_text(conversations(40))
    config.data.file, config.data.cache = str(file), str(tmp_path / "cache")
    config.data.length, config.data.workers, config.data.validation_share = 192, 1, 0.2
    config.lora.rank, config.lora.dropout, config.lora.targets = 4, 0.0, "all_linear"
    config.optim.lr, config.optim.warmup_steps = 1e-2, 2
    config.trainer.precision, config.hardware.device = Precision.fp32, Device.cpu
    config.trainer.steps, config.trainer.micro_batch, config.trainer.accumulate = 4, 2, 2
    config.trainer.save_every, config.trainer.validate_every, config.trainer.log_every = 2, 2, 1
    config.sample.prompts, config.sample.seeds, config.sample.max_new_tokens = ["How many cats?"], [0], 4
    config.export.formats = [ExportFormat.peft]
    return config


def change_tasks(monkeypatch: pytest.MonkeyPatch, change: Callable[[Task], None]) -> None:
    """Every task that is built from now on, of any kind of model, is handed to `change` first."""
    for name in MODEL_KINDS:
        kind = import_module(f"finetune.{name}.kind")

        def built(*arguments: Any, build: Callable[..., Task] = kind.build_task) -> Task:
            task = build(*arguments)
            change(task)
            return task

        monkeypatch.setattr(kind, "build_task", built)


@dataclass
class Setting:
    """A configuration and its data set."""

    config: Config
    dataset: Dataset | TextSet


@pytest.fixture(params=["diffusion", "language"])
def setting(request: pytest.FixtureRequest) -> Setting:
    """Each kind of model in turn: what holds for the loop holds for both."""
    if request.param == "diffusion":
        return Setting(request.getfixturevalue("config"), request.getfixturevalue("make_dataset")())
    config = request.getfixturevalue("language_config")
    return Setting(config, tokenize.build(config, None))
