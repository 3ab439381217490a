"""Settings that are chosen from a list, two by two: what can't be done together is refused before anything is made.

Any two values of any two of these keys meet in a row, for both kinds of model, and so do the values and the commands. A
row works to its end, or leaves nothing behind.
"""

import copy
from enum import Enum
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import finetune
from finetune.config.describe import kind_of, leaf_types
from finetune.config.model_kinds import model_kind
from finetune.config.schema import Config, ConversationFormat, Device, ExportFormat, Optimizer, Precision, Quantize
from finetune.config.validate import check
from finetune.errors import ConfigError, FinetuneError
from finetune.stages import COMMANDS
from tests.end_to_end.command import contents
from tests.tiny_language_models import save_language
from tests.tiny_models import save_captioner, save_diffusion
from tests.unit.conftest import image_config

pytestmark = pytest.mark.exhaustive
torch.set_num_threads(1)

COMMAND = "command"
ENDING = [command for command in COMMANDS if command != "serve"]  # which goes on until it is stopped
KINDS = ("diffusion", "language")
# What isn't a choice by its type: numbers that switch something on, and the formats, of which a run has several.
SWITCHES: dict[str, list[Any]] = {
    "trainer.activation_checkpointing": [0, 1, 2],
    "trainer.ema_decay": [0.0, 0.9],
    "trainer.patience": [0, 1],
    "trainer.validate_every": [1, 0],
    "optim.lora_plus": [1.0, 4.0],
    "sample.previews": [0, 1],
    "caption.trigger": ["", "pixar style"],
}
NEEDS_GPU = {
    "hardware.device": [Device.cuda],
    "trainer.precision": [Precision.fp16],
    "optim.name": [Optimizer.adamw8bit, Optimizer.paged_adamw8bit],
}
IMAGES_NEED_GPU = {"model.quantize": [Quantize.int8, Quantize.nf4]}
MESSAGES = '{"messages": [{"role": "user", "content": "Who is %d?"}, {"role": "assistant", "content": "Me."}]}\n'
ROWS = {
    ConversationFormat.auto: MESSAGES,
    ConversationFormat.messages: MESSAGES,
    ConversationFormat.sharegpt: MESSAGES.replace("messages", "conversations")
    .replace("role", "from")
    .replace("content", "value"),
    ConversationFormat.alpaca: '{"instruction": "Who is %d?", "output": "Me."}\n',
    ConversationFormat.prompt_completion: '{"prompt": "Who is %d?", "completion": "Me."}\n',
    ConversationFormat.text: '{"text": "This is number %d."}\n',
}
Row = dict[str, Any]


def choices(kind: str) -> dict[str, list[Any]]:
    """Every key of a kind of model whose values can be listed, and the commands."""
    listed = {
        key: list(type_) for key, type_ in leaf_types().items() if isinstance(type_, type) and issubclass(type_, Enum)
    }
    switched = {key: [False, True] for key, type_ in leaf_types().items() if type_ is bool}
    formats = [[format_] for format_ in model_kind(kind).export_formats]
    found = {COMMAND: ENDING, **listed, **switched, **SWITCHES, "export.formats": formats}
    if not torch.cuda.is_available():
        refused = needs_gpu(kind)
        found |= {key: [value for value in found[key] if value not in values] for key, values in refused.items()}
    return {key: values for key, values in found.items() if kind_of(key) in (None, kind)}


def needs_gpu(kind: str) -> dict[str, list[Any]]:
    """Values that training refuses without a GPU."""
    return NEEDS_GPU | (IMAGES_NEED_GPU if kind == "diffusion" else {})


def changed(config: Config, row: Row) -> Config:
    """A copy of the configuration with the row's values."""
    config = copy.deepcopy(config)
    for key, value in row.items():
        *sections, name = key.split(".")
        owner: Any = config
        for section in sections:
            owner = getattr(owner, section)
        if key != COMMAND:
            setattr(owner, name, value)
    return config


def allowed(kind: str, row: Row) -> bool:
    """Whether the settings of a row, or of a part of one, don't contradict one another."""
    config = Config()
    config.model.kind, config.data.folder, config.data.file = kind, "", ""
    setattr(config.data, "folder" if kind == "diffusion" else "file", "data")
    config.model.lora_targets = {config.lora.targets: ["to_q"]}
    config.export.formats = [model_kind(kind).export_formats[0]]
    config.model.quantize = Quantize.nf4  # which alone allows each value of every other key
    return not check(changed(config, row))


@cache
def rows(kind: str) -> list[Row]:
    """Few rows in which every two values meet that may: each begins with two that have not met, and takes the values,
    key by key, that let most others meet. Settings contradict each other two by two."""
    lists = choices(kind)
    cells = [{(key, place) for place in range(len(values))} for key, values in lists.items()]
    pairs = {frozenset(pair) for one, other in combinations(cells, 2) for pair in product(one, other)}
    contradicting = {pair for pair in pairs if not allowed(kind, {key: lists[key][place] for key, place in pair})}
    missing, found = pairs - contradicting, []
    while missing:
        row = set(min(missing, key=sorted))
        for key in sorted(lists.keys() - dict(row).keys()):
            met = {
                (key, place): {frozenset({(key, place), other}) for other in row} for place in range(len(lists[key]))
            }
            row.add(
                max((cell for cell in met if not met[cell] & contradicting), key=lambda cell: len(met[cell] & missing))
            )
        missing -= {frozenset(pair) for pair in combinations(row, 2)}
        found.append({key: lists[key][place] for key, place in row})
    return found


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "diffusion": save_diffusion(folder / "diffusion"),
        "language": save_language(folder / "language"),
        "captioner": save_captioner(folder / "captioner"),
        "cache": folder / "cache",
    }


@pytest.fixture
def plain(kind: str, bases: dict[str, Path], tmp_path: Path) -> Config:
    """Two steps on a tiny model, with enough examples to hold some out; half of the images have a caption."""
    config = image_config(tmp_path, bases["diffusion"])
    config.data.cache = str(bases["cache"])
    config.caption.model, config.caption.max_new_tokens = str(bases["captioner"]), 4
    config.trainer.steps, config.trainer.save_every, config.trainer.accumulate = 2, 2, 1
    config.optim.warmup_steps, config.sample.steps, config.data.workers = 0, 1, 1
    if kind == "language":
        config.model.kind, config.model.base = kind, str(bases["language"])
        config.model.lora_targets = {config.lora.targets: ["q_proj", "down_proj"]}
        config.export.formats = [ExportFormat.peft]
        config.data.folder, config.data.file = "", str(tmp_path / "chats.jsonl")
        config.data.length, config.sample.max_new_tokens = 192, 2
        return config
    folder = Path(config.data.folder)
    folder.mkdir()
    for number in range(20):
        Image.new("RGB", (32, 32), (number, 200, 0)).save(folder / f"{number}.png")
        if number % 2:
            (folder / f"{number}.txt").write_text("a wall, pixar style", encoding="utf-8")
    return config


def write_rows(config: Config) -> None:
    """Conversations in the format that the configuration names."""
    if config.data.file:
        Path(config.data.file).write_text("".join(ROWS[config.data.format] % n for n in range(24)), encoding="utf-8")


@pytest.mark.parametrize("command", ENDING)
@pytest.mark.parametrize("kind", KINDS)
def test_what_can_not_be_done_leaves_nothing(plain: Config, kind: str, command: str, tmp_path: Path) -> None:
    failed = []
    for number, row in enumerate(rows(kind)):
        if row[COMMAND] == command:
            config = changed(plain, row | {"run_dir": str(tmp_path / f"run{number}")})
            write_rows(config)
            before = contents(tmp_path)
            try:
                if COMMANDS[command].needs_run or COMMANDS[command].needs_prompts:
                    finetune.train(config)
                getattr(finetune, command)(config)
            except ConfigError:
                assert contents(tmp_path) == before, row
                assert not Path(config.run_dir).exists(), row
            except FinetuneError as error:  # too late
                failed.append((error, row))
    assert not failed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        pytest.param(kind, key, value, id=f"{kind}-{key}-{value.name}")
        for kind in KINDS
        for key, values in needs_gpu(kind).items()
        for value in values
    ],
)
def test_what_needs_a_gpu_leaves_nothing_without_one(plain: Config, key: str, value: Any, tmp_path: Path) -> None:
    config = changed(plain, {key: value})
    write_rows(config)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=f"{key}={value.name}") as raised:
        finetune.train(config)
    assert "; " in str(raised.value)  # what to type instead
    assert contents(tmp_path) == before
    assert not Path(config.run_dir).exists()
