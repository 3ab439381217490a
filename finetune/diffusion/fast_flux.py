"""The transformer blocks of FLUX.1 with LoRA, as functions with a backward pass of their own around the attention.

B images, T tokens of a caption, L of an image or of either, S of both, N of all images, D channels, H heads, E channels
of a head, I of the feed-forward layer, O output features of a linear layer, J input features of one, r rank

Under autocast, norms, modulation and rotary positions compute in fp32 and are cast for each layer behind them: a third
of the time of plain blocks is copies and elementwise kernels. Here all stays in the dtype of the arithmetic, and one
kernel norms and turns queries or keys.
"""

from collections.abc import Hashable, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu, scaled_dot_product_attention

from finetune.diffusion import fast_kernels as kernels
from finetune.training.fast_linear import Linear, apply, is_off

TANH = "tanh"  # the approximation of GELU that FLUX has
Turns = tuple[Tensor, Tensor]  # cosines and sines of positions, (L, E) fp32, each twice


class Before:
    """What makes queries, keys and values of tokens, and the feed-forward layer's input where that reads the same."""

    def __init__(self, norm: Any, layers: Sequence[Any], norms: Sequence[Any], dtype: torch.dtype) -> None:
        """norms: of the heads of queries and keys. dtype: of the arithmetic."""
        self.norm, self.layers, self.norms = norm, [Linear(layer, dtype) for layer in layers], norms


class After:
    """What reads the tokens that attention found: its output layer and the feed-forward layers."""

    def __init__(self, output: Any, norm: Any, wide: Any, down: Any, dtype: torch.dtype) -> None:
        self.norm, self.layers = norm, [Linear(layer, dtype) for layer in (output, wide, down)]


class FastDouble:
    """A block in which the tokens of captions and of images have layers of their own."""

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        """dtype: of the arithmetic."""
        attn, context = block.attn, block.norm1_context
        of_text, of_image = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), (attn.to_q, attn.to_k, attn.to_v)
        self.before = [
            Before(context.norm, of_text, (attn.norm_added_q, attn.norm_added_k), dtype),
            Before(block.norm1.norm, of_image, (attn.norm_q, attn.norm_k), dtype),
        ]
        self.after = [
            After(output, norm, feed_forward.net[0].proj, feed_forward.net[2], dtype)
            for output, norm, feed_forward in (
                (attn.to_add_out, block.norm2_context, block.ff_context),
                (attn.to_out[0], block.norm2, block.ff),
            )
        ]
        self.dtype = dtype

    def parts(self) -> list[Linear]:
        before, after = ([layer for side in sides for layer in side.layers] for sides in (self.before, self.after))
        return before + after

    def forward(self, block: Any, tokens: Sequence[Tensor], embedding_BD: Tensor, turns: Turns) -> Sequence[Tensor]:
        """Tokens of captions (B, T, D) and images (B, L, D) -> the same of the next block."""
        changes = [modulation(norm, embedding_BD, self.dtype) for norm in (block.norm1_context, block.norm1)]
        with torch.autocast(embedding_BD.device.type, enabled=False):  # all is in its dtype
            lengths = [x_BLD.shape[1] for x_BLD in tokens]
            of_side = zip(*(torch.split(turn, lengths) for turn in turns), strict=True)
            made = [
                apply(States, before, change[:2], turn, x_BLD, adapters=before.layers)
                for before, change, turn, x_BLD in zip(self.before, changes, of_side, tokens, strict=True)
            ]
            found_BSO = attend(*(torch.cat(both, 1) for both in zip(*made, strict=True)))
            return [
                apply(Rest, after, change[2:], x_BLD, found_BLO, adapters=after.layers)
                for after, change, x_BLD, found_BLO in zip(
                    self.after, changes, tokens, torch.split(found_BSO, lengths, 1), strict=True
                )
            ]


class FastSingle:
    """A block in which attention and feed-forward layer of all tokens lie side by side."""

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        """dtype: of the arithmetic."""
        attn = block.attn
        layers = attn.to_q, attn.to_k, attn.to_v, block.proj_mlp
        self.before = Before(block.norm.norm, layers, (attn.norm_q, attn.norm_k), dtype)
        self.output, self.dtype = Linear(block.proj_out, dtype), dtype

    def parts(self) -> list[Linear]:
        return [*self.before.layers, self.output]

    def forward(self, block: Any, tokens: Sequence[Tensor], embedding_BD: Tensor, turns: Turns) -> Sequence[Tensor]:
        """As that of `FastDouble`."""
        *change, gate_B1D = modulation(block.norm, embedding_BD, self.dtype)
        with torch.autocast(embedding_BD.device.type, enabled=False):
            x_BSD = torch.cat(list(tokens), 1)
            *states, wide_BSI = apply(States, self.before, change, turns, x_BSD, adapters=self.before.layers)
            y_BSD = apply(Joined, self.output, gate_B1D, x_BSD, attend(*states), wide_BSI, adapters=[self.output])
            return torch.split(y_BSD, [x_BLD.shape[1] for x_BLD in tokens], 1)


def modulation(norm: Any, embedding_BD: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Shift, scale and gate of each image, (B, 1, D); for a block's second half too where the norm gives six."""
    changes: Tensor = norm.linear(norm.silu(embedding_BD)).to(dtype)[:, None]
    return changes.chunk(changes.shape[2] // norm.norm.normalized_shape[0], 2)


def attend(query_BSHE: Tensor, key_BSHE: Tensor, value_BSHE: Tensor) -> Tensor:
    """What was found, (B, S, O)."""
    query, key, value = (states_BSHE.transpose(1, 2) for states_BSHE in (query_BSHE, key_BSHE, value_BSHE))
    return scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class States(torch.autograd.Function):
    """x (B, L, D) -> queries and keys, normed and turned, and values (B, L, H, E); and what else reads the norm."""

    @staticmethod
    def forward(ctx: Any, before: Before, change: Sequence[Tensor], turns: Turns, x_BLD: Tensor, *_: Tensor) -> Any:
        normed_BLD, *moments = _modulated(before.norm, x_BLD, change)
        found, kept = zip(*(layer.product(normed_BLD.flatten(0, 1)) for layer in before.layers), strict=True)
        raw = [_by_head(states_NO, x_BLD, before) for states_NO in found[:3]]
        pairs = zip(raw, before.norms, strict=False)  # values stay as they are
        turned = [kernels.turn(states_BLHE, norm.weight, *turns, norm.eps) for states_BLHE, norm in pairs]
        ctx.before, ctx.turns, ctx.change = before, turns, change
        ctx.save_for_backward(x_BLD, *moments, *raw[:2], *kept)
        return *turned, raw[2], *(states_NO.unflatten(0, x_BLD.shape[:2]) for states_NO in found[3:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        before: Before = ctx.before
        x_BLD, mean_BL1, deviation_BL1, query_BLHE, key_BLHE, *kept = ctx.saved_tensors
        normed_ND = _modulated(before.norm, x_BLD, ctx.change)[0].flatten(0, 1)
        gradients = [dy.contiguous() for dy in upstream]
        cos_LE, sin_LE = ctx.turns
        for place, (raw_BLHE, norm) in enumerate(zip((query_BLHE, key_BLHE), before.norms, strict=True)):
            dy_BLHE = gradients[place]
            gradients[place] = kernels.turn_backward(dy_BLHE, raw_BLHE, norm.weight, cos_LE, sin_LE, norm.eps)
        on_normed_ND, on_adapters = None, []
        for layer, dy, xa_Nr in zip(before.layers, gradients, kept, strict=True):
            dy_NO = dy.view(len(normed_ND), -1)
            on_normed_ND, dxa_Nr = layer.input_gradient(dy_NO, on_normed_ND)
            on_adapters += layer.adapter_gradients(dy_NO, dxa_Nr, normed_ND, xa_Nr)
        on_normed_BLD = cast(Tensor, on_normed_ND).view_as(x_BLD)
        dx_BLD = _modulated_backward(before.norm, on_normed_BLD, x_BLD, mean_BL1, deviation_BL1, ctx.change)
        return None, None, None, dx_BLD, *on_adapters


class Rest(torch.autograd.Function):
    """x (B, L, D) and what attention found (B, L, O) -> the block's output, (B, L, D)."""

    @staticmethod
    def forward(
        ctx: Any, after: After, change: Sequence[Tensor], x_BLD: Tensor, found_BLO: Tensor, *_: Tensor
    ) -> Tensor:
        output, wide, down = after.layers
        gate_B1D, *inner, gate_after_B1D = change
        found_NO = found_BLO.reshape(-1, found_BLO.shape[2])
        out_ND, from_found = output.product(found_NO)
        middle_BLD = torch.addcmul(x_BLD, gate_B1D, out_ND.view_as(x_BLD))
        normed_BLD, *moments = _modulated(after.norm, middle_BLD, inner)
        wide_NI, from_normed = wide.product(normed_BLD.flatten(0, 1))
        down_ND, from_active = down.product(gelu(wide_NI, approximate=TANH))
        ctx.after, ctx.change = after, change
        ctx.save_for_backward(found_NO, middle_BLD, *moments, wide_NI, from_found, from_normed, from_active)
        return torch.addcmul(middle_BLD, gate_after_B1D, down_ND.view_as(x_BLD))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        found_NO, middle_BLD, mean_BL1, deviation_BL1, wide_NI, from_found, from_normed, from_active = ctx.saved_tensors
        output, wide, down = ctx.after.layers
        gate_B1D, *inner, gate_after_B1D = ctx.change
        dy_BLD = upstream.contiguous()
        on_down_ND = (dy_BLD * gate_after_B1D).flatten(0, 1)
        on_active_NI, onto_down = down.input_gradient(on_down_ND)
        active_NI = gelu(wide_NI, approximate=TANH)
        on_adapters = down.adapter_gradients(on_down_ND, onto_down, active_NI, from_active)
        on_wide_NI = torch.ops.aten.gelu_backward(on_active_NI, wide_NI, approximate=TANH)
        del on_down_ND, on_active_NI, active_NI
        normed_ND = _modulated(ctx.after.norm, middle_BLD, inner)[0].flatten(0, 1)
        on_normed_ND, onto_wide = wide.input_gradient(on_wide_NI)
        on_adapters = wide.adapter_gradients(on_wide_NI, onto_wide, normed_ND, from_normed) + on_adapters
        on_normed_BLD = on_normed_ND.view_as(dy_BLD)
        on_middle_BLD = _modulated_backward(
            ctx.after.norm, on_normed_BLD, middle_BLD, mean_BL1, deviation_BL1, inner
        ).add_(dy_BLD)
        on_out_ND = (on_middle_BLD * gate_B1D).flatten(0, 1)
        on_found_NO, onto_found = output.input_gradient(on_out_ND)
        on_adapters = output.adapter_gradients(on_out_ND, onto_found, found_NO, from_found) + on_adapters
        return None, None, on_middle_BLD, on_found_NO.view(*dy_BLD.shape[:2], -1), *on_adapters


class Joined(torch.autograd.Function):
    """x (B, S, D), what attention found (B, S, O) and a feed-forward layer's input (B, S, I) -> the block's output."""

    @staticmethod
    def forward(
        ctx: Any, output: Linear, gate_B1D: Tensor, x_BSD: Tensor, found_BSO: Tensor, wide_BSI: Tensor, *_: Tensor
    ) -> Tensor:
        out_ND, from_both = output.product(_joined(found_BSO, wide_BSI))
        ctx.output = output
        ctx.save_for_backward(gate_B1D, found_BSO, wide_BSI, from_both)
        return torch.addcmul(x_BSD, gate_B1D, out_ND.view_as(x_BSD))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        gate_B1D, found_BSO, wide_BSI, from_both = ctx.saved_tensors
        dy_BSD = upstream.contiguous()
        on_out_ND = (dy_BSD * gate_B1D).flatten(0, 1)
        on_both_NJ, onto_out = ctx.output.input_gradient(on_out_ND)
        on_adapters = ctx.output.adapter_gradients(on_out_ND, onto_out, _joined(found_BSO, wide_BSI), from_both)
        on_found, on_active = on_both_NJ.unflatten(0, dy_BSD.shape[:2]).split(
            [found_BSO.shape[2], wide_BSI.shape[2]], 2
        )
        on_wide_BSI = torch.ops.aten.gelu_backward(on_active, wide_BSI, approximate=TANH)
        return None, None, dy_BSD, on_found, on_wide_BSI, *on_adapters


def fast(block: Any, dtype: torch.dtype) -> tuple[Any, Any] | None:
    """What a block of FLUX.1 computes and its class with a forward pass of its own; None for any other block."""
    name = type(block).__name__
    if name not in ("FluxTransformerBlock", "FluxSingleTransformerBlock") or not _is_plain(block):
        return None
    computes = FastSingle if name == "FluxSingleTransformerBlock" else FastDouble
    return computes(block, dtype), _fast_class(cast(Hashable, type(block)))


def _is_plain(block: Any) -> bool:
    attention = block.attn
    if type(attention.processor).__name__ != "FluxAttnProcessor" or attention.processor._attention_backend is not None:
        return False
    if attention.fused_projections or any(part.p for part in block.modules() if isinstance(part, nn.Dropout)):
        return False
    norms = (getattr(block, name, None) for name in ("norm", "norm1", "norm1_context"))
    if any(hasattr(norm.linear, "lora_A") for norm in norms if norm is not None):
        return False  # no gradient goes to what modulates
    activations = [part for part in block.modules() if type(part).__name__ == "GELU"]
    return bool(activations) and all(part.approximate == TANH for part in activations)


@cache
def _fast_class(plain: Any) -> Any:
    """A subclass with a forward pass of its own, so that libraries still know it."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        tokens, fast = [encoder_hidden_states, hidden_states], self.fast
        special = joint_attention_kwargs or image_rotary_emb is None
        if special or is_off(self) or temb.requires_grad or any(x.dtype != fast.dtype for x in tokens):
            return plain.forward(
                self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
        return tuple(fast.forward(self, tokens, temb, image_rotary_emb))

    return type(plain.__name__, (plain,), {"forward": forward})


def _by_head(states_NO: Tensor, x_BLD: Tensor, before: Before) -> Tensor:
    """The same memory as (B, L, H, E)."""
    return states_NO.view(*x_BLD.shape[:2], -1, before.norms[0].weight.shape[0])


def _joined(found_BSO: Tensor, wide_BSI: Tensor) -> Tensor:
    """What the output layer of a single block reads, (N, O + I)."""
    return torch.cat([found_BSO, gelu(wide_BSI, approximate=TANH)], 2).flatten(0, 1)


def _modulated(norm: Any, x_BLD: Tensor, change: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The layer norm, shifted and scaled by image; mean and inverse deviation of each token."""
    shift_B1D, scale_B1D = change
    normed_BLD, mean_BL1, deviation_BL1 = kernels.layer_norm(norm, x_BLD)
    return torch.addcmul(shift_B1D, normed_BLD, 1 + scale_B1D), mean_BL1, deviation_BL1


def _modulated_backward(
    norm: Any, dy_BLD: Tensor, x_BLD: Tensor, mean_BL1: Tensor, deviation_BL1: Tensor, change: Sequence[Tensor]
) -> Tensor:
    """The gradient on x."""
    return kernels.layer_norm_backward(norm, dy_BLD * (1 + change[1]), x_BLD, mean_BL1, deviation_BL1)
