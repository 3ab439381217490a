"""What the detector learns from, by independent means: true boxes, fair pairs, the measure of the outcome."""

from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts.embedded.average_precision import Found, ap50
from scripts.embedded.box_sets import Labelled
from scripts.embedded.detector import new_detector, windows
from scripts.embedded.detector_loss import best_few, decoder_loss, generalised_iou, pair_off
from scripts.toyworld import render as rendering
from scripts.toyworld.boxes import boxes
from scripts.toyworld.crowd import Crowd, sample_crowd
from scripts.toyworld.looks import STYLES
from scripts.toyworld.render import batch_of, picture
from scripts.toyworld.scene import KINDS, Scene, sample_scene

SIDE = 96


def shown(scene: Scene | Crowd, slot: int, look: str, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The pixels that change when one thing is painted white instead of black, all of its parts: what shows of it."""
    placed_things = rendering.placed_things

    def picture_with(tone: float) -> Tensor:
        def painted(scene: Scene | Crowd, *, frontal: bool) -> list[Any]:
            placed = placed_things(scene, frontal=frontal)
            placed[slot] = replace(placed[slot], rgb=[(tone,) * 3] * len(placed[slot].parts))
            return placed

        with monkeypatch.context() as patched:
            patched.setattr(rendering, "placed_things", painted)
            return picture(batch_of([scene], STYLES[look], SIDE, SIDE, torch.device("cpu")))[0].int()

    return (picture_with(0.0) - picture_with(1.0)).abs().amax(0) > 40


@pytest.mark.parametrize("look", ["flat", "plastic", "pixar"])
@pytest.mark.parametrize("scene", [sample_scene(4, things=2), sample_crowd(3)], ids=["scene", "crowd"])
def test_a_box_holds_what_the_picture_shows(scene: Scene | Crowd, look: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = boxes([scene], look, SIDE)[0]
    assert [box.kind for box in found] == [thing.kind for thing in scene.things]
    for slot, box in enumerate(found):
        rows, columns = shown(scene, slot, look, monkeypatch).nonzero(as_tuple=True)
        seen = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert [float(edge) for edge in seen] == pytest.approx([SIDE * edge for edge in box.edges], abs=2)


def test_what_hides_behind_others_has_no_box() -> None:
    crowd = sample_crowd(3)
    front = replace(crowd.things[0], kind="house")  # the others have gaps to look through
    behind = replace(front, stance=replace(front.stance, z=front.stance.z - 1, scale=front.stance.scale / 2))
    hidden = replace(crowd, things=(behind, front))
    assert [box.kind for box in boxes([hidden], "flat", SIDE)[0]] == [front.kind]


def test_pairs_are_the_cheapest_where_things_are_apart_and_never_share() -> None:
    generator = torch.Generator().manual_seed(0)
    cost_BQT = torch.rand(50, 6, 3, generator=generator)
    labels_BT = torch.randint(-1, 5, (50, 3), generator=generator)
    answers_BQ = pair_off(cost_BQT, labels_BT)
    cheapest = 0
    for cost_QT, labels_T, answers_Q in zip(cost_BQT, labels_BT, answers_BQ, strict=True):
        real = [slot for slot in range(3) if labels_T[slot] >= 0]
        assert sorted(answers_Q[answers_Q >= 0].tolist()) == real
        taken = sum(float(cost_QT[query, slot]) for query, slot in enumerate(answers_Q.tolist()) if slot >= 0)
        best = min(
            sum(float(cost_QT[query, slot]) for query, slot in zip(queries, real, strict=True))
            for queries in permutations(range(6), len(real))
        )
        assert taken >= best - 1e-6
        cheapest += taken < best + 1e-6
    assert cheapest > 30  # of 50 with random costs, where things are much nearer to one another than in a frame


def test_several_answer_for_a_thing_in_the_encoder_and_none_for_no_thing() -> None:
    cost_BQT = torch.rand(4, 40, 3, generator=torch.Generator().manual_seed(1))
    answers_BQ = best_few(cost_BQT, torch.tensor([[1, 1, -1]]).expand(4, -1))
    counts = torch.stack([(answers_BQ == slot).sum(1) for slot in range(3)])
    assert (counts[:2] >= 3).all()
    assert (counts[:2] <= 6).all()
    assert (counts[2] == 0).all()


def test_the_loss_falls_to_nothing_where_all_is_found() -> None:
    labels_BT, targets_BT4 = torch.tensor([[2, -1]]), torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0, 0, 0, 0]]])
    boxes_BQ4 = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.1, 0.1, 0.1, 0.1]]])
    logits_BQC = torch.full((1, 2, 5), -12.0)
    missed = decoder_loss(logits_BQC, boxes_BQ4, labels_BT, targets_BT4)
    logits_BQC[0, 0, 2] = 12.0
    found = decoder_loss(logits_BQC, boxes_BQ4, labels_BT, targets_BT4)
    doubled = logits_BQC.clone()
    doubled[0, 1, 2] = 12.0
    assert found < 1e-3 < missed
    assert decoder_loss(doubled, boxes_BQ4, labels_BT, targets_BT4) > missed / 2


def test_generalised_iou_of_boxes_apart_says_how_far() -> None:
    one, near, far = torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.5, 0.2, 0.2, 0.2], [0.8, 0.2, 0.2, 0.2]])
    assert generalised_iou(one, one)[1] == pytest.approx(1.0)
    assert generalised_iou(one, near)[0] == generalised_iou(one, far)[0] == 0
    assert generalised_iou(one, near)[1] > generalised_iou(one, far)[1]


def test_a_window_shows_what_its_labels_say() -> None:
    """A picture with one white square: in every window, mirrored or not, its box is where the white is."""
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    image[..., 20:36, 24:32] = 255
    edges = torch.tensor([[[24, 20, 32, 36], [0, 0, 0, 0]]]) / 64
    pictures = Labelled(image, edges, torch.tensor([[5, -1]]), [])
    images, labels, targets = windows(pictures, torch.ones(1), 40, 64, torch.Generator().manual_seed(0))
    whole = 0
    for picture_3PP, labels_K, targets_K4 in zip(images, labels, targets, strict=True):
        assert labels_K[1] == -1
        rows, columns = (picture_3PP[0] > 0.5).nonzero(as_tuple=True)
        if labels_K[0] == 5:
            middle, size = targets_K4[0, :2] * 64, targets_K4[0, 2:] * 64
            seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert [float(x) for x in (*(middle - size / 2), *(middle + size / 2))] == pytest.approx(
                [float(x) for x in seen], abs=1.5
            )
            whole += 1
        else:
            assert len(rows) < 0.4 * 16 * 8 * 4  # little of it, at the edge
    assert whole > 20


def test_average_precision_is_that_of_coco() -> None:
    """Against pycocotools, on noisy finds with misses, doubles and wrong classes."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rng = np.random.default_rng(0)
    truths, found, gt, dt = [], [], [], []
    for image in range(30):
        count = int(rng.integers(0, 4))
        corner, side = rng.uniform(0, 0.6, (count, 2)), rng.uniform(0.1, 0.4, (count, 2))
        edges, kinds = np.hstack([corner, corner + side]), rng.integers(0, 3, count)
        claims = np.vstack([edges + rng.normal(0, 0.05, edges.shape), edges, rng.uniform(0, 1, (1, 4))])
        claims = np.hstack([np.minimum(claims[:, :2], claims[:, 2:]), np.maximum(claims[:, :2], claims[:, 2:])])
        claimed = np.concatenate([kinds, rng.integers(0, 3, count + 1)])
        scores = rng.uniform(0, 1, len(claims))
        truths.append(Found(torch.from_numpy(kinds), torch.from_numpy(edges)))
        found.append(Found(torch.from_numpy(claimed), torch.from_numpy(claims), torch.from_numpy(scores)))

        def row(edges_4: Any, kind: int, image: int = image) -> dict[str, Any]:
            x, y, right, bottom = (float(edge) * 1000 for edge in edges_4)
            box = [x, y, right - x, bottom - y]
            return {"image_id": image, "category_id": int(kind), "bbox": box, "area": box[2] * box[3], "iscrowd": 0}

        gt += [row(*pair) for pair in zip(edges, kinds, strict=True)]
        dt += [row(*pair) | {"score": score} for *pair, score in zip(claims, claimed, scores, strict=True)]
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(30)],
        "categories": [{"id": kind} for kind in range(3)],
        "annotations": [entry | {"id": number} for number, entry in enumerate(gt, start=1)],
    }
    coco.createIndex()
    judged = COCOeval(coco, coco.loadRes(dt), "bbox")
    judged.params.iouThrs = np.array([0.5])
    judged.params.areaRng, judged.params.areaRngLbl = [[0, 1e10]], ["all"]
    judged.evaluate()
    judged.accumulate()
    precision = judged.eval["precision"][0, :, :, 0, -1]
    assert 0.2 < ap50(found, truths) < 0.9
    assert ap50(found, truths) == pytest.approx(float(precision.mean()), abs=1e-6)


def test_the_detector_trains_from_its_start_and_knows_the_things_by_name() -> None:
    torch.manual_seed(0)
    model = new_detector()
    assert list(model.config.id2label.values()) == list(KINDS)
    found = model.model(torch.rand(2, 3, 128, 128))
    assert found.intermediate_logits.shape == (2, 3, 40, len(KINDS))
    targets = torch.tensor([[[0.3, 0.4, 0.2, 0.2]], [[0.6, 0.5, 0.3, 0.3]]])
    loss = decoder_loss(
        found.intermediate_logits[:, -1],
        found.intermediate_reference_points[:, -1],
        *(torch.tensor([[1], [2]]), targets),
    )
    loss.backward()
    stem = next(model.model.backbone.parameters())
    assert stem.grad is not None
    assert stem.grad.abs().max() > 0
