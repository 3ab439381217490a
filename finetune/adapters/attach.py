"""A PEFT folder put into a fresh base, for every kind of model."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.adapters import formats
from finetune.errors import ModelError

ANOTHER = "was it trained on another?"


def attach(model: nn.Module, folder: Path) -> Any:
    """The `PeftModel` of a base and a PEFT folder, for inference. Changes `model`, which stays inside.

    Raises ModelError if the adapter is missing, damaged, or made for another base.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    require(folder)
    require(folder / "adapter_config.json")  # PEFT would look for the folder on the hub
    stored = formats.read_peft_folder(folder)  # names a damaged file better than PEFT does
    with fitting(folder):
        config: Any = PeftConfig.from_pretrained(str(folder))
        if config.exclude_modules == formats.OTHER_PARTS:
            config.exclude_modules = None  # parts of a larger model, which this one was taken out of
        with _placed(model):
            attached = PeftModel.from_pretrained(model, str(folder), config=config, key_mapping=formats.WITHIN)
        attached.eval()
    own = {
        name.removeprefix("base_model.model."): weight
        for name, weight in get_peft_model_state_dict(attached, save_embedding_layers=False).items()
    }
    if odd := sorted(own.keys() ^ stored.keys()):  # PEFT leaves out what has no place, and says nothing
        raise ModelError(f"{folder} does not fit this base ({len(odd)} tensors differ, first {odd[0]}); {ANOTHER}")
    place(attached)
    return attached


@contextmanager
def _placed(model: Any) -> Iterator[None]:
    """Inside, PEFT doesn't see that some blocks rest in CPU memory: it would spread the model again by its own rules,
    and the GPU may be full."""
    places = model.__dict__.pop("hf_device_map", None)
    try:
        yield
    finally:
        if places is not None:
            model.hf_device_map = places


def place(model: nn.Module) -> None:
    """Move adapters to the GPU, if there is any: PEFT puts one where its layer's weights are, be it CPU memory."""
    device = next((weight.device for weight in model.parameters() if weight.device.type != "cpu"), torch.device("cpu"))
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            weight.data = weight.data.to(device)


def require(path: Path) -> None:
    """Raises ModelError if there is nothing at `path`."""
    if not path.exists():
        raise ModelError(f"no adapter at {path}; train one first, or name another with sample.adapter=FOLDER_OR_FILE")


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """What the libraries raise while they put the adapter at `path` into a base, as a ModelError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except json.JSONDecodeError as error:
        raise ModelError(
            f"{path / 'adapter_config.json'} is damaged ({error}); export it again or restore it from a copy"
        ) from error
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        raise ModelError(f"{path} does not fit this base ({str(error).splitlines()[0]}); {ANOTHER}") from error
