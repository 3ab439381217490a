"""How alike two language models predict: the same token rows through both, and their logits compared.

N tokens of all rows, L tokens of a row, D hidden channels, V vocabulary entries
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from finetune.language.causal_lm import head, packed_hidden_states
from finetune.language.losses import Head, logits

CHUNK_BYTES = 1 << 27  # of one model's fp32 logits; about five of it are alive at once


@dataclass(frozen=True, eq=False)
class ModelOutputs:
    """What a model makes of the rows, in CPU memory: states before the head (N, D) in fp32, and the head.

    The logits follow from it, and are larger by V / D: 17 GB for 32,000 tokens and 128,000 entries.
    """

    states: Tensor
    head: Head


@dataclass(frozen=True)
class LogitDifference:
    """A model compared with a reference over all tokens.

    relative: ‖logits − reference‖ / ‖reference‖. largest: max |Δlogit|. divergence: mean KL(reference ‖ model), nats a
    token. agreement: share of tokens for which both find the same next one likeliest.
    """

    relative: float
    largest: float
    divergence: float
    agreement: float


@torch.no_grad()
def model_outputs(model: Any, rows: Sequence[Sequence[int]], device: torch.device) -> ModelOutputs:
    """Each row (L token ids) alone through a model on `device`, in eval mode and in the model's own arithmetic."""
    model.eval()
    states = []
    for row in rows:
        ids_1L = torch.tensor([list(row)], device=device)
        positions_1L = torch.arange(ids_1L.shape[1], device=device)[None]
        states.append(packed_hidden_states(model, ids_1L, positions_1L, None)[0].float().cpu())
    return ModelOutputs(torch.cat(states), head(model).to(torch.device("cpu")))


@torch.no_grad()
def compare(reference: ModelOutputs, other: ModelOutputs, device: torch.device) -> LogitDifference:
    """How like the reference the other model is; the logits are made again on `device`, a chunk at a time, in fp32."""
    heads = [reference.head.to(device)]
    same_head = _equal(reference.head, other.head)  # as nearly always; a large vocabulary's takes 2 GiB in fp32
    heads.append(heads[0] if same_head else other.head.to(device))
    chunk = max(1, CHUNK_BYTES // (4 * heads[0].weight.shape[0]))
    apart = size = divergence = 0.0
    largest, same = torch.zeros((), device=device), 0
    pairs = zip(torch.split(reference.states, chunk), torch.split(other.states, chunk), strict=True)
    for states in pairs:
        wanted_CV, found_CV = (logits(layer, part.to(device)) for layer, part in zip(heads, states, strict=True))
        gap_CV = found_CV - wanted_CV
        apart += float(torch.linalg.vector_norm(gap_CV)) ** 2
        size += float(torch.linalg.vector_norm(wanted_CV)) ** 2
        largest = torch.maximum(largest, gap_CV.abs().max())  # unlike max(), keeps what is not a number
        same += int((wanted_CV.argmax(dim=-1) == found_CV.argmax(dim=-1)).sum())
        divergence += float(
            functional.kl_div(
                found_CV.log_softmax(dim=-1), wanted_CV.log_softmax(dim=-1), reduction="sum", log_target=True
            )
        )
    count = len(reference.states)
    if divergence < 0:  # which it is not: equal models differ by rounding, to either side
        divergence = 0.0
    return LogitDifference((apart / size) ** 0.5, float(largest), divergence / count, same / count)


def _equal(one: Head, other: Head) -> bool:
    """Whether two heads compute the same."""
    same = one.bias is other.bias if one.bias is None or other.bias is None else torch.equal(one.bias, other.bias)
    return same and torch.equal(one.weight, other.weight) and (one.softcap, one.scale) == (other.softcap, other.scale)
