"""Draws the next token of every reply of a batch, each by its own settings and its own random numbers.

B rows, V tokens of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.language.generate import gumbel

SCORES_BYTES = 32  # of a token's score while it is drawn: in fp32, twice in fp64, and its noise


@dataclass(frozen=True)
class Sampler:
    """How one reply is drawn: as `TextRequest` has it. random: None takes the likeliest token."""

    temperature: float
    top_p: float
    top_k: int
    random: torch.Generator | None


def draw(logits_BV: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """A token for each row.

    argmax(logits / temperature + Gumbel noise) is a sample (arXiv 1411.0030). Rounding, which differs with the rows of
    a batch, hardly ever changes it: a seeded reply is the same alone and in company.
    """
    scores_BV = logits_BV.double()
    drawn = [row for row, sampler in enumerate(samplers) if sampler.random is not None]
    if drawn:
        scores_BV[drawn] = torch.stack([_with_noise(scores_BV[row], samplers[row]) for row in drawn])
    found: list[int] = scores_BV.argmax(1).tolist()
    return found


def _with_noise(scores_V: Tensor, sampler: Sampler) -> Tensor:
    scores_V = scores_V / sampler.temperature
    if 0 < sampler.top_k < len(scores_V):
        least = scores_V.topk(sampler.top_k).values[-1]
        scores_V = scores_V.masked_fill(scores_V < least, -torch.inf)
    if sampler.top_p < 1:
        sorted_V, order_V = scores_V.sort(descending=True)
        before_V = sorted_V.softmax(0).cumsum(0) - sorted_V.softmax(0)  # probability of all that are likelier
        scores_V = scores_V.index_fill(0, order_V[before_V >= sampler.top_p], -torch.inf)
    assert sampler.random is not None
    return scores_V + gumbel(sampler.random, len(scores_V)).to(scores_V.device)
