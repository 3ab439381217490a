"""A tiny detector with random weights, in the ordinary layout."""

from pathlib import Path

import torch
from transformers import RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection
from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil


def tiny_detector(folder: Path) -> Path:
    torch.manual_seed(0)
    backbone = RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16] * 4, depths=[1] * 4, layer_type="basic", out_indices=[2, 3, 4]
    )
    config = RTDetrV2Config(
        backbone_config=backbone,
        encoder_in_channels=[16] * 3,
        encoder_hidden_dim=32,
        encoder_ffn_dim=32,
        d_model=32,
        decoder_in_channels=[32] * 3,
        decoder_ffn_dim=32,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=12,
        num_denoising=0,
        id2label={0: "N/A", 1: "cat", 2: "car"},
        label2id={"N/A": 0, "cat": 1, "car": 2},
    )
    RTDetrV2ForObjectDetection(config).save_pretrained(folder)
    RTDetrImageProcessorPil(size={"height": 96, "width": 128}).save_pretrained(folder)
    return folder
