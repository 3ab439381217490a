"""A LoRA adapter as a GGUF file for llama.cpp, written with the `gguf` package and read back.

Such a file holds the pairs A and B of each layer under llama.cpp's names, and one alpha; the update of a weight is
B @ A * alpha / rank. Architectures whose rotary embedding turns neighbouring channels in llama.cpp keep the rows of
their query and key weights in another order there, and so must B.

r rank, I inputs, O outputs of a layer
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.adapters import formats
from finetune.errors import ConfigError

# transformers' model_type -> (llama.cpp's architecture, whether query and key rows are reordered). From llama.cpp's
# own converters (conversion/llama.py, qwen.py, gemma.py, phi.py, granite.py, olmo.py, smollm.py).
ARCHITECTURES = {
    "gemma": ("gemma", False),
    "gemma2": ("gemma2", False),
    "gemma3_text": ("gemma3", False),
    "granite": ("granite", True),
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "olmo2": ("olmo2", False),
    "phi3": ("phi3", False),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "smollm3": ("smollm3", True),
}
OTHERWISE = "leave gguf out, as in export.formats=[peft,merged]; llama.cpp's own converter reads the merged folder"


@dataclass(frozen=True)
class Pair:
    """One layer's adapter: its name in the base, A (r, I), B (O, r), and the factor of B @ A."""

    name: str
    a: Tensor
    b: Tensor
    scaling: float


def require(base: Any, *, dora: bool = False, added_tokens: bool = False) -> None:
    """Raises ConfigError if an adapter for this base (transformers' configuration of it) can't become a GGUF file."""
    if find_spec("gguf") is None:
        raise ConfigError(f"export.formats names gguf, which needs: pip install finetune[gguf]; or {OTHERWISE}")
    if base.model_type not in ARCHITECTURES:
        raise ConfigError(
            f"export.formats names gguf, which is there for {', '.join(ARCHITECTURES)}, not for {base.model_type}; "
            f"{OTHERWISE}"
        )
    if dora or added_tokens:
        what = "lora.dora=true has magnitudes" if dora else "model.added_tokens have rows of their own"
        raise ConfigError(f"export.formats names gguf, but {what}, which a GGUF adapter can't hold; {OTHERWISE}")


def write(file: Path, adapter: Path, base: Any, name: str) -> None:
    """Write the PEFT folder `adapter` as one fp32 file that `llama-cli --lora` takes.

    base: transformers' configuration of the base. Raises ConfigError for what GGUF can't hold.
    """
    import gguf

    names = _names(base)
    pairs = list(_pairs(adapter))
    rank = len(pairs[0].a)
    writer = gguf.GGUFWriter(file, ARCHITECTURES[base.model_type][0])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, pairs[0].scaling * rank)
    for pair in pairs:
        target = names.get_name(pair.name)
        if target is None or (target == "output" and base.tie_word_embeddings):
            raise ConfigError(f"llama.cpp has no weight of its own for {pair.name}; {OTHERWISE}")
        heads = reordered_heads(pair.name, base)
        b_Or = reordered(pair.b, heads) if heads else pair.b
        writer.add_tensor(f"{target}.weight.lora_a", pair.a.numpy())
        writer.add_tensor(f"{target}.weight.lora_b", b_Or.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def reordered_heads(name: str, base: Any) -> int:
    """How many heads share a query or key weight whose rows llama.cpp keeps in another order; 0 for other weights."""
    _, reorders = ARCHITECTURES[base.model_type]
    if reorders and name.endswith("q_proj"):
        return int(base.num_attention_heads)
    if reorders and name.endswith("k_proj"):
        return int(base.num_key_value_heads)
    return 0


def reordered(weight: Tensor, heads: int) -> Tensor:
    """Rows (O, …) of transformers' order in llama.cpp's: those of a head's two halves take turns."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def difference(file: Path, adapter: Path, base: Any) -> float:
    """‖updates read from `file` − the PEFT folder's‖ / ‖the PEFT folder's‖, over the updates of all layers."""
    import gguf

    reader = gguf.GGUFReader(file)
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    names = _names(base)
    apart, size = [], []
    for pair in _pairs(adapter):
        a_rI, b_Or = (tensors[f"{names.get_name(pair.name)}.weight.lora_{half}"] for half in "ab")
        update_OI = b_Or @ a_rI * (alpha / len(a_rI))
        if heads := reordered_heads(pair.name, base):
            update_OI = update_OI.reshape(heads, -1, 2, pair.a.shape[1]).transpose(1, 2).reshape(update_OI.shape)
        wanted_OI = pair.b @ pair.a * pair.scaling
        apart.append(torch.linalg.vector_norm(update_OI - wanted_OI))
        size.append(torch.linalg.vector_norm(wanted_OI))
    total = torch.linalg.vector_norm(torch.stack(size)).clamp(min=torch.finfo(torch.float32).tiny)  # untrained: 0 / 0
    return float(torch.linalg.vector_norm(torch.stack(apart)) / total)


def _pairs(adapter: Path) -> Iterator[Pair]:
    """The layers of a PEFT folder, sorted by name. Raises ConfigError for anything but pairs of A and B."""
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    rank = settings["r"]
    scaling = settings["lora_alpha"] / (rank**0.5 if settings["use_rslora"] else rank)
    weights = {name: weight.float() for name, weight in formats.read_peft_folder(adapter).items()}
    layers = sorted({name.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight") for name in weights})
    for name in layers:
        if f"{name}.lora_A.weight" not in weights:
            raise ConfigError(f"a GGUF adapter can't hold {name}; {OTHERWISE}")
        yield Pair(name, weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"], scaling)


def _names(base: Any) -> Any:
    """llama.cpp's names of layers by those in transformers."""
    import gguf

    architecture, _ = ARCHITECTURES[base.model_type]
    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(key, base.num_hidden_layers)
