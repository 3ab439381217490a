"""Offloaded blocks: where they are when, that nothing else changes, and what only a GPU can show.

Without a GPU the ring of buffers is in CPU memory too, and copies are done at once.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune.adapters import attach, formats, lora
from finetune.config.schema import LoraConfig, ModelConfig, Quantize
from finetune.language import causal_lm
from finetune.memory import block_offload, checkpointing, fallbacks
from finetune.memory.activation_offload import ActivationOffload
from tests.tiny_language_models import save_language
from tests.unit.language import packs
from tests.unit.memory.models import MODELS, adapted, gradients
from tests.unit.memory.models import language as tiny_llama

pytestmark = pytest.mark.sampled
CPU = torch.device("cpu")
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language(tmp_path_factory.mktemp("llama"))


class Watched(block_offload.Ring):
    """A ring that keeps the numbers of the blocks in the order in which they are fetched."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.fetched: list[int] = []

    def fetch(self, block: Any, slot: Any) -> None:
        self.fetched.append(self.order[block])
        slot.buffer.fill_(255)  # NaN in every dtype: a product that still needs what lies there will show it
        super().fetch(block, slot)


@pytest.fixture(autouse=True)
def rings(monkeypatch: pytest.MonkeyPatch) -> list[Watched]:
    """The rings that are made, in turn."""
    made: list[Watched] = []

    def make(*arguments: Any, **options: Any) -> Watched:
        made.append(Watched(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(block_offload, "Ring", make)
    return made


def inside(tensor: Tensor, flat: Tensor) -> bool:
    """Whether a tensor lies in another one's memory."""
    return flat.data_ptr() <= tensor.data_ptr() < flat.data_ptr() + flat.nbytes


def frozen(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_an_offloaded_model_has_the_same_gradients(name: str, share: int, training: bool) -> None:
    make, output, targets = MODELS[name]
    model = adapted(make, targets).train(training)
    expected, before = gradients(model, output), frozen(model)
    with torch.no_grad():
        drawn = output(model.eval())
    block_offload.stream(model.train(training), block_offload.find(model)[::share], CPU)
    checkpointing.set_checkpointing(model, 0)  # means 1 now
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(output(model.eval()), drawn)
        found = gradients(model.train(training), output)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    after = frozen(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_blocks_are_fetched_one_ahead_in_both_directions(rings: list[Watched]) -> None:
    _, output, targets = MODELS["llama"]
    model = adapted(deep, targets)
    block_offload.stream(model, block_offload.find(model), CPU)
    (ring,) = rings
    fetched = ring.fetched
    gradients(model, output)
    assert fetched == [0, 1, 2, 3, 4, 5, 3, 2, 1, 0]  # at the turn the last two are still there
    fetched.clear()
    gradients(model, output)
    assert fetched == [2, 3, 4, 5, 3, 2, 1, 0]  # and at the other turn the first two
    fetched.clear()
    with torch.no_grad():
        output(model)
        output(model)
    assert fetched == [2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0, 1][: len(fetched)]
    assert len(fetched) == 10 + 1
    assert len(ring.slots) == block_offload.RING_SLOTS
    largest = max(block.flat.numel() for block in ring.blocks)
    assert sum(slot.buffer.nbytes for slot in ring.slots) == block_offload.RING_SLOTS * largest


def deep() -> nn.Module:
    """Six layers."""
    return tiny_llama(layers=6)


def test_frozen_blocks_lie_in_one_piece_and_adapters_stay_out(rings: list[Watched]) -> None:
    make, _, targets = MODELS["llama"]
    model = adapted(make, targets)
    block_offload.stream(model, block_offload.find(model), CPU)
    for block in rings[0].blocks:
        for name, parameter in block.module.named_parameters():
            assert inside(parameter, block.flat) == (".lora_" not in name), name


@pytest.mark.parametrize("dora", [False, True])
def test_4bit_blocks_move_with_their_scales(llama: Path, dora: bool, rings: list[Watched]) -> None:
    config = ModelConfig(kind="language", base=str(llama), quantize=Quantize.nf4)
    kept, away = (causal_lm.load_model(config, torch.float32, CPU) for _ in range(2))
    for model in (kept, away):
        lora.inject(model, LoraConfig(rank=4, alpha=8, dropout=0.1, dora=dora), TARGETS, seed=0)
        random = torch.Generator().manual_seed(0)
        for parameter in lora.adapter_parameters(model):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=random)
    block_offload.stream(away, block_offload.find(away), CPU)
    (ring,) = rings
    del ring.slots[1:]  # every block in the same buffer: what is kept from forward to backward is overwritten
    output = MODELS["llama"][1]
    found, expected = (gradients(model.train(), output) for model in (away, kept))
    assert expected
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    weight = away.get_submodule("model.layers.0.mlp.up_proj").weight
    for tensor in (weight, weight.quant_state.absmax, weight.quant_state.state2.absmax):
        assert inside(tensor, ring.blocks[0].flat)


@pytest.mark.parametrize("limit", ["hardware.vram_gib", "what is free"])
def test_as_many_blocks_stay_as_fit_evenly_spread(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], limit: str
) -> None:
    model, output = deep(), MODELS["llama"][1]
    with torch.no_grad():
        expected = output(model)
    blocks = block_offload.find(model)
    size = block_offload.weight_bytes(blocks[0])
    # Room for all blocks but one: then two more have to go, for the ring.
    room = int((block_offload.weight_bytes(model) - size) / block_offload.WEIGHTS_SHARE) + 9
    free, vram_gib = (10**12, room / 2**30) if limit == "hardware.vram_gib" else (room, 0.0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))
    capfd.readouterr()
    block_offload.offload_to_fit(model.requires_grad_(False), CPU, vram_gib)
    away = [index for index, block in enumerate(blocks) if getattr(block, checkpointing.SELF_CHECKPOINTING, False)]
    assert away == [0, 2, 4]
    assert capfd.readouterr().err.startswith("model.offload: 0.0 of 0.0 GiB ")
    assert Accelerator(cpu=True).verify_device_map(model)  # it won't move the model to the GPU as a whole
    with torch.no_grad():
        assert torch.equal(output(model), expected)


def test_cpu_memory_is_taken_in_few_pieces_of_powers_of_two(rings: list[Watched]) -> None:
    """As pinned memory comes."""
    layers = nn.ModuleList(nn.Linear(13, 13, bias=False) for _ in range(35)).requires_grad_(False)
    before = [layer.weight.clone() for layer in layers]
    block_offload.stream(layers, list(layers), CPU)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True))
    flats = sorted((block.flat for block in rings[0].blocks), key=Tensor.data_ptr)
    assert all(first.data_ptr() + first.nbytes <= second.data_ptr() for first, second in itertools.pairwise(flats))
    pieces = {flat.untyped_storage().data_ptr(): flat.untyped_storage().nbytes() for flat in flats}
    assert all(size.bit_count() == 1 for size in pieces.values())
    assert len(pieces) <= 6
    assert sum(pieces.values()) <= 1.1 * sum(flat.nbytes for flat in flats)


def test_what_fits_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["llama"][0]()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10**12, 10**12))
    block_offload.offload_to_fit(model, CPU, 0.0)
    assert not checkpointing.has_self_checkpointing(model)
    assert not Accelerator(cpu=True).verify_device_map(model)


def test_blocks_are_layers_transformer_blocks_and_residual_blocks() -> None:
    kinds = {
        name: {type(block).__name__ for block in block_offload.find(make())} for name, (make, _, _) in MODELS.items()
    }
    assert kinds == {
        "unet": {"BasicTransformerBlock", "ResnetBlock2D", "Downsample2D", "Upsample2D"},
        "transformer": {"JointTransformerBlock"},
        "llama": {"LlamaDecoderLayer"},
    }


def test_without_a_gpu_the_only_fallback_is_activation_checkpointing() -> None:
    for make, _, _ in MODELS.values():
        for checkpointed, expected in (
            (0, ["trainer.activation_checkpointing=1"]),
            (1, []),
            (2, ["trainer.activation_checkpointing=1"]),
        ):
            model = make()
            offload = ActivationOffload(model, CPU, False)
            assert list(fallbacks.gpu_fallbacks(model, ModelConfig(), checkpointed, offload, CPU)) == expected
            assert not offload.enabled


def test_an_adapter_is_loaded_without_moving_the_model(llama: Path, tmp_path: Path) -> None:
    """PEFT would move offloaded blocks to wherever it finds room."""
    config = ModelConfig(kind="language", base=str(llama))
    model: Any = causal_lm.load_model(config, torch.float32, CPU)
    lora.inject(model, LoraConfig(rank=4, alpha=8, dropout=0.0), TARGETS, seed=0)
    random = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(value.shape, generator=random) for name, value in lora.state(model).items()}
    lora.load_state(model, weights, "here")
    formats.save_peft(model, tmp_path, weights, str(llama))
    with torch.no_grad():
        expected = MODELS["llama"][1](model.eval())
    away: Any = causal_lm.load_model(config, torch.float32, CPU)
    block_offload.stream(away, block_offload.find(away), CPU)
    places = dict(away.hf_device_map)
    loaded = attach.attach_peft_folder(away, tmp_path)
    assert not any(hasattr(module, "_hf_hook") for module in loaded.modules())
    assert away.hf_device_map == places
    with torch.no_grad():
        assert torch.equal(MODELS["llama"][1](loaded), expected)


# What only a GPU can show

GPU = torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_a_gpu_computes_the_same_with_offloaded_blocks(
    name: str, monkeypatch: pytest.MonkeyPatch, rings: list[Watched]
) -> None:
    """Without TF32: with it a UNet's gradients differ by 1e-4 of their size from one run to the next, offload or not,
    because cuDNN adds up in no fixed order and TF32 rounds what it gets."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    make, output, targets = MODELS[name]

    def on_gpu(model: nn.Module) -> Tensor:
        return output_on(model, output)

    kept, away = (adapted(make, targets) for _ in range(2))
    kept.to(GPU)
    block_offload.stream(away, block_offload.find(away), GPU)
    for _ in range(3):
        with torch.no_grad():
            assert torch.allclose(on_gpu(away.eval()), on_gpu(kept.eval()), rtol=1e-5, atol=1e-5)
        found, expected = (gradients(model.train(), on_gpu) for model in (away, kept))
        assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-4) for one, other in zip(found, expected, strict=True))
    for block in rings[0].blocks:
        assert block.flat.is_pinned()
        assert all(parameter.device == CPU for _, _, parameter in block.places)


def output_on(model: nn.Module, output: Any) -> Tensor:
    """`output` with its inputs, which it makes on the CPU, moved to the GPU."""

    class Moved(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            def move(value: Any) -> Any:
                return value.to(GPU) if isinstance(value, Tensor) else value

            return model(*map(move, args), **{key: move(value) for key, value in kwargs.items()})

    found: Tensor = output(Moved())
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", [Quantize.none, Quantize.nf4])
def test_a_language_model_that_does_not_fit_has_its_blocks_in_cpu_memory(llama: Path, quantize: Quantize) -> None:
    config = ModelConfig(kind="language", base=str(llama), quantize=quantize, offload=True)
    model: Any = causal_lm.load_model(config, torch.bfloat16, GPU, vram_gib=1e-6)
    weights = [layer.weight for layer in model.get_decoder().modules() if isinstance(layer, nn.Linear)]
    assert all(weight.device == CPU and weight.is_pinned() for weight in weights)
    assert model.device.type == causal_lm.head(model).weight.device.type == "cuda"
    whole = causal_lm.load_model(ModelConfig(kind="language", base=str(llama), quantize=quantize), torch.bfloat16, GPU)
    checkpointing.set_checkpointing(model, 0)
    found, expected = (packs.gradients(packs.adapted(each, TARGETS)) for each in (model, whole))
    assert packs.distance(found, expected) < 0.02


@pytest.mark.gpu
def test_offloaded_blocks_leave_the_gpu_free() -> None:
    """A stack of 12 large layers: the resident model's weights alone are more than the offloaded one's peak."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 8}

    def peak(away: bool) -> tuple[int, list[Tensor]]:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, pad_token_id=0)).requires_grad_(False)
        lora.inject(model, LoraConfig(rank=4, alpha=8, dropout=0.0), TARGETS, seed=0)
        torch.cuda.empty_cache()
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        if away:
            block_offload.stream(model, block_offload.find(model), GPU)
        else:
            model.to(GPU)
        checkpointing.set_checkpointing(model, 1)
        found = gradients(model.train(), lambda each: output_on(each, MODELS["llama"][1]))
        return torch.cuda.max_memory_allocated() - base, found

    (resident, expected), (offloaded, found) = peak(False), peak(True)
    assert offloaded < resident / 3
    assert all(bool(gradient.isfinite().all()) for gradient in expected)
    assert all(torch.allclose(one, other, rtol=1e-3, atol=1e-3) for one, other in zip(found, expected, strict=True))
