"""The program, the memory model and the bound on CPU memory place the base of an export alike, for every preset.

Bases have few layers and no weights. What is compared is what each of them does: the program's loaders and the memory
model's tracer are stopped as soon as they are called.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune import kinds
from finetune.adapters import lora
from finetune.config import recipes
from finetune.config.schema import Config, ExportFormat, ModelConfig, Precision, Quantize
from finetune.diffusion import export as image_export
from finetune.diffusion import meta, pipeline
from finetune.language import export as language_export
from finetune.language import tokenize
from finetune.memory import policy
from finetune.memory.policy import Placement
from finetune.planning.memory_model import MemoryModel
from finetune.planning.tracer import Trace, Tracer
from finetune.run.records import Run
from tests.presets import is_language, preset, shortened

PRESETS = sorted(recipes.preset_files()["model"])
LITTLE, MUCH = 1.0, 1e15  # bytes: no block of any base fits, and every base does
RUN = Run("", "", 4, 0, 0, 1.0, 0.5, None, None, None, "images", 0, 0.0, 0.0, 0, "0" * 64)


class Loaded(Exception):
    """The base is loaded: the export need not go on."""


@pytest.fixture
def config(name: str, quantize: Quantize, cuda: bool, tmp_path: Path) -> Config:
    model = preset(name)
    base = model.base if model.base.startswith("embedded:") else str(shortened(model.base, tmp_path / name))
    config = Config(name=name, run_dir=str(tmp_path / "run"), model=replace(model, base=base, quantize=quantize))
    config.lora.targets, config.caption.model, config.data.length = "attention", "embedded:captioner", 64
    config.export.formats, config.trainer.validate_every = [ExportFormat.peft], 0
    config.trainer.precision = Precision.bf16 if cuda else Precision.fp32
    config.data.folder = str(tmp_path / "none")  # an empty one would be the current folder, with all its files
    return config


def program_placement(config: Config, room: float, cuda: bool, monkeypatch: pytest.MonkeyPatch) -> Placement:
    """How the program has the base when it begins to compare."""
    kind, device = kinds.of(config), torch.device("cuda" if cuda else "cpu")
    seen: list[tuple[torch.dtype, bool]] = []

    def offloads(model: ModelConfig, device: torch.device) -> bool:
        return model.offload and device.type == "cuda"

    def load_backbone(model: ModelConfig, dtype: torch.dtype, device: torch.device, *, vram_gib: float) -> nn.Module:
        backbone = meta.backbone(model, dtype)
        seen.append((dtype, offloads(model, device)))
        return backbone

    def inject(backbone: nn.Module, *_: Any, **__: Any) -> nn.Module:
        (loaded_in, offload), dtype = seen.pop(), next(backbone.parameters()).dtype
        assert dtype is loaded_in or not offload  # blocks in CPU memory stay as they are loaded
        seen.append((dtype, offload))
        raise Loaded

    def load_model(model: ModelConfig, dtype: torch.dtype, device: torch.device, *, vram_gib: float) -> nn.Module:
        seen.append((dtype, offloads(model, device)))
        raise Loaded

    with monkeypatch.context() as patch:
        patch.setattr(kind, "pick_device", lambda _: device)
        patch.setattr(image_export, "usable_bytes", lambda *_: room)
        patch.setattr(image_export, "load_backbone", load_backbone)
        patch.setattr(lora, "inject", inject)
        patch.setattr(tokenize, "chat_of", lambda *_: SimpleNamespace(tokenizer=None))
        patch.setattr(language_export, "comparison_rows", lambda *_, **__: ([], ""))
        patch.setattr(language_export, "check_formats", lambda *_: None)
        patch.setattr(language_export, "load_model", load_model)
        with pytest.raises(Loaded):
            kind.export(config, RUN, {}, None, Path())
        ((dtype, offload),) = seen
        return Placement(dtype, offload, kind.exports_on_cpu(config))


@dataclass
class Traced:
    """What the memory model traces last. weights: bytes of them that are added to those of `model`, below 0 if away."""

    dtype: torch.dtype
    model: nn.Module
    weights: float


def traced_placement(memory_model: MemoryModel, monkeypatch: pytest.MonkeyPatch) -> Placement:
    """How the memory model has the base in its trace of an export; offload: whether weights are away."""
    runs: list[Traced] = []

    def run(self: Tracer, model: nn.Module, work: Any, *, held: Any = None) -> Trace:
        runs.append(Traced(self.dtype, model, (held or {}).get("weights", 0.0)))
        return Trace({}, ())

    with monkeypatch.context() as patch:
        patch.setattr(Tracer, "run", run)
        options = list(dict(memory_model.phases(1, {}))["export"])
    traced = runs[-1]
    assert {weight.dtype for weight in plain_weights(traced.model)} <= {traced.dtype}
    return Placement(traced.dtype, traced.weights < 0, any(option.trace is None for option in options))


def plain_weights(model: nn.Module) -> list[Tensor]:
    """Frozen ones that aren't quantised."""
    return [weight for weight in model.parameters() if not weight.requires_grad and weight.is_floating_point()]


@pytest.mark.exhaustive
@pytest.mark.parametrize("cuda", [True, False], ids=["cuda", "cpu"])
@pytest.mark.parametrize("quantize", [Quantize.none, Quantize.nf4], ids=lambda how: how.name)
@pytest.mark.parametrize("name", PRESETS)
def test_an_export_is_planned_as_it_is_done(
    config: Config, quantize: Quantize, cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.bfloat16 if cuda else torch.float32
    for config.model.offload in (False, True) if cuda else (True,):
        workload = kinds.of(config).workload(config)
        memory_model = workload.build(workload.model, dtype, cuda, MUCH)
        for memory_model.room in (LITTLE, MUCH):
            done = program_placement(config, memory_model.room, cuda, monkeypatch)
            away = done.offload and memory_model.room == LITTLE
            assert traced_placement(memory_model, monkeypatch) == replace(done, offload=away)
            if cuda:
                bound = memory_model.cpu_memory(export_on_cpu=False)
                in_fp32 = done.offload and done.dtype is torch.float32 and quantize is Quantize.none
                count = sum(weight.numel() for weight in memory_model.model.parameters())
                expected = policy.fp32_cpu_bytes(count, memory_model.room) if in_fp32 else bound["loading the base"]
                assert bound["export"] == pytest.approx(expected, rel=0.05)  # adapters, which are few, or none of them


@pytest.mark.parametrize("name", [name for name in PRESETS if not is_language(name)])
def test_what_encodes_is_planned_in_the_dtype_that_it_is_loaded_in(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = preset(name)
    requested: list[Any] = []

    def load(*_: Any, torch_dtype: Any, **__: Any) -> Any:
        requested.append(torch_dtype)
        raise Loaded

    monkeypatch.setattr(pipeline.hub, "load", load)
    with pytest.raises(Loaded):
        pipeline.load_vae_model(model)
    with pytest.raises(Loaded):
        pipeline.TextEncoder(model, torch.device("cpu"))
    vae, texts = requested
    assert {weight.dtype for weight in meta.autoencoder(model).parameters()} == {vae}
    for part, encoder in meta.text_encoders(model).items():
        assert {weight.dtype for weight in encoder.parameters()} == {texts.get(part, texts["default"])}
