"""Tokens are drawn with the right chances, by each row's own settings."""

from collections import Counter

import pytest
import torch

from finetune.serving.sampling import Sampler, draw

pytestmark = pytest.mark.sampled
LOGITS_V = torch.tensor([2.0, 1.0, 0.0, -1.0])


def sampler(temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, seed: int = 0) -> Sampler:
    return Sampler(temperature, top_p, top_k, torch.Generator().manual_seed(seed))


def chances(chosen: Sampler, draws: int = 4000) -> list[float]:
    counts = Counter(draw(LOGITS_V[None], [chosen])[0] for _ in range(draws))
    return [counts[token] / draws for token in range(len(LOGITS_V))]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_have_their_chances(temperature: float) -> None:
    expected = (LOGITS_V / temperature).softmax(0).tolist()
    assert chances(sampler(temperature)) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    ("chosen", "tokens"),
    [
        (sampler(top_k=2), 2),
        (sampler(top_p=0.6), 1),  # the likeliest alone has 0.64
        (sampler(top_p=0.65), 2),
        (sampler(top_p=1e-9), 1),
        (sampler(top_k=99), 4),
    ],
)
def test_the_rest_is_never_drawn_and_those_left_keep_their_ratio(chosen: Sampler, tokens: int) -> None:
    left = LOGITS_V[:tokens].softmax(0).tolist() + [0.0] * (4 - tokens)
    assert chances(chosen) == pytest.approx(left, abs=0.03)


def test_rows_are_drawn_by_their_own_settings_whatever_their_neighbours() -> None:
    greedy = Sampler(0.0, 1.0, 0, None)
    logits_BV = LOGITS_V.expand(3, -1)
    together = draw(logits_BV, [sampler(3.0, seed=5), greedy, sampler(3.0, seed=6)])
    assert together == [*draw(logits_BV[:1], [sampler(3.0, seed=5)]), 0, *draw(logits_BV[:1], [sampler(3.0, seed=6)])]
