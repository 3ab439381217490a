"""The commands that a run prints are pasted: the shell and Hydra read the settings that the run had."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import finetune
from finetune import api
from finetune.config.describe import as_dict
from finetune.config.schema import Config
from finetune.config.spelling import override
from finetune.planning.plan import Plan, Setting
from finetune.reporting import terminal
from finetune.run.receipts import save_receipt
from finetune.run.records import Adapter, Report, Result, Samples
from tests.unit.reporting.records import run_record, text_set

TRIGGER = 'it\'s "my" style, [v2] = ${ä}'
ODD = {
    "name": 'my run (2) = it\'s [ä], "x"',
    "caption.trigger": TRIGGER,
    "data.folder": "my pics, 'old' = [1]",
    "sample.seeds": [3, 4],
}


def result(config: Config) -> Result:
    folder = Path(config.run_dir)
    save_receipt(folder, "train", Report("x"), input_hash="", seconds=1.0, figures={})
    adapter = Adapter(str(folder / "adapter"), {}, {}, "base", config.caption.trigger)
    return Result(None, text_set(), run_record(folder), adapter, Samples("", "", ()), Report(str(folder / "r.html")))


def printed(out: str) -> list[list[str]]:
    """The lines below "next", as a shell takes them apart."""
    return [shlex.split(line) for line in out.partition("next\n")[2].splitlines() if line.startswith("  ")]


def settings(words: list[str]) -> Config:
    recipe, *others = words
    assert recipe.startswith("conf=")
    return finetune.load(recipe.removeprefix("conf="), others)


@pytest.mark.parametrize("run_dir", ["", "out/a=b,c [1]/it's"])
def test_the_next_commands_of_a_run(
    finetune_cli: Callable[..., Any], workdir: Path, monkeypatch: pytest.MonkeyPatch, run_dir: str
) -> None:
    seen: list[Config] = []
    monkeypatch.setattr(api, "train", lambda config: seen.append(config) or result(config))
    values = ODD | ({"run_dir": run_dir} if run_dir else {})
    words = [override(key, value) for key, value in values.items()]
    answer = finetune_cli("train", "conf=smoke", *words, "trainer.restart=true")
    assert answer.code == 0, answer.err
    board, sample = printed(answer.out)
    assert board[1:] == ["--logdir", f"{seen[0].run_dir}/tensorboard"]
    again = settings(sample[sample.index("sample") + 1 :])
    assert again.sample.prompts == [f"a big green fish in space, {TRIGGER}"]
    seen[0].sample.prompts, seen[0].trainer.restart = again.sample.prompts, False
    assert as_dict(again) == as_dict(seen[0])


def test_the_next_commands_of_every_run_of_a_sweep(
    finetune_cli: Callable[..., Any], workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Config] = []
    monkeypatch.setattr(api, "train", lambda config: seen.append(config) or result(config))
    answer = finetune_cli("train", "conf=smoke", 'caption.trigger="a, b=c","it\'s [ä]"', "seed=1,2", "--multirun")
    assert answer.code == 0, answer.err
    table = answer.out.rpartition("4 runs")[2].split()
    assert table[:4] == ["settings", "loss", "validation", "folder"]
    assert table.count("seed=1") == table.count("seed=2") == 2
    assert "conf=smoke" not in table
    samples = [
        words for part in answer.out.split("next\n")[1:] for words in printed(f"next\n{part}") if "sample" in words
    ]
    assert len(samples) == len(seen) == 4
    for words, config in zip(samples, seen, strict=True):
        again = settings(words[words.index("sample") + 1 :])
        config.sample.prompts, config.run_dir = again.sample.prompts, str(Path(config.run_dir).relative_to(workdir))
        assert as_dict(again) == as_dict(config)


def test_the_command_that_a_plan_offers(
    finetune_cli: Callable[..., Any], workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = Setting(2, 3, 1, True, False, 0.25, 8, {"weights": 5.0})
    plan = Plan(
        "another name", "a/base", "a GPU", 23.5, "bf16", "none", "images", chosen, chosen, (), {"training": 5.0}, (), ()
    )
    monkeypatch.setattr(api, "plan", lambda config: plan)
    words = [override(key, value) for key, value in ODD.items()]
    answer = finetune_cli("plan", "conf=smoke", *words, "trainer.micro_batch=9")
    assert answer.out.startswith("finetune plan conf=smoke ")
    (line,) = printed(answer.out)
    again = settings(line[line.index("train") + 1 :])
    trainer = again.trainer
    assert (trainer.micro_batch, trainer.accumulate, trainer.activation_checkpointing) == (2, 3, 1)
    assert trainer.offload_activations
    assert (again.name, again.caption.trigger, again.data.folder) == (ODD["name"], TRIGGER, ODD["data.folder"])


def test_a_recipe_of_any_name_is_offered_so_that_it_can_be_typed(
    finetune_cli: Callable[..., Any], capfd: pytest.CaptureFixture[str], workdir: Path
) -> None:
    (workdir / "conf").mkdir()
    (workdir / "conf" / "it's mine, [2].yaml").write_text("defaults: [smoke]\n")
    config = finetune.load("it's mine, [2]")
    terminal.show(config, result(config), began=0.0)
    (_, sample) = printed(capfd.readouterr().out)
    answer = finetune_cli(*sample[sample.index("sample") :], "--cfg", "job")
    assert yaml.safe_load(answer.out)["name"] == config.name
