"""Every format predicts what the trained model predicts, and a file that doesn't is never exported."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune import hub, kinds
from finetune.adapters import attach, formats, lora
from finetune.config.schema import Config, Device, ExportFormat, Quantize
from finetune.data.text.store import open_store
from finetune.errors import ConfigError, ExportError, ModelError
from finetune.language import export, tokenize
from finetune.language.causal_lm import load_model
from finetune.language.task import inject
from finetune.memory.device import pick_device
from finetune.run.receipts import save_receipt
from finetune.run.records import Run
from finetune.stages.export import export as export_stage
from finetune.training import checkpoint
from finetune.training.checkpoint import Checkpoint, TrainState
from tests.tiny_language_models import save_language

RUN = Run("", "", 4, 0, 0, 1.0, 0.5, None, None, None, "tokens", 0, 0.0, 0.0, 0, "0" * 64)
IDS = torch.tensor([[5, 9, 40, 7, 33, 12, 61, 8]])
Write = Callable[..., tuple[dict[str, str], dict[str, float]]]


def weights_of(config: Config, size: float = 0.05) -> dict[str, Tensor]:
    """Adapters as far from their start as a training would bring them."""
    device = pick_device(config.hardware.device)
    base = load_model(config.model, torch.float32, device)
    tokenizer = tokenize.chat_of(config.model, config.data).tokenizer
    model = inject(base, config.model, config.lora, 0, tokenizer.convert_tokens_to_ids(config.model.added_tokens))
    random = torch.Generator().manual_seed(1)
    for weight in lora.trainable_tensors(model).values():
        weight += size * torch.randn(weight.shape, generator=random).to(device)
    return lora.state(model)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter").mkdir()
    return tmp_path / "adapter"


@pytest.fixture
def write(language_config: Config, folder: Path) -> Write:
    """Writes the formats that the configuration names."""
    language_config.export.formats = [ExportFormat.peft, ExportFormat.merged, ExportFormat.gguf]

    def run(size: float = 0.05, averaged: bool = False) -> tuple[dict[str, str], dict[str, float]]:
        weights = weights_of(language_config, size)
        halved = {name: weight / 2 for name, weight in weights.items()} if averaged else None
        return kinds.of(language_config).export(language_config, RUN, weights, halved, folder)

    return run


def comparison(folder: Path) -> Any:
    return json.loads((folder / "comparison.json").read_text())


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS).logits.float()


def test_all_formats_reproduce_the_trained_model(language_config: Config, write: Write, folder: Path) -> None:
    files, differences = write(averaged=True)
    assert files == {"peft": "peft", "merged": "merged", "gguf": "tiny-language.gguf", "ema": "peft_ema"}
    assert differences["peft"] <= 1e-5
    assert differences["gguf"] <= 1e-6
    assert 0 < differences["merged"] < 1e-4
    found = comparison(folder)["models"]
    assert set(found) == {"base", "peft", "merged"}
    assert set(found["merged"]) == {"relative", "largest", "divergence", "agreement"}
    assert found["merged"]["divergence"] == differences["merged"] < 1e-3 * found["base"]["divergence"]
    assert found["merged"]["agreement"] > 0.9 > found["base"]["agreement"]

    base = AutoModelForCausalLM.from_pretrained(language_config.model.base)
    own = PeftModel.from_pretrained(base, folder / "peft")
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert merged.dtype is torch.bfloat16
    assert float((logits(merged) - logits(own)).norm() / logits(own).norm()) < 0.05
    average = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(language_config.model.base), folder / "peft_ema"
    )
    assert not torch.allclose(logits(average), logits(own), rtol=0.1)
    assert gguf.GGUFReader(folder / files["gguf"]).fields["general.name"].contents() == "tiny-language"


def test_the_chat_template_travels_with_model_and_adapter(language_config: Config, write: Write, folder: Path) -> None:
    language_config.data.chat_template = "chatml"
    write()
    text = tokenize.chat_of(language_config.model, language_config.data).template.text
    assert "<|im_start|>" in text
    template = json.loads((folder / "peft" / "chat_template.json").read_text())
    assert template == {"sha256": hashlib.sha256(text.encode()).hexdigest(), "base": language_config.model.base}
    for name in ("peft", "merged"):
        assert AutoTokenizer.from_pretrained(folder / name).chat_template == text


def test_an_adapter_with_the_bases_own_template_and_tokens_needs_no_tokenizer(write: Write, folder: Path) -> None:
    write()
    assert (folder / "peft" / "chat_template.json").exists()
    assert not (folder / "peft" / "tokenizer.json").exists()


def test_new_tokens_travel_with_model_and_adapter(language_config: Config, write: Write, folder: Path) -> None:
    language_config.model.added_tokens = ["<|note|>"]
    language_config.export.formats = [ExportFormat.peft, ExportFormat.merged]
    _, differences = write()
    assert differences["peft"] <= 1e-5
    assert differences["merged"] < 1e-4
    for name in ("peft", "merged"):
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        assert tokenizer.tokenize("a<|note|>b") == ["a", "<|note|>", "b"]
    rows = AutoModelForCausalLM.from_pretrained(folder / "merged").get_input_embeddings().weight
    assert rows.shape[0] == tokenizer.convert_tokens_to_ids("<|note|>") + 1


def test_a_quantised_base_is_merged_where_the_model_changes_least(
    language_config: Config, write: Write, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    language_config.model.quantize = Quantize.nf4
    _, differences = write()
    found = {name: difference_["divergence"] for name, difference_ in comparison(folder)["models"].items()}
    original, dequantised = (f"merged into the {which} weights" for which in ("original", "dequantised"))
    assert found["merged"] == found[dequantised] == differences["merged"] < found[original] / 100
    assert found["merged, in nf4 again"] > found["merged"]
    said = capfd.readouterr().err
    assert f"{original}: {found[original]:.2e} nats a token" in said
    assert f"{dequantised}: {found[dequantised]:.2e} nats a token" in said
    assert sorted(path.name for path in folder.iterdir()) == ["comparison.json", "merged", "peft", "tiny-language.gguf"]
    assert "quantization_config" not in json.loads((folder / "merged" / "config.json").read_text())


def test_a_base_in_fp16_stays_in_fp16(language_config: Config, write: Write, folder: Path, tmp_path: Path) -> None:
    half = shutil.copytree(language_config.model.base, tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(half, dtype=torch.float16).save_pretrained(half)
    language_config.model.base = str(half)
    language_config.export.formats = [ExportFormat.merged]
    files, differences = write()
    assert set(files) == set(differences) == {"peft", "merged"}  # samples and later trainings load the PEFT folder
    assert AutoModelForCausalLM.from_pretrained(folder / "merged").dtype is torch.float16


def test_rows_to_compare_on_are_held_out_or_trained_on_or_random(language_config: Config) -> None:
    chat = tokenize.chat_of(language_config.model, language_config.data)
    rows, source = export.comparison_rows(None, chat, length=12, share=0.2)
    assert source == "random tokens"
    assert all(0 <= number < len(chat.tokenizer) for row in rows for number in row)

    stored = open_store(Path(tokenize.build(language_config, None).rows))
    _, held_out = stored.split(0.2)
    rows, source = export.comparison_rows(stored, chat, length=12, share=0.2)
    assert source == "held-out rows"
    assert len(rows) == min(16, len(held_out)) > 0
    assert all(row in [stored[int(index)].ids[:12].tolist() for index in held_out] for row in rows)

    rows, source = export.comparison_rows(stored, chat, length=12, share=0.0)
    assert source == "rows that were trained on"
    assert rows[0] == stored[0].ids[:12].tolist()
    assert rows[-1] == stored[len(stored) - 1].ids[:12].tolist()
    assert len(rows) == 16 < len(stored)


def test_the_comparison_is_made_on_rows_of_the_run(language_config: Config, write: Write, folder: Path) -> None:
    """As long as they are in the cache."""

    def source() -> str:
        language_config.export.formats = [ExportFormat.peft]
        write()
        return str(comparison(folder)["source"])

    assert source() == "random tokens"
    record = tokenize.build(language_config, None)
    save_receipt(Path(language_config.run_dir), "dataset", record, input_hash="", seconds=0.0, figures={})
    assert source() == "held-out rows"
    shutil.rmtree(record.rows)
    assert source() == "random tokens"


def test_a_merged_model_that_does_not_reproduce_the_trained_one_fails(language_config: Config, write: Write) -> None:
    language_config.export.divergence = 1e-12
    with pytest.raises(ExportError, match=r"merged .*1.0e-12 .*export.divergence"):
        write()


@pytest.mark.parametrize(
    ("factor", "error", "message"),
    [(1.01, ExportError, r"peft .*export.tolerance"), (float("nan"), ModelError, r"peft.* is not finite")],
)
def test_an_adapter_that_does_not_reproduce_the_model_fails(
    language_config: Config,
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
    factor: float,
    error: type[Exception],
    message: str,
) -> None:
    save = formats.save_peft

    def wrong(model: Any, target: Path, weights: dict[str, Tensor], *base: str) -> None:
        save(model, target, {name: weight * factor for name, weight in weights.items()}, *base)

    monkeypatch.setattr(formats, "save_peft", wrong)
    with pytest.raises(error, match=message):
        write()


def test_an_untrained_adapter_is_reported(
    language_config: Config, write: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    language_config.export.formats = [ExportFormat.peft]
    write(size=0.0)
    assert "changes the logits by only 0.0e+00" in capfd.readouterr().err


def test_formats_that_the_base_cannot_have_are_refused_before_anything_is_loaded(
    language_config: Config, folder: Path, tmp_path: Path
) -> None:
    def refused(message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            kinds.of(language_config).export(language_config, RUN, {}, None, folder)

    language_config.export.formats = [ExportFormat.gguf]
    language_config.lora.dora = True
    refused(r"lora.dora=true")
    language_config.lora.dora = False
    language_config.model.base = str(save_language(tmp_path / "glm", "glm4"))
    refused(r"glm4")
    assert not any(folder.iterdir())


def test_adapters_that_are_missing_damaged_or_of_another_base_are_named(
    language_config: Config, write: Write, folder: Path, tmp_path: Path
) -> None:
    def base(path: object = language_config.model.base) -> Any:
        return AutoModelForCausalLM.from_pretrained(path)

    def refused(model: Any, path: Path, message: str) -> None:
        with pytest.raises(ModelError, match=message):
            export.load(model, path)

    language_config.export.formats = [ExportFormat.peft]
    write()
    assert torch.equal(logits(export.load(base(), folder)), logits(export.load(base(), folder / "peft")))
    refused(base(), tmp_path / "nowhere", r"no adapter at .*nowhere; .*sample.adapter=")

    smaller, shallower = base().config, base().config
    smaller.hidden_size, shallower.num_hidden_layers = 16, 1
    refused(AutoModelForCausalLM.from_config(smaller), folder, r"peft does not fit this base .*trained on another")
    refused(
        AutoModelForCausalLM.from_config(shallower),
        folder,
        r"fit this base \(14 tensors without a counterpart",
    )
    phi = base(save_language(tmp_path / "phi", "phi3"))
    refused(phi, folder, r"peft does not fit this base \(.*trained on another")

    peft = folder / "peft"
    settings, weights = peft / "adapter_config.json", peft / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    refused(base(), folder, r"adapter_model.safetensors is damaged")
    weights.unlink()
    refused(base(), folder, r"adapter_model.safetensors does not exist")
    weights.write_bytes(whole)
    settings.write_text("{")
    refused(base(), folder, r"adapter_config.json is damaged .*restore it from a copy")
    settings.unlink()
    refused(base(), peft, r"no adapter at .*adapter_config.json")


def test_a_gpu_that_is_too_small_is_not_called_another_base(tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError), attach.mismatch_as_model_error(tmp_path):
        raise torch.OutOfMemoryError


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", Quantize)
@pytest.mark.parametrize("vram_gib", [0.0, 1e-6], ids=["fits", "offloaded"])
def test_all_formats_on_a_gpu(language_config: Config, write: Write, quantize: Quantize, vram_gib: float) -> None:
    language_config.hardware.device, language_config.hardware.vram_gib = Device.cuda, vram_gib
    language_config.model.quantize = quantize
    _, differences = write()
    assert differences["peft"] <= 1e-5
    assert differences["gguf"] <= 1e-6
    assert differences["merged"] < 1e-3


@pytest.mark.parametrize("embedded", [True, False])
def test_the_code_of_the_model_card_runs(
    language_config: Config, monkeypatch: pytest.MonkeyPatch, embedded: bool
) -> None:
    trained = Checkpoint(Path(), TrainState({}), weights_of(language_config), {}, None)
    base = Path(language_config.model.base)
    if embedded:
        monkeypatch.setattr(hub, "EMBEDDED", base.parent)
        language_config.model.base = f"embedded:{base.name}"
    monkeypatch.setattr(checkpoint, "load", lambda _: trained)
    adapter = export_stage(language_config, RUN)
    code = Path(adapter.folder, "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(language_config.run_dir)
    names: dict[str, Any] = {}
    exec(code, names)
    assert isinstance(names["model"], PeftModel)
    assert len(names["tokenizer"]) > 0
