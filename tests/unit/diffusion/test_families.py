"""Every family reads texts, makes latents and calls its backbone as diffusers' own pipeline does."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import finetune
from finetune.adapters import lora
from finetune.config.schema import Config, LoraConfig, ModelConfig
from finetune.diffusion import families, tiling
from finetune.diffusion.families import family, flux
from finetune.diffusion.families.spec import BaseVersion, FamilySpec, stacked
from finetune.diffusion.image_sampler import ImageSampler
from finetune.diffusion.kind import workload
from finetune.diffusion.memory_model import WORKSPACE_GIB_PER_MEGAPIXEL
from finetune.diffusion.objectives import ERRORS
from finetune.diffusion.pipeline import TextEncoder, Vae, load_backbone, load_scheduler
from finetune.errors import ConfigError, ModelError
from finetune.memory import block_offload, checkpointing
from tests.tiny_families import SAVERS, save_family

pytestmark = pytest.mark.sampled
CPU = torch.device("cpu")
PROMPT = "a red robot"
# The transformers' inputs and outputs as latents (B, C, h, w), where they are in another form.
UNPACKED: dict[str, Callable[[Any, int, int], Tensor]] = {
    "flux": flux.unpack,
    "flux2": lambda tokens, height, width: tokens.transpose(1, 2).unflatten(2, (height, width)),
    "z_image": lambda listed, height, width: torch.stack(list(listed)).squeeze(2),
    "qwen_image": flux.unpack,
}
TOWARDS_CLEAN = {"z_image"}  # what predicts from noise to clean; its pipeline turns the sign round


@pytest.fixture(scope="module", params=list(SAVERS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return save_family(tmp_path_factory.mktemp("families") / request.param, request.param)


def test_every_family_is_tested() -> None:
    assert sorted(SAVERS) == families.names()


def test_a_family_that_there_is_not_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    command = ["train", "conf=pixar_style", "model.family=sdx", "lora.rank=0", f"run_dir={tmp_path / 'run'}"]
    code = f"import sys; from finetune.cli import main; print(main({command}), 'torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.stdout == "2 False\n"
    rank, line = answer.stderr.splitlines()
    assert "lora.rank" in rank
    assert line == f"error: model.family must be one of {', '.join(sorted(SAVERS))}, got 'sdx'; did you mean sdxl?"
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"model.family must be one of .*, got 'spec'"):
        family("spec")


def test_a_family_that_leaves_a_fact_out_is_no_family() -> None:
    with pytest.raises(TypeError, match=r"missing .* required keyword-only arguments"):
        FamilySpec(pipeline="StableDiffusionPipeline", backbone="unet")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("base", "kind", "name", "architecture", "v2"),
    [
        ("sd15", "sd", "sd_v1", "stable-diffusion-v1", False),
        ("sd21", "sd", "sd_v2_v", "stable-diffusion-v2-768-v", True),
        ("sdxl", "sdxl", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base", False),
        ("sd35_medium", "sd3", "sd3", "stable-diffusion-3", False),
        ("flux1_dev", "flux", "flux1", "flux-1-dev", False),
        ("flux2_klein", "flux2", "flux2", "flux-2-klein", False),
        ("qwen_image", "qwen_image", "qwen_image", "Qwen-Image", False),
        ("z_image", "z_image", "z_image", "Z-Image", False),
    ],
)
def test_an_adapters_file_names_its_base_as_other_programs_do(
    base: str, kind: str, name: str, architecture: str, v2: bool
) -> None:
    folder, spec = Path(finetune.__file__).parent / "architectures" / base, family(kind)
    config, scheduler = (
        SimpleNamespace(**json.loads(file.read_text()))
        for file in (folder / spec.backbone / "config.json", folder / "scheduler" / "scheduler_config.json")
    )
    assert spec.base_version(config, scheduler) == BaseVersion(name, architecture, v2)


def test_texts_have_the_shapes_that_the_backbone_reads(model: ModelConfig) -> None:
    encoder, backbone = TextEncoder(model, CPU), load_backbone(model, torch.float32)
    short, long = encoder.encode([PROMPT, "very " * 600])
    wanted = family(model.family).text_shapes(backbone.config)
    assert {name: tuple(value.shape) for name, value in short.items()} == wanted
    assert short.keys() == long.keys()
    assert any(not torch.equal(short[name], long[name]) for name in short)
    assert encoder.encode([PROMPT])[0].keys() == short.keys()
    for name, value in encoder.encode([PROMPT])[0].items():
        assert torch.allclose(value.float(), short[name].float(), atol=1e-5)


def test_text_encoders_read_as_many_captions_and_tokens_as_the_memory_plan_counts(model: ModelConfig) -> None:
    encoder, read = TextEncoder(model, CPU), {}
    for part in encoder.family.text_tokens:
        seen = read.setdefault(part, [])
        getattr(encoder.pipeline, part).register_forward_pre_hook(
            lambda _, inputs, named, seen=seen: seen.append(named.get("input_ids", *inputs[:1]).shape), with_kwargs=True
        )
    encoder.encode([PROMPT, "very " * 600, PROMPT])
    for part, tokens in encoder.family.text_tokens.items():
        captions, longest = map(max, zip(*read[part], strict=True))
        assert captions == min(3, encoder.family.captions_per_pass)
        # Qwen-Image's pipeline cuts what has been read.
        assert longest >= tokens if model.family == "qwen_image" else longest == tokens


def test_what_a_text_encoder_does_not_read_is_named(model: ModelConfig) -> None:
    encoder = TextEncoder(model, CPU)
    assert encoder.truncated_tail(PROMPT) == ""
    text = "".join(chr(ord("a") + number % 26) for number in range(1500))
    lost = "".join(encoder.truncated_tail(text).split())
    assert text.endswith(lost)
    assert 0 < len(lost) < len(text)


def test_latents_come_back_as_pixels_of_the_same_size(model: ModelConfig) -> None:
    kind, vae = family(model.family), Vae(model, CPU)
    latents = vae.encode(torch.rand(1, 3, 64, 96) * 2 - 1)[0]
    backbone = load_backbone(model, torch.float32)
    assert latents["mean"].shape == latents["std"].shape
    assert latents["mean"].shape[0] == kind.latent_channels(backbone.config)
    assert float(latents["std"].min()) > 0


def test_large_pictures_meet_the_autoencoder_one_by_one_and_very_large_ones_in_tiles(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, vae = family(model.family), Vae(model, CPU)
    seen: list[tuple[int, ...]] = []
    for part in (vae.model.encoder, vae.model.decoder):
        part.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    pixels_B3HW = torch.rand(3, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = vae.encode(pixels_B3HW)
    assert [shape[0] for shape in seen] == [3]
    monkeypatch.setattr(tiling, "MAX_BATCH_PIXELS", 2 * 64 * 96)
    seen.clear()
    alone = vae.encode(pixels_B3HW)
    assert [shape[0] for shape in seen] == [1, 1, 1]
    for one, other in zip(whole, alone, strict=True):
        assert torch.allclose(one["mean"], other["mean"], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(tiling, "UNTILED", 64 * 96 - 1)
    if model.family == "qwen_image":  # whose tiles are larger than these images
        vae.model.enable_tiling(32, 32, 24, 24)
    seen.clear()
    tiled = vae.encode(pixels_B3HW[:1])[0]["mean"]
    assert tiled.shape == whole[0]["mean"].shape
    assert len(seen) > 1
    assert max(shape[-2] * shape[-1] for shape in seen) < 64 * 96
    seen.clear()
    latents = torch.randn(3, *tiled.shape, generator=torch.Generator().manual_seed(1))
    assert kind.decode(vae.model, kind.pack_latents(latents), 64, 96).shape == (3, 3, 64, 96)
    assert max(shape[0] for shape in seen) == 1
    assert len(seen) > 3


def test_the_autoencoder_leaves_the_device_where_memory_ran_out(model: ModelConfig) -> None:
    kind, backbone = family(model.family), load_backbone(model, torch.float32).train()
    image_sampler = ImageSampler(model, [PROMPT], "", CPU, torch.float32)

    def fail(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    image_sampler.family = replace(kind, decode=fail)
    with pytest.raises(torch.OutOfMemoryError):
        image_sampler.generate(backbone, [(PROMPT, 0)], width=96, height=64, steps=1, guidance=1.0)
    assert getattr(image_sampler.pipeline, kind.backbone) is None
    assert backbone.training


def test_frozen_blocks_in_main_memory_and_recomputed_ones_give_the_same_gradients(model: ModelConfig) -> None:
    kind, random = family(model.family), torch.Generator().manual_seed(0)
    backbones = [load_backbone(model, torch.float32) for _ in range(3)]
    for backbone in backbones:
        lora.inject(backbone, LoraConfig(rank=4, alpha=8, dropout=0.2), ["to_q", "to_v"], seed=0)
        for weight in backbone.parameters():  # where it lies in a file, sums round otherwise
            weight.data = weight.data.clone()
    shape = (1, kind.latent_channels(backbones[0].config), 16, 16)
    noisy_BChw = torch.randn(shape, generator=random)
    shapes = sorted(kind.text_shapes(backbones[0].config).items())
    text = {name: torch.randn((1, *size), generator=random) for name, size in shapes}
    checkpointing.set_checkpointing(backbones[1], 2)
    block_offload.stream(backbones[2], block_offload.find(backbones[2]), CPU)
    found = []
    for backbone in backbones:
        torch.manual_seed(1)
        kind.predict(backbone.train(), noisy_BChw, torch.tensor([500]), text).square().sum().backward()
        found.append([weight.grad for weight in lora.adapter_parameters(backbone) if weight.grad is not None])
    plain, checkpointed, away = found
    assert any(bool(gradient.any()) for gradient in plain)
    assert all(torch.equal(one, other) for one, other in zip(plain, checkpointed, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(plain, away, strict=True))


def test_training_calls_the_backbone_as_the_pipeline_does(model: ModelConfig) -> None:
    """The same noisy latents, timestep and text, caught on the pipeline's way, give the same inputs and output."""
    kind, backbone = family(model.family), load_backbone(model, torch.float32)
    caught: list[tuple[dict[str, Any], Tensor]] = []

    def catch(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        given = dict(zip(("sample", "timestep", "captions"), inputs, strict=False)) | named
        caught.append((given, output[0]))

    backbone.register_forward_hook(catch, with_kwargs=True)
    image_sampler = ImageSampler(model, [PROMPT], "", CPU, torch.float32)
    packed: list[Tensor] = []

    def white(vae: object, latents: Tensor, height: int, width: int) -> Tensor:
        packed.append(latents)
        return torch.zeros(1, 3, height, width)

    image_sampler.family = replace(kind, decode=white)
    image_sampler.generate(backbone, [(PROMPT, 0)], width=96, height=64, steps=2, guidance=1.0)
    (sampling, drawn), caught[:] = caught[0], []

    entering = sampling.get("sample", sampling.get("hidden_states"))[:1]
    unpack = UNPACKED.get(model.family, lambda latents, height, width: latents)
    factor = 64 // Vae(model, CPU).encode(torch.zeros(1, 3, 64, 64))[0]["mean"].shape[-1]
    noisy = unpack(entering, 64 // factor, 96 // factor)
    text = {name: value[None].float() for name, value in TextEncoder(model, CPU).encode([PROMPT])[0].items()}
    timestep = image_sampler.pipeline.scheduler.timesteps[:1].float()
    with torch.no_grad():
        predicted = kind.predict(backbone, noisy, timestep, text)
    training = tensors(caught[0][0])
    for name, value in tensors(sampling).items():
        if name != "guidance":
            rows = value[: len(training[name])] if value.ndim else value.expand(1)
            assert torch.allclose(training[name].float(), rows.float(), atol=1e-5), name
    assert predicted.shape == noisy.shape
    assert packed[0].shape == kind.pack_latents(noisy).shape
    sign = -1 if model.family in TOWARDS_CLEAN else 1
    assert torch.allclose(sign * unpack(drawn[:1], 64 // factor, 96 // factor), predicted, atol=1e-4)


def tensors(arguments: dict[str, Any]) -> dict[str, Tensor]:
    flat = arguments | (arguments.get("added_cond_kwargs") or {})
    first = {name: value[0] if isinstance(value, list) else value for name, value in flat.items()}
    return {name: value for name, value in first.items() if isinstance(value, Tensor)}


def test_a_prediction_does_not_depend_on_who_else_is_in_the_batch(model: ModelConfig) -> None:
    kind, backbone = family(model.family), load_backbone(model, torch.float32)
    captions = TextEncoder(model, CPU).encode([PROMPT, "a much longer caption, of a red robot in a city at night " * 3])
    noisy = torch.randn(2, kind.latent_channels(backbone.config), 4, 6, generator=torch.Generator().manual_seed(1))
    timesteps = torch.tensor([100, 700])
    texts = [{name: value.float() for name, value in caption.items()} for caption in captions]
    with torch.no_grad():
        together = kind.predict(backbone, noisy, timesteps, stacked(texts))
        for index, text in enumerate(texts):
            alone = kind.predict(backbone, noisy[[index]], timesteps[[index]], stacked([text]))
            assert torch.allclose(alone, together[[index]], atol=1e-5)
            other = kind.predict(backbone, noisy[[index]], timesteps[[index]], stacked([texts[1 - index]]))
            assert not torch.allclose(alone, other, atol=1e-4)  # the caption does make a difference


def test_shapes_alone_are_enough_to_predict_for_a_memory_plan(model: ModelConfig) -> None:
    kind = family(model.family)
    real = load_backbone(model, torch.float32)
    with FakeTensorMode():
        backbone = type(real).from_config(dict(real.config))
        noisy = torch.randn(2, kind.latent_channels(real.config), 8, 8)
        text = {name: torch.randn(2, *shape) for name, shape in kind.text_shapes(real.config).items()}
        predicted = kind.predict(backbone, noisy, torch.tensor([100.0, 700.0]), text)
        predicted.sum().backward()
    assert predicted.shape == noisy.shape


@pytest.mark.exhaustive
def test_a_memory_plan_sees_pictures_decoded(model: ModelConfig) -> None:
    config = Config(model=replace(model, resolution=64, bucket_step=32, lora_targets={"attention": ["to_q"]}))
    config.lora.targets = "attention"
    config.sample.prompts, config.sample.previews = ["a", "b", "c"], 3
    config.trainer.validate_every = 0
    memory_model = workload(config).build(config.model, torch.float32, True, 2.0**30)
    (name, options), *_ = memory_model.training_phases(1, {})
    trace = next(iter(options)).trace
    assert name == "sampling"
    assert trace is not None
    images = 8 * 3 * 64 * 64 * 4  # bytes: so many of this size are drawn at once, in fp32
    assert trace.kernels[-1].live - sum(trace.held.values()) >= images
    assert trace.held["workspace"] == pytest.approx(8 * 64 * 64 / 1024**2 * WORKSPACE_GIB_PER_MEGAPIXEL * 2**30)


def test_sixteen_bits_train_too(model: ModelConfig) -> None:
    kind = family(model.family)
    backbone = load_backbone(model, torch.bfloat16)
    lora.inject(backbone, LoraConfig(rank=2, alpha=2, dropout=0.0), model.lora_targets["attention"], seed=0)
    for parameter in lora.adapter_parameters(backbone):
        parameter.data += 0.1  # B starts at zero, and A's gradient with it
    text = stacked(TextEncoder(model, CPU).encode([PROMPT, "a cat"]))
    noisy = torch.randn(2, kind.latent_channels(backbone.config), 4, 6, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predicted = kind.predict(backbone, noisy, torch.tensor([100, 700]), text)
    predicted.float().square().sum().backward()
    assert predicted.isfinite().all()
    for name, parameter in backbone.named_parameters():
        assert not parameter.requires_grad or (parameter.grad is not None and parameter.grad.isfinite().all()), name


def test_pictures_depend_on_prompt_seed_and_size_alone(model: ModelConfig) -> None:
    backbone = load_backbone(model, torch.float32)
    image_sampler = ImageSampler(model, [PROMPT, "a cat"], "", CPU, torch.float32)

    def draw(*jobs: tuple[str, int]) -> Tensor:
        drawn = image_sampler.generate(backbone, jobs, width=96, height=64, steps=2, guidance=3.0)
        assert all(image.size == (96, 64) for image in drawn)
        return torch.stack([torch.from_numpy(np.array(image, dtype=np.int16)) for image in drawn])

    first, second = draw((PROMPT, 0), (PROMPT, 1))
    assert (first - second).abs().max() > 10
    assert (draw((PROMPT, 1))[0] - second).abs().max() <= 1  # of 255: sums in another order round otherwise


def test_the_objective_is_the_schedulers(model: ModelConfig) -> None:
    objective = family(model.family).objective(load_scheduler(model))
    clean, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    last = torch.tensor([objective.level(0.999)] * 2)
    assert torch.corrcoef(torch.stack([objective.noisy(clean, noise, last).flatten(), noise.flatten()]))[0, 1] > 0.99
    assert objective.target(clean, noise, last).shape == clean.shape
    assert objective.snr(last).shape == (2,)
    assert objective.prediction_type in ERRORS


def test_a_base_of_another_family_is_refused_and_named(model: ModelConfig) -> None:
    other = "sdxl" if model.family != "sdxl" else "sd"
    with pytest.raises(ModelError, match=rf"model.family={other} needs a .*Pipeline; choose the preset"):
        load_scheduler(ModelConfig(base=model.base, family=other))


def test_a_damaged_index_is_named(model: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ModelError, match=r"model_index.json is damaged"):
        load_scheduler(ModelConfig(base=str(tmp_path), family=model.family))


def test_every_pipeline_is_one_of_diffusers() -> None:
    import diffusers

    for kind in map(family, families.names()):
        for name in (kind.pipeline, kind.backbone_class, kind.vae_class):
            assert getattr(diffusers, name).__name__ == name
