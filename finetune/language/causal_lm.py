"""Language models as adapters see them: the tokenizer, the frozen base, the states of packed rows, the output layer.

B packs, L token positions of a pack, D hidden channels, V vocabulary entries, H heads, K heads of keys and values, E
channels of a head, G segments of all packs, N tokens
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from finetune import hub
from finetune.adapters.formats import FULL_MODEL_PREFIX
from finetune.config.schema import ModelConfig, Quantize
from finetune.config.spelling import setting
from finetune.errors import ConfigError, ModelError
from finetune.language import varlen_attention
from finetune.language.losses import Head, logits
from finetune.memory import block_offload, quantize
from finetune.run import libraries
from finetune.run.progress import say

# Where models that also read images keep the language model, in releases before and since transformers 5.
TEXT_PARTS = {r"^language_model\.model\.": "model.", r"^language_model\.lm_head\.": "lm_head.",
              r"^model\.language_model\.": "model."}  # fmt: skip
# Relative difference of logits: rounding gives 1e-6 in fp32 and at most 0.051 in 16 bit (8 billion random weights in
# nf4), a row that sees another 0.2 to 1.
FP32_NOISE, HALF_NOISE = 1e-3, 0.1


def load_tokenizer(base: str, added: Sequence[str] = ()) -> Any:
    """The tokenizer of a base model, with `added` as new control tokens behind its vocabulary.

    base: `embedded:NAME`, a local folder or a hub id. Raises ModelError if there is none, ConfigError for an added
    token that is blank or already an ordinary piece of text.
    """
    from transformers import AddedToken, AutoTokenizer

    tokenizer = hub.load(AutoTokenizer, base)
    with hub.explained(lambda reason: f"the tokenizer of {base} failed ({reason}); get its files again"):
        tokenizer("a")  # what its configuration says of lengths and sides is used here first
    pieces = tokenizer.get_vocab().keys() - {entry.content for entry in tokenizer.added_tokens_decoder.values()}
    for token in added:
        if token != token.strip() or not token or token in pieces:
            raise ConfigError(
                f"model.added_tokens: {token!r} can't become a control token of {base}: it must have no blank at "
                "either end and not be an ordinary token already; try one like <|note|>"
            )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    return tokenizer


def most_tokens(model: Any) -> int | None:
    """Tokens of the longest row that a base reads; None where it names none."""
    found: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found


def load_model(model: ModelConfig, dtype: torch.dtype, device: torch.device, *, vram_gib: float = 0.0) -> nn.Module:
    """The base as a frozen causal language model in eval mode, stored and placed as `model` says.

    dtype: of weights that aren't quantised, and of the arithmetic of those that are. vram_gib: memory of the GPU, GiB,
    that `model.offload` fills before it keeps blocks in CPU memory; 0 is all of it. Of a model that also reads
    images, the language model alone. New control tokens begin at the mean of all others. Raises ModelError for a base
    that is none, that can't be stored so, or whose hidden states or output layer are used in a way that isn't known
    here.
    """
    loader, config, options = architecture(model)
    streamed = block_offload.is_active(model, device)
    if model.quantize is not Quantize.none:
        from transformers import BitsAndBytesConfig

        quantize.prove(model, dtype, device)
        options["quantization_config"] = BitsAndBytesConfig(**quantize.settings(model.quantize, dtype))
    with libraries.without_warnings():  # about weights that are left out (those for images); `hub` reports missing ones
        loaded = hub.load(
            loader, model.base, config=config, dtype=dtype, device_map={"": "cpu" if streamed else device}, **options
        )
    if "key_mapping" in options:
        loaded._weight_conversions = None  # else `save_pretrained` would write the names of the whole model
        setattr(loaded, FULL_MODEL_PREFIX, "model.language_model.")
    if model.added_tokens:
        _add_rows(loaded, model)
    loaded.requires_grad_(False).eval()
    quantize.prepare(loaded)
    if streamed:
        block_offload.offload_to_fit(loaded, device, vram_gib)
    if device.type == "cuda" and varlen_attention.supports(loaded, dtype):
        if varlen_attention.self_test(loaded, dtype, device):
            varlen_attention.enable(loaded)
        else:
            say("torch's attention for packed rows doesn't work on this GPU; masks do, slower and with more memory")
    with hub.explained(lambda reason: f"{model.base} doesn't work ({reason}); get the model again"):
        _prove(loaded, model.base, device)
    return cast(nn.Module, loaded)


def packed_hidden_states(model: nn.Module, ids_BL: Tensor, positions_BL: Tensor, segments_BL: Tensor | None) -> Tensor:
    """States behind the final norm (B, L, D), what `head` reads; adapters included, no key-value cache.

    positions_BL: from 0 in each segment, as in `Pack.positions`. segments_BL: as `Pack.segments`: a slot sees those of
    its own segment that are not later (within the window, where a layer has one); on the CPU they spare the GPU a
    wait. None: a pack is one segment, whatever its positions. Raises ValueError where positions and segments disagree.
    """
    causal: Any = model
    if segments_BL is None:
        attention_kwargs: dict[str, Any] = {"attention_mask": torch.ones_like(ids_BL)}
    elif varlen_attention.is_enabled(causal):
        attention_kwargs = varlen_attention.attention_kwargs(
            ids_BL, varlen_attention.cu_seqlens(segments_BL).to(ids_BL.device, non_blocking=True)
        )
    else:
        # transformers reads the segments off the positions and builds every layer's mask, windows included.
        segments_BL = segments_BL.to(positions_BL.device)
        if not torch.equal(positions_BL.diff(dim=1) != 1, segments_BL.diff(dim=1) != 0):
            raise ValueError("positions must count up within each segment and start again in the next")
        attention_kwargs = {"attention_mask": None}
    return hidden_states(model, ids_BL, positions_BL, attention_kwargs)


def hidden_states(model: nn.Module, ids_BL: Tensor, positions_BL: Tensor, attention_kwargs: dict[str, Any]) -> Tensor:
    """`packed_hidden_states` with the arguments that say what each slot sees."""
    causal: Any = model
    backbone: Any = causal.get_decoder()
    found: Tensor = backbone(
        input_ids=ids_BL, position_ids=positions_BL, use_cache=False, **attention_kwargs
    ).last_hidden_state
    return found


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


def require_rows(model: nn.Module, tokenizer: Any, largest: int, where: str) -> None:
    """Raises ModelError if `largest`, a token's id in what `where` names, has no row in the embedding."""
    causal: Any = model
    rows = causal.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ModelError(
            f"{where}: the tokenizer gives {token!r} the id {largest}, but the base's embedding has {rows} rows; train "
            f"a row for it, {setting('model.added_tokens', [token])}, or take the tokenizer that belongs to the base"
        )


def architecture(model: ModelConfig, folder: Path | None = None) -> tuple[Any, Any, dict[str, Any]]:
    """The causal language model's class, its configuration (of `folder`, if given), and options for loading it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    source = hub.resolve(model.base)
    if isinstance(source, Path) and (source / "model_index.json").is_file():
        raise _no_language_model(model.base, "diffusion")
    hub.require(model.base, "config.json")
    whole = hub.load(AutoConfig, str(folder) if folder else model.base)
    text = whole.get_text_config()
    config = text if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING else whole
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _no_language_model(model.base, whole.model_type)
    pad = getattr(config, "pad_token_id", None)
    if pad is not None and not -config.vocab_size <= pad < config.vocab_size:
        raise ModelError(
            f"{model.base}: its config.json has pad_token_id={pad}, but a vocabulary of {config.vocab_size} tokens; "
            "correct it there, null is none"
        )
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


def _add_rows(model: Any, wanted: ModelConfig) -> None:
    """Rows of the embedding (and of an output layer of its own) for new tokens, at the mean of the others.

    The mean leaves other tokens' probabilities nearly as they were; a row of random numbers may outdo them all.
    """
    embedding = model.get_input_embeddings()
    rows, old = embedding.weight.shape[0], set(load_tokenizer(wanted.base).get_vocab().values())
    ids = load_tokenizer(wanted.base, wanted.added_tokens).convert_tokens_to_ids(wanted.added_tokens)
    new = sorted({token for token in ids if token not in old or token >= rows})
    if not new:
        return
    if new[-1] >= rows:
        with torch.random.fork_rng():
            model.resize_token_embeddings(new[-1] + 1, mean_resizing=False)
        new = sorted({*new, *range(rows, new[-1] + 1)})
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[new] = layer.weight[: new[0]].float().mean(0).to(layer.weight.dtype)


def _prove(model: Any, base: str, device: torch.device) -> None:
    """Two rows in a pack must give the logits that the model itself gives for one of them alone.

    Raises ModelError if they don't: rows that see one another, tokens that see later ones, or an output layer that does
    more than `head` knows would all train a wrong model in silence.
    """
    ids_1L = torch.tensor([[4, 5, 6, 7, 4, 5, 6]], device=device)
    positions_1L = torch.tensor([[0, 1, 2, 3, 0, 1, 2]], device=device)
    with torch.no_grad():
        states_LD = packed_hidden_states(model, ids_1L, positions_1L, torch.tensor([[0, 0, 0, 0, 1, 1, 1]]))[0]
        alone_LV = model(input_ids=ids_1L[:, :3], use_cache=False).logits[0].float()
        packed_LV = logits(head(model), states_LD)
    noise = FP32_NOISE if model.dtype == torch.float32 and not hasattr(model, "hf_quantizer") else HALF_NOISE
    worst = max(float((part_LV - alone_LV).norm() / alone_LV.norm()) for part_LV in (packed_LV[:3], packed_LV[4:]))
    if not worst <= noise:
        raise ModelError(
            f"{base} ({type(model).__name__}) can't be trained here: its packed rows or its output layer work in an "
            f"unknown way (logits differ by {worst:.2g} of their size from those of a row alone); choose another base"
        )
