"""Pretrained detectors of the DETR family: what is where in a frame.

B frames, H×W the pixels that the detector reads.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from finetune import hub
from finetune.errors import ModelError
from finetune.video.tracks import Detection, iou

FAMILIES = (
    "rt_detr",
    "rt_detr_v2",
    "d_fine",
    "deimv2",
    "rf_detr",
    "lw_detr",
    "detr",
    "conditional_detr",
    "deformable_detr",
    "dab_detr",
    "yolos",
)
"""By `model_type`: released under Apache or MIT licences, and loaded without their own code."""
NO_CLASS = "N/A"  # COCO's numbers have gaps, and released models name them so
SAME_IOU = 0.8  # of two boxes of one class: DETR's sometimes find a thing twice, mostly within a few pixels


class Detector:
    """A detector on a device. Raises ModelError where it can't be loaded or finds no class that is wanted."""

    def __init__(
        self, reference: str, device: torch.device, dtype: torch.dtype, *, threshold: float, classes: Sequence[str]
    ) -> None:
        from transformers import MODEL_FOR_OBJECT_DETECTION_MAPPING, AutoConfig, AutoImageProcessor

        hub.require(reference, "config.json")
        config = hub.load(AutoConfig, reference)
        if config.model_type not in FAMILIES:
            raise ModelError(
                f"{reference} is a {config.model_type} model; objects are found by: {', '.join(FAMILIES)}; "
                "try detector=PekingU/rtdetr_v2_r18vd"
            )
        self.reference, self.device, self.dtype, self.threshold = reference, device, dtype, threshold
        try:
            # The PIL backend, so that no torchvision is needed; frames are resized before it, on their way from FFmpeg.
            self.processor: Any = hub.load(AutoImageProcessor, reference, backend="pil")
        except ModelError as error:
            if not _lacks_processor(reference):
                raise
            raise ModelError(
                f"{reference} holds no {hub.PROCESSOR_FILES[0]}, which says how frames are resized; "
                "copy it from where config.json came from, or try detector=PekingU/rtdetr_v2_r18vd"
            ) from error
        model = hub.load(MODEL_FOR_OBJECT_DETECTION_MAPPING[type(config)], reference, dtype=dtype)
        self.model: Any = model.to(device).eval().requires_grad_(False)
        names = {int(number): str(name) for number, name in self.model.config.id2label.items()}
        self._require_numbers(names)
        # Feature maps of several strides are added up: these must divide the sides.
        self.multiple: int = max(getattr(self.model.config, "feat_strides", None) or [1])
        self.names = {number: name for number, name in names.items() if name != NO_CLASS}
        if unknown := set(classes) - set(self.names.values()):
            there = ", ".join(sorted(self.names.values()))
            raise ModelError(f"{reference} knows no class {sorted(unknown)[0]}; it knows: {there}")
        self.classes = frozenset(classes)

    def _require_numbers(self, names: dict[int, str]) -> None:
        """Raises ModelError for names that count from 1: which class is meant by a number can't be known then."""
        count = self.model.config.num_labels
        if (last := max(names)) >= count:
            raise ModelError(
                f"{self.reference}: config.json calls class {last} {names[last]}, but classes are 0 to {count - 1}; "
                "number id2label from 0"
            )

    def reads(self, width: int, height: int) -> tuple[int, int]:
        """The size, width and height, in which the detector wants frames of this size."""
        size = self.processor.size
        wanted = dict(size) if isinstance(size, dict) else {key: value for key, value in vars(size).items() if value}
        if wanted.get("height") and wanted.get("width"):
            return self._divisible(wanted["width"]), self._divisible(wanted["height"])
        edges = ((wanted.get("shortest_edge"), min(width, height)), (wanted.get("longest_edge"), max(width, height)))
        scales = [edge / side for edge, side in edges if edge]
        if not scales:
            raise ModelError(f"{self.reference}: its image processor's size {wanted} is not known here")
        return self._divisible(width * min(scales)), self._divisible(height * min(scales))

    def _divisible(self, side: float) -> int:
        """The nearest side that the model can take."""
        return max(1, round(side / self.multiple)) * self.multiple

    @torch.no_grad()
    def find(self, frames: Sequence[NDArray[np.uint8]], width: int, height: int) -> list[list[Detection]]:
        """What is in frames [H, W, 3] of the size that `reads` says; boxes in pixels of a width×height frame."""
        with hub.explained(lambda reason: f"the detector {self.reference} doesn't work ({reason}); get it again"):
            outputs = self.model(pixel_values=self.pixels(frames))
            outputs.logits, outputs.pred_boxes = outputs.logits.float(), outputs.pred_boxes.float()
            sizes = torch.tensor([[height, width]] * len(frames), device=self.device)
            found = self.processor.post_process_object_detection(outputs, threshold=self.threshold, target_sizes=sizes)
        return [without_doubles(list(self._detections(one, width, height))) for one in found]

    def pixels(self, frames: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
        """[B, 3, H, W] as the model takes them. Bytes go to the device: a quarter of what floats would be."""
        processor = self.processor
        pixels_BHW3 = torch.from_numpy(np.stack(frames)).to(self.device)
        pixels_B3HW = pixels_BHW3.permute(0, 3, 1, 2).float()
        if processor.do_rescale:
            pixels_B3HW = pixels_B3HW * processor.rescale_factor
        if processor.do_normalize:
            mean, deviation = (
                torch.tensor(values, device=self.device).view(3, 1, 1)
                for values in (processor.image_mean, processor.image_std)
            )
            pixels_B3HW = (pixels_B3HW - mean) / deviation
        return pixels_B3HW.to(self.dtype)

    def _detections(self, found: dict[str, Any], width: int, height: int) -> Any:
        scores, labels, boxes = (found[key].tolist() for key in ("scores", "labels", "boxes"))
        for score, label, (left, top, right, bottom) in zip(scores, labels, boxes, strict=True):
            name = self.names.get(label)
            box = (max(0.0, left), max(0.0, top), min(float(width), right), min(float(height), bottom))
            if name and (not self.classes or name in self.classes) and box[0] < box[2] and box[1] < box[3]:
                yield Detection(name, box, score)


def _lacks_processor(reference: str) -> bool:
    """Whether it is known that a folder, or a model on the hub, has no file that says how images are prepared."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    source = hub.resolve(reference)
    if isinstance(source, Path):
        return not any((source / name).is_file() for name in hub.PROCESSOR_FILES)
    name, _, revision = source.partition("@")
    return all(
        try_to_load_from_cache(name, file, revision=revision or None) is _CACHED_NO_EXIST
        for file in hub.PROCESSOR_FILES
    )


def without_doubles(found: Sequence[Detection]) -> list[Detection]:
    """These in their order; of those that are the same thing, the likeliest alone."""
    kept: list[int] = []
    for number, one in sorted(enumerate(found), key=lambda pair: -pair[1].score):
        same_class = (found[other].box for other in kept if found[other].name == one.name)
        if all(iou(one.box, box) < SAME_IOU for box in same_class):
            kept.append(number)
    return [found[number] for number in sorted(kept)]
