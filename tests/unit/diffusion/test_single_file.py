"""Bases in one file: every part is what the folder has, what is missing is borrowed, and what doesn't fit is said."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune import hub
from finetune.config.schema import ModelConfig, Quantize
from finetune.diffusion import meta, pipeline, single_file
from finetune.diffusion.families import family
from finetune.errors import ModelError
from finetune.language import meta as language_meta
from finetune.memory.quantize import settings as settings_of
from tests.single_files import original_backbone, save_single_file
from tests.tiny_families import save_family

pytestmark = pytest.mark.sampled
CPU = torch.device("cpu")
# What released files hold: of FLUX.1 and others the transformer alone.
HELD = {
    "sd": ("unet", "vae", "text_encoder"),
    "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2"),
    "sd3": ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"),
    "flux2": ("transformer",),
    "z_image": ("transformer",),
}
RELEASED = {
    "sd15": "sd",
    "sd21": "sd",
    "sdxl": "sdxl",
    "sd35_medium": "sd3",
    "flux1_dev": "flux",
}


def whole_and_file(folder: Path, kind: str) -> tuple[ModelConfig, ModelConfig]:
    """A base in a folder, and the same one in a file; what the file holds is nowhere else."""
    whole = save_family(folder / "whole", kind)
    if kind == "sd3":  # whose first text encoder has no projection of its own in such files
        weights = folder / "whole" / "text_encoder" / "model.safetensors"
        save_file(load_file(weights) | {"text_projection.weight": torch.eye(8)}, weights, metadata={"format": "pt"})
    file = save_single_file(folder / "whole", folder / "base.safetensors", kind, HELD[kind])
    shutil.copytree(folder / "whole", folder / "parts")
    for part in HELD[kind]:
        for weights in (folder / "parts" / part).glob("*.safetensors"):
            weights.unlink()
    return whole, replace(whole, base=str(file), parts=str(folder / "parts"))


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, ModelConfig]:
    return whole_and_file(tmp_path_factory.mktemp("sd"), "sd")


@pytest.fixture
def model(sd: tuple[ModelConfig, ModelConfig], tmp_path: Path) -> ModelConfig:
    """A base of one file that a test may change, with only its configuration and tokenizer elsewhere."""
    file = shutil.copy(sd[1].base, tmp_path / "base.safetensors")
    return replace(sd[1], base=str(file))


def change(model: ModelConfig, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    weights = load_file(model.base)
    edit(weights)
    save_file(weights, model.base)


@pytest.mark.parametrize("kind", HELD)
def test_every_part_is_the_folders(kind: str, tmp_path: Path) -> None:
    whole, model = whole_and_file(tmp_path, kind)
    for load_part in (pipeline.load_vae_model, lambda base: pipeline.load_backbone(base, torch.bfloat16)):
        wanted, found = load_part(whole), load_part(model)
        assert found.state_dict().keys() == wanted.state_dict().keys()
        assert all(torch.equal(found.state_dict()[name], weight) for name, weight in wanted.state_dict().items())
        assert not any(weight.requires_grad for weight in found.parameters())
        assert not found.training
    wanted, found = (pipeline.TextEncoder(base, CPU).encode(["a red robot", ""]) for base in (whole, model))
    for one, other in zip(wanted, found, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(other[name], value) for name, value in one.items())
    assert pipeline.load_scheduler(model).config == pipeline.load_scheduler(whole).config


def test_a_phase_reads_its_part_alone(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors

    seen: list[str] = []
    opened = safetensors.safe_open

    class Noting:
        def __init__(self, *arguments: Any) -> None:
            self.file = opened(*arguments).__enter__()

        def __enter__(self) -> "Noting":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.__exit__(None, None, None)

        def get_tensor(self, name: str) -> Tensor:
            seen.append(name)
            weight: Tensor = self.file.get_tensor(name)
            return weight

    found = single_file.find(model)
    assert found is not None
    monkeypatch.setattr(safetensors, "safe_open", Noting)
    pipeline.TextEncoder(model, CPU)
    assert seen == found.names("text_encoder") != []
    seen.clear()
    pipeline.Vae(model, CPU)
    assert seen == found.names("vae") != []
    seen.clear()
    pipeline.load_scheduler(model)
    assert seen == []
    pipeline.load_backbone(model, torch.float32)
    assert seen == found.names("unet") != []


def test_the_package_has_clips_tokenizer(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import CLIPTokenizer

    found = single_file.find(model)
    assert found is not None
    released = replace(found, settings=hub.ARCHITECTURES / "sdxl", parts="stabilityai/stable-diffusion-xl-base-1.0")
    monkeypatch.setattr(hub, "local", lambda reference: None)
    first, second = (single_file.load(CLIPTokenizer, released, part) for part in ("tokenizer", "tokenizer_2"))
    assert len(first) == len(second) == 49408
    # As OpenAI's own tokenizer reads them.
    assert first("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    mixed = first("Größe 東京 naïve café's 12.5 !! wow", add_special_tokens=False).input_ids
    assert mixed == [
        709,
        7255,
        127,
        253,
        324,
        48338,
        21078,
        361,
        1097,
        35689,
        563,
        15304,
        568,
        272,
        273,
        269,
        276,
        748,
        2781,
    ]
    filled = [reader("hello world", padding="max_length", max_length=6).input_ids for reader in (first, second)]
    assert filled == [[49406, 3306, 1002, 49407, 49407, 49407], [49406, 3306, 1002, 49407, 0, 0]]
    assert first.model_max_length == 77


def test_a_tokenizer_beside_the_file_comes_first(model: ModelConfig) -> None:
    from transformers import CLIPTokenizer

    before = pipeline.text_encoder_hash(model)
    beside = Path(model.base).parent / "tokenizer"
    shutil.copytree(Path(model.parts) / "tokenizer", beside)
    assert pipeline.text_encoder_hash(model) != before
    settings = json.loads((beside / "tokenizer_config.json").read_text())
    (beside / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 50}))
    found = single_file.find(model)
    assert found is not None
    assert single_file.load(CLIPTokenizer, found, "tokenizer").model_max_length == 50
    (beside / "tokenizer.json").unlink()
    (beside / "merges.txt").unlink()  # a vocabulary alone is no tokenizer
    assert single_file.load(CLIPTokenizer, found, "tokenizer").model_max_length == 77


def test_identity_is_of_content(model: ModelConfig, sd: tuple[ModelConfig, ModelConfig]) -> None:
    every = [pipeline.base_hash, pipeline.text_encoder_hash, pipeline.vae_hash]
    before = [identity(model) for identity in every]
    assert before == [identity(sd[1]) for identity in every]
    assert len(set(before)) == 3
    change(model, lambda weights: weights["first_stage_model.decoder.conv_in.bias"].add_(1))
    assert all(identity(model) != old for identity, old in zip(every, before, strict=True))


def test_no_hub_is_asked_for_what_the_file_holds(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a released model: its configuration is in the package."""
    requested: list[str] = []

    def note(source: str) -> str:
        requested.append(source)
        raise ModelError("the hub can't be reached")

    monkeypatch.setattr(hub, "_ask_hub", note)
    monkeypatch.setattr(hub, "_snapshot", lambda source: None)
    monkeypatch.setattr(hub, "config_folder", lambda reference: Path(model.parts))
    released = replace(model, parts="stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert pipeline.base_hash(released).endswith("+stable-diffusion-v1-5/stable-diffusion-v1-5")
    pipeline.load_backbone(released, torch.float32)
    pipeline.Vae(released, CPU)
    assert requested == []
    change(released, lambda weights: [weights.pop(name) for name in list(weights) if "first_stage" in name])
    parts = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    line = rf"base.safetensors holds no vae; it is to come from model.parts={parts}: the hub can't be reached"
    for ask in (pipeline.load_vae_model, pipeline.vae_hash):
        with pytest.raises(ModelError, match=line):
            ask(released)
    assert set(requested) == {parts}


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (
        lambda file: file.write_bytes(file.read_bytes()[:-100]),
        r"base.safetensors is damaged \(.* bytes where its header says .*\); copy or download it again",
    ),
    "text": (
        lambda file: file.write_text("<html>log in to download</html>"),
        r"base.safetensors is damaged \(.* without a safetensors header\); copy or download it again",
    ),
    "adapter": (
        lambda file: save_file({"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(1)}, file),
        r"base.safetensors is an adapter, not a base; type sample.adapter=.*base.safetensors to draw with it",
    ),
    "scaled": (
        lambda file: save_file(load_file(file) | {"model.diffusion_model.scaled_fp8": torch.zeros(1)}, file),
        r"base.safetensors is quantised \(8-bit weights with scales\); get the same model in 16 bit",
    ),
    "unet": (
        lambda file: save_file({"first_stage_model.x": torch.zeros(1)}, file),
        r"base.safetensors is not of the architecture of .* \(it holds no unet of that kind\); none of the presets",
    ),
    "incomplete": (
        lambda file: save_file(
            {name: weight for name, weight in load_file(file).items() if "time_embed.0.bias" not in name}, file
        ),
        r"\(it lacks time_embedding.linear_1.bias\)",
    ),
    "inpainting": (
        lambda file: save_file(
            load_file(file) | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(16, 9, 3, 3)}, file
        ),
        r"\(conv_in.weight is \[16, 9, 3, 3\] instead of \[16, 4, 3, 3\]\); none of .*: take another file$",
    ),
    "velocity": (
        lambda file: save_file(load_file(file) | {"v_pred": torch.zeros(1)}, file),
        r"base.safetensors predicts velocities, .*parts doesn't; name a folder .* as model.parts",
    ),
    "gone": (Path.unlink, r"there is no file .*base.safetensors; download it, and type model.base="),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_wrong_with_a_file_is_one_line(
    model: ModelConfig, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, line = BROKEN[kind]
    (tmp_path / "none").mkdir()
    monkeypatch.setattr(hub, "ARCHITECTURES", tmp_path / "none")  # comparing with all takes seconds
    damage(Path(model.base))
    for ask in (pipeline.base_hash, pipeline.load_scheduler):
        with pytest.raises(ModelError, match=line) as error:
            ask(model)
        assert "\n" not in str(error.value)


def test_weights_that_a_part_lacks_are_not_made_up(model: ModelConfig) -> None:
    name = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    change(model, lambda weights: weights.pop(name))
    with pytest.raises(ModelError, match=r"lacks 1 weight of its text_encoder, first .*final_layer_norm.bias; get it"):
        pipeline.TextEncoder(model, CPU)


def test_a_part_that_cannot_be_read_is_named(model: ModelConfig) -> None:
    name = "first_stage_model.decoder.conv_in.bias"
    change(model, lambda weights: weights.update({name: torch.zeros(3)}))
    with pytest.raises(ModelError, match=r"the vae in .*base.safetensors can't be loaded \(.*shape.*\); get the file"):
        pipeline.load_vae_model(model)
    change(model, lambda weights: [weights.pop(name) for name in list(weights) if "first_stage_model" in name])
    change(model, lambda weights: weights.update({"vae.x": torch.zeros(1)}))
    with pytest.raises(
        ModelError, match=r"the vae in .*base.safetensors can't be loaded \(.*missing.*\); get the file"
    ):
        pipeline.load_vae_model(model)


def test_memory_that_runs_out_stays_what_it_is(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AutoencoderKL, "from_single_file", fail)
    with pytest.raises(torch.OutOfMemoryError):
        pipeline.load_vae_model(model)


def test_older_names_and_eight_bits_are_read(model: ModelConfig) -> None:
    """As merged files have them: text encoders named as before 2022, weights in 8 bit without scales."""
    before = pipeline.TextEncoder(model, CPU).encode(["a red robot"])[0]["embedding"]
    change(model, _age)
    assert torch.equal(pipeline.TextEncoder(model, CPU).encode(["a red robot"])[0]["embedding"], before)
    backbone = pipeline.load_backbone(model, torch.bfloat16)
    assert {weight.dtype for weight in backbone.parameters()} == {torch.bfloat16}
    wanted = load_file(model.base)["model.diffusion_model.input_blocks.0.0.weight"].bfloat16()
    assert torch.equal(backbone.conv_in.weight, wanted)


def _age(weights: dict[str, Tensor]) -> None:
    for name in list(weights):
        weight = weights.pop(name)
        if name.startswith("model.diffusion_model."):
            weight = weight.to(torch.float8_e4m3fn)
        weights[name.replace("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.")] = weight


def test_other_formats_are_refused_with_a_way_out(model: ModelConfig, tmp_path: Path) -> None:
    pickle = tmp_path / "old.ckpt"
    torch.save({"state_dict": load_file(model.base), "global_step": 1}, pickle)
    with pytest.raises(ModelError, match=r"old.ckpt is no .safetensors file, and pickles may run code") as error:
        pipeline.load_vae_model(replace(model, base=str(pickle)))
    exec(shlex.split(str(error.value).partition("type: ")[2])[2], {})
    found = pipeline.load_vae_model(replace(model, base=str(tmp_path / "old.safetensors")))
    assert torch.equal(found.decoder.conv_in.bias, pipeline.load_vae_model(model).decoder.conv_in.bias)
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"small.gguf is quantised for inference \(GGUF\); get the same model as"):
        pipeline.load_vae_model(replace(model, base=str(tmp_path / "small.gguf")))


def test_a_file_wants_a_preset(model: ModelConfig) -> None:
    with pytest.raises(ModelError, match=r"choose that with a preset: model=sd15, model=sdxl, … model.base=.*base"):
        pipeline.load_scheduler(replace(model, parts=""))
    language = ModelConfig(kind="language", base=model.base)
    for ask in (
        lambda: hub.load(torch.nn.Linear, language.base),
        lambda: language_meta.language_model(language, torch.float32),
    ):
        with pytest.raises(ModelError, match=r"is a single file, which only image models"):
            ask()


def test_a_plan_needs_only_the_header(model: ModelConfig, sd: tuple[ModelConfig, ModelConfig]) -> None:
    wanted, found = meta.backbone(sd[0], torch.float32), meta.backbone(model, torch.float32)
    assert {name: weight.shape for name, weight in found.named_parameters()} == {
        name: weight.shape for name, weight in wanted.named_parameters()
    }


def test_a_file_of_another_architecture_names_its_preset(
    sd: tuple[ModelConfig, ModelConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, other = whole_and_file(tmp_path, "sdxl")
    shutil.copytree(sd[1].parts, tmp_path / "architectures" / "sd15")
    shutil.copytree(other.parts, tmp_path / "architectures" / "sdxl")
    monkeypatch.setattr(hub, "ARCHITECTURES", tmp_path / "architectures")
    for base, wrong, preset in ((other.base, sd[1], "sdxl"), (sd[1].base, other, "sd15")):
        with pytest.raises(ModelError, match=rf"{base} is not of the architecture of .*; type model={preset} besides$"):
            pipeline.base_hash(replace(wrong, base=base))


@pytest.mark.parametrize(("preset", "kind"), RELEASED.items())
def test_a_released_file_fits_its_preset(preset: str, kind: str) -> None:
    """By names and shapes at full size, without weights."""
    settings = hub.ARCHITECTURES / preset
    weights = meta.backbone(ModelConfig(base=str(settings), family=kind), torch.bfloat16).state_dict()
    shapes = {
        single_file.BACKBONE + name: tuple(weight.shape) for name, weight in original_backbone(kind, weights).items()
    }
    found = single_file.SingleFile(Path("x.safetensors"), family(kind), shapes, settings, "")
    assert single_file.misfit(found) == ""
    others = {name: other for name, other in RELEASED.items() if name in ("sd15", "sd21", preset) and name != preset}
    for name, other in others.items():
        reason = single_file.misfit(replace(found, spec=family(other), settings=hub.ARCHITECTURES / name))
        assert re.match(r"it lacks |it holds no |\S+ is \[", reason)


@pytest.mark.parametrize("quantize", [Quantize.nf4, Quantize.int8])
def test_a_file_is_quantised_as_the_folder_is(
    quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers wants a GPU for it, bitsandbytes doesn't."""
    from diffusers import BitsAndBytesConfig, SD3Transformer2DModel
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    for kind in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(kind, "validate_environment", lambda *_, **__: None)
    whole, one = whole_and_file(tmp_path, "sd3")
    settings = BitsAndBytesConfig(**settings_of(quantize, torch.bfloat16))
    options = {"torch_dtype": torch.bfloat16, "quantization_config": settings, "device_map": {"": CPU}}
    found = single_file.find(one)
    assert found is not None
    file = single_file.load(SD3Transformer2DModel, found, "transformer", **options)
    folder = hub.load(SD3Transformer2DModel, whole.base, subfolder="transformer", **options)
    same_and_quantised(folder, file)


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", [Quantize.nf4, Quantize.int8])
@pytest.mark.parametrize("kind", ["sd3", "flux2", "z_image"])
def test_a_quantised_backbone_is_the_folders(kind: str, quantize: Quantize, tmp_path: Path) -> None:
    models = [replace(model, quantize=quantize) for model in whole_and_file(tmp_path, kind)]
    same_and_quantised(*(pipeline.load_backbone(model, torch.bfloat16, torch.device("cuda")) for model in models))


def same_and_quantised(folder: Any, file: Any) -> None:
    weights, others = folder.state_dict(), file.state_dict()
    assert weights.keys() == others.keys()
    assert any(weight.dtype in (torch.uint8, torch.int8) for weight in others.values())
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
