"""Figures about two models are those of their whole logits, whatever the chunks, and nothing hides in them."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config.schema import ModelConfig
from finetune.language import compare_logits
from finetune.language.causal_lm import load_model
from finetune.language.losses import Head

CPU = torch.device("cpu")
ROWS = [[5, 9, 40, 7], [33, 12, 61, 8, 90, 14, 3], [2]]


@pytest.fixture
def load(tiny_language: Path) -> Callable[[float], Any]:
    """The tiny model with its embedding times a factor."""

    def build(factor: float) -> Any:
        model: Any = load_model(ModelConfig(kind="language", base=str(tiny_language)), torch.float32, CPU)
        model.get_input_embeddings().weight.mul_(factor)
        model.get_output_embeddings().weight.mul_(1 / factor)
        return model

    return build


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 13, 1 << 27])
def test_the_figures_are_those_of_the_whole_logits(
    load: Callable[[float], Any], monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(compare_logits, "CHUNK_BYTES", chunk_bytes)
    models = load(1.0), load(1.5)
    with torch.no_grad():
        ours, theirs = (torch.cat([model(torch.tensor([row])).logits[0] for row in ROWS]).double() for model in models)
    found = compare_logits.compare(*(compare_logits.model_outputs(model, ROWS, CPU) for model in models), CPU)
    assert found.relative == pytest.approx(float((theirs - ours).norm() / ours.norm()), rel=1e-5)
    assert found.largest == pytest.approx(float((theirs - ours).abs().max()), rel=1e-5)
    gain = ours.log_softmax(-1) - theirs.log_softmax(-1)
    assert found.divergence == pytest.approx(float((ours.softmax(-1) * gain).sum(-1).mean()), rel=1e-4)
    assert found.agreement == pytest.approx(float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()))


def test_a_head_that_both_share_is_moved_once(load: Callable[[float], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large vocabulary it takes gigabytes of the GPU."""
    outputs = compare_logits.model_outputs(load(1.0), ROWS, CPU)
    copied = replace(outputs, head=replace(outputs.head, weight=outputs.head.weight.clone()))
    bias = torch.ones(len(outputs.head.weight))
    moved: list[Head] = []
    to = Head.to
    monkeypatch.setattr(Head, "to", lambda head, device: moved.append(head) or to(head, device))
    assert compare_logits.compare(outputs, copied, CPU).relative == 0
    assert len(moved) == 1
    for other in ({"weight": 2 * outputs.head.weight}, {"bias": bias}, {"scale": 2.0}, {"softcap": 1.0}):
        moved.clear()
        assert (
            compare_logits.compare(outputs, replace(outputs, head=replace(outputs.head, **other)), CPU).relative > 0.01
        )
        assert len(moved) == 2


def test_a_model_is_like_itself(load: Callable[[float], Any]) -> None:
    outputs = compare_logits.model_outputs(load(1.0), ROWS, CPU)
    assert compare_logits.compare(outputs, outputs, CPU) == compare_logits.LogitDifference(0.0, 0.0, 0.0, 1.0)


def test_rounding_makes_no_divergence_below_zero(load: Callable[[float], Any]) -> None:
    outputs = compare_logits.model_outputs(load(1.0), ROWS, CPU)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        noise = 1e-7 * torch.randn(outputs.states.shape, generator=generator)
        near = replace(outputs, states=outputs.states + noise)
        assert 0 <= compare_logits.compare(outputs, near, CPU).divergence < 1e-6


def test_what_is_not_a_number_shows_in_every_figure(
    load: Callable[[float], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_logits, "CHUNK_BYTES", 1)
    outputs = compare_logits.model_outputs(load(1.0), ROWS, CPU)
    broken = replace(outputs, states=outputs.states.clone())
    broken.states[3, 0] = float("nan")
    found = compare_logits.compare(outputs, broken, CPU)
    assert all(math.isnan(figure) for figure in (found.relative, found.largest, found.divergence))
