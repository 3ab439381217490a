"""An adapter folded into the weights of its base: each layer's sum is made in fp32 and rounded once.

Only one layer at a time is there in fp32, so a merge needs hardly more memory than the base.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.adapters.attach import attach_peft_folder
from finetune.errors import ExportError


def merge(base: nn.Module, adapter: Path, stored: nn.Module | None = None) -> Any:
    """The base with a PEFT folder's adapter folded in: a plain model again, of the same dtype.

    base: not quantised; it is changed. stored: the same base quantised, on any device, with or without adapters; its
    dequantised weights then take the place of the base's own, in layers without an adapter too. Raises ModelError if
    the adapter doesn't fit, ExportError if a weight is not finite afterwards.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import TrainableTokensWrapper

    names = [name for name, _ in base.named_modules()]
    model = attach_peft_folder(base, adapter)
    for name in names:
        layer: Any = model.get_base_model().get_submodule(name)
        weight = None if stored is None else _dequantised(stored.get_submodule(name))
        if isinstance(layer, TrainableTokensWrapper):
            layer, adapted = layer.token_adapter, layer.token_adapter.get_base_layer()
        elif isinstance(layer, LoraLayer):
            adapted = layer.get_base_layer()
        elif weight is not None:
            layer, adapted = None, layer
        else:
            continue
        _fold(name, layer, adapted.weight, weight)
    return model.unload()


def _fold(name: str, layer: Any, weight: nn.Parameter, start: Tensor | None) -> None:
    """Add the layer's adapter, if there is a layer, to `start` or to what `weight` holds, and leave the sum there."""
    dtype = weight.dtype
    weight.data = (weight.data if start is None else start).to(weight.device, torch.float32)
    if layer is not None:
        layer.merge()
    weight.data = weight.data.to(dtype)
    if not torch.isfinite(weight.data).all():
        raise ExportError(
            f"merged into {name}, the adapter gives weights that are not finite in {dtype}; "
            "leave merged out of export.formats, or train again with a smaller optim.lr"
        )


def _dequantised(layer: Any) -> Tensor | None:
    """The weight of a quantised layer as it takes part in its products; None for any other layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type

    plain = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    weight = plain._parameters.get("weight")
    if weight is None or not get_bnb_param_type(weight):
        return None
    found: Tensor = dequantize_bnb_weight(weight, getattr(plain, "state", None))
    return found
