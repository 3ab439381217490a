"""Activation checkpointing: which blocks it takes, and that gradients don't change by a bit."""

from typing import Any

import pytest
import torch
from torch import nn

from finetune.errors import ModelError
from finetune.memory import checkpointing
from tests.tiny_language_models import CHATS
from tests.unit.memory.models import MODELS, adapted, gradients, language, tokens

pytestmark = pytest.mark.sampled


torch.set_num_threads(1)
BLOCKS = {"unet": 11, "transformer": 3, "llama": 3}


@pytest.fixture
def recomputed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was handed to torch's checkpoint function."""
    calls: list[Any] = []
    real = checkpointing.checkpoint
    monkeypatch.setattr(checkpointing, "checkpoint", lambda *a, **k: calls.append(a[0]) or real(*a, **k))
    return calls


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_stay_bit_for_bit_with_dropout(name: str, every: int, recomputed: list[Any]) -> None:
    make, output, targets = MODELS[name]
    model = adapted(make, targets)
    expected = gradients(model, output)
    assert expected
    assert any(bool(gradient.any()) for gradient in expected)
    checkpointing.set_checkpointing(model, every)
    for _ in range(2):
        recomputed.clear()
        found = gradients(model, output)
        assert len(recomputed) == -(-BLOCKS[name] // every)  # the same blocks in every step
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_0_switches_it_off(recomputed: list[Any]) -> None:
    model = adapted(language, ["q_proj"])
    checkpointing.set_checkpointing(model, 1)
    checkpointing.set_checkpointing(model, 0)
    gradients(model, tokens)
    assert not recomputed


@pytest.mark.parametrize("architecture", CHATS)
def test_every_language_model_has_blocks(architecture: str) -> None:
    model = language(architecture, layers=2)
    checkpointing.set_checkpointing(model, 2)
    assert any(module.gradient_checkpointing for module in checkpointing.checkpointable(model))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match=r"Linear .*trainer.activation_checkpointing=0"):
        checkpointing.set_checkpointing(nn.Linear(2, 2), 1)
    checkpointing.set_checkpointing(nn.Linear(2, 2), 0)
