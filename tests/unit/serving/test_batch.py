"""Rows of a batch have the logits they have alone, whoever joins and leaves meanwhile."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config.schema import ModelConfig
from finetune.errors import ModelError
from finetune.language import causal_lm
from finetune.serving import language
from finetune.serving.batch import CachedBatch, RereadBatch, Router, padded
from finetune.serving.requests import BASE
from tests.tiny_language_models import CHATS, save_language

CPU, FP32 = torch.device("cpu"), torch.float32
ROWS = [[4, 5, 6], [7, 8, 9, 10, 11, 12, 13], [5], [6, 7]]


@pytest.fixture(scope="module", params=["llama", "gemma2", "mistral_sliding"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = save_language(tmp_path_factory.mktemp("base"), request.param)
    return causal_lm.load_model(ModelConfig(kind="language", base=str(folder)), FP32, CPU)


def alone(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    return found


@pytest.mark.sampled
@pytest.mark.parametrize("way", [CachedBatch, RereadBatch])
@torch.no_grad()
def test_rows_are_as_alone_while_others_join_and_leave(model: Any, way: type[CachedBatch | RereadBatch]) -> None:
    batch = way(model, Router(model), CPU, FP32)
    tokens = itertools.cycle([4, 9, 14, 5])
    rows: list[list[int]] = []

    def check(logits_BV: torch.Tensor, expected: list[list[int]]) -> None:
        for logits_V, ids in zip(logits_BV, expected, strict=True):
            torch.testing.assert_close(logits_V, alone(model, ids), rtol=1e-3, atol=1e-3)

    def step() -> None:
        for row in rows:
            row.append(next(tokens))
        check(batch.step([row[-1] for row in rows]), rows)

    def join(*new: list[int]) -> None:
        check(batch.join(new, [BASE] * len(new)), list(new))
        rows.extend(list(ids) for ids in new)

    def keep(*places: int) -> None:
        batch.keep(places)
        rows[:] = [rows[place] for place in places]

    join(ROWS[0])
    step()
    join(ROWS[1], ROWS[2])  # one is longer than all that is there
    step()
    keep(0, 2)  # the longest leaves
    step()
    join(ROWS[3])
    for _ in range(70):  # more than the room that a cache begins with
        step()
    keep()
    join(ROWS[1])
    step()


def test_padding_stands_in_front() -> None:
    ids_NL, mask_NL = padded([[4, 5, 6], [7]], CPU)
    assert ids_NL.tolist() == [[4, 5, 6], [0, 0, 7]]
    assert mask_NL.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.sampled
@pytest.mark.parametrize("architecture", CHATS)
def test_every_architecture_here_passes_the_check_with_a_cache(architecture: str, tmp_path: Path) -> None:
    folder = save_language(tmp_path, architecture)
    made: Any = causal_lm.load_model(ModelConfig(kind="language", base=str(folder)), FP32, CPU)
    batch = language.working_batch(made, Router(made), ROWS, [3], CPU, FP32)
    assert isinstance(batch, CachedBatch)


def test_a_model_whose_cache_is_wrong_writes_without(
    model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(CachedBatch, "step", lambda self, tokens: torch.ones(len(tokens), model.config.vocab_size))
    batch = language.working_batch(model, Router(model), ROWS, [3], CPU, FP32)
    assert isinstance(batch, RereadBatch)
    assert "replies are written without a key-value cache, which is slow: logits in a batch differ" in (
        capsys.readouterr().err
    )


def test_a_model_that_can_not_write_says_why(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise NotImplementedError("no such layer")

    monkeypatch.setattr(CachedBatch, "join", fail)
    monkeypatch.setattr(RereadBatch, "join", fail)
    with pytest.raises(ModelError, match="can't write several replies at once: NotImplementedError: no such layer"):
        language.working_batch(model, Router(model), ROWS, [3], CPU, FP32)
