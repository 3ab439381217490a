"""A merged model predicts what base and adapter predict, with one rounding of each weight."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from finetune.adapters import formats, lora
from finetune.adapters.attach import attach_peft_folder
from finetune.config.schema import LoraConfig, LoraInit, ModelConfig, Quantize
from finetune.errors import ExportError
from finetune.language.causal_lm import load_model, load_tokenizer
from finetune.language.merge import merge

pytestmark = pytest.mark.sampled
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LAST = 392  # id of the last token without added ones
IDS = torch.tensor([[5, 9, 40, 7, 33, 12, 61, 8, LAST]])


@pytest.fixture
def load(tiny_language: Path) -> Callable[..., Any]:
    def build(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        model = ModelConfig(kind="language", base=str(tiny_language), **changes)
        return load_model(model, dtype, torch.device("cpu"))

    return build


def save_adapter(folder: Path, base: Any, size: float = 0.05, rows: Sequence[int] = (), **options: Any) -> Path:
    """A PEFT folder of random adapters for that base, rank 4 and alpha 6 on the attention's layers."""
    settings = LoraConfig(rank=4, alpha=6.0, dropout=0.0, **options)
    model = lora.inject(base, settings, ATTENTION, seed=0, new_token_rows=rows)
    random = torch.Generator().manual_seed(1)
    for weight in lora.trainable_tensors(model).values():
        weight += size * torch.randn(weight.shape, generator=random)
    formats.save_peft(model, folder, lora.state(model), base.name_or_path)
    return folder


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = IDS.clone()
    ids[0, 3] = model.get_input_embeddings().weight.shape[0] - 1  # an added token, if there is one
    return model(ids).logits.float()


def apart(model: Any, reference: Any) -> float:
    return float((logits(model) - logits(reference)).norm() / logits(reference).norm())


@pytest.mark.parametrize(
    "options",
    [{}, {"rslora": True}, {"dora": True}, {"init": LoraInit.pissa}],
    ids=["plain", "rslora", "dora", "pissa"],
)
def test_base_and_adapter_merged_predict_the_same(load: Callable[..., Any], tmp_path: Path, options: Any) -> None:
    adapter = save_adapter(tmp_path, load(), **options)
    trained = attach_peft_folder(load(), adapter)
    merged = merge(load(), adapter)
    assert apart(load(), trained) > 0.1
    assert apart(merged, trained) < 1e-5
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert merged.state_dict().keys() == load().state_dict().keys()


def test_new_tokens_keep_what_they_learnt(load: Callable[..., Any], tiny_language: Path, tmp_path: Path) -> None:
    tokens = ["<|note|>"]
    row = load_tokenizer(str(tiny_language), tokens).convert_tokens_to_ids(tokens[0])
    assert row == LAST + 1
    adapter = save_adapter(tmp_path / "peft", load(added_tokens=tokens), rows=[row])
    trained = attach_peft_folder(load(added_tokens=tokens), adapter)
    merged = merge(load(added_tokens=tokens), adapter)
    assert apart(load(added_tokens=tokens), trained) > 0.1
    assert apart(merged, trained) < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    assert apart(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), trained) < 1e-5


def test_a_sum_is_rounded_once(load: Callable[..., Any], tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path, load())
    layers = {
        name: layer
        for name, layer in attach_peft_folder(load(), adapter).get_base_model().named_modules()
        if name.endswith(tuple(ATTENTION))
    }
    before, after = load(torch.bfloat16).state_dict(), merge(load(torch.bfloat16), adapter).state_dict()
    for name, weight in after.items():
        assert weight.dtype is torch.bfloat16
        exact = before[name].float()
        if name.removesuffix(".weight") in layers:
            exact = exact + layers[name.removesuffix(".weight")].get_delta_weight(lora.ADAPTER)
            assert not torch.equal(weight, before[name])
        assert torch.equal(weight, exact.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("quantize", "options", "noise"),
    [(Quantize.nf4, {}, 1e-5), (Quantize.nf4, {"dora": True}, 1e-5), (Quantize.int8, {}, 0.02)],
    ids=["nf4", "nf4-dora", "int8"],  # int8 rounds a layer's inputs too
)
def test_the_dequantised_weights_are_those_the_adapter_was_trained_with(
    load: Callable[..., Any], tmp_path: Path, quantize: Quantize, options: Any, noise: float
) -> None:
    """All of them, in layers without an adapter too: only then does the merged model predict the same."""
    adapter = save_adapter(tmp_path, load(quantize=quantize), **options)
    trained = attach_peft_folder(load(quantize=quantize), adapter).get_base_model()
    before = logits(trained)
    found = apart(merge(load(), adapter, load(quantize=quantize)), trained)
    assert found < noise
    assert found == apart(merge(load(), adapter, trained), trained)  # its adapters are not in the way
    assert apart(merge(load(), adapter), trained) > found
    assert torch.equal(logits(trained), before)


def test_weights_that_overflow_are_an_error(load: Callable[..., Any], tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path, load(), size=1e3)
    merge(load(torch.bfloat16), adapter)
    with pytest.raises(ExportError, match=r"merged into model\.layers\.0\.self_attn\..*not finite in torch.float16"):
        merge(load(torch.float16), adapter)
