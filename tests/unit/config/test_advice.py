"""What an error offers to type is typed, and does what was meant."""

import re
import shlex
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import yaml

import finetune
from finetune.config import describe
from finetune.config.schema import Config
from finetune.config.validate import check
from finetune.errors import ConfigError
from tests.conftest import Answer

Cli = Callable[..., Answer]
SMOKE, CHAT = "train conf=smoke ", "train conf=pirate_chat "

# What was typed, what is offered in the error, the command line with that in its place, and what it then sets.
MEANT: list[tuple[str, str, str, dict[str, Any]]] = [
    (
        SMOKE + "'sample.prompts=a, b'",
        "'sample.prompts=[a,b]'",
        SMOKE + "{}",
        {"sample.prompts": ["a", "b"]},
    ),
    (SMOKE + "'sample.prompts=a, b'", "'sample.prompts=[\"a, b\"]'", SMOKE + "{}", {"sample.prompts": ["a, b"]}),
    (SMOKE + "'sample.prompts=a bee'", "'sample.prompts=[\"a bee\"]'", SMOKE + "{}", {"sample.prompts": ["a bee"]}),
    (SMOKE + "'sample.prompts=[ä, b]'", "'sample.prompts=[\"ä\",b]'", SMOKE + "{}", {"sample.prompts": ["ä", "b"]}),
    (SMOKE + "'sample.prompts=[\"a\"],[b]'", "'sample.prompts=[a,b]'", SMOKE + "{}", {"sample.prompts": ["a", "b"]}),
    (
        CHAT + "data.columns={prompt:größe}",
        "'data.columns={prompt:\"größe\"}'",
        CHAT + "{}",
        {"data.columns.prompt": "größe"},
    ),
    (SMOKE + "model.lora_targets.a=ö", "'model.lora_targets.a=[\"ö\"]'", SMOKE + "{}", {"model.lora_targets.a": ["ö"]}),
    (SMOKE + "'caption.trigger=a, b'", "'caption.trigger=\"a, b\"'", SMOKE + "{}", {"caption.trigger": "a, b"}),
    (SMOKE + "'caption.trigger=[a b'", "'caption.trigger=\"[a b\"'", SMOKE + "{}", {"caption.trigger": "[a b"}),
    (SMOKE + "sample.seeds=3", "'sample.seeds=[3]'", SMOKE + "{}", {"sample.seeds": [3]}),
    (SMOKE + "export.formats=peff", "'export.formats=[peft]'", SMOKE + "{}", {"export.formats": ["peft"]}),
    (SMOKE + "hardware.device=gpu", "cuda", SMOKE + "hardware.device={}", {"hardware.device": "cuda"}),
    (SMOKE + "hardware=4090", "rtx4090", SMOKE + "hardware={}", {"hardware.gpu": "NVIDIA GeForce RTX 4090"}),
    (SMOKE + "model.quantize=4bit", "nf4", SMOKE + "model.quantize={}", {"model.quantize": "nf4"}),
    (SMOKE + "trainer.precision=bfloat16", "bf16", SMOKE + "trainer.precision={}", {"trainer.precision": "bf16"}),
    (SMOKE + "batch_size=2", "trainer.micro_batch", SMOKE + "{}=2", {"trainer.micro_batch": 2}),
    (SMOKE + "learning_rate=2", "optim.lr", SMOKE + "{}=2", {"optim.lr": 2}),
    (SMOKE + "data.folder=my pics", "'data.folder=\"my pics\"'", SMOKE + "{}", {"data.folder": "my pics"}),
    (SMOKE + "data.folder=it\\'s my pics", "'data.folder=\"it'\"'\"'s my pics\"'", SMOKE + "{}", {}),
    (SMOKE + "lora.rank= 8", "lora.rank=8", SMOKE + "{}", {"lora.rank": 8}),
    (SMOKE + "lora.rank 8", "lora.rank=8", SMOKE + "{}", {"lora.rank": 8}),
    (SMOKE + "lora.rank:8", "lora.rank=8", SMOKE + "{}", {"lora.rank": 8}),
    ("train conf=Smoke", "smoke", "train conf={}", {"name": "smoke"}),
    ("train conf=smoke.yaml", "smoke", "train conf={}", {"name": "smoke"}),
    (SMOKE + "hardware=RTX4090", "rtx4090", SMOKE + "hardware={}", {"hardware.gpu": "NVIDIA GeForce RTX 4090"}),
    (SMOKE + "data.skip_bad=yes", "true", SMOKE + "data.skip_bad={}", {"data.skip_bad": True}),
    (SMOKE + "data.flip=0", "false", SMOKE + "data.flip={}", {"data.flip": False}),
    ("train smoke", "conf=smoke", "train {}", {"name": "smoke"}),
    ("train conf=conf/smoke.yaml", "smoke", "train conf={}", {"name": "smoke"}),
    ("train --conf smoke", "conf=smoke", "train {}", {"name": "smoke"}),
    ("train --config=smoke", "conf=smoke", "train {}", {"name": "smoke"}),
    (SMOKE + "--lora.rank 8", "lora.rank=8", SMOKE + "{}", {"lora.rank": 8}),
    (SMOKE + "--rank=8", "lora.rank=8", SMOKE + "{}", {"lora.rank": 8}),
    (SMOKE + "--learning-rate 2", "optim.lr=2", SMOKE + "{}", {"optim.lr": 2}),
    (SMOKE + "--data.folder 'my pics'", "'data.folder=\"my pics\"'", SMOKE + "{}", {"data.folder": "my pics"}),
    (SMOKE + "--dry-run 'run_dir=\"a b\"'", "finetune plan conf=smoke 'run_dir=\"a b\"'", "{}", {"run_dir": "a b"}),
    ("conf=smoke 'run_dir=\"a b\"'", "finetune train conf=smoke 'run_dir=\"a b\"'", "{}", {"run_dir": "a b"}),
]


@pytest.mark.sampled
@pytest.mark.parametrize(("typed", "offered", "instead", "sets"), MEANT, ids=[f"{row[0]} → {row[1]}" for row in MEANT])
def test_what_is_offered_does_what_was_meant(
    finetune_cli: Cli, typed: str, offered: str, instead: str, sets: dict[str, Any]
) -> None:
    refused = finetune_cli(*shlex.split(typed))
    assert refused.code == ConfigError.exit_code
    words = r"(?:[:;,]|mean|such as|try|type|is)"
    assert re.search(rf"{words} {re.escape(offered)}(?:$|[?; ])", refused.err, re.MULTILINE), refused.err
    answer = finetune_cli(*shlex.split(f"{instead.format(offered).removeprefix('finetune ')} --cfg job"))
    assert (answer.code, answer.err) == (0, "")
    config = yaml.safe_load(answer.out.partition("\n\n")[0])
    found = {key: _at(config, key) for key in sets}
    assert found == sets


def _at(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = value[name]
    return value


@pytest.mark.parametrize(
    ("typed", "key"), [("my pics", "data.folder"), ("pics", "data.folder"), ("my chats.jsonl", "data.file")]
)
def test_a_path_without_a_key_is_offered_with_the_key(finetune_cli: Cli, workdir: Path, typed: str, key: str) -> None:
    path = workdir / typed
    path.touch() if path.suffix else path.mkdir()
    (line,) = finetune_cli("train", "conf=smoke", typed).errors
    (word,) = shlex.split(line.partition("such as ")[2])
    recipe = "smoke" if key == "data.folder" else "pirate_chat"
    assert attrgetter(key)(finetune.load(recipe, [word])) == typed


def test_the_file_of_a_recipe_is_offered_as_the_recipe(finetune_cli: Cli, workdir: Path) -> None:
    (workdir / "conf").mkdir()
    (workdir / "conf" / "mine.yaml").write_text("defaults: [smoke]\n")
    lines = finetune_cli("train", "conf/mine.yaml").errors
    assert lines[0].endswith("such as conf=mine")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (SMOKE + "--resolve", "type: --cfg job --resolve"),
        (SMOKE + "--cfg jb", "type: --cfg job"),
        (SMOKE + "-c", "type: --cfg job"),
        (SMOKE + "--multirun --cfg job", "leave one of them out"),
        (SMOKE + "--multirn", "did you mean --multirun?"),
    ],
)
def test_flags_that_say_too_little_or_too_much(finetune_cli: Cli, typed: str, offered: str) -> None:
    answer = finetune_cli(*shlex.split(typed))
    assert (answer.code, len(answer.errors)) == (ConfigError.exit_code, 1)
    assert answer.err.rstrip().endswith(offered)


def test_resume_is_answered_by_what_happens_anyway(finetune_cli: Cli) -> None:
    (line,) = finetune_cli(*shlex.split(SMOKE + "--resume")).errors
    assert "--resolve" not in line
    assert "type the same command without --resume" in line


def test_the_values_that_a_check_offers_pass_it() -> None:
    offered: dict[str, list[str]] = {"smoke": [], "pirate_chat": []}
    for key, rule in describe.rules().items():
        recipe = "pirate_chat" if describe.kind_of(key) == "language" else "smoke"
        config = Config()
        config.model.kind = "language" if recipe == "pirate_chat" else "diffusion"
        section, _, name = key.rpartition(".")
        bad = next(value for value in (-1, 10**6, float("inf"), "", [], [0], "a/b") if _breaks(rule.holds, value))
        setattr(attrgetter(section)(config) if section else config, name, bad)
        problem = next(line for line in check(config) if line.startswith(f"{key} must") and "got" in line)
        (word,) = shlex.split(problem.rpartition("; try ")[2])
        assert word.startswith(f"{key}=")
        offered[recipe].append(word)
    for recipe, words in offered.items():
        assert check(finetune.load(recipe, [*words, *(["model.resolution=16"] if recipe == "smoke" else [])])) == []


def _breaks(holds: Callable[[Any], object], value: Any) -> bool:
    try:
        return not holds(value)
    except (TypeError, AttributeError):
        return False


# -- what other parts of the program offer ---------------------------------------------------------------------------


def test_a_folder_of_any_name_is_offered_so_that_it_can_be_typed(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.data.images import folder as images

    parent = workdir / "it's, [my] Bilder=ä"
    parent.mkdir()
    (parent / "file.txt").write_text("x")
    (parent / "link").symlink_to(workdir)
    (parent / "inner").mkdir()
    for path, meant in ((parent / "file.txt", parent), (parent, parent / "link")):
        with pytest.raises(finetune.errors.DataError) as refused:
            images.images(path)
        (word,) = shlex.split(str(refused.value)[str(refused.value).index("'data.folder=") :])
        assert finetune.load("smoke", [word]).data.folder == str(meant)


@pytest.mark.parametrize(("recipe", "key"), [("smoke", "data.folder"), ("pirate_chat", "data.file")])
def test_in_another_folder_the_example_is_offered_where_it_lies(
    finetune_cli: Cli, workdir: Path, recipe: str, key: str
) -> None:
    (line,) = finetune_cli("dataset", f"conf={recipe}").errors
    (word,) = shlex.split(line[line.index(f"{key}=") :])
    assert Path(word.removeprefix(f"{key}=")).exists()
    assert word.endswith(getattr(finetune.load(recipe).data, key.partition(".")[2]))


def test_a_pickle_is_offered_a_line_that_converts_it(workdir: Path) -> None:
    import subprocess
    import sys

    import torch
    from safetensors.torch import load_file

    from finetune import hub
    from finetune.errors import ModelError

    file = workdir / 'it\'s "my" {model}.ckpt'
    torch.save({"a": torch.ones(2)}, file)
    with pytest.raises(ModelError) as refused:
        hub.single_file(str(file))
    words = shlex.split(str(refused.value).partition("type: ")[2])
    assert words[0] == "python"
    subprocess.run([sys.executable, *words[1:]], check=True)
    assert torch.equal(load_file(file.with_suffix(".safetensors"))["a"], torch.ones(2))
