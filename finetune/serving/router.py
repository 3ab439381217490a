"""Which adapter each row of a batch takes.

B rows, O output features of an adapted layer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finetune.adapters import lora
from finetune.errors import ModelError
from finetune.serving.requests import BASE

PEFT_BASE = "__base__"  # PEFT's word for no adapter


class Router:
    """Says to every adapted layer which adapter each row of a batch takes.

    PEFT's own way, the argument `adapter_names` of `PeftModel`, puts hooks on every layer in each call: with 56 layers
    that takes longer than a step of a small model. Here they stay. PEFT's own way takes no DoRA either, and forgets
    whole layers and token rows of all adapters but the active one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names: list[str] = []
        self._hooked: set[nn.Module] = set()

    def require_routable(self, settings: Mapping[str, Any], name: str) -> None:
        """Raises ModelError for an adapter of PEFT that can't be given to some rows alone. settings: of the adapter."""
        from peft.utils import AuxiliaryTrainingWrapper

        if settings.get("bias", "none") != "none":
            raise ModelError(f"{name} changes biases of the base (bias={settings['bias']}); serve it merged, as a base")
        if settings.get("target_parameters"):
            raise ModelError(f"{name} changes single parameters (target_parameters); serve it merged, as a base")
        rows = settings.get("trainable_token_indices") or {}
        whole = {*(settings.get("modules_to_save") or ()), *(rows if isinstance(rows, dict) else ())}
        targets = settings.get("target_modules") or ()
        for path, module in self.model.named_modules():
            is_replaced = isinstance(module, AuxiliaryTrainingWrapper)
            replaces = any(path.endswith(part) for part in whole)
            if replaces and not (is_replaced or isinstance(module, nn.Linear | nn.Embedding)):
                raise ModelError(
                    f"{name} replaces {path}, which can't be done for some requests alone: only linear layers and "
                    "embeddings that no other adapter changes can be replaced; serve it merged, as a base"
                )
            if is_replaced and not isinstance(targets, str) and any(f".{path}".endswith(f".{end}") for end in targets):
                raise ModelError(
                    f"{name} changes {path}, which another adapter here replaces; serve it without that one"
                )

    def watch(self) -> None:
        """Reach layers that have become adapted ones. Raises ModelError for DoRA on weights that can't be read."""
        from peft.tuners.lora import LoraLayer
        from peft.utils import AuxiliaryTrainingWrapper

        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                for key in [key for key, used in module.use_dora.items() if used]:
                    _split_dora(module, key)
            if isinstance(module, LoraLayer | AuxiliaryTrainingWrapper) and module not in self._hooked:
                module.register_forward_pre_hook(self._route, with_kwargs=True)
                if isinstance(module, LoraLayer):
                    module.register_forward_hook(self._scale)
                else:
                    _answer_for_own_adapters(module)
                self._hooked.add(module)

    def set(self, adapters: Sequence[str]) -> None:
        """adapters: a key for each row of the next forward pass."""
        self.names = [PEFT_BASE if key == BASE else key for key in adapters]

    def _route(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        names = self.names
        if not hasattr(module, "lora_A"):  # a layer that some adapters replace: the others have none there
            module._active_adapter = []  # else PEFT passes by all if the active one has none
            names = [name if name in module._adapters else PEFT_BASE for name in names]
        return args, kwargs | {"adapter_names": names}

    def _scale(self, layer: Any, _: Any, output_BO: Tensor) -> Tensor:
        """See `_split_dora`."""
        for key in layer.lora_magnitude_vector.keys() & set(self.names):
            rows = [row for row, name in enumerate(self.names) if name == key]
            bias = getattr(layer.get_base_layer(), "bias", None)
            plain_BO = output_BO[rows].float() - (0 if bias is None else bias)
            scaled_BO = plain_BO * layer.lora_magnitude_vector[key].weight.view(-1) + (0 if bias is None else bias)
            output_BO[rows] = scaled_BO.to(output_BO)
        return output_BO


def _answer_for_own_adapters(wrapper: Any) -> None:
    """PEFT asks every replaced layer for the weights of every adapter that is loaded, and fails where it has none."""
    for name in ("adapter_state_dict", "adapter_state_dict_load_map"):
        asked = getattr(wrapper, name)

        def answer(key: str, *rest: Any, asked: Any = asked) -> Any:
            return asked(key, *rest) if key in wrapper._adapters else {}

        setattr(wrapper, name, answer)


@torch.no_grad()
def _split_dora(layer: Any, key: str) -> None:
    """From now on PEFT takes a DoRA adapter (arXiv 2402.09353, eq. 5) for a plain one, and keeps its scale beside it.

    W' x = m / ‖W + ΔW‖ · (W + ΔW) x: all but the factor in front is a plain adapter, and the factor is a constant here.
    In place of the magnitudes m it is kept where they are, so that it goes with the adapter.
    """
    base = layer.get_base_layer()
    delta = layer.get_delta_weight(key)
    if base.weight.device != delta.device:
        raise ModelError("a DoRA adapter needs all weights where it computes; serve it with model.offload=false")
    outputs_last = layer.fan_in_fan_out or isinstance(base, nn.Embedding)
    norms_O = torch.linalg.vector_norm(lora.base_weight(layer) + delta.float(), dim=0 if outputs_last else 1)
    magnitudes = layer.lora_magnitude_vector[key].weight
    magnitudes.data = (magnitudes.float().view(-1) / norms_O).view_as(magnitudes)
    layer.use_dora[key] = False
    del layer.lora_variant[key]
