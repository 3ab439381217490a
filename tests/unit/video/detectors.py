"""Tiny detectors with random weights, in the ordinary layout."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    DFineConfig,
    DFineForObjectDetection,
    HGNetV2Config,
    ResNetConfig,
    RTDetrResNetConfig,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
)

FAMILIES = ("detr", "rt_detr_v2", "d_fine")
NAMES = {0: "N/A", 1: "cat", 2: "car"}
SIZE = {"height": 96, "width": 128}
STAGES: Any = {"embedding_size": 16, "hidden_sizes": [16] * 4, "depths": [1] * 4}


def tiny_detector(
    folder: Path,
    family: str = "rt_detr_v2",
    *,
    names: Mapping[int, str] | None = NAMES,
    size: Mapping[str, int] | None = SIZE,
    queries: int = 12,
) -> Path:
    """names, size: None leaves them out of the files."""
    torch.manual_seed(0)
    common: Any = {"d_model": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    common |= {"num_queries": queries, "decoder_layers": 2, "encoder_ffn_dim": 32}
    if names:
        common |= {"id2label": dict(names), "label2id": {name: number for number, name in names.items()}}
    real_time: Any = {"encoder_in_channels": [16] * 3, "encoder_hidden_dim": 32, "decoder_in_channels": [32] * 3}
    real_time |= {"num_denoising": 0}
    if family == "detr":
        resnet = ResNetConfig(**STAGES, layer_type="basic", out_features=["stage4"])
        model: Any = DetrForObjectDetection(DetrConfig(backbone_config=resnet, encoder_layers=1, **common))
    elif family == "d_fine":
        parts: Any = {f"stage_{part}": [16] * 4 for part in ("in_channels", "mid_channels", "out_channels")}
        parts |= {f"stage_{part}": [1] * 4 for part in ("num_blocks", "numb_of_layers")}
        stages = ["stage2", "stage3", "stage4"]
        hgnet = HGNetV2Config(**STAGES, **parts, stem_channels=[3, 8, 16], out_features=stages)
        model = DFineForObjectDetection(DFineConfig(backbone_config=hgnet, **real_time, **common))
    else:
        resnet = RTDetrResNetConfig(**STAGES, layer_type="basic", out_indices=[2, 3, 4])
        model = RTDetrV2ForObjectDetection(RTDetrV2Config(backbone_config=resnet, **real_time, **common))
    model.save_pretrained(folder)
    processor: dict[str, Any] = {
        "image_processor_type": "DetrImageProcessor" if family == "detr" else "RTDetrImageProcessor",
        "do_normalize": False,
    }
    if size:
        processor["size"] = dict(size)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    if not names:
        config = json.loads((folder / "config.json").read_text())
        kept = {key: value for key, value in config.items() if key not in ("id2label", "label2id")}
        (folder / "config.json").write_text(json.dumps(kept))
    return folder
