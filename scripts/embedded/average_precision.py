"""Average precision at IoU 0.5, written from its definition (COCO's 101 recalls), to measure the detector with."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IOU = 0.5
RECALLS = 101


@dataclass(frozen=True)
class Found:
    """What was found in a picture, or is truly in it: classes [N], edges [N, 4] and, of what was found, scores [N]."""

    classes: Tensor
    edges: Tensor
    scores: Tensor | None = None


def ap50(found: Sequence[Found], truths: Sequence[Found]) -> float:
    """Mean over the classes that the truths have. Pictures in the same order."""
    classes = torch.cat([truth.classes for truth in truths]).unique().tolist()
    return sum(class_ap50(found, truths, name) for name in classes) / len(classes)


def class_ap50(found: Sequence[Found], truths: Sequence[Found], wanted: int) -> float:
    """The best claim takes the truth that it overlaps most, if by IoU; a truth is taken once."""
    hits: list[tuple[float, bool]] = []
    total = 0
    for claimed, truth in zip(found, truths, strict=True):
        real = truth.edges[truth.classes == wanted]
        total += len(real)
        mine = claimed.classes == wanted
        assert claimed.scores is not None
        scores, edges = claimed.scores[mine], claimed.edges[mine]
        order = scores.argsort(descending=True, stable=True)
        overlap = ious(edges[order], real)
        for score, row in zip(scores[order].tolist(), overlap, strict=True):
            best = int(row.argmax()) if len(real) else 0
            hit = bool(len(real)) and float(row[best]) >= IOU
            hits.append((score, hit))
            if hit:
                overlap[:, best] = -1
    hits.sort(key=lambda entry: -entry[0])
    right = torch.tensor([hit for _, hit in hits], dtype=torch.float64).cumsum(0)
    precision = right / torch.arange(1, len(hits) + 1)
    recall = right / total
    # The precision at a recall is the best at that recall or beyond.
    levels = torch.linspace(0, 1, RECALLS, dtype=torch.float64)
    best = precision.flip(0).cummax(0).values.flip(0) if len(hits) else precision
    places = torch.searchsorted(recall, levels)
    return float(torch.cat([best, best.new_zeros(1)])[places].mean())


def ious(one_N4: Tensor, other_M4: Tensor) -> Tensor:
    """[N, M] of boxes by their edges."""
    low = torch.maximum(one_N4[:, None, :2], other_M4[None, :, :2])
    high = torch.minimum(one_N4[:, None, 2:], other_M4[None, :, 2:])
    shared = (high - low).clamp_min(0).prod(-1)
    areas = [(box[:, 2:] - box[:, :2]).prod(-1) for box in (one_N4, other_M4)]
    return shared / (areas[0][:, None] + areas[1] - shared)
