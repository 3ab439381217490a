"""What llama.cpp reads from a GGUF adapter is the adapter that was trained."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from finetune.adapters import formats, lora
from finetune.config.schema import LoraConfig, ModelConfig
from finetune.errors import ConfigError
from finetune.language import gguf_file
from finetune.language.causal_lm import load_model
from tests.tiny_language_models import save_language

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {"phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}
# As llama.cpp names the weights of a block (llama-arch.cpp).
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up",
}  # fmt: skip


def save(folder: Path, architecture: str, targets: Sequence[str] = (), **options: Any) -> tuple[Path, Any]:
    """A PEFT folder of random adapters for a tiny base, and the base's configuration."""
    base = save_language(folder / "base", architecture)
    model = load_model(ModelConfig(kind="language", base=str(base)), torch.float32, torch.device("cpu"))
    settings = LoraConfig(rank=4, alpha=6.0, dropout=0.0, **options)
    lora.inject(model, settings, targets or TARGETS.get(architecture, LINEAR), seed=0)
    random = torch.Generator().manual_seed(1)
    for weight in lora.trainable_tensors(model).values():
        weight += 0.1 * torch.randn(weight.shape, generator=random)
    formats.save_peft(model, folder / "peft", lora.state(model), str(base))
    return folder / "peft", AutoConfig.from_pretrained(base).get_text_config()


def updates_in_llama_cpp(file: Path) -> dict[str, Tensor]:
    """B @ A * alpha / rank of each weight, as llama.cpp takes them from the file."""
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    return {
        name.removesuffix(".lora_a"): tensors[name.removesuffix("a") + "b"]
        @ a
        * (fields["adapter.lora.alpha"] / len(a))
        for name, a in tensors.items()
        if name.endswith(".lora_a")
    }


@pytest.mark.parametrize(
    ("architecture", "name", "reordered", "options"),
    [
        ("llama", "llama", True, {}),
        ("mistral", "llama", True, {"rslora": True}),
        ("qwen3", "qwen3", False, {}),
        ("gemma2", "gemma2", False, {"rslora": True}),
        ("gemma3", "gemma3", False, {}),
        ("granite", "granite", True, {}),
        ("phi3", "phi3", False, {}),
    ],
)
def test_every_update_in_the_file_is_that_of_the_adapter(
    tmp_path: Path, architecture: str, name: str, reordered: bool, options: Any
) -> None:
    adapter, base = save(tmp_path, architecture, **options)
    file = tmp_path / "tiny.gguf"
    gguf_file.write(file, adapter, base, "tiny")
    assert gguf.GGUFReader(file).fields["general.architecture"].contents() == name
    found = updates_in_llama_cpp(file)
    weights = formats.read_peft_folder(adapter)
    layers = {weight.removesuffix(".lora_A.weight") for weight in weights if weight.endswith(".lora_A.weight")}
    assert len(found) == len(layers)
    for layer in layers:
        _, _, block, module = layer.split(".", 3)
        update = found[f"blk.{block}.{NAMES[module]}.weight"]
        expected = weights[f"{layer}.lora_B.weight"] @ weights[f"{layer}.lora_A.weight"]
        expected *= 6.0 / (math.sqrt(4) if options else 4)
        if reordered and NAMES[module] in ("attn_q", "attn_k"):
            assert not torch.allclose(update, expected, rtol=0.1)
            # Neighbouring rows of a head there are the same row of its first and of its second half here.
            heads = base.num_attention_heads if NAMES[module] == "attn_q" else base.num_key_value_heads
            update = torch.cat([part for head in update.chunk(heads) for part in (head[0::2], head[1::2])])
        assert torch.allclose(update, expected, rtol=1e-5, atol=1e-7)
    assert gguf_file.difference(file, adapter, base) < 1e-6


def test_reordered_rows_attend_as_before() -> None:
    """llama.cpp's rotary embedding turns neighbouring channels of a head, transformers' those half a head apart."""
    random = torch.Generator().manual_seed(0)
    queries_HE, keys_HE = torch.randn((2, 2, 8), generator=random, dtype=torch.float64)
    angles = 100.0 ** -torch.linspace(0, 1, 4, dtype=torch.float64)

    def turned(first: Tensor, second: Tensor, position: int) -> Tensor:
        cos, sin = (position * angles).cos(), (position * angles).sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=1)

    def halves(states_HE: Tensor, position: int) -> Tensor:
        return turned(states_HE[:, :4], states_HE[:, 4:], position)

    def neighbours(states_HE: Tensor, position: int) -> Tensor:
        states_HE = gguf_file.reordered(states_HE.reshape(-1, 1), heads=2).view(2, 8)
        return turned(states_HE[:, 0::2], states_HE[:, 1::2], position)

    here, there = ((rotary(queries_HE, 7) * rotary(keys_HE, 3)).sum(1) for rotary in (halves, neighbours))
    assert torch.allclose(here, there)


def test_a_file_that_holds_something_else_is_noticed(tmp_path: Path) -> None:
    adapter, base = save(tmp_path, "llama")
    file = tmp_path / "tiny.gguf"
    gguf_file.write(file, adapter, base, "tiny")
    name = adapter / "adapter_config.json"
    name.write_text(json.dumps(json.loads(name.read_text()) | {"lora_alpha": 7.0}))
    assert gguf_file.difference(file, adapter, base) == pytest.approx(1 / 7, rel=1e-4)


def test_an_untrained_adapter_is_no_difference(tmp_path: Path) -> None:
    adapter, base = save(tmp_path, "llama")
    file = adapter / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(weight) for name, weight in load_file(file).items()}, file)
    gguf_file.write(tmp_path / "tiny.gguf", adapter, base, "tiny")
    assert gguf_file.difference(tmp_path / "tiny.gguf", adapter, base) == 0


def test_what_gguf_cannot_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = AutoConfig.from_pretrained(save_language(tmp_path / "base"))
    gguf_file.require(base)
    with pytest.raises(ConfigError, match=r"names gguf, but lora.dora=true has magnitudes.*export.formats=\[peft"):
        gguf_file.require(base, dora=True)
    with pytest.raises(ConfigError, match=r"names gguf, but model.added_tokens have rows"):
        gguf_file.require(base, added_tokens=True)
    other = AutoConfig.from_pretrained(save_language(tmp_path / "other", "cohere"))
    with pytest.raises(ConfigError, match=r"there for gemma, .*qwen3, smollm3, not for cohere; leave gguf out"):
        gguf_file.require(other)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"needs: pip install finetune\[gguf\]"):
        gguf_file.require(base)


def test_layers_that_gguf_cannot_hold_are_named(tmp_path: Path) -> None:
    adapter, base = save(tmp_path, "llama", targets=["lm_head"])
    base.tie_word_embeddings = True
    with pytest.raises(ConfigError, match=r"llama.cpp has no weight of its own for lm_head; leave gguf out"):
        gguf_file.write(tmp_path / "tiny.gguf", adapter, base, "tiny")
    adapter, base = save(tmp_path, "llama", dora=True)
    with pytest.raises(ConfigError, match=r"a GGUF adapter can't hold model.layers.0.*lora_magnitude_vector"):
        gguf_file.write(tmp_path / "tiny.gguf", adapter, base, "tiny")
