"""What a run on a GPU takes of CPU memory besides: what comes through it, waits in it, or is compared in it.

Upper bounds. A file that is stored as it computes is mapped, and its pages may go again; in another precision, as in an
export in fp32, a copy of all of it is there (seen with transformers 5.23 and diffusers 0.42 on a CPU). The process
itself, a few GiB with CUDA's libraries, is not counted.
"""

from collections.abc import Collection, Iterator

import torch
from torch import nn

from finetune import hub
from finetune.config.schema import Config, ExportFormat, Quantize
from finetune.diffusion import meta as diffusion_meta
from finetune.language import meta as language_meta
from finetune.memory import block_offload
from finetune.planning.candidates import Candidates
from finetune.planning.machine import GIB
from finetune.planning.plan import Setting

LEAST_GIB = 0.05  # what is less isn't worth a word


def peaks(
    config: Config, candidates: Candidates, setting: Setting, elsewhere: Collection[str] = ()
) -> dict[str, float]:
    """GiB by what is being done, the most first; nothing without a GPU, whose memory then is the main one.

    config: the recipe's own, whose exports are planned for; candidates, setting: what training takes; elsewhere:
    stages for which the GPU is too small.
    """
    if not candidates.machine.cuda:
        return {}
    waiting = candidates.waiting(setting)
    blocks = waiting.get("blocks", 0.0)
    found = {
        "loading the base": _loading(candidates) + blocks,  # they are copied to their place while the whole is there
        "training": sum(waiting.values()),
        "export": max(_export(candidates), _compared_here(candidates) if "export" in elsewhere else 0.0),
    }
    if config.model.kind == "diffusion":
        found["loading the text encoders"] = (
            sum(map(block_offload.weight_bytes, diffusion_meta.text_encoders(config.model))) / GIB
        )
    kept = {name: gib for name, gib in found.items() if gib >= LEAST_GIB}
    return dict(sorted(kept.items(), key=lambda item: -item[1]))


def warning(config: Config, found: dict[str, float], free_gib: float | None) -> Iterator[str]:
    """A line that says what to type, where the most of `found` is more than is free."""
    if free_gib is None or not found:
        return
    name, gib = next(iter(found.items()))
    if gib <= free_gib:
        return
    if name == "export" and ExportFormat.merged in config.export.formats:
        way = "try 'export.formats=[peft]'"
    elif name != "loading the text encoders" and config.model.quantize is Quantize.none:
        way = "try model.quantize=nf4"
    else:
        way = "close other programs first"
    yield f"CPU memory: {name} takes up to {gib:.1f} GiB, and {free_gib:.1f} are free here now; {way}"


def _loading(candidates: Candidates) -> float:
    """GiB of the base that come through CPU memory on their way to the GPU."""
    model, base = candidates.config.model, block_offload.frozen_bytes(candidates.memory_model.model) / GIB
    if model.kind == "language":  # straight to the GPU, unless blocks stay behind
        return base if model.offload else 0.0
    if file := hub.single_file(model.base):  # its tensors are renamed and cut up first
        return file.stat().st_size / GIB
    return base if model.quantize is Quantize.none else 0.0  # diffusers quantises on the GPU


def _export(candidates: Candidates) -> float:
    """GiB of the models that are compared: `handout` and `text_handout` say which, and when in fp32."""
    config = candidates.config
    model, plain = config.model, config.model.quantize is Quantize.none
    if model.kind == "diffusion":
        if not (plain and model.offload):  # else in fp32, of which a part stays
            return _loading(candidates)
        return _in_fp32(_numbers(candidates.memory_model.model), candidates)
    merged = ExportFormat.merged in config.export.formats
    count = _numbers(language_meta.language_model(model, torch.bfloat16))
    if config.lora.dora:  # whose base is at hand as a whole, on the GPU; a merged model is made here all the same
        return 2 * count / GIB if merged else 0.0
    return _in_fp32(count, candidates) if plain or merged else _loading(candidates)


def _compared_here(candidates: Candidates) -> float:
    """GiB of one model in fp32; of a quantised one at most, whose embeddings and head alone are."""
    model = candidates.memory_model.model
    if candidates.config.model.quantize is Quantize.none:
        return 4 * _numbers(model) / GIB
    return 2 * block_offload.weight_bytes(model) / GIB


def _in_fp32(count: int, candidates: Candidates) -> float:
    """GiB of so many weights, and of what of them then has its place in CPU memory."""
    whole = 4 * count / GIB
    return whole + max(0.0, whole - block_offload.WEIGHTS_SHARE * candidates.memory_model.room / GIB)


def _numbers(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())
