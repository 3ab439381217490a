"""The losses of the detector, without scipy: who is responsible for which thing, and how far off it is.

B frames, Q predictions of each, T targets at most, C classes; boxes are centre and size, 0…1. Targets without a thing
have the label -1.
"""

import torch
from torch import Tensor
from torch.nn import functional

CLASS_WEIGHT, BOX_WEIGHT, IOU_WEIGHT = 1.0, 5.0, 2.0  # of the losses, as RT-DETR has them (arXiv 2304.08069)
CLASS_COST = 2.0
FAR = 1e4  # a cost that nobody takes willingly
CANDIDATES = 6  # predictions that answer for a thing in the encoder, where many may


def decoder_loss(logits_BQC: Tensor, boxes_BQ4: Tensor, labels_BT: Tensor, targets_BT4: Tensor) -> Tensor:
    """Each thing is answered for by one prediction, so that none is found twice."""
    cost_BQT = costs(logits_BQC, boxes_BQ4, labels_BT, targets_BT4)
    return responsible_loss(logits_BQC, boxes_BQ4, labels_BT, targets_BT4, pair_off(cost_BQT, labels_BT))


def encoder_loss(logits_BQC: Tensor, boxes_BQ4: Tensor, labels_BT: Tensor, targets_BT4: Tensor) -> Tensor:
    """Each thing is answered for by its best few predictions: many more of them learn from every frame."""
    cost_BQT = costs(logits_BQC, boxes_BQ4, labels_BT, targets_BT4)
    return responsible_loss(logits_BQC, boxes_BQ4, labels_BT, targets_BT4, best_few(cost_BQT, labels_BT))


@torch.no_grad()
def costs(logits_BQC: Tensor, boxes_BQ4: Tensor, labels_BT: Tensor, targets_BT4: Tensor) -> Tensor:
    """[B, Q, T]: how badly each prediction fits each target; columns without a thing mean nothing."""
    shares_BQT = logits_BQC.sigmoid().gather(2, labels_BT.clamp_min(0)[:, None].expand(-1, logits_BQC.shape[1], -1))
    overlap_BQT = generalised_iou(boxes_BQ4[:, :, None], targets_BT4[:, None])[1]
    apart_BQT = (boxes_BQ4[:, :, None] - targets_BT4[:, None]).abs().sum(-1)
    return BOX_WEIGHT * apart_BQT - IOU_WEIGHT * overlap_BQT - CLASS_COST * shares_BQT


def pair_off(cost_BQT: Tensor, labels_BT: Tensor) -> Tensor:
    """[B, Q]: the target that each prediction answers for, or -1; no two the same one.

    The best pair of all goes first, then the best of what is left: not always the cheapest whole, but T passes of a few
    kernels for a whole batch, where the cheapest needs a solver on the CPU.
    """
    batch, queries, targets = cost_BQT.shape
    left = cost_BQT.masked_fill(labels_BT[:, None] < 0, FAR)
    answers_BQ = torch.full((batch, queries), -1, device=cost_BQT.device)
    rows = torch.arange(batch, device=cost_BQT.device)
    for _ in range(targets):
        best_B = left.flatten(1).argmin(1)
        query_B, target_B = best_B // targets, best_B % targets
        real_B = left[rows, query_B, target_B] < FAR
        answers_BQ[rows, query_B] = torch.where(real_B, target_B, answers_BQ[rows, query_B])
        left[rows, query_B] = FAR
        left[rows, :, target_B] = FAR
    return answers_BQ


def best_few(cost_BQT: Tensor, labels_BT: Tensor) -> Tensor:
    """[B, Q]: the target that each prediction answers for, or -1; each target has CANDIDATES of them, or fewer where
    another target is nearer to one."""
    cost = cost_BQT.masked_fill(labels_BT[:, None] < 0, FAR)
    limit_B1T = cost.topk(min(CANDIDATES, cost.shape[1]), 1, largest=False).values[:, -1:]
    cheapest_BQ, target_BQ = cost.masked_fill(cost > limit_B1T, FAR).min(2)
    return target_BQ.masked_fill(cheapest_BQ >= FAR, -1)


def responsible_loss(
    logits_BQC: Tensor, boxes_BQ4: Tensor, labels_BT: Tensor, targets_BT4: Tensor, answers_BQ: Tensor
) -> Tensor:
    """Varifocal class loss (arXiv 2008.13367), L1 and generalised IoU, over the number of responsible predictions."""
    responsible_BQ = answers_BQ >= 0
    which_BQ = answers_BQ.clamp_min(0)
    wanted_BQ4 = targets_BT4.gather(1, which_BQ[..., None].expand(-1, -1, 4))
    label_BQ = labels_BT.gather(1, which_BQ).clamp_min(0)
    iou_BQ, generalised_BQ = generalised_iou(boxes_BQ4, wanted_BQ4)
    count = responsible_BQ.sum().clamp_min(1)

    quality_BQ = iou_BQ.detach().clamp(0, 1) * responsible_BQ
    right_BQC = functional.one_hot(label_BQ, logits_BQC.shape[2]) * responsible_BQ[..., None]
    weight_BQC = 0.75 * logits_BQC.detach().sigmoid() ** 2 * (1 - right_BQC) + quality_BQ[..., None] * right_BQC
    classes = functional.binary_cross_entropy_with_logits(
        logits_BQC, quality_BQ[..., None] * right_BQC, weight_BQC, reduction="sum"
    )
    apart = ((boxes_BQ4 - wanted_BQ4).abs().sum(-1) * responsible_BQ).sum()
    overlap = ((1 - generalised_BQ) * responsible_BQ).sum()
    return (CLASS_WEIGHT * classes + BOX_WEIGHT * apart + IOU_WEIGHT * overlap) / count


def generalised_iou(one_X4: Tensor, other_X4: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union of boxes as centre and size, and the generalised one (arXiv 1902.09630)."""
    low = [box[..., :2] - box[..., 2:] / 2 for box in (one_X4, other_X4)]
    high = [box[..., :2] + box[..., 2:] / 2 for box in (one_X4, other_X4)]
    shared = (torch.minimum(*high) - torch.maximum(*low)).clamp_min(0).prod(-1)
    union = one_X4[..., 2:].prod(-1) + other_X4[..., 2:].prod(-1) - shared
    around = (torch.maximum(*high) - torch.minimum(*low)).prod(-1)
    iou = shared / union.clamp_min(1e-7)
    return iou, iou - (around - union) / around.clamp_min(1e-7)
