"""Attention for rows of many lengths laid end to end (torch's kernel), as one of transformers' attention functions.

B packs, L token positions of a pack, H heads, K heads of keys and values, E channels of a head, G segments of all
packs, N tokens
"""

from typing import Any

import torch
from torch import Tensor, nn

NAME = "finetune_varlen"  # of `attention` in transformers' table of attention functions
SEGMENTS = 32  # their number is a multiple of it; for each of them the backward pass takes memory for 128 tokens
HALF = (torch.float16, torch.bfloat16)
NOISE = 0.05  # relative difference of one attention in 16 bit: rounding gives about 0.01, a row that sees another more


def supports(model: Any, dtype: torch.dtype) -> bool:
    """Whether attention for rows of many lengths is all that this model's attention does."""
    config = model.config
    return bool(
        dtype in HALF
        and model._supports_flash_attn
        and config._attn_implementation == "sdpa"
        and not getattr(config, "attention_dropout", 0)
        and set(getattr(config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}
    )


@torch.enable_grad()
def self_test(model: Any, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch's kernel gives what plain attention gives, gradients too, for heads of this size on this GPU."""
    config = model.config
    channels = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    segments_L = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1], device=device)
    behind_LL = torch.arange(8, device=device)[:, None] - torch.arange(8, device=device)
    random = torch.randn((4, 1, 2, 8, channels), generator=torch.Generator().manual_seed(0)).to(device, dtype)
    query, key, value = (states.requires_grad_() for states in random[:3])
    try:
        for window in (None, 3):
            seen_LL = (segments_L[:, None] == segments_L) & (behind_LL >= 0) & (behind_LL < (window or 8))
            plain = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen_LL)
            packed_BLHE, _ = attention(
                nn.Module(), query, key, value, None, scaling=channels**-0.5, sliding_window=window,
                cu_seq_lens_q=cu_seqlens(segments_L[None]), max_length_q=8,
            )  # fmt: skip
            found, expected = (
                torch.cat([output, *torch.autograd.grad(output, (query, key, value), random[3])])
                for output in (packed_BLHE.transpose(1, 2), plain)
            )
            if not (found - expected).norm() <= NOISE * expected.norm():
                return False
    except RuntimeError:  # no kernel for this GPU or size of heads
        return False
    return True


def enable(model: Any) -> None:
    """Have the model attend with `attention` from now on."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # for every call without borders, as in writing
    model.set_attn_implementation(NAME)


def is_enabled(model: Any) -> bool:
    """Whether `enable` was called on the model."""
    return bool(model.config._attn_implementation == NAME)


def attention_kwargs(ids_BL: Tensor, cu_seqlens_G: Tensor) -> dict[str, Any]:
    """What a model that uses `attention` is called with besides ids and positions. cu_seqlens_G: from `cu_seqlens`."""
    # An empty mask: transformers builds none of its own, and attention that knows no borders fails on it.
    given: dict[str, Any] = {"attention_mask": ids_BL.new_zeros((1, 1, 0, 0), dtype=torch.bool)}
    given |= {"cu_seq_lens_q": cu_seqlens_G, "cu_seq_lens_k": cu_seqlens_G}
    return given | dict.fromkeys(("max_length_q", "max_length_k"), ids_BL.shape[1])


def cu_seqlens(segments_BL: Tensor) -> Tensor:
    """Where segments begin in the packs laid end to end, and the last one ends: (G+1,) int32."""
    starts_BL = torch.ones_like(segments_BL, dtype=torch.bool)
    starts_BL[:, 1:] = segments_BL.diff(dim=1) != 0
    starts = starts_BL.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([segments_BL.numel()])]).int()


def padded(cu_seqlens_G: Tensor) -> Tensor:
    """The same with empty segments at the end, so that steps with other rows have the same shape."""
    missing = -(len(cu_seqlens_G) - 1) % SEGMENTS
    return torch.cat([cu_seqlens_G, cu_seqlens_G[-1:].expand(missing)])


def attention(
    module: nn.Module,
    query_BHLE: Tensor,
    key_BKLE: Tensor,
    value_BKLE: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention within segments (B, L, H, E) where cu_seqlens are given; anywhere else transformers' own."""
    from torch.nn.attention import varlen
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if cu_seq_lens_q is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query_BHLE, key_BKLE, value_BKLE, attention_mask, scaling=scaling, **others
        )
        return found
    groups = query_BHLE.shape[1] // key_BKLE.shape[1]  # torch shares keys between heads from 2.12 on only
    query_NHE, key_NHE, value_NHE = (
        states.to(value_BKLE.dtype).transpose(1, 2).flatten(0, 1) for states in (query_BHLE, key_BKLE, value_BKLE)
    )
    if groups > 1:
        key_NHE, value_NHE = (states.repeat_interleave(groups, dim=1) for states in (key_NHE, value_NHE))
    output_NHE: Any = varlen.varlen_attn(
        query_NHE,
        key_NHE,
        value_NHE,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
    )
    return output_NHE.unflatten(0, (query_BHLE.shape[0], -1)), None
