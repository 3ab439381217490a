"""Bases at full size with random weights, from the architectures that ship with the presets.

Speed and memory do not depend on the values of weights. Text encoders are shortened: they run once, before training.

    python -m scripts.bench.bases PRESET FOLDER

saves a language model to be served: a word for each of its ids, since random weights write any.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from tests.tiny_tokenizers import clip_tokenizer, qwen_tokenizer, t5_tokenizer

PACKAGE = Path(__file__).resolve().parents[2] / "finetune"
LANGUAGE_TOKENIZER = PACKAGE / "embedded" / "language"
CAPTIONER = PACKAGE / "embedded" / "captioner"
# Of a language model's weights, half of what transformers draws them with. int8 keeps each column in 16 bit in which a
# number exceeds 6: trained models have few (arXiv 2208.07339), with this spread there are none among 2,048 tokens, with
# twice of it nearly all of an MLP's inner columns are.
SPREAD = 0.01
TEXT_LAYERS = {"Qwen3ForCausalLM": 28}  # FLUX.2 reads the states behind three layers, of which the last is the 27th
MAX_SHARD = "4GB"


def build(preset: str, base: Path, device: torch.device) -> int:
    """Save the base of `model=PRESET` into the folder `base`, in bf16; returns its parameters, text encoders aside."""
    return save(PACKAGE / "architectures" / preset, base, device)


def save(source: Path, base: Path, device: torch.device) -> int:
    """The same for an architecture in the folder `source`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            if (source / "model_index.json").exists():
                return _pipeline(source, base)
            kind = json.loads((source / "config.json").read_text())["model_type"]
            return (_captioner if kind == "blip" else _language)(source, base)
    finally:
        torch.set_default_dtype(before)


def _language(source: Path, base: Path) -> int:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(LANGUAGE_TOKENIZER)
    config = AutoConfig.from_pretrained(source)
    text = config.get_text_config()
    for part in (config, text):
        part.bos_token_id, part.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        part.pad_token_id, part.initializer_range = tokenizer.pad_token_id, SPREAD
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(base, max_shard_size=MAX_SHARD)
    tokenizer.save_pretrained(base)
    return sum(weight.numel() for weight in model.parameters())


def name_all_ids(base: Path) -> None:
    """Give the tokenizer in the folder `base` a word for each id of the model that it has none for."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    size = AutoConfig.from_pretrained(base).get_text_config().vocab_size
    tokenizer.add_tokens([f" word{index}" for index in range(len(tokenizer), size)])
    tokenizer.save_pretrained(base)


def _captioner(source: Path, base: Path) -> int:
    from transformers import AutoConfig, AutoTokenizer, BlipForConditionalGeneration, BlipImageProcessorPil

    config = AutoConfig.from_pretrained(source)
    model = BlipForConditionalGeneration(config)
    model.save_pretrained(base)
    side = config.vision_config.image_size
    BlipImageProcessorPil(size={"height": side, "width": side}).save_pretrained(base)
    AutoTokenizer.from_pretrained(CAPTIONER).save_pretrained(base)
    return sum(weight.numel() for weight in model.parameters())


def _pipeline(source: Path, base: Path) -> int:
    index = json.loads((source / "model_index.json").read_text())
    count = 0
    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, list) or entry[0] is None:
            continue
        folder, name = base / part, entry[1]
        if "Tokenizer" in name:
            make = clip_tokenizer if "CLIP" in name else t5_tokenizer if "T5" in name else qwen_tokenizer
            make(folder)
        elif (source / part / "config.json").exists():
            count += _part(name, source / part, folder)
        else:
            shutil.copytree(source / part, folder, dirs_exist_ok=True)  # the scheduler
    shutil.copy(source / "model_index.json", base / "model_index.json")
    return count


def _part(name: str, source: Path, folder: Path) -> int:
    import diffusers
    import transformers

    if hasattr(diffusers, name):
        kind: Any = getattr(diffusers, name)
        model = kind.from_config(kind.load_config(source))
        model.save_pretrained(folder, max_shard_size=MAX_SHARD)
        return sum(weight.numel() for weight in model.parameters())
    kind = getattr(transformers, name)
    config = kind.config_class.from_pretrained(source)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for layers in ("num_hidden_layers", "num_layers"):
        if hasattr(text, layers):
            setattr(text, layers, TEXT_LAYERS.get(name, 2))
    if hasattr(text, "layer_types"):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    kind(config).save_pretrained(folder, max_shard_size=MAX_SHARD)
    return 0


def main() -> None:
    preset, base = sys.argv[1], Path(sys.argv[2])
    print(build(preset, base, torch.device("cuda" if torch.cuda.is_available() else "cpu")), "parameters")
    name_all_ids(base)


if __name__ == "__main__":
    main()
