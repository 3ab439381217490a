"""How often work is done, counted instead of timed: what is read and encoded, and what a step makes the host do."""

import itertools
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.profiler import ProfilerActivity

from finetune.config.schema import Config
from finetune.data.images import decode
from finetune.data.text.tokens import Chat
from finetune.diffusion import fast_blocks
from finetune.diffusion.pipeline import TextEncoder, Vae
from finetune.errors import Interrupted
from finetune.language import fast_layers, tokenize
from finetune.run.records import Dataset, TextSet
from finetune.stages.caption import caption
from finetune.stages.dataset import dataset
from finetune.stages.train import build_trainer, train
from finetune.training.loop import WAITING
from tests.unit.conftest import conversations, talking_config

IMAGES, HELD_OUT, ROWS = 21, 1, 40
Watched = Callable[[Any, str, Callable[..., list[str]]], None]
CUT = 5
WAITS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[str], Watched]:
    """A counter, and what has it count the things that a function is called with, which it still does."""
    counter: Counter[str] = Counter()

    def watch(owner: Any, name: str, things: Callable[..., list[str]]) -> None:
        plain = getattr(owner, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            counter.update(things(*arguments, **named))
            return plain(*arguments, **named)

        monkeypatch.setattr(owner, name, watched)

    return counter, watch


@pytest.fixture
def pictures(config: Config) -> Config:
    """A recipe with so many captioned images, each also as its mirror image, and several epochs."""
    folder, random = Path(config.data.folder), np.random.default_rng(0)
    folder.mkdir()
    for number in range(IMAGES):
        file = folder / f"{number:02}.png"
        Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(file)
        os.utime(file, (0, 0))  # of a file as new as this each look is another read
        (folder / f"{number:02}.txt").write_text(f"a toy, number {number}")
    config.data.flip, config.data.validation_share = True, 0.05
    config.trainer.steps, config.trainer.micro_batch, config.trainer.accumulate = 3, 40, 1  # an epoch each
    config.trainer.validate_every = config.sample.previews = 0
    return config


def whole(config: Config) -> None:
    train(config, dataset(config, caption(config)))


def test_an_image_is_decoded_twice_and_each_variant_encoded_once(
    pictures: Config, counted: tuple[Counter[str], Watched]
) -> None:
    counter, watch = counted
    watch(decode, "check", lambda path, *_: [f"checked {path.name}"])
    watch(decode, "rgb", lambda path, *_: [f"decoded {path.name}"])
    watch(decode, "file_bytes", lambda path: [f"read {path.name}"])
    watch(Vae, "encode", lambda _, pixels: [f"encoded {hash(pixels.numpy().tobytes())}"] * len(pixels))
    watch(TextEncoder, "encode", lambda _, texts: [f"encoded {text}" for text in texts])
    whole(pictures)
    expected = Counter(
        {"checked": IMAGES, "decoded": IMAGES, "read": 2 * IMAGES, "encoded": 2 * (IMAGES - HELD_OUT) + HELD_OUT}
    )
    expected["encoded"] += IMAGES + 1  # captions, and the empty one
    assert sums(counter) == expected
    assert set(counter.values()) == {1, 2}
    assert {name.split()[0] for name, count in counter.items() if count == 2} == {"read"}
    counter.clear()
    pictures.trainer.steps = 5  # goes on
    whole(pictures)
    whole(replace(pictures, run_dir=f"{pictures.run_dir}-of-another"))  # with the same cache
    assert not counter


def test_what_was_encoded_before_a_run_was_stopped_is_not_encoded_again(
    pictures: Config, counted: tuple[Counter[str], Watched]
) -> None:
    counter, watch = counted
    before: Counter[str] = Counter()

    def encoded(_: Vae, pixels: torch.Tensor) -> list[str]:
        if not before and counter.total() == CUT:
            raise Interrupted("stopped", 2)
        return [str(hash(pixels.numpy().tobytes()))]

    watch(Vae, "encode", encoded)
    with pytest.raises(Interrupted):
        dataset(pictures, caption(pictures))
    before.update(counter)
    counter.clear()
    dataset(pictures, caption(pictures))
    assert len(before) == CUT
    assert set((before + counter).values()) == {1}
    assert len(before + counter) == 2 * (IMAGES - HELD_OUT) + HELD_OUT


def test_a_row_is_tokenised_once(language_config: Config, counted: tuple[Counter[str], Watched]) -> None:
    counter, watch = counted
    watch(Chat, "encode_batch", lambda _, rows: [row.source for row in rows])
    config = language_config
    config.trainer.validate_every = config.sample.previews = 0
    config.trainer.micro_batch, config.trainer.accumulate = 4, 2  # an epoch each
    train(config, dataset(config, None))
    assert len(counter) == ROWS
    assert set(counter.values()) == {1}
    counter.clear()
    config.trainer.steps = 6
    train(config, dataset(config, None))
    train(other := replace(config, run_dir=f"{config.run_dir}-of-another"), dataset(other, None))
    assert not counter


@pytest.mark.sampled
@pytest.mark.parametrize(("kind", "operators", "waits"), [("images", 2000, 2), ("rows", 3100, 4)])
def test_a_step_asks_the_same_of_the_host_however_large_the_set_and_whether_it_is_logged(
    kind: str, operators: int, waits: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """It waits for its loss and norm; of rows besides, in the attention that a CPU has, twice for their segments."""
    few, many = (steps_of(kind, count, tmp_path / str(count), request) for count in (8, 200))
    assert len({*few, *many}) == 1
    assert few[0][0] < operators
    assert few[0][1] == waits


def steps_of(kind: str, count: int, folder: Path, request: pytest.FixtureRequest) -> list[tuple[int, int]]:
    """Of each later step of a training on so many examples: the operators that ran, and the waits for a GPU."""
    folder.mkdir()
    config: Config
    examples: Dataset | TextSet
    if kind == "images":
        config, examples = request.getfixturevalue("config"), request.getfixturevalue("make_dataset")(count, 0)
        config = replace(config, run_dir=str(folder / "run"))
    else:
        config = talking_config(folder, request.getfixturevalue("tiny_language"))
        config.data.file = str(folder / "rows.jsonl")
        Path(config.data.file).write_text(conversations(count))
        examples = tokenize.build(config, None)
    config.trainer.steps, config.trainer.log_every, config.trainer.save_every = 20, 2, 20
    config.trainer.micro_batch = config.trainer.accumulate = 1
    config.trainer.validate_every = config.sample.previews = 0
    trainer = build_trainer(config, examples)
    install = fast_blocks.install if kind == "images" else fast_layers.install
    assert install(trainer.task.model, torch.float32)  # as on a GPU
    steps = trainer.steps()
    for step in itertools.islice(steps, 3):
        trainer.after_step(step)
    found = []
    for _ in range(2):  # one of them is logged
        with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
            trainer.after_step(next(steps))
        operators = [event for event in profiler.events() if event.name.startswith("aten::") and not is_apart(event)]
        found.append((len(operators), sum(event.name in WAITS for event in operators)))
    trainer.close()
    return found


def is_apart(event: Any) -> bool:
    """Whether an operator is part of a batch's making, which a GPU finds done, or of what a kernel does on a CPU."""
    while event := event.cpu_parent:
        if event.name == WAITING or event.name.startswith("aten::_fused_adamw"):
            return True
    return False


def sums(counter: Counter[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for name, count in counter.items():
        found[name.split()[0]] += count
    return found
