"""Trains the detector to its end, exports it and measures it: AP50 in every look, on scenes that it never saw."""

import datetime
import json
from typing import Any

import torch
from PIL import Image
from transformers import RTDetrV2ForObjectDetection
from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil

from scripts.embedded.average_precision import Found, ap50
from scripts.embedded.box_sets import Labelled, find_boxes, load_labelled
from scripts.embedded.cards import detector_card
from scripts.embedded.detector import FRAME_PX, detector_folder, train_detector
from scripts.embedded.export import export_model, parameter_millions, settle_files
from scripts.embedded.settings import CROWD_UNSEEN, Settings
from scripts.toyworld.looks import STYLES

EVALUATION_BATCH = 100


def detector(settings: Settings) -> None:
    """Train; when that is done, export and measure."""
    if not train_detector(settings):
        return
    export_detector(settings)
    path = settings.embedded / "figures.json"
    figures = json.loads(path.read_text()) if path.exists() else {}
    figures["detector"] = detector_figures(settings)
    path.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures["detector"], indent=1), flush=True)
    (settings.embedded / "detector" / "README.md").write_text(detector_card(figures["detector"]))


def export_detector(settings: Settings) -> None:
    folder = settings.embedded / "detector"
    model = RTDetrV2ForObjectDetection.from_pretrained(detector_folder(settings.work))
    export_model(folder, model=model, processor=new_image_processor())
    settle_files(settings.embedded)


def new_image_processor() -> RTDetrImageProcessorPil:
    """With the PIL backend, so that no torchvision is needed."""
    return RTDetrImageProcessorPil(size={"height": FRAME_PX, "width": FRAME_PX})


def detector_figures(settings: Settings) -> dict[str, Any]:
    """AP50 by look: of scenes as captions say them, and of crowds, where some hide others."""
    scenes = [f"{name}-unseen" for name in STYLES]
    find_boxes(settings, [*scenes, CROWD_UNSEEN])
    folder = settings.embedded / "detector"
    model = RTDetrV2ForObjectDetection.from_pretrained(folder).to(settings.device).eval()
    crowds = load_labelled(settings, CROWD_UNSEEN)
    figures: dict[str, dict[str, float]] = {}
    for name, look in STYLES.items():
        rows = torch.tensor([row for row, other in enumerate(crowds.looks) if other == look], device=settings.device)
        crowd = Labelled(crowds.images[rows], crowds.edges[rows], crowds.kinds[rows], [])
        alone = load_labelled(settings, f"{name}-unseen")
        figures[name] = {
            "scenes": round(measured(model, alone), 4),
            "frames": len(alone.images),
            "crowds": round(measured(model, crowd), 4),
            "crowd_frames": len(crowd.images),
        }
        print(f"detector: {name} {figures[name]}", flush=True)
    trained = json.loads((settings.work / "checkpoints" / "detector.json").read_text())
    made = {"date": datetime.date.today().isoformat(), **trained}
    return {"ap50": figures, "million_parameters": round(parameter_millions(folder), 2), "made": made}


def measured(model: RTDetrV2ForObjectDetection, pictures: Labelled) -> float:
    """AP50 through the same calls as any detector."""
    processor = new_image_processor()
    found: list[Found] = []
    side = pictures.images.shape[-1]
    for images in pictures.images.split(EVALUATION_BATCH):
        opened = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images.cpu()]
        inputs = processor(images=opened, return_tensors="pt").to(model.device)
        with torch.no_grad():
            outputs = model(**inputs)
        sizes = torch.tensor([[side, side]] * len(opened))
        for one in processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes):
            found.append(Found(one["labels"].cpu(), one["boxes"].float().cpu() / side, one["scores"].float().cpu()))
    truths = []
    for edges, kinds in zip(pictures.edges.cpu(), pictures.kinds.cpu(), strict=True):
        truths.append(Found(kinds[kinds >= 0], edges[kinds >= 0]))
    return ap50(found, truths)
