"""An adapter is the same function whichever file it came from; what a file holds and isn't used is said."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from finetune import kinds
from finetune.adapters import formats, lora
from finetune.config.schema import Config, LoraConfig, ModelConfig
from finetune.diffusion.pipeline import ADAPTER_FILE, load_adapter, load_backbone, read_adapter, save_adapter
from finetune.errors import ModelError
from finetune.run.hashing import hash_adapter
from finetune.run.records import Dataset
from tests.tiny_families import save_family
from tests.tiny_models import save_diffusion

pytestmark = pytest.mark.sampled


Weights = dict[str, torch.Tensor]
SETTINGS = LoraConfig(rank=4, alpha=3.0, dropout=0.0)  # alpha != rank: converters like to mix them up
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
FACTORS = {"lora_A": "lora_down", "lora_B": "lora_up"}
EARLY = {
    "to_q": "processor.to_q_lora",
    "to_k": "processor.to_k_lora",
    "to_v": "processor.to_v_lora",
    "to_out.0": "processor.to_out_lora",
}
ORIGINAL = {
    "down_blocks.0.attentions.0": "input_blocks_1_1",
    "mid_block.attentions.0": "middle_block_1",
    "up_blocks.1.attentions.0": "output_blocks_2_1",
    "up_blocks.1.attentions.1": "output_blocks_3_1",
}
"""Layers of the tiny UNet as Stable Diffusion's first code calls them."""


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the blocks of `ORIGINAL`."""
    return save_diffusion(tmp_path_factory.mktemp("models") / "whole", whole=True)


@pytest.fixture
def model(tiny_base: Path) -> ModelConfig:
    return ModelConfig(base=str(tiny_base))


@pytest.fixture
def trained(model: ModelConfig) -> Any:
    """A UNet whose adapters change its output."""
    unet = lora.inject(load_backbone(model, torch.float32), SETTINGS, ATTENTION, seed=0)
    random = torch.Generator().manual_seed(1)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=random)
    return unet


def output(unet: Any) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    latents, text = torch.randn((1, 4, 8, 8), generator=random), torch.randn((1, 77, 16), generator=random)
    with torch.no_grad():
        return unet(latents, torch.tensor([500]), encoder_hidden_states=text, return_dict=False)[0]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).norm() / other.norm()) < 1e-5


def renamed(weights: Weights, layer_name: Callable[[str], str], *, alpha: bool, kohya: bool) -> Weights:
    """A file of another program: with `lora_down` for lora_A, and an alpha for each layer, if told so."""
    found = {}
    for name, weight in weights.items():
        layer, _, factor = name.removesuffix(".weight").rpartition(".")
        found[f"{layer_name(layer)}.{FACTORS[factor] if kohya else factor}.weight"] = weight
        if alpha:
            found[f"{layer_name(layer)}.alpha"] = torch.tensor(SETTINGS.alpha)
    return found


def original(layer: str) -> str:
    """`lora_unet_…` with the blocks of the original Stable Diffusion."""
    found = next(name for name in ORIGINAL if layer.startswith(name))
    return "lora_unet_" + ORIGINAL[found] + layer.removeprefix(found).replace(".", "_")


def early(layer: str) -> str:
    attention, _, projection = layer.partition(".to_")
    return f"unet.{attention}.{EARLY['to_' + projection]}"


FILES: dict[str, tuple[Callable[[str], str], bool, bool]] = {
    "dots after diffusion_model": (lambda layer: f"diffusion_model.{layer}", True, False),
    "dots after transformer": (lambda layer: f"transformer.{layer}", True, True),
    "dots after base_model.model": (lambda layer: f"base_model.model.{layer}", True, False),
    "no prefix": (lambda layer: layer, True, True),
    "underscores after lora_unet": (lambda layer: "lora_unet_" + layer.replace(".", "_"), True, True),
    "underscores after lora_transformer": (lambda layer: "lora_transformer_" + layer.replace(".", "_"), True, True),
    "original blocks": (original, True, True),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_other_programs_are_the_same_function(
    model: ModelConfig, trained: Any, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    layer_name, alpha, kohya = FILES[name]
    save_file(renamed(lora.state(trained), layer_name, alpha=alpha, kohya=kohya), tmp_path / "x.safetensors")
    loaded = load_adapter(model, load_backbone(model, torch.float32), tmp_path / "x.safetensors")
    assert same(output(loaded), output(trained))
    assert "not used" not in capsys.readouterr().err


def test_names_that_only_diffusers_knows_are_the_same_function(tmp_path: Path) -> None:
    """sd-scripts' FLUX.1, where one layer stands for three."""
    model = save_family(tmp_path / "base", "flux")
    base: Any = load_backbone(model, torch.float32)
    width = base.transformer_blocks[0].attn.to_q.weight.shape[0]
    random = torch.Generator().manual_seed(1)
    a, b = torch.randn((4, width), generator=random), torch.randn((3 * width, 4), generator=random)
    layer = "lora_unet_double_blocks_0_img_attn_qkv"
    file = {f"{layer}.lora_down.weight": a, f"{layer}.lora_up.weight": b, f"{layer}.alpha": torch.tensor(3.0)}
    save_file(file, tmp_path / "x.safetensors")
    loaded: Any = load_adapter(model, load_backbone(model, torch.float32), tmp_path / "x.safetensors")
    inputs = torch.randn((1, width), generator=random)
    for name, part in zip(("to_q", "to_k", "to_v"), b.chunk(3), strict=True):
        before, after = (getattr(one.transformer_blocks[0].attn, name)(inputs) for one in (base, loaded))
        assert torch.allclose(after - before, 3 / 4 * inputs @ a.T @ part.T, atol=1e-4)


def test_a_file_without_alpha_has_strength_one(model: ModelConfig, trained: Any, tmp_path: Path) -> None:
    """Early diffusers files too, which name layers after attention processors."""
    weights = lora.state(trained)
    plain = renamed(weights, lambda layer: "lora_unet_" + layer.replace(".", "_"), alpha=False, kohya=True)
    save_file(plain, tmp_path / "plain.safetensors")
    processors = renamed(weights, early, alpha=False, kohya=True)
    processors = {name.replace(".lora_down", ".down").replace(".lora_up", ".up"): w for name, w in processors.items()}
    save_file(processors, tmp_path / "early.safetensors")
    for _, layer in lora.lora_layers(trained):
        layer.scaling[lora.ADAPTER] = 1.0
    for name in ("plain", "early"):
        loaded = load_adapter(model, load_backbone(model, torch.float32), tmp_path / f"{name}.safetensors")
        assert same(output(loaded), output(trained))


@pytest.mark.parametrize("kind", ["peft", "kohya"])
def test_layers_of_their_own_rank_and_strength_are_the_same_function(
    model: ModelConfig, tmp_path: Path, kind: str
) -> None:
    """As other trainers write them: in PEFT's settings, or as an alpha beside each layer's factors."""
    settings = PeftLoraConfig(
        r=4,
        lora_alpha=3,
        use_rslora=True,
        target_modules=["to_q", "to_k", "to_v"],
        rank_pattern={"attn1.to_q": 2},
        alpha_pattern={"attn2.to_k": 7},
    )
    unet = get_peft_model(load_backbone(model, torch.float32), settings)
    random = torch.Generator().manual_seed(1)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=random)
    if kind == "peft":
        unet.save_pretrained(tmp_path)
    else:
        file = {}
        for name, layer in lora.lora_layers(unet.base_model.model):
            rank, key = layer.r["default"], "lora_unet_" + name.replace(".", "_")
            file[f"{key}.lora_down.weight"] = layer.lora_A["default"].weight.data.clone()
            file[f"{key}.lora_up.weight"] = layer.lora_B["default"].weight.data.clone()
            file[f"{key}.alpha"] = torch.tensor(layer.scaling["default"] * rank)
        save_file(file, tmp_path / ADAPTER_FILE)
    assert same(output(load_adapter(model, load_backbone(model, torch.float32), tmp_path)), output(unet.eval()))


def test_readers_that_know_no_metadata_get_the_same_adapter(model: ModelConfig, trained: Any, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from safetensors import safe_open

    for name in (ADAPTER_FILE, "averaged.safetensors"):
        file = save_adapter(model, trained, tmp_path, lora.state(trained), name)
        with safe_open(file, framework="pt") as opened:
            settings = json.loads(opened.metadata()["lora_adapter_metadata"])
        assert settings["unet.lora_alpha"] == settings["unet.r"] == 4
        outputs = []
        for stripped in (False, True):
            if stripped:
                save_file(load_file(file), file)
            pipeline = StableDiffusionPipeline.from_pretrained(model.base, safety_checker=None)
            pipeline.load_lora_weights(tmp_path, weight_name=name)
            outputs += [output(pipeline.unet), output(load_adapter(model, load_backbone(model, torch.float32), file))]
        assert all(same(one, output(trained)) for one in outputs)


def test_a_diffusers_file_of_an_earlier_version_keeps_its_strength(
    model: ModelConfig, trained: Any, tmp_path: Path
) -> None:
    """Alpha was in its metadata alone."""
    from diffusers import StableDiffusionPipeline

    settings = trained.peft_config[lora.ADAPTER].to_dict() | {"lora_dropout": 0.0, "exclude_modules": None}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=lora.state(trained), unet_lora_adapter_metadata=settings
    )
    loaded = load_adapter(model, load_backbone(model, torch.float32), tmp_path / ADAPTER_FILE)
    assert same(output(loaded), output(trained))


def test_the_weights_of_a_peft_folder_have_the_folders_strength(
    model: ModelConfig, trained: Any, tmp_path: Path
) -> None:
    formats.save_peft(trained, tmp_path, lora.state(trained), "")
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert same(output(load_adapter(model, load_backbone(model, torch.float32), path)), output(trained))


def test_what_a_file_holds_and_is_not_used_is_said(
    model: ModelConfig, trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.safetensors"
    own = renamed(lora.state(trained), lambda layer: "lora_unet_" + layer.replace(".", "_"), alpha=True, kohya=True)
    first = next(name for name in own if name.endswith("lora_down.weight")).removesuffix(".lora_down.weight")
    others = {
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(4, 16),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(16, 4),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0),
        "lora_unet_down_blocks_7_attentions_0_proj_in.lora_down.weight": torch.ones(4, 16),
        "lora_unet_down_blocks_7_attentions_0_proj_in.lora_up.weight": torch.ones(16, 4),
        f"{first}.dora_scale": torch.ones(16, 1),
    }
    save_file(own | others, file)
    loaded = load_adapter(model, load_backbone(model, torch.float32), file)
    assert same(output(loaded), output(trained))
    said = capsys.readouterr().err.splitlines()
    (line,) = (line for line in said if str(file) in line)
    assert (
        "not used: 5 tensors without a place in this base (dora_scale, lora_A, lora_B, lora_down, lora_up; first"
        in line
    )
    save_file(others, file)
    with pytest.raises(ModelError, match=r"does not fit this base \(5 tensors without a place"):
        load_adapter(model, load_backbone(model, torch.float32), file)


def test_a_lokr_is_its_kronecker_product_and_layers_without_a_place_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_family(tmp_path / "base", "z_image")
    plain, layer = load_backbone(model, torch.float32), "layers.0.attention.to_q"
    weight = plain.get_submodule(layer).weight
    small = torch.randn((2, 2), generator=torch.Generator().manual_seed(0))
    large = torch.ones(weight.shape[0] // 2, weight.shape[1] // 2)
    factors = {"lokr_w1": small, "lokr_w2": large}
    file = tmp_path / "lokr.safetensors"
    here, elsewhere = (
        {f"diffusion_model.{place}.{name}": factor.clone() for name, factor in factors.items()}
        for place in (layer, "layers.99.attention.to_q")
    )
    save_file(here | elsewhere, file)
    tuned = load_adapter(model, load_backbone(model, torch.float32), file)
    assert "not used: 2 tensors without a place" in capsys.readouterr().err
    change = next(module for name, module in tuned.named_modules() if name == layer)
    inputs = torch.randn((3, weight.shape[1]), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        added = change(inputs) - plain.get_submodule(layer)(inputs)
    torch.testing.assert_close(added, inputs @ torch.kron(small, large).T, rtol=1e-4, atol=1e-4)
    save_file(elsewhere, file)
    with pytest.raises(ModelError, match="does not fit this base"):
        load_adapter(model, load_backbone(model, torch.float32), file)


def test_a_folder_of_another_kind_of_adapter_is_refused(model: ModelConfig, trained: Any, tmp_path: Path) -> None:
    formats.save_peft(trained, tmp_path, lora.state(trained), "")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "LOHA"}))
    for use in (load_adapter, read_adapter):
        with pytest.raises(ModelError, match=r"is of type LOHA, and only LORA adapters are read"):
            use(model, load_backbone(model, torch.float32), tmp_path)


@pytest.mark.parametrize("alpha", [1.0, 3.0, 32.0])
@pytest.mark.parametrize("kind", ["peft", "diffusers", "kohya"])
def test_a_run_starts_as_the_adapter_it_starts_from(
    config: Config, trained: Any, make_dataset: Callable[..., Dataset], tmp_path: Path, kind: str, alpha: float
) -> None:
    weights = lora.state(trained)
    if kind == "peft":
        formats.save_peft(trained, tmp_path / "peft", weights, "")
    elif kind == "diffusers":
        save_adapter(config.model, trained, tmp_path, weights)
    else:
        formats.save_kohya(tmp_path / "kohya.safetensors", weights, "lora_unet_", SETTINGS.alpha, {})
    config.lora.alpha, config.sample.previews = alpha, 0
    config.lora.start_from = str(tmp_path / "kohya.safetensors" if kind == "kohya" else tmp_path)
    kinds.of(config).require_start(config)
    task = kinds.of(config).build_task(config, make_dataset(), torch.device("cpu"))
    assert same(output(task.model.eval()), output(trained))


def test_an_adapter_of_another_rank_is_not_continued(
    config: Config, trained: Any, make_dataset: Callable[..., Dataset], tmp_path: Path
) -> None:
    formats.save_peft(trained, tmp_path / "peft", lora.state(trained), "")
    config.lora.rank, config.lora.start_from, config.sample.previews = 8, str(tmp_path), 0
    with pytest.raises(ModelError, match=r"has rank 4, and lora.rank is 8; set lora.rank=4"):
        kinds.of(config).build_task(config, make_dataset(), torch.device("cpu"))
    with pytest.raises(ModelError, match=r"has rank 4, and lora.rank is 8; set lora.rank=4"):
        kinds.of(config).require_start(config)


@pytest.mark.parametrize("kind", ["peft", "kohya"])
def test_a_dora_adapter_is_not_continued_and_no_refused_setting_is_advised(
    config: Config, make_dataset: Callable[..., Dataset], tmp_path: Path, kind: str
) -> None:
    dora = replace(SETTINGS, dora=kind == "peft")
    unet = lora.inject(load_backbone(config.model, torch.float32), dora, ATTENTION, seed=0)
    if kind == "peft":
        formats.save_peft(unet, tmp_path / "peft", lora.state(unet), "")
    else:
        file = tmp_path / "pytorch_lora_weights.safetensors"
        formats.save_kohya(file, lora.state(unet), "lora_unet_", SETTINGS.alpha, {})
        first = next(key for key in load_file(file) if key.endswith(".alpha")).removesuffix(".alpha")
        save_file(load_file(file) | {f"{first}.dora_scale": torch.ones(16, 1)}, file)
    config.lora.start_from, config.sample.previews = str(tmp_path), 0
    with pytest.raises(ModelError, match=r"DoRA.*lora.start_from=") as error:
        kinds.of(config).build_task(config, make_dataset(), torch.device("cpu"))
    assert "lora.dora" not in str(error.value)
    with pytest.raises(ModelError, match=re.escape(str(error.value))):
        kinds.of(config).require_start(config)
    config.lora.start_from = ""
    kinds.of(config).build_task(config, make_dataset(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("lora_alpha", value) for value in (float("nan"), float("inf"), 1e300, "4", True, None, [4])),
        *(("r", value) for value in (0, -1, 10**400, "4")),
        *(("alpha_pattern", value) for value in ({"to_q": float("nan")}, [1], "x")),
        ("rank_pattern", {"to_q": 0}),
    ],
)
def test_a_strength_that_is_no_number_is_refused(
    model: ModelConfig, trained: Any, tmp_path: Path, name: str, value: Any
) -> None:
    """Images of numbers that aren't numbers would be black, and the command would end well."""
    formats.save_peft(trained, tmp_path / "peft", lora.state(trained), "")
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    for load in (load_adapter, read_adapter):
        with pytest.raises(ModelError, match=r"adapter_config.json is damaged \(") as error:
            load(model, load_backbone(model, torch.float32), tmp_path / "peft")
        assert "\n" not in str(error.value)
    file = save_adapter(model, trained, tmp_path, lora.state(trained))
    tensors = {key: tensor for key, tensor in load_file(file).items() if not key.endswith("alpha")}
    settings = {"unet.r": 4, "unet.lora_alpha": 4, f"unet.{name}": value}
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(settings)})
    with pytest.raises(ModelError, match="is damaged"):
        load_adapter(model, load_backbone(model, torch.float32), file)


def test_an_adapter_of_no_strength_is_refused(model: ModelConfig, trained: Any, tmp_path: Path) -> None:
    """It would be drawn as the base twice; a single layer may be switched off."""
    formats.save_peft(trained, tmp_path / "peft", lora.state(trained), "")
    path = tmp_path / "peft" / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"alpha_pattern": {"to_q": 0}}))
    load_adapter(model, load_backbone(model, torch.float32), tmp_path / "peft")
    path.write_text(json.dumps(settings | {"lora_alpha": 0}))
    with pytest.raises(ModelError, match=r"adapter_config.json: lora_alpha is 0, .*changes nothing"):
        load_adapter(model, load_backbone(model, torch.float32), tmp_path / "peft")


def test_an_adapter_that_is_not_finite_is_refused(model: ModelConfig, trained: Any, tmp_path: Path) -> None:
    weights = lora.state(trained)
    weights[next(iter(weights))][0, 0] = float("nan")
    formats.save_peft(trained, tmp_path, weights, "")
    with pytest.raises(ModelError, match=r"adapter_model.safetensors is damaged \(.* is not finite\)"):
        load_adapter(model, load_backbone(model, torch.float32), tmp_path)


@pytest.mark.parametrize(
    "odd", [{"rank_pattern": "text"}, {"alpha_pattern": {"(": 1}}, {"r": 0}, {"lora_alpha": "x"}, {"r": []}]
)
def test_odd_settings_of_a_peft_folder_are_damage(trained: Any, tmp_path: Path, odd: dict[str, Any]) -> None:
    formats.save_peft(trained, tmp_path, lora.state(trained), "")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | odd))
    with pytest.raises(ModelError, match=r"adapter_config.json is damaged \(.+\); export it again"):
        formats.read_peft(tmp_path)


def test_a_link_to_itself_is_no_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").symlink_to("adapter_model.safetensors")
    (tmp_path / "adapter_config.json").mkdir()
    assert hash_adapter(tmp_path) == hash_adapter(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"adapter_model.safetensors does not exist"):
        formats.read_peft(tmp_path)
