"""What `finetune bench` measures, prints and compares."""

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pynvml
import pytest
import torch

from finetune.config.schema import ModelConfig, Precision, Quantize
from finetune.errors import ConfigError
from finetune.language.causal_lm import load_model
from finetune.language.meta import language_model
from finetune.workstation import large_speeds, measuring, speeds, training_speeds
from finetune.workstation.bench import ARTICLE, Benchmark, Figure, change, load, table
from finetune.workstation.measuring import Meter, Speed
from tests.conftest import Answer
from tests.unit.workstation.gpus import AT_WORK, GEFORCE, stand_in

Cli = Callable[..., Answer]


def figure(*values: float, more_is_better: bool = False) -> Figure:
    middle = sorted(values)[len(values) // 2]
    return Figure("tokens/s" if more_is_better else "s", more_is_better, middle, min(values), max(values), len(values))


def benchmark(**figures: Figure) -> Benchmark:
    return Benchmark(1.8e9, 0.1, "desk", "NVIDIA GeForce RTX 4090", 16, {"torch": "2.13.0"}, figures)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, overrides = speeds.IMAGE_MODEL
    values = {"PROMPT_TOKENS": 8, "CPU_TOKENS": 4, "IMAGE_MODEL": (recipe, [*overrides, "sample.steps=1"])}
    for name, value in values.items():
        monkeypatch.setattr(speeds, name, value)
    recipes = {"pixar_style": ["model.resolution=32", "trainer.micro_batch=1"], "pirate_chat": ["data.length=64"]}
    for name, value in {"PHOTO": (96, 80), "CROP": 64, "EXAMPLES": 4, "RECIPES": recipes}.items():
        monkeypatch.setattr(training_speeds, name, value)


@pytest.mark.exhaustive
def test_the_embedded_models_are_measured(small: None, finetune_cli: Cli, workdir: Path) -> None:
    answer = finetune_cli("bench", "--repeats", "2", "--json")
    assert answer.code == 0
    Path("now.json").write_text(answer.out)
    found = load(Path("now.json"))
    assert list(found.figures) == [
        *("text-fp32-pp8", "text-fp32-tg4", "text-bf16-pp8", "text-bf16-tg4"),
        *("text-int8-pp8", "text-int8-tg4", "text-nf4-pp8", "text-nf4-tg4"),
        *("image-128px-efficient", "image-128px-plain"),
        *("train-pixar_style", "train-pirate_chat"),
        *("resnet50-b1", "resnet50-b1-with-loading", "resnet50-loading"),
    ]
    for each in found.figures.values():
        assert 0 < each.low <= each.median <= each.high
        assert each.repeats == 2
        assert each.more_is_better == each.unit.endswith("/s")
    assert {"finetune", "torch", "transformers", "diffusers"} <= found.versions.keys()


def test_both_ways_of_attention_are_used(small: None, monkeypatch: pytest.MonkeyPatch, workdir: Path) -> None:
    used: list[set[str]] = []

    def note(_: Any, backbone: Any, *__: Any, **___: Any) -> None:
        used.append({type(each).__name__ for each in backbone.attn_processors.values()})

    monkeypatch.setattr(speeds.ImageSampler, "generate", note)
    for name, measure in speeds.every_measurement().items():
        if name.startswith("image-"):
            list(measure(1))
    assert used == [{"AttnProcessor2_0"}] * 2 + [{"AttnProcessor"}] * 2


SLOW, FAST, NEAR = (10.0, 10.5, 11.0), (5.0, 5.5, 6.0), (9.0, 9.9, 10.4)


@pytest.mark.parametrize(
    ("before", "now", "more_is_better", "word"),
    [
        (FAST, SLOW, False, "slower"),
        (SLOW, FAST, False, "faster"),
        (FAST, SLOW, True, "faster"),
        (SLOW, FAST, True, "slower"),
        (SLOW, NEAR, False, "same"),  # some repeats are alike
        ((10.0, 10.0, 10.0), (10.4, 10.4, 10.4), False, "same"),  # too little
    ],
)
def test_a_change_is_told_from_chance(before: Any, now: Any, more_is_better: bool, word: str) -> None:
    old = benchmark(a=figure(*before, more_is_better=more_is_better))
    new = benchmark(a=figure(*now, more_is_better=more_is_better), b=figure(1.0))
    assert (change(old, new, "a"), change(old, new, "b")) == (word, "")


def measurements(*values: float) -> dict[str, measuring.Measure]:
    return {"text-fp32": lambda _: iter([Speed("text-fp32-tg128", "tokens/s", True, values)])}


@pytest.mark.parametrize(("values", "code", "shown"), [(FAST, 1, "-48% slower"), (SLOW, 0, "+0% same")])
def test_slower_than_an_earlier_file_is_an_exit_code(
    values: tuple[float, ...],
    code: int,
    shown: str,
    finetune_cli: Cli,
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(speeds, "every_measurement", lambda: measurements(*SLOW))
    Path("before.json").write_text(finetune_cli("bench", "--json").out)
    monkeypatch.setattr(speeds, "every_measurement", lambda: measurements(*values))
    answer = finetune_cli("bench", "--compare", "before.json")
    assert answer.code == code
    [line] = [line for line in answer.out.splitlines() if line.startswith("text-fp32-tg128")]
    assert line.endswith(shown)


def test_a_measurement_that_fails_is_one_line_and_the_figures_of_the_others_stay(
    finetune_cli: Cli, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(_: int) -> Iterator[Speed]:
        yield Speed("resnet50-b32", "iterations/s", True, FAST)
        raise RuntimeError("input dtypes must be the same\nsomewhere")

    monkeypatch.setattr(speeds, "every_measurement", lambda: {"resnet50": breaks} | measurements(*SLOW))
    answer = finetune_cli("bench")
    assert answer.code == 1
    rows = answer.out.splitlines()
    assert [row.split()[0] for row in rows if "/s " in row] == ["resnet50-b32", "text-fp32-tg128"]
    assert [row for row in rows if "failed" in row] == ["resnet50 failed: input dtypes must be the same somewhere"]
    Path("now.json").write_text(finetune_cli("bench", "--json").out)
    assert load(Path("now.json")).failed == {"resnet50": "input dtypes must be the same somewhere"}


def test_figures_of_the_article_stand_below_those_that_are_like_them() -> None:
    now = benchmark(**{"llama2_7b-fp16-tg128": figure(96.0, more_is_better=True), "sd21-512px-plain": figure(1.9)})
    assert now.figures.keys() <= ARTICLE.keys()
    lines = table(now).splitlines()
    assert lines[-3:] == [
        "beside an RTX 4090 with real weights, by an article",
        "sd21-512px-plain             3.8  s                  here 2.0 times as fast",
        "llama2_7b-fp16-tg128          48  tokens/s           here 2.0 times as fast",
    ]
    assert "article" not in table(benchmark(a=figure(1.0)))


CPU = torch.device("cpu")


def test_large_bases_are_measured_with_random_weights(
    tiny_base: Path, tiny_language: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU and small, as a GPU and a large base are not here."""
    monkeypatch.setattr(large_speeds, "STEPS", 2)
    monkeypatch.setattr(large_speeds, "NEW_TOKENS", 3)
    monkeypatch.setattr(large_speeds, "PROMPT_TOKENS", 8)
    images = large_speeds.image(
        2, name="sd21-64px-plain", model=ModelConfig(base=str(tiny_base)), side=64, attention="plain", device=CPU
    )
    base = ModelConfig(kind="language", base=str(tiny_language))
    texts = large_speeds.text(2, name="llama2_7b-fp16", model=base, stored=Quantize.none, device=CPU)
    found = {speed.id: speed for speed in (*images, *texts)}
    assert list(found) == ["sd21-64px-plain", "llama2_7b-fp16-pp8", "llama2_7b-fp16-tg3"]
    assert all(len(speed.values) == 2 and min(speed.values) > 0 for speed in found.values())


@pytest.mark.parametrize("stored", [Quantize.int8, Quantize.nf4])
def test_random_weights_are_stored_as_a_quantised_base_is(
    tiny_language: Path, monkeypatch: pytest.MonkeyPatch, stored: Quantize
) -> None:
    # On a CPU with AVX512-BF16, bitsandbytes would take its layout of its own, which GPUs don't have.
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    base = ModelConfig(kind="language", base=str(tiny_language), quantize=stored)
    loaded: Any = load_model(base, torch.float16, CPU)
    drawn: Any = large_speeds.quantised(language_model(base, torch.float16), stored, CPU)
    assert {name: _as_stored(layer) for name, layer in drawn.named_modules()} == {
        name: _as_stored(layer) for name, layer in loaded.named_modules()
    }
    ids_BL = torch.arange(8)[None]
    assert drawn(ids_BL).logits.isfinite().all()
    weight = drawn.model.layers[0].mlp.up_proj.weight
    assert float(weight.data.float().std()) > 0


def _as_stored(layer: Any) -> tuple[Any, ...]:
    """What decides which kernels a layer takes."""
    weight, state = getattr(layer, "weight", None), getattr(layer, "state", None)
    four = getattr(weight, "quant_state", None)
    return (
        type(layer),
        None if weight is None else (type(weight), weight.dtype, weight.shape),
        four and (four.quant_type, four.blocksize, four.nested, four.dtype, four.shape),
        getattr(layer, "compute_dtype", None),
        state and (state.threshold, state.has_fp16_weights, state.use_pool),
    )


def test_a_gpu_s_own_meters_are_figures_and_missing_ones_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, AT_WORK)
    monkeypatch.setattr(measuring, "handles", lambda _: [0])
    meter = Meter(CPU)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", lambda _: 1_234_567 + 50_000)
    assert list(meter.energy("a", "step", 5)) == [Speed("a-energy", "J a step", False, (10.0,))]
    assert list(meter.utilisation("a")) == [Speed("a-busy", "% of the time", True, (97.0,))]
    stand_in(monkeypatch, GEFORCE)
    assert [*meter.energy("a", "step", 5), *meter.utilisation("a")] == []


def test_a_table_says_what_else_is_another_one_and_fits_a_terminal() -> None:
    now = benchmark(**{"image-128px-efficient": figure(*SLOW), "text-fp32-pp256": figure(123.4, 150.2, 160.9)})
    assert table(now).splitlines() == [
        "NVIDIA GeForce RTX 4090, 16 threads, torch 2.13.0",
        "",
        "image-128px-efficient       10.5  s                          10–11",
        "text-fp32-pp256              150  s                        123–161",
    ]
    before = replace(now, host="lap", threads=1, load=3.5, versions={"torch": "2.11.0"})
    shown = table(replace(now, load=2.5), before).splitlines()
    assert shown[0].endswith("; load 2.5 before")
    assert shown[2].endswith("10–11  +0% same")
    assert max(map(len, shown)) <= 80
    assert shown[-5].startswith("compared with 20")
    assert shown[-4:] == ["host was lap", "threads was 1", "load was 3.5", "torch was 2.11.0"]


@pytest.mark.parametrize("text", [None, "", "[]", '{"time": 1}'])
def test_a_file_that_can_not_be_compared_is_named(text: str | None, finetune_cli: Cli, workdir: Path) -> None:
    if text is not None:
        Path("before.json").write_text(text)
    answer = finetune_cli("bench", "--compare", "before.json")
    assert answer.code == ConfigError.exit_code
    assert answer.errors[0].startswith("error: cannot compare with before.json (")
    assert answer.errors[0].endswith("); make one with: finetune bench --json > before.json")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("conf=pixar_style",), "unrecognized arguments: conf=pixar_style"),
        (("--repeats", "0"), "argument --repeats: 0 is no number from 1 to 1000"),
        (("--repeats", "many"), "argument --repeats: many is no number from 1 to 1000"),
    ],
)
def test_other_words_are_refused(finetune_cli: Cli, words: tuple[str, ...], why: str) -> None:
    answer = finetune_cli("bench", *words)
    assert answer.code == ConfigError.exit_code
    usage = "usage: finetune bench [--repeats NUMBER] [--compare FILE] [--json]"
    assert answer.errors == [f"error: {why}; {usage}"]


@pytest.mark.parametrize(("round_s", "numbers"), [(1.0, 6), (5.0, 5), (60.0, 4)])
def test_slow_machines_repeat_less(round_s: float, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(perf_counter=itertools.count(0.0, round_s).__next__)
    monkeypatch.setattr(measuring, "time", clock)
    assert list(measuring.rounds(5)) == list(range(numbers))


def test_a_precision_that_the_device_has_not_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert list(speeds.text(2, name="text-nf4", precision=Precision.fp32, quantize=Quantize.nf4, device=CPU)) == []
    said = capsys.readouterr().err
    assert said.startswith("text-nf4: not on this machine (model.quantize=nf4 does not work on this cpu (")
