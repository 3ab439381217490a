"""The transformer blocks of UNets with LoRA, as functions with a backward pass of their own around the attention.

B images, L tokens of an image or a caption, N tokens of all images, C those of all captions, D channels, O output
features of a linear layer, I and J as in `fast_kernels`

Under autocast a layer norm gives fp32, each of the layers behind it casts that for itself, and an adapter multiplies
and adds beside its layer: some 300 kernels a block, most of them too short to keep a GPU busy. Here they are about 60.
Attention stays torch's.
"""

from collections.abc import Hashable, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from finetune.diffusion import fast_kernels as kernels
from finetune.training.fast_linear import Linear, apply, is_off

NORMED = "layer_norm"  # `norm_type` of the blocks that are known here; others read timesteps in their norms


class FastAttention:
    """The four layers of an attention."""

    def __init__(self, attention: Any, dtype: torch.dtype) -> None:
        """dtype: of the arithmetic."""
        self.query, self.key, self.value, self.output = (
            Linear(layer, dtype) for layer in (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0])
        )
        self.heads = attention.heads

    def parts(self) -> tuple[Linear, ...]:
        return self.query, self.key, self.value, self.output

    def attend(self, images: int, *states: Tensor) -> Tensor:
        """Queries (N, O), keys and values as many or (C, O) -> what was found, (N, O)."""
        channels = states[0].shape[1] // self.heads
        query, key, value = (states_NO.view(images, -1, self.heads, channels).transpose(1, 2) for states_NO in states)
        found_BHLE = scaled_dot_product_attention(query, key, value)
        return found_BHLE.transpose(1, 2).reshape(states[0].shape)


class FastBlock:
    """What a block computes."""

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        """dtype: of the arithmetic."""
        self.first, self.second = FastAttention(block.attn1, dtype), FastAttention(block.attn2, dtype)
        self.wide, self.down = Linear(block.ff.net[0].proj, dtype), Linear(block.ff.net[2], dtype)
        self.norms, self.dtype = (block.norm1, block.norm2, block.norm3), dtype

    def parts(self) -> list[Linear]:
        return [*self.first.parts(), *self.second.parts(), self.wide, self.down]

    def forward(self, x_BLD: Tensor, text_BLT: Tensor) -> Tensor:
        """The block's output, as its input."""
        first, second, images = self.first, self.second, len(x_BLD)
        x_ND, text_CT = x_BLD.reshape(-1, x_BLD.shape[2]), text_BLT.reshape(-1, text_BLT.shape[2])
        states = apply(Normed, parts := first.parts()[:3], self.norms[0], x_ND, adapters=parts)
        x_ND = apply(Added, first.output, first.attend(images, *states), x_ND, adapters=[first.output])
        (query_NO,) = apply(Normed, parts := (second.query,), self.norms[1], x_ND, adapters=parts)
        of_text = apply(FromText, parts := second.parts()[1:3], text_CT, adapters=parts)
        x_ND = apply(Added, second.output, second.attend(images, query_NO, *of_text), x_ND, adapters=[second.output])
        y_ND: Tensor = apply(FeedForward, self.wide, self.down, self.norms[2], x_ND, adapters=[self.wide, self.down])
        return y_ND.view(x_BLD.shape)


class Normed(torch.autograd.Function):
    """x (N, D) -> what some linear layers make of its layer norm, (N, O) each."""

    @staticmethod
    def forward(ctx: Any, parts: Sequence[Linear], norm: Any, x_ND: Tensor, *_: Tensor) -> Any:
        normed_ND, *moments = kernels.layer_norm(norm, x_ND)
        found, kept = zip(*(part.product(normed_ND) for part in parts), strict=True)
        ctx.parts, ctx.norm = parts, norm
        ctx.save_for_backward(x_ND, *moments, *kept)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        x_ND, mean_N1, scale_N1, *kept = ctx.saved_tensors
        normed_ND, *_ = kernels.layer_norm(ctx.norm, x_ND)
        on_normed_ND, on_adapters = None, []
        for part, dy_NO, xa_Nr in zip(ctx.parts, upstream, kept, strict=True):
            dy_NO = dy_NO.contiguous()
            on_normed_ND, dxa_Nr = part.input_gradient(dy_NO, on_normed_ND)
            on_adapters += part.adapter_gradients(dy_NO, dxa_Nr, normed_ND, xa_Nr)
        dx_ND = kernels.layer_norm_backward(ctx.norm, cast(Tensor, on_normed_ND), x_ND, mean_N1, scale_N1)
        return None, None, dx_ND, *on_adapters


class FromText(torch.autograd.Function):
    """Captions (C, T), which have no gradient -> what some linear layers make of them, (C, O) each."""

    @staticmethod
    def forward(ctx: Any, parts: Sequence[Linear], text_CT: Tensor, *_: Tensor) -> Any:
        found, kept = zip(*(part.product(text_CT) for part in parts), strict=True)
        ctx.parts = parts
        ctx.save_for_backward(text_CT, *kept)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        text_CT, *kept = ctx.saved_tensors
        on_adapters = []
        for part, dy_CO, xa_Cr in zip(ctx.parts, upstream, kept, strict=True):
            dy_CO = dy_CO.contiguous()
            on_adapters += part.adapter_gradients(dy_CO, part.to_adapter(dy_CO), text_CT, xa_Cr)
        return None, None, *on_adapters


class Added(torch.autograd.Function):
    """x (N, O) and y (N, D) -> y and what a linear layer makes of x."""

    @staticmethod
    def forward(ctx: Any, part: Linear, x_NO: Tensor, onto_ND: Tensor, *_: Tensor) -> Tensor:
        y_ND, xa_Nr = part.product(x_NO, onto_ND)
        ctx.part = part
        ctx.save_for_backward(x_NO, xa_Nr)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        x_NO, xa_Nr = ctx.saved_tensors
        dy_ND = upstream.contiguous()
        dx_NO, dxa_Nr = ctx.part.input_gradient(dy_ND)
        return None, dx_NO, dy_ND, *ctx.part.adapter_gradients(dy_ND, dxa_Nr, x_NO, xa_Nr)


class FeedForward(torch.autograd.Function):
    """x (N, D) -> x and what the feed-forward layer makes of its layer norm."""

    @staticmethod
    def forward(ctx: Any, wide: Linear, down: Linear, norm: Any, x_ND: Tensor, *_: Tensor) -> Tensor:
        normed_ND, *moments = kernels.layer_norm(norm, x_ND)
        wide_NJ, from_normed = wide.product(normed_ND)
        y_ND, from_active = down.product(kernels.geglu(wide_NJ), x_ND)
        ctx.wide, ctx.down, ctx.norm = wide, down, norm
        ctx.save_for_backward(x_ND, *moments, wide_NJ, from_normed, from_active)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        x_ND, mean_N1, scale_N1, wide_NJ, from_normed, from_active = ctx.saved_tensors
        dy_ND, wide, down = upstream.contiguous(), ctx.wide, ctx.down
        active_NI, onto_down = down.input_gradient(dy_ND)
        kernels.geglu_backward_(active_NI, wide_NJ)  # gradients and values change their places
        on_down = down.adapter_gradients(dy_ND, onto_down, active_NI, from_active)
        del active_NI
        on_normed_ND, onto_wide = wide.input_gradient(wide_NJ)
        on_wide = []
        if from_normed is not None:
            normed_ND, *_ = kernels.layer_norm(ctx.norm, x_ND)
            on_wide = wide.adapter_gradients(wide_NJ, onto_wide, normed_ND, from_normed)
        dx_ND = kernels.layer_norm_backward(ctx.norm, on_normed_ND, x_ND, mean_N1, scale_N1).add_(dy_ND)
        return None, None, None, dx_ND, *on_wide, *on_down


def fast(block: Any, dtype: torch.dtype) -> tuple[Any, Any] | None:
    """What a block of a UNet computes and its class with a forward pass of its own; None for any other block."""
    return (FastBlock(block, dtype), _fast_class(cast(Hashable, type(block)))) if _is_known(block) else None


def _is_known(block: Any) -> bool:
    """Whether it is diffusers' block as UNets of Stable Diffusion have it."""
    if type(block).__name__ != "BasicTransformerBlock" or block.norm_type != NORMED or block.attn2 is None:
        return False
    if block.pos_embed is not None or block.only_cross_attention or hasattr(block, "fuser"):
        return False
    if any(part.p for part in block.modules() if isinstance(part, nn.Dropout)):
        return False
    norms = all(type(norm) is nn.LayerNorm for norm in (block.norm1, block.norm2, block.norm3))
    gated = type(block.ff.net[0]).__name__ == "GEGLU" and len(block.ff.net) == 3
    return norms and gated and all(map(_is_plain, (block.attn1, block.attn2)))


def _is_plain(attention: Any) -> bool:
    if type(attention.processor).__name__ != "AttnProcessor2_0" or attention.residual_connection:
        return False
    extras = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross")
    return attention.rescale_output_factor == 1 and not any(getattr(attention, name) for name in extras)


@cache
def _fast_class(plain: Any) -> Any:
    """The class of blocks with a forward pass of its own; a subclass, so that libraries still know them."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        *others: Any,
        **named: Any,
    ) -> Any:
        text = encoder_hidden_states
        special = attention_mask is not None or encoder_attention_mask is not None or cross_attention_kwargs
        if (
            special
            or is_off(self)
            or text is None
            or text.requires_grad
            or not hidden_states.dtype == text.dtype == self.fast.dtype
        ):
            return plain.forward(
                self,
                hidden_states,
                attention_mask,
                text,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                *others,
                **named,
            )
        with torch.autocast(hidden_states.device.type, enabled=False):  # all is in its dtype
            return self.fast.forward(hidden_states, text)

    return type(plain.__name__, (plain,), {"forward": forward})
