"""Llama's decoder layers with LoRA, each as two functions with a backward pass of their own around the attention.

N tokens of all packs, D hidden channels, H heads, E channels of a head, I channels of the feed-forward layer, O output
features of a linear layer, r rank

PEFT's modules stay and own the parameters; only what the layer computes is written anew. Left to autograd, a layer with
adapters launches some 150 kernels, most of them for copies, casts and sums around the products, and a GPU waits for
their launch. Here norms, rotary positions and activation are one kernel each, and what an adapter adds is added inside
the product. With activation checkpointing, blocks that are not recomputed as a whole make the two wide products of
their feed-forward layer again, which costs little for what it saves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finetune.config.schema import LoraConfig, ModelConfig
from finetune.language import fast_kernels as kernels
from finetune.run.progress import say
from finetune.training.fast_linear import Linear, apply, is_off, reason_against, renew

ARCHITECTURES = {"LlamaDecoderLayer": (), "MistralDecoderLayer": ("sliding_window",)}
"""Class of the layers, and the settings that its attention is called with besides the common ones."""


@dataclass
class FastLayer:
    """What a decoder layer computes. heads: of queries; those of keys and values are alike in number of channels."""

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    gate: Linear
    up: Linear
    down: Linear
    first_norm: Any
    second_norm: Any
    channels: int
    dtype: torch.dtype

    @classmethod
    def of(cls, layer: Any, dtype: torch.dtype) -> "FastLayer":
        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            query=Linear(attention.q_proj, dtype),
            key=Linear(attention.k_proj, dtype),
            value=Linear(attention.v_proj, dtype),
            output=Linear(attention.o_proj, dtype),
            gate=Linear(mlp.gate_proj, dtype),
            up=Linear(mlp.up_proj, dtype),
            down=Linear(mlp.down_proj, dtype),
            first_norm=layer.input_layernorm,
            second_norm=layer.post_attention_layernorm,
            channels=attention.head_dim,
            dtype=dtype,
        )

    def parts(self) -> Sequence[Linear]:
        return self.query, self.key, self.value, self.output, self.gate, self.up, self.down

    def heads(self, states_NO: Tensor) -> Tensor:
        """(N, O) as (N, H, E), the same memory."""
        return states_NO.view(len(states_NO), -1, self.channels)


class Projections(torch.autograd.Function):
    """x (N, D) -> queries, keys and values (N, H, E), the first two turned by their positions."""

    @staticmethod
    def forward(ctx: Any, layer: FastLayer, x_ND: Tensor, cos_NE: Tensor, sin_NE: Tensor, *_: Tensor) -> Any:
        normed_ND = kernels.rms_norm(x_ND, *_settings(layer.first_norm))
        found, kept = zip(*(part.product(normed_ND) for part in (layer.query, layer.key, layer.value)), strict=True)
        states = [layer.heads(states_NO) for states_NO in found]
        for states_NHE in states[:2]:
            kernels.rotate_(states_NHE, cos_NE, sin_NE)
        ctx.layer = layer
        ctx.save_for_backward(x_ND, cos_NE, sin_NE, *kept)
        return tuple(states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        layer: FastLayer = ctx.layer
        x_ND, cos_NE, sin_NE, *kept = ctx.saved_tensors
        gradients = [states.contiguous() for states in upstream]
        for states_NHE in gradients[:2]:
            kernels.rotate_(states_NHE, cos_NE, sin_NE, back=True)
        normed_ND = kernels.rms_norm(x_ND, *_settings(layer.first_norm))
        on_normed_ND, on_adapters = None, []
        for part, states_NHE, xa_Nr in zip((layer.query, layer.key, layer.value), gradients, kept, strict=True):
            dy_NO = states_NHE.flatten(1)
            on_normed_ND, dxa_Nr = part.input_gradient(dy_NO, on_normed_ND)
            on_adapters += part.adapter_gradients(dy_NO, dxa_Nr, normed_ND, xa_Nr)
        dx_ND = kernels.rms_norm_backward(cast(Tensor, on_normed_ND), x_ND, *_settings(layer.first_norm))
        return None, dx_ND, None, None, *on_adapters


class Rest(torch.autograd.Function):
    """x (N, D) and what attention found (N, O) -> the layer's output (N, D)."""

    @staticmethod
    def forward(ctx: Any, layer: FastLayer, keep: bool, x_ND: Tensor, found_NO: Tensor, *_: Tensor) -> Tensor:
        middle_ND, from_found = layer.output.product(found_NO, x_ND)
        normed_ND = kernels.rms_norm(middle_ND, *_settings(layer.second_norm))
        gate_NI, from_gate = layer.gate.product(normed_ND)
        up_NI, from_up = layer.up.product(normed_ND)
        active_NI = kernels.swiglu(gate_NI, up_NI)
        wide = (gate_NI, up_NI) if keep else ()
        del gate_NI, up_NI
        y_ND, from_down = layer.down.product(active_NI, middle_ND)
        ctx.layer = layer
        ctx.save_for_backward(found_NO, middle_ND, from_found, from_gate, from_up, from_down, *wide)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        layer: FastLayer = ctx.layer
        found_NO, middle_ND, from_found, from_gate, from_up, from_down, *wide = ctx.saved_tensors
        dy_ND = upstream.contiguous()
        normed_ND = kernels.rms_norm(middle_ND, *_settings(layer.second_norm))
        gate_NI, up_NI = wide or (part.product(normed_ND)[0] for part in (layer.gate, layer.up))
        active_NI, from_active = layer.down.input_gradient(dy_ND)
        kernels.swiglu_backward_(active_NI, gate_NI, up_NI)  # three gradients and values change their places
        on_down = layer.down.adapter_gradients(dy_ND, from_active, active_NI, from_down)
        del active_NI
        on_normed_ND, onto_gate = layer.gate.input_gradient(gate_NI)
        on_gate = layer.gate.adapter_gradients(gate_NI, onto_gate, normed_ND, from_gate)
        on_normed_ND, onto_up = layer.up.input_gradient(up_NI, on_normed_ND)
        on_up = layer.up.adapter_gradients(up_NI, onto_up, normed_ND, from_up)
        del wide, gate_NI, up_NI, normed_ND
        on_middle_ND = kernels.rms_norm_backward(on_normed_ND, middle_ND, *_settings(layer.second_norm)).add_(dy_ND)
        on_found_NO, onto_found = layer.output.input_gradient(on_middle_ND)
        on_output = layer.output.adapter_gradients(on_middle_ND, onto_found, found_NO, from_found)
        return None, None, on_middle_ND, on_found_NO, *on_output, *on_gate, *on_up, *on_down


def install_or_say(model: Any, base: ModelConfig, lora: LoraConfig, dtype: torch.dtype) -> bool:
    """`install`, or one line that says which setting or what of the model is in its way."""
    if reason := reason_against(base, lora, dtype):
        say(f"train: {reason} takes the plain layers; without it a step may take half the time")
        return False
    if not install(model, dtype):
        say(f"train: {type(model).__name__} takes the plain layers; trainer.fast=true knows those of Llama and Mistral")
        return False
    return True


def install(model: Any, dtype: torch.dtype) -> bool:
    """Let the model's decoder layers compute as here where that is the same; False for layers that aren't known.

    model: with its adapters. dtype: of the arithmetic. For settings that `reason_against` has nothing against.
    """
    layers = list(model.get_decoder().layers)
    if not all(_is_known(layer) for layer in layers):
        return False
    for layer in layers:
        plain: Any = type(layer)
        layer.fast, layer.__class__ = FastLayer.of(layer, dtype), _fast_class(plain)
    model.get_decoder().register_forward_pre_hook(lambda *_: renew(layers))
    return True


def _is_known(layer: Any) -> bool:
    if type(layer).__name__ not in ARCHITECTURES or type(layer.mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        return False
    if layer.self_attn.attention_dropout:  # of which there is none here
        return False
    frozen = [part for part in layer.modules() if isinstance(part, nn.Linear) and not part.weight.requires_grad]
    return all(part.bias is None for part in frozen)


@cache
def _fast_class(plain: Any) -> Any:
    """The class of decoder layers with a forward pass of its own: a subclass, so that whatever the library wraps around
    a layer's `forward` or `__call__`, checkpointing above all, is around this one too."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama.modeling_llama import eager_attention_forward

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Any:
        fast, attention = self.fast, self.self_attn
        if past_key_values is not None or is_off(self) or hidden_states.dtype != fast.dtype:
            return plain.forward(
                self,
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        own = {name: getattr(attention.config, name, None) for name in ARCHITECTURES[plain.__name__]}
        packs, length, _ = hidden_states.shape
        x_ND = hidden_states.flatten(0, 1)
        cos_NE, sin_NE = (turn.expand(packs, -1, -1).flatten(0, 1) for turn in position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
        with torch.autocast(x_ND.device.type, enabled=False):  # all is in its dtype
            states = apply(Projections, fast, x_ND, cos_NE, sin_NE, adapters=fast.parts()[:3])
            by_head = (states_NHE.unflatten(0, (packs, length)).transpose(1, 2) for states_NHE in states)
            seen, _ = attend(
                attention, *by_head, attention_mask, dropout=0.0, scaling=attention.scaling, **own, **kwargs
            )
            seen_NO = seen.reshape(packs * length, -1)
            keep = not self.gradient_checkpointing
            y_ND: Tensor = apply(Rest, fast, keep, x_ND, seen_NO, adapters=fast.parts()[3:])
        return y_ND.view(hidden_states.shape)

    return type(plain.__name__, (plain,), {"forward": forward})


def _settings(norm: Any) -> tuple[Tensor, float]:
    return norm.weight, norm.variance_epsilon
