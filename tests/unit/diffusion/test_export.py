"""Every format draws what was trained, and a file that doesn't is never exported."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from finetune import hub, kinds
from finetune.adapters import formats, lora
from finetune.config.schema import Config, ExportFormat, ModelConfig, Precision, Quantize
from finetune.diffusion import card, pipeline
from finetune.diffusion.families import family
from finetune.diffusion.pipeline import load_adapter, load_backbone, load_vae_model
from finetune.errors import ExportError, ModelError
from finetune.run.records import Dataset, Run
from finetune.stages.export import export
from finetune.stages.train import train
from finetune.training import checkpoint
from finetune.training.checkpoint import Checkpoint, TrainState
from tests.single_files import save_single_file

pytestmark = pytest.mark.sampled


@pytest.fixture(params=["attention", "wide"])
def run(config: Config, make_dataset: Callable[..., Dataset], request: pytest.FixtureRequest) -> Run:
    config.lora.targets = request.param
    config.lora.alpha, config.trainer.ema_decay = 3.0, 0.9  # alpha != rank: converters like to mix them up
    config.caption.trigger = "pixar style"
    return train(config, make_dataset())


def test_all_formats_reproduce_the_trained_module(config: Config, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = export(config, run)
    assert "compared with the trained model: no difference (peft" in capsys.readouterr().err
    assert set(adapter.differences) == {"peft", "diffusers", "kohya"}
    assert all(difference <= 1e-5 for difference in adapter.differences.values())
    folder = Path(adapter.folder)
    with safe_open(folder / adapter.files["kohya"], framework="pt") as file:
        metadata = file.metadata()
        alphas = [float(file.get_tensor(name)) for name in file.keys() if name.endswith(".alpha")]  # noqa: SIM118
    assert metadata["recipe"] == "tiny"
    assert (metadata["rank"], metadata["alpha"]) == ("4", "3.0")
    assert metadata["trigger_phrase"] == "pixar style"
    assert (metadata["ss_base_model_version"], metadata["ss_v2"]) == ("sd_v1", "False")
    assert (metadata["modelspec.architecture"], metadata["modelspec.title"]) == ("stable-diffusion-v1/lora", "tiny")
    assert metadata["training_hash"] == run.training_hash
    assert set(alphas) == {3.0}
    assert (folder / adapter.files["ema"]).is_file()
    assert json.loads((folder / "peft" / "adapter_config.json").read_text())["lora_alpha"] == 3.0
    assert "pixar style" in (folder / "README.md").read_text()


def test_the_libraries_own_loaders_read_the_files(config: Config, run: Run, tiny_base: Path) -> None:
    from diffusers import StableDiffusionPipeline

    adapter = export(config, run)
    outputs = []
    for name in (adapter.files["diffusers"], adapter.files["kohya"]):
        loaded_into = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
        loaded_into.load_lora_weights(adapter.folder, weight_name=name)
        outputs.append(predicted(loaded_into.unet))
    assert torch.allclose(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)
    base = predicted(load_backbone(ModelConfig(base=str(tiny_base)), torch.float32))
    assert not torch.allclose(outputs[0], base, atol=1e-4)


def test_a_file_that_does_not_reproduce_the_module_fails_the_stage_and_leaves_the_old_adapter(
    config: Config, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(config, run)
    before = sorted(path.name for path in Path(config.run_dir, "adapter").iterdir())
    write = formats.save_kohya
    monkeypatch.setattr(
        formats, "save_kohya", lambda file, weights, part, alpha, metadata: write(file, weights, part, 4.0, metadata)
    )
    config.name = "renamed"  # not up to date
    with pytest.raises(ExportError, match=r"kohya .*export.tolerance"):
        export(config, run)
    assert sorted(path.name for path in Path(config.run_dir, "adapter").iterdir()) == before


def test_an_untrained_adapter_is_reported(
    config: Config, run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    unet = load_backbone(config.model, torch.float32)
    lora.inject(unet, config.lora, config.model.lora_targets[config.lora.targets], seed=0)
    kinds.of(config).export(config, run, lora.state(unet), None, tmp_path)
    assert "changes the output by only 0.0e+00" in capsys.readouterr().err


def test_adapters_that_are_missing_damaged_or_of_another_base_are_named(
    config: Config, run: Run, tiny_base: Path, tmp_path: Path
) -> None:
    unet = load_backbone(ModelConfig(base=str(tiny_base)), torch.float32)
    with pytest.raises(ModelError, match=r"no adapter at .*sample.adapter="):
        load_adapter(config.model, unet, tmp_path / "nowhere")
    adapter = export(config, run)
    peft = Path(adapter.folder) / "peft" / "adapter_model.safetensors"
    peft.write_bytes(peft.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"adapter_model.safetensors is damaged"):
        load_adapter(config.model, unet, peft.parent)
    from diffusers import UNet2DConditionModel

    other = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, cross_attention_dim=8, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    for name in ("diffusers", "kohya"):
        with pytest.raises(ModelError, match=r"does not fit"):
            load_adapter(config.model, other, Path(adapter.folder) / adapter.files[name])


CARDS = [(formats, False, True) for formats in [["peft"], ["diffusers"], ["kohya"], ["kohya", "peft"]]]
CARDS += [(["kohya"], False, False), (["peft", "diffusers", "kohya"], True, True)]


@pytest.mark.parametrize(("names", "embedded", "reads_kohya"), CARDS)
def test_the_code_of_the_model_card_runs(
    config: Config,
    run: Run,
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: list[str],
    embedded: bool,
    reads_kohya: bool,
) -> None:
    if embedded:
        monkeypatch.setattr(hub, "EMBEDDED", tiny_base.parent)
        config.model.base = f"embedded:{tiny_base.name}"
    spec = replace(family(config.model.family), diffusers_reads_kohya=reads_kohya)
    monkeypatch.setattr(card, "family", lambda _: spec)
    config.name, config.export.formats = "it's a {name}", [ExportFormat[name] for name in names]
    config.sample.prompts = ['it\'s a "red" {robot}']
    adapter = export(config, run)
    page = Path(adapter.folder, "README.md").read_text()
    monkeypatch.chdir(config.run_dir)
    made: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], made)
    assert Image.open("image.png").size == (32, 32)
    base = load_backbone(config.model, torch.float32)
    untuned = predicted(base)
    trained = predicted(load_adapter(config.model, base, Path(adapter.folder, adapter.files[names[0]])))
    assert torch.allclose(predicted(made["pipeline"].unet), trained, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(untuned, trained, atol=1e-4)


@pytest.mark.parametrize("parts", [None, ["unet"]], ids=["whole", "backbone alone"])
def test_the_code_of_the_model_card_loads_a_base_in_a_single_file(
    config: Config,
    run: Run,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    parts: list[str] | None,
) -> None:
    file = save_single_file(tiny_base, tmp_path / "my base.safetensors", "sd", parts)
    config.model = replace(config.model, base=str(file), parts=str(tiny_base))
    page = Path(export(config, run).folder, "README.md").read_text()
    monkeypatch.chdir(config.run_dir)
    made: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], made)
    assert Image.open("image.png").size == (32, 32)
    trained = load_adapter(config.model, load_backbone(config.model, torch.float32), Path("adapter", "peft"))
    assert torch.allclose(predicted(made["pipeline"].unet), predicted(trained), rtol=1e-5, atol=1e-6)
    theirs, ours = made["pipeline"].vae.state_dict(), load_vae_model(config.model).state_dict()
    assert all(torch.equal(theirs[name], weight) for name, weight in ours.items())
    config.model.quantize, config.trainer.precision = Quantize.nf4, Precision.bf16
    code = kinds.of(config).usage(config).format(base=repr(config.model.base))
    exec(code.replace("Quantize.nf4", "Quantize.none").replace('"cuda"', '"cpu"'), made)  # the same without a GPU
    assert {made["pipeline"].unet.dtype, made["pipeline"].vae.dtype} == {torch.bfloat16}


class _Asked(Exception):
    """What a loader was asked for, instead of a GPU to load it on."""

    def __init__(self, **options: Any) -> None:
        self.options = options


def test_the_code_of_the_model_card_quantises_a_single_file_as_the_export_did(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base = tmp_path / "base.safetensors"
    save_file({}, base)
    config.model.base, config.model.family, config.model.parts = str(base), "sdxl", "some/parts"
    config.model.quantize, config.trainer.precision = Quantize.nf4, Precision.bf16

    def asked(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        raise _Asked(model=model, dtype=dtype, device=device.type)

    monkeypatch.setattr(pipeline, "load_backbone", asked)
    with pytest.raises(_Asked) as shown:
        exec(kinds.of(config).usage(config).format(base=repr(config.model.base)), {})
    asked_for, own = shown.value.options, config.model
    assert (asked_for["dtype"], asked_for["device"]) == (torch.bfloat16, "cuda")
    for name in ("base", "family", "parts", "quantize"):
        assert getattr(asked_for["model"], name) == getattr(own, name)


@torch.no_grad()
def predicted(unet: Any) -> Tensor:
    """What it predicts for fixed random inputs."""
    random = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 4, 8, 8, generator=random), torch.randn(1, 77, 16, generator=random)
    sample: Tensor = unet.eval()(latents, torch.tensor([5]), encoder_hidden_states=text).sample
    return sample


@pytest.mark.parametrize(
    ("base", "loaded"),
    [
        ("a/b", 'load("a/b")'),
        ("a/b@v2", 'load("a/b", revision="v2")'),
        ("embedded:x", 'from finetune import hub\nload(str(hub.resolve("embedded:x")))'),
    ],
)
def test_the_model_card_names_the_base_as_its_library_takes_it(
    config: Config, monkeypatch: pytest.MonkeyPatch, base: str, loaded: str
) -> None:
    config.model.base = base
    monkeypatch.setattr(checkpoint, "load", lambda _: Checkpoint(Path(), TrainState({}), {}, {}, None))
    monkeypatch.setattr(kinds.of(config), "export", lambda *_: ({}, {}))
    monkeypatch.setattr(kinds.of(config), "contents", lambda _: {})
    monkeypatch.setattr(kinds.of(config), "usage", lambda _: "load({base})\n")
    run = Run("", "", 4, 0, 0, 1.0, 0.5, None, None, None, "images", 0, 0.0, 0.0, 0, "0" * 64)
    page = Path(export(config, run).folder, "README.md").read_text()
    assert f"```python\n{loaded}\n```" in page
