"""Tiny random language models of the real classes, built in code and saved in the ordinary layout."""

from pathlib import Path
from typing import Any

import torch

from tests import chat_templates as templates

# What each released model writes its conversations with: template, end of an answer, start of a text, padding.
CHATS: dict[str, tuple[str, str, str | None, str | None]] = {
    "llama": (templates.LLAMA3, "<|eot_id|>", "<|begin_of_text|>", None),
    "llama2": (templates.LLAMA2, "</s>", "<s>", None),
    "tinyllama": (templates.ZEPHYR, "</s>", "<s>", "</s>"),
    "qwen3": (templates.QWEN3, "<|im_end|>", None, "<|endoftext|>"),
    "mistral": (templates.MISTRAL, "</s>", "<s>", None),
    "mistral_sliding": (templates.MISTRAL, "</s>", "<s>", None),
    "gemma2": (templates.GEMMA, "<end_of_turn>", "<s>", "<unk>"),
    "gemma3": (templates.GEMMA, "<end_of_turn>", "<s>", "<unk>"),
    "phi3": (templates.PHI, "<|end|>", "<|endoftext|>", "<|endoftext|>"),
    "glm4": (templates.GLM, "<|endoftext|>", None, "<|endoftext|>"),
    "granite": (templates.ZEPHYR, "</s>", "<s>", "<|endoftext|>"),
    "cohere": (templates.CHATML, "<|im_end|>", "<s>", "<|endoftext|>"),
}
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
WINDOW = 4  # tokens that a sliding layer sees


def save_language(folder: Path, architecture: str = "llama", seed: int = 0) -> Path:
    """A language model of some 50,000 parameters and two layers, with a tokenizer that has a chat template.

    architecture: a key of `CHATS`. gemma3 is the class with an image encoder that the 4B model is released as.
    """
    template, end, start, padding = CHATS[architecture]
    tokenizer = templates.tokenizer(template, eos=end, bos=start, pad=padding)
    tokenizer.save_pretrained(folder)
    control = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build(architecture, SIZES | control | {"vocab_size": len(tokenizer)})
        for parameter in model.parameters():  # large enough that a token's neighbours show in its hidden state
            if parameter.ndim > 1:
                parameter.data.mul_(5)
            else:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def build(architecture: str, sizes: dict[str, Any]) -> Any:
    import transformers as hf

    half_sliding = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
    if architecture in ("llama", "llama2", "tinyllama"):
        return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes))
    if architecture == "qwen3":
        return hf.Qwen3ForCausalLM(hf.Qwen3Config(**sizes, head_dim=8))
    if architecture.startswith("mistral"):
        return hf.MistralForCausalLM(
            hf.MistralConfig(**sizes, sliding_window=WINDOW if architecture == "mistral_sliding" else None)
        )
    if architecture == "gemma2":
        return hf.Gemma2ForCausalLM(
            hf.Gemma2Config(**sizes, **half_sliding, query_pre_attn_scalar=8, final_logit_softcapping=2.0)
        )
    if architecture == "gemma3":
        images = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        return hf.Gemma3ForConditionalGeneration(
            hf.Gemma3Config(
                text_config=sizes | half_sliding | {"query_pre_attn_scalar": 8},
                vision_config=images | {"image_size": 28, "patch_size": 14},
                mm_tokens_per_image=4,
            )
        )
    if architecture == "phi3":
        extrapolated = {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
        return hf.Phi3ForCausalLM(
            hf.Phi3Config(
                **sizes,
                sliding_window=WINDOW**5,
                original_max_position_embeddings=128,
                rope_parameters=extrapolated | {"rope_theta": 1e4, "partial_rotary_factor": 0.75},
            )
        )
    if architecture == "glm4":
        return hf.Glm4ForCausalLM(hf.Glm4Config(**sizes, head_dim=8, attention_bias=True))
    if architecture == "granite":
        return hf.GraniteForCausalLM(hf.GraniteConfig(**sizes, logits_scaling=8.0, embedding_multiplier=12.0))
    return hf.CohereForCausalLM(hf.CohereConfig(**sizes, logit_scale=0.0625))
