"""Language models as adapters see them: the tokenizer, the frozen base, the states of packed rows, the output layer.

B packs, L slots of a pack, D hidden channels, V vocabulary entries, H heads, K heads of keys and values, E channels of
a head, G segments of all packs, N tokens
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from finetune.config import ModelConfig, Quantize
from finetune.errors import ConfigError, ModelError
from finetune.models import hub, offload, quantize
from finetune.models.linear_loss import Head, logits
from finetune.models.lora_files import PART_OF
from finetune.progress import say

VARLEN = "finetune_varlen"  # name of `_varlen_attention` in transformers' table of attention functions
HALF = (torch.float16, torch.bfloat16)
# Where models that also read pictures keep the language model, in releases before and since transformers 5.
TEXT_PARTS = {r"^language_model\.model\.": "model.", r"^language_model\.lm_head\.": "lm_head.",
              r"^model\.language_model\.": "model."}  # fmt: skip
# Relative differences. Of one attention in 16 bit, rounding alone stays below the second. Of a whole model's logits it
# gives 1e-6 in fp32 and at most 0.051 in 16 bit (8 billion random weights in nf4); a row that sees another, 0.2 to 1.
FP32_NOISE, KERNEL_NOISE, HALF_NOISE = 1e-3, 0.05, 0.1


def load_tokenizer(base: str, added: Sequence[str] = ()) -> Any:
    """The tokenizer of a base model, with `added` as new control tokens behind its vocabulary.

    base: `embedded:NAME`, a local folder or a hub id. Raises ModelError if there is none, ConfigError for an added
    token that is blank or already an ordinary piece of text.
    """
    from transformers import AddedToken, AutoTokenizer

    tokenizer = hub.load(AutoTokenizer, base)
    pieces = tokenizer.get_vocab().keys() - {entry.content for entry in tokenizer.added_tokens_decoder.values()}
    for token in added:
        if token != token.strip() or not token or token in pieces:
            raise ConfigError(
                f"model.added_tokens: {token!r} can't become a control token of {base}: it must have no blank at "
                "either end and not be an ordinary token already; try one like <|note|>"
            )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    return tokenizer


def load_model(model: ModelConfig, dtype: torch.dtype, device: torch.device, *, vram_gib: float = 0.0) -> nn.Module:
    """The base as a frozen causal language model in eval mode, stored and placed as `model` says.

    dtype: of weights that aren't quantised, and of the arithmetic of those that are. vram_gib: memory of the card, GiB,
    that `model.offload` fills before it keeps blocks in main memory; 0 is all of it. Of a model that also reads
    pictures, the language model alone. New control tokens begin at the mean of all others. Raises ModelError for a base
    that is none, that can't be stored so, or whose hidden states or output layer are used in a way that isn't known
    here.
    """
    loader, config, options = _architecture(model)
    streamed = offload.wanted(model, device)
    if model.quantize is not Quantize.none:
        from transformers import BitsAndBytesConfig

        quantize.prove(model, dtype, device)
        options["quantization_config"] = BitsAndBytesConfig(**quantize.settings(model.quantize, dtype))
    with _hushed():
        loaded = hub.load(
            loader, model.base, config=config, dtype=dtype, device_map={"": "cpu" if streamed else device}, **options
        )
    if "key_mapping" in options:
        loaded._weight_conversions = None  # else `save_pretrained` would write the names of the whole model
        setattr(loaded, PART_OF, "model.language_model.")
    if model.added_tokens:
        _add_rows(loaded, model)
    loaded.requires_grad_(False).eval()
    for layer in loaded.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            # bitsandbytes' layout for CPU inference: the first evaluation would convert the weights to it for good, and
            # whatever is trained afterwards would get no gradient through them.
            layer.support_avx512bf16_for_cpu = False
    if streamed:
        offload.spread(loaded, device, vram_gib)
    if device.type == "cuda" and dtype in HALF and _varlen_fits(loaded):
        if _varlen_works(loaded, dtype, device):
            _use_varlen(loaded)
        else:
            say("torch's attention for packed rows doesn't work on this card; masks do, slower and with more memory")
    _prove(loaded, model.base, device)
    return cast(nn.Module, loaded)


def hidden(model: nn.Module, ids_BL: Tensor, positions_BL: Tensor, segments_BL: Tensor | None) -> Tensor:
    """States behind the final norm (B, L, D), what `head` reads; adapters included, no key-value cache.

    positions_BL: from 0 in each segment, as in `Pack.positions`. segments_BL: as `Pack.segments`: a slot sees those of
    its own segment that are not later (within the window, where a layer has one); on the CPU they spare the card a
    wait. None: a pack is one segment, whatever its positions. Raises ValueError where positions and segments disagree.
    """
    causal: Any = model
    backbone: Any = causal.get_decoder()
    seen: dict[str, Any]
    if segments_BL is None:
        seen = {"attention_mask": torch.ones_like(ids_BL)}
    elif backbone.config._attn_implementation == VARLEN:
        borders = _borders(segments_BL).to(ids_BL.device, non_blocking=True)
        # An empty mask: transformers builds none of its own, and attention that knows no borders fails on it.
        seen = {"attention_mask": ids_BL.new_zeros((1, 1, 0, 0), dtype=torch.bool)}
        seen |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
        seen |= dict.fromkeys(("max_length_q", "max_length_k"), ids_BL.shape[1])
    else:
        # transformers reads the segments off the positions and builds every layer's mask, windows included.
        segments_BL = segments_BL.to(positions_BL.device)
        if not torch.equal(positions_BL.diff(dim=1) != 1, segments_BL.diff(dim=1) != 0):
            raise ValueError("positions must count up within each segment and start anew in the next")
        seen = {"attention_mask": None}
    states: Tensor = backbone(input_ids=ids_BL, position_ids=positions_BL, use_cache=False, **seen).last_hidden_state
    return states


def head(model: nn.Module) -> Head:
    """The frozen output layer, with what the architecture does to its logits."""
    config: Any = model.config
    causal: Any = model
    layer = causal.get_output_embeddings()
    scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1.0)  # Cohere, Granite
    return Head(
        weight=layer.weight,
        bias=getattr(layer, "bias", None),
        softcap=getattr(config, "final_logit_softcapping", None),  # Gemma 2
        scale=scale,
    )


def _architecture(model: ModelConfig) -> tuple[Any, Any, dict[str, Any]]:
    """The causal language model's class, its configuration, and further options for loading it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    source = hub.resolve(model.base)
    if isinstance(source, Path) and (source / "model_index.json").is_file():
        raise _no_language_model(model.base, "diffusion")
    whole = hub.load(AutoConfig, model.base)
    text = whole.get_text_config()
    config = text if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING else whole
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _no_language_model(model.base, whole.model_type)
    stored = getattr(whole, "quantization_config", None)
    if stored and (model.quantize is not Quantize.none or config is not whole):
        method = stored.get("quant_method", "unknown method") if isinstance(stored, dict) else stored.quant_method
        raise ModelError(
            f"{model.base} is stored quantised ({method}) and can't be quantised again"
            + ("; try model.quantize=none" if config is whole else "; take the release that isn't quantised")
        )
    options: dict[str, Any] = {} if config is whole else {"key_mapping": TEXT_PARTS}
    if getattr(config, "attn_logit_softcapping", None):  # Gemma 2's; some releases of transformers drop it elsewhere
        options["attn_implementation"] = "eager"
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config, options


def _no_language_model(base: str, kind: str) -> ModelError:
    return ModelError(
        f"{base} is a {kind} model and no causal language model; try a preset such as model=qwen3_4b, or "
        "model.base=OWNER/NAME of a chat model"
    )


@contextmanager
def _hushed() -> Iterator[None]:
    """No report of weights that are left out (those for pictures); `hub` reports missing ones."""
    from transformers.utils import logging as library

    before = library.get_verbosity()
    library.set_verbosity_error()
    try:
        yield
    finally:
        library.set_verbosity(before)


def _add_rows(model: Any, wanted: ModelConfig) -> None:
    """Rows of the embedding (and of an output layer of its own) for new tokens, at the mean of the others.

    The mean leaves other tokens' probabilities nearly as they were; a row of random numbers may outdo them all.
    """
    old = set(load_tokenizer(wanted.base).get_vocab().values())
    new = sorted(set(load_tokenizer(wanted.base, wanted.added_tokens).get_vocab().values()) - old)
    if not new:
        return
    if new[-1] >= model.get_input_embeddings().weight.shape[0]:
        with torch.random.fork_rng():
            model.resize_token_embeddings(new[-1] + 1, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[new] = layer.weight[: new[0]].float().mean(0).to(layer.weight.dtype)


def _varlen_fits(model: Any) -> bool:
    """Whether attention for rows of many lengths is all that this model's attention does."""
    config = model.config
    return bool(
        model._supports_flash_attn
        and config._attn_implementation == "sdpa"
        and not getattr(config, "attention_dropout", 0)
        and set(getattr(config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}
    )


@torch.enable_grad()
def _varlen_works(model: Any, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch's kernel gives what plain attention gives, gradients too, for heads of this size on this card."""
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
            packed_BLHE, _ = _varlen_attention(
                nn.Module(), query, key, value, None, scaling=channels**-0.5, sliding_window=window,
                cu_seq_lens_q=_borders(segments_L[None]), max_length_q=8,
            )  # fmt: skip
            found, expected = (
                torch.cat([output, *torch.autograd.grad(output, (query, key, value), random[3])])
                for output in (packed_BLHE.transpose(1, 2), plain)
            )
            if not (found - expected).norm() <= KERNEL_NOISE * expected.norm():
                return False
    except RuntimeError:  # no kernel for this card or size of heads
        return False
    return True


def _use_varlen(model: Any) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(VARLEN, _varlen_attention)
    AttentionMaskInterface.register(VARLEN, sdpa_mask)  # for every call without borders, as in writing
    model.set_attn_implementation(VARLEN)


def _borders(segments_BL: Tensor) -> Tensor:
    """Where segments begin in the packs laid end to end, and the last one ends: (G+1,) int32."""
    starts_BL = torch.ones_like(segments_BL, dtype=torch.bool)
    starts_BL[:, 1:] = segments_BL.diff(dim=1) != 0
    starts = starts_BL.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([segments_BL.numel()])]).int()


def _varlen_attention(
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
    """Attention within segments (B, L, H, E) where `hidden` gives their borders; anywhere else transformers' own."""
    from torch.nn.attention import varlen
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if cu_seq_lens_q is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query_BHLE, key_BKLE, value_BKLE, attention_mask, scaling=scaling, **others
        )
        return found
    groups = query_BHLE.shape[1] // key_BKLE.shape[1]  # torch shares keys between heads from 2.12 on only
    query_NHE, key_NHE, value_NHE = (
        states.to(value_BKLE.dtype).transpose(1, 2).flatten(0, 1).repeat_interleave(times, dim=1)
        for states, times in ((query_BHLE, 1), (key_BKLE, groups), (value_BKLE, groups))
    )
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


def _prove(model: Any, base: str, device: torch.device) -> None:
    """Two rows in a pack must give the logits that the model itself gives for one of them alone.

    Raises ModelError if they don't: rows that see one another, tokens that see later ones, or an output layer that does
    more than `head` knows would all train a wrong model in silence.
    """
    ids_1L = torch.tensor([[4, 5, 6, 7, 4, 5, 6]], device=device)
    positions_1L = torch.tensor([[0, 1, 2, 3, 0, 1, 2]], device=device)
    with torch.no_grad():
        states_LD = hidden(model, ids_1L, positions_1L, torch.tensor([[0, 0, 0, 0, 1, 1, 1]]))[0]
        alone_LV = model(input_ids=ids_1L[:, :3], use_cache=False).logits[0].float()
        packed_LV = logits(head(model), states_LD)
    noise = FP32_NOISE if model.dtype == torch.float32 and not hasattr(model, "hf_quantizer") else HALF_NOISE
    worst = max(float((part_LV - alone_LV).norm() / alone_LV.norm()) for part_LV in (packed_LV[:3], packed_LV[4:]))
    if not worst <= noise:
        raise ModelError(
            f"{base} ({type(model).__name__}) can't be trained here: its packed rows or its output layer work in an "
            f"unknown way (logits differ by {worst:.2g} of their size from those of a row alone); choose another base"
        )
