"""Load an exported PEFT folder into a fresh base of any kind, for inference."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from finetune import hub
from finetune.adapters import formats, lora
from finetune.errors import ModelError
from finetune.run.progress import plural


def attach_peft_folder(model: nn.Module, folder: Path, name: str = lora.ADAPTER) -> Any:
    """The `PeftModel` of a base and a PEFT folder. Changes `model`, which stays inside.

    model: a base, or a `PeftModel` of which the folder becomes one more adapter, by a name that it hasn't got yet.
    Raises ModelError if the adapter is missing, damaged, or made for another base; its name may then be taken.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    require_adapter(folder)
    stored = formats.read_peft_folder(folder)  # names a damaged file better than PEFT does
    require_adapter(folder / formats.PEFT_CONFIG)  # PEFT would look for the folder on the hub
    formats.read_peft_config(folder)
    with mismatch_as_model_error(folder):
        config: Any = PeftConfig.from_pretrained(str(folder))
        if config.exclude_modules == formats.OTHER_MODALITIES:
            config.exclude_modules = None  # `model` has none of them, and PEFT warns of exclusions that exclude none
        with _without_device_map(model):
            if isinstance(model, PeftModel):
                attached: Any = model
                attached.add_adapter(name, config)
                attached.load_adapter(str(folder), name, key_mapping=formats.FULL_TO_TEXT_MODEL)
            else:
                attached = PeftModel.from_pretrained(
                    model, str(folder), name, config=config, key_mapping=formats.FULL_TO_TEXT_MODEL
                )
        attached.eval()
    tensors = get_peft_model_state_dict(attached, adapter_name=name, save_embedding_layers=False)
    own = {key.removeprefix("base_model.model."): weight for key, weight in tensors.items()}
    if odd := sorted(own.keys() ^ stored.keys()):  # PEFT leaves out what has no place, and says nothing
        raise mismatch(folder, f"{plural(len(odd), 'tensor')} without a counterpart, first {odd[0]}")
    move_adapters_to_gpu(attached)
    return attached


def require_adapter(path: Path) -> None:
    """Raises ModelError if there is nothing at `path`, or a folder that is none of an adapter, which may lack its
    weights."""
    is_other = path.is_dir() and not (formats.holds_weights(path) or (path / formats.PEFT_CONFIG).is_file())
    if is_other or not path.exists():  # what is no file, such as a pipe, is named when it is read
        raise ModelError(f"no adapter at {path}; train one first, or name another with sample.adapter=FOLDER_OR_FILE")


@contextmanager
def mismatch_as_model_error(path: Path) -> Iterator[None]:
    """What the libraries raise while they load the adapter at `path` into a base, as a ModelError."""
    with hub.explained(lambda reason: str(mismatch(path, reason))):
        yield


def move_adapters_to_gpu(model: nn.Module) -> None:
    """Move adapters to the GPU, if `model` uses one: PEFT puts each beside its layer's weights, be it in CPU memory."""
    device = lora.compute_device(model)
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            weight.data = weight.data.to(device)


@contextmanager
def _without_device_map(model: Any) -> Iterator[None]:
    """Inside, PEFT doesn't see that some blocks wait in CPU memory: it would spread the model again by its own rules,
    and the GPU may be full."""
    device_map = model.__dict__.pop("hf_device_map", None)
    try:
        yield
    finally:
        if device_map is not None:
            model.hf_device_map = device_map


def mismatch(path: Path, reason: str) -> ModelError:
    """The error for an adapter of another base."""
    return ModelError(f"{path} does not fit this base ({reason}); was it trained on another?")
