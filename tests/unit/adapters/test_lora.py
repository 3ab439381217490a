"""Adapters: zero at first, named as PEFT names them, refused where they don't fit."""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft import LoraConfig as PeftLoraConfig
from safetensors.torch import load_file, save_file

from finetune.adapters import formats, lora
from finetune.adapters.attach import attach_peft_folder
from finetune.config.schema import LoraConfig, LoraInit, ModelConfig, OptimConfig, Quantize
from finetune.diffusion.pipeline import load_backbone
from finetune.errors import ConfigError, ModelError
from finetune.language.causal_lm import load_model
from finetune.training.optim import build_optimizer

pytestmark = pytest.mark.sampled
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
UNET_LORA = LoraConfig(rank=4, alpha=8, dropout=0.0)


@pytest.fixture
def unet(tiny_base: Path) -> torch.nn.Module:
    return load_backbone(ModelConfig(base=str(tiny_base)), torch.float32)


def output(unet: torch.nn.Module) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    latents, text = torch.randn((1, 4, 8, 8), generator=random), torch.randn((1, 77, 16), generator=random)
    with torch.no_grad():
        return unet(latents, torch.tensor([500]), encoder_hidden_states=text, return_dict=False)[0]


def test_a_new_adapter_changes_nothing(unet: torch.nn.Module) -> None:
    before = output(unet)
    lora.inject(unet, UNET_LORA, ATTENTION, seed=0)
    assert torch.equal(before, output(unet))


def test_only_the_adapter_trains_in_fp32_under_pefts_names(tiny_base: Path) -> None:
    unet = load_backbone(ModelConfig(base=str(tiny_base)), torch.bfloat16)
    lora.inject(unet, UNET_LORA, ATTENTION, seed=0)
    assert {parameter.dtype for parameter in lora.adapter_parameters(unet)} == {torch.float32}
    trainable, total = lora.counts(unet)
    assert trainable == sum(weight.numel() for weight in lora.state(unet).values())
    assert 0 < trainable < total / 2
    assert lora.state(unet).keys() == get_peft_model_state_dict(unet).keys()


def test_the_same_seed_gives_the_same_start_and_leaves_the_global_stream_alone(tiny_base: Path) -> None:
    states = []
    torch.manual_seed(7)
    expected = torch.rand(3)
    for seed in (0, 0, 1):
        torch.manual_seed(7)
        unet = load_backbone(ModelConfig(base=str(tiny_base)), torch.float32)
        torch.manual_seed(7)
        lora.inject(unet, UNET_LORA, ATTENTION, seed=seed)
        assert torch.equal(torch.rand(3), expected)
        states.append(lora.state(unet))
    name = next(name for name in states[0] if "lora_A" in name)
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


def test_no_layer_to_adapt_is_an_error(unet: torch.nn.Module) -> None:
    with pytest.raises(ModelError, match=r"no layer of the base matches lora targets"):
        lora.inject(unet, UNET_LORA, ["q_proj"], seed=0)


def test_weights_of_another_rank_or_other_layers_are_refused(unet: torch.nn.Module) -> None:
    lora.inject(unet, UNET_LORA, ATTENTION, seed=0)
    weights = lora.state(unet)
    name = next(iter(weights))
    with pytest.raises(ModelError, match=r"other does not fit: .* is \(8"):
        lora.load_state(unet, {**weights, name: torch.zeros(8, 3)}, "other")
    weights.pop(name)
    with pytest.raises(ModelError, match=r"other does not fit: 1 tensor without a counterpart"):
        lora.load_state(unet, weights, "other")


def test_a_missing_and_a_damaged_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gone.safetensors does not exist"):
        formats.read_weights(tmp_path / "gone.safetensors")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match=r"bad.safetensors is damaged"):
        formats.read_weights(bad)


# Adapters of language models: every start and variant.

TARGETS = ["q_proj", "v_proj", "down_proj"]
NEW_ROWS = [60, 61]
RANK = 4
IDS_BL = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(3))
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("fp32", {}),
    "default in bf16": ("bf16", {}),
    "default on nf4": ("nf4", {}),
    "default on int8": ("int8", {}),
    "rslora": ("fp32", {"rslora": True}),
    "dora": ("fp32", {"dora": True}),
    "dora in bf16": ("bf16", {"dora": True}),
    "dora on nf4": ("nf4", {"dora": True}),
    "pissa": ("fp32", {"init": LoraInit.pissa}),
    "pissa in bf16": ("bf16", {"init": LoraInit.pissa}),
    "pissa on nf4": ("nf4", {"init": LoraInit.pissa}),
    "pissa on int8": ("int8", {"init": LoraInit.pissa}),
    "pissa with rslora": ("fp32", {"init": LoraInit.pissa, "rslora": True}),
    "pissa with dora": ("fp32", {"init": LoraInit.pissa, "dora": True}),
    "loftq": ("nf4", {"init": LoraInit.loftq}),
    "loftq with rslora": ("nf4", {"init": LoraInit.loftq, "rslora": True}),
    "loftq with dora": ("nf4", {"init": LoraInit.loftq, "dora": True}),
    "rows": ("fp32", {"new_token_rows": NEW_ROWS}),
    "rows, tied": ("fp32 tied", {"new_token_rows": NEW_ROWS}),
    "rows, tied, in bf16": ("bf16 tied", {"new_token_rows": NEW_ROWS}),
    "rows with loftq": ("nf4", {"init": LoraInit.loftq, "new_token_rows": NEW_ROWS}),
}
every_case = pytest.mark.parametrize(("kind", "extra"), CASES.values(), ids=CASES)


def inject(
    model: Any,
    *,
    targets: Sequence[str] = TARGETS,
    seed: int = 0,
    new_token_rows: Sequence[int] = (),
    rank: int = RANK,
    **settings: Any,
) -> Any:
    """The model with adapters of rank 4 and alpha 6 on three of its layers, unless told otherwise."""
    chosen = LoraConfig(rank=rank, alpha=6.0, dropout=0.0, **settings)
    return lora.inject(model, chosen, targets, seed=seed, new_token_rows=new_token_rows)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Saved bases; the one under True has a head with the embedding's weights."""
    folders = {}
    for tied in (False, True):
        folders[tied] = tmp_path_factory.mktemp("llama")
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        with torch.random.fork_rng():
            torch.manual_seed(tied)
            llama = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=64, tie_word_embeddings=tied, **sizes))
        for parameter in llama.parameters():
            parameter.data.mul_(4 if parameter.ndim > 1 else 1)  # an untrained model's outputs hardly differ
        llama.save_pretrained(folders[tied])
    return folders


@pytest.fixture
def load(llamas: dict[bool, Path]) -> Callable[[str], Any]:
    """A frozen base: fp32, bf16, int8 or nf4; `… tied` for the tied head."""

    def load(kind: str) -> Any:
        folder = llamas[kind.endswith("tied")]
        quantize = Quantize[kind] if kind in ("nf4", "int8") else Quantize.none
        dtype = torch.float32 if kind.startswith("fp32") else torch.bfloat16
        return load_model(ModelConfig(base=str(folder), quantize=quantize), dtype, torch.device("cpu"))

    return load


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS_BL).logits.double()
    return result


def difference(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return build_optimizer(lora.parameter_groups(model, 4.0), OptimConfig(lr=1e-2))


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        rows_NV = model(IDS_BL).logits[:, :-1].flatten(0, 1).float()
        torch.nn.functional.cross_entropy(rows_NV, IDS_BL[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@every_case
def test_a_run_cut_and_continued_ends_like_an_uncut_one(
    load: Callable[[str], Any], kind: str, extra: dict[str, Any]
) -> None:
    whole = inject(load(kind), **extra)
    optimizer = optimizer_of(whole)
    train(whole, optimizer)
    weights, moments = lora.state(whole), copy.deepcopy(optimizer.state_dict())
    train(whole, optimizer)
    continued = inject(load(kind), **extra, seed=5)  # as if the SVD gave another answer
    lora.load_state(continued, weights, "the checkpoint")
    optimizer = optimizer_of(continued)
    optimizer.load_state_dict(moments)
    train(continued, optimizer)
    assert torch.equal(logits(whole), logits(continued))
    ends, again = lora.state(whole), lora.state(continued)
    assert all(torch.equal(ends[name], again[name]) for name in ends)
    assert any(not torch.equal(ends[name], weights[name]) for name in ends)


@every_case
def test_a_peft_folder_makes_the_trained_module_of_the_untouched_base(
    load: Callable[[str], Any], tmp_path: Path, kind: str, extra: dict[str, Any]
) -> None:
    trained = inject(load(kind), **extra)
    train(trained, optimizer_of(trained))
    average = {name: weight.clone() for name, weight in lora.trainable_tensors(trained).items()}
    for number, weights in enumerate((lora.state(trained), average)):
        formats.save_peft(trained, tmp_path / str(number), weights, "somewhere/base")
        loaded = PeftModel.from_pretrained(load(kind), str(tmp_path / str(number))).eval()
        assert difference(logits(loaded), logits(trained)) < 1e-5
    assert difference(logits(loaded), logits(load(kind))) > 0.01
    assert trained.peft_config["default"].r == RANK


def test_a_language_adapter_loads_with_its_base_by_one_call(
    load: Callable[[str], Any], llamas: dict[bool, Path], unet: torch.nn.Module, tmp_path: Path
) -> None:
    trained = inject(load("fp32"))
    train(trained, optimizer_of(trained))
    formats.save_peft(trained, tmp_path / "language", lora.state(trained), str(llamas[False]))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "language").eval()
    assert difference(logits(loaded), logits(trained)) < 1e-5
    image = lora.inject(unet, UNET_LORA, ATTENTION, seed=0)
    formats.save_peft(image, tmp_path / "image", lora.state(image), "")
    assert PeftConfig.from_pretrained(tmp_path / "image").task_type is None


def test_a_checkpoint_of_an_earlier_version_still_loads(load: Callable[[str], Any]) -> None:
    """The names are part of the checkpoint's format."""
    model = inject(load("fp32"), init=LoraInit.pissa, dora=True, new_token_rows=NEW_ROWS)
    layers = [f"model.layers.{number}.{name}" for number in (0, 1) for name in
              ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]  # fmt: skip
    parts = ["lora_A.weight", "lora_A.initial", "lora_B.weight", "lora_B.initial", "lora_magnitude_vector"]
    names = {f"{layer}.{part}" for layer in layers for part in parts}
    names |= {f"{layer}.token_adapter.trainable_tokens_delta" for layer in ("model.embed_tokens", "lm_head")}
    assert lora.state(model).keys() == names
    older = {name: torch.randn_like(weight) for name, weight in lora.state(model).items()}
    lora.load_state(model, older, "the checkpoint")
    assert all(torch.equal(older[name], weight) for name, weight in lora.state(model).items())


@every_case
def test_the_base_is_left_as_it_was_and_comes_back(
    load: Callable[[str], Any], kind: str, extra: dict[str, Any]
) -> None:
    base = load(kind)
    before, stored = logits(base), {name: parameter.clone() for name, parameter in base.named_parameters()}
    model = inject(base, **extra)
    if extra.get("init") is not LoraInit.loftq:
        assert difference(logits(model), before) < (1e-5 if kind.startswith("fp32") else 0.01)
    train(model, optimizer_of(model))
    trained, own = logits(model), lora.adapter_parameters(model)
    with lora.disabled(model):
        assert torch.equal(logits(model), before)
        assert not lora.adapter_parameters(model)
    assert torch.equal(logits(model), trained)
    assert [id(parameter) for parameter in lora.adapter_parameters(model)] == [id(parameter) for parameter in own]
    frozen = {
        name.replace(".token_adapter", "").replace(".base_layer", ""): parameter
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    }
    assert frozen.keys() == stored.keys()
    assert all(torch.equal(parameter, stored[name]) for name, parameter in frozen.items())


@every_case
def test_what_is_trained_is_fp32_counted_and_named_as_peft_names_it(
    load: Callable[[str], Any], kind: str, extra: dict[str, Any]
) -> None:
    model = inject(load(kind), **extra)
    assert {parameter.dtype for parameter in lora.adapter_parameters(model)} == {torch.float32}
    assert lora.state(model).keys() == get_peft_model_state_dict(model).keys()
    trainable, total = lora.counts(model)
    assert trainable == sum(weight.numel() for weight in lora.trainable_tensors(model).values())
    unquantised = load("fp32 tied" if kind.endswith("tied") else "fp32")
    assert total == trainable + sum(parameter.numel() for parameter in unquantised.parameters())


@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_starts_at_the_principal_part_of_the_weights(load: Callable[[str], Any], kind: str, rslora: bool) -> None:
    model = inject(load(kind), init=LoraInit.pissa, rslora=rslora)
    for _, layer in lora.lora_layers(model):
        scaling = 6 / 4**0.5 if rslora else 6 / 4
        part_OI = scaling * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        weight_OI = lora.base_weight(layer)
        # PEFT's fast SVD is not exact where the singular values on both sides of the rank are close.
        assert (weight_OI - part_OI).norm() < 1.005 * torch.linalg.svdvals(weight_OI)[4:].norm()


@pytest.mark.parametrize("rslora", [False, True])
def test_loftq_takes_off_as_much_of_the_loss_as_its_rank_can(load: Callable[[str], Any], rslora: bool) -> None:
    original = load("fp32").state_dict()
    model = inject(load("nf4"), init=LoraInit.loftq, rslora=rslora)
    for name, layer in lora.lora_layers(model):
        lost_OI = original[f"{name}.weight"].bfloat16().float() - lora.base_weight(layer)
        left_OI = lost_OI - layer.get_delta_weight("default").detach()
        least = torch.linalg.svdvals(lost_OI)[4:].norm()
        assert left_OI.norm() < 1.001 * least < lost_OI.norm()


def test_loftq_finds_its_weights_under_other_names_and_among_like_ones(
    load: Callable[[str], Any], llamas: dict[bool, Path]
) -> None:
    expected = lora.state(inject(load("nf4"), init=LoraInit.loftq))
    model, file = load("nf4"), llamas[False] / "model.safetensors"
    stored = file.read_bytes()
    tensors = load_file(file)
    try:
        likes = {f"vision.{name}": torch.randn_like(weight) for name, weight in tensors.items()}
        save_file(likes | {f"text.{name}": weight for name, weight in tensors.items()}, file)
        found = lora.state(inject(model, init=LoraInit.loftq))
    finally:
        file.write_bytes(stored)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_loftq_without_nf4_or_without_the_weights_before_it_is_refused(
    load: Callable[[str], Any], llamas: dict[bool, Path]
) -> None:
    with pytest.raises(ConfigError, match=r"lora.init=loftq makes up for nf4's loss; set model.quantize=nf4"):
        inject(load("bf16"), init=LoraInit.loftq)
    for name in ("", str(llamas[True])):  # built in memory; the weights of another model
        model = load("nf4")
        model.config.name_or_path = model.name_or_path = name
        with pytest.raises(ModelError, match=r"the weights that model.layers.0.self_attn.q_proj was quantised from"):
            inject(model, init=LoraInit.loftq)


def test_magnitudes_of_weights_that_cannot_be_read_are_refused(load: Callable[[str], Any]) -> None:
    model = load("fp32")
    model.model.norm.to("meta")  # stands for a GPU that the other layers are not on
    with pytest.raises(ModelError, match=r"lora.dora=true needs all weights where it computes, and model.offload"):
        inject(model, dora=True)


def test_a_start_that_a_layer_does_not_have_is_refused(load: Callable[[str], Any]) -> None:
    with pytest.raises(ModelError, match=r"q_proj has only 32 directions to start in; set lora.rank=32"):
        inject(load("fp32"), rank=33, init=LoraInit.pissa)
    with pytest.raises(ModelError, match=r"model.embed_tokens is no linear layer, and only those can start elsewhere"):
        inject(load("fp32"), targets=["embed_tokens"], init=LoraInit.pissa)


def test_pissa_on_weights_that_are_stored_the_other_way_round() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        gpt2 = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4)).eval()
    before = logits(gpt2)
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = inject(gpt2, targets=["c_attn"], init=LoraInit.pissa)
    assert difference(logits(model), before) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_new_rows_are_trained_on_both_sides(load: Callable[[str], Any], tied: bool) -> None:
    kind = "fp32 tied" if tied else "fp32"
    base, model = load(kind), inject(load(kind), new_token_rows=[*NEW_ROWS, NEW_ROWS[0]])
    train(model, optimizer_of(model))
    old = [row for row in range(64) if row not in NEW_ROWS]
    for side in ("get_input_embeddings", "get_output_embeddings"):
        before_VD, after_VD = getattr(base, side)().weight, getattr(model, side)().weight
        assert torch.equal(before_VD[old], after_VD[old])
        assert not torch.isclose(before_VD[NEW_ROWS], after_VD[NEW_ROWS]).any(dim=1).all()
    assert sum("trainable_tokens_delta" in name for name in lora.state(model)) == (1 if tied else 2)
    if tied:
        assert torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)


def test_new_rows_that_would_go_wrong_are_refused(load: Callable[[str], Any]) -> None:
    with pytest.raises(ModelError, match=r"lm_head can't have an adapter and new rows at once"):
        inject(load("fp32"), targets=["q_proj", "lm_head"], new_token_rows=NEW_ROWS)
    model = load("fp32")
    model.lm_head = torch.nn.Linear(32, 64)
    with pytest.raises(ModelError, match=r"new rows don't fit a head with a bias"):
        inject(model, new_token_rows=NEW_ROWS)


@pytest.mark.parametrize(("kind", "init"), [("bf16", LoraInit.default), ("nf4", LoraInit.loftq)])
def test_magnitudes_start_as_those_of_the_weights_in_fp32(
    load: Callable[[str], Any], kind: str, init: LoraInit
) -> None:
    model = inject(load(kind), init=init, dora=True)
    for _, layer in lora.lora_layers(model):
        norms_O = (lora.base_weight(layer) + layer.get_delta_weight("default")).norm(dim=1)
        assert torch.allclose(layer.lora_magnitude_vector["default"].weight, norms_O, rtol=1e-6)


def test_weights_of_another_kind_of_adapter_are_refused(load: Callable[[str], Any], tmp_path: Path) -> None:
    dora = inject(load("fp32"), dora=True)
    formats.save_peft(dora, tmp_path, lora.state(dora), "")
    weights = formats.read_peft_folder(tmp_path)
    lora.load_state(dora, weights, "the folder")
    with pytest.raises(ModelError, match=r"lora_magnitude_vector; was lora.targets, lora.init, lora.dora or"):
        lora.load_state(inject(load("fp32")), weights, "the folder")


def test_lora_plus_gives_the_factors_b_a_group_of_their_own(load: Callable[[str], Any]) -> None:
    model = inject(load("fp32"), dora=True, new_token_rows=NEW_ROWS)
    (single,) = lora.parameter_groups(model, 1.0)
    assert list(single) == ["params"]
    assert [id(parameter) for parameter in single["params"]] == [id(p) for p in lora.adapter_parameters(model)]
    others, factors = lora.parameter_groups(model, 16.0)
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all("lora_B" in named[id(parameter)] for parameter in factors["params"])
    assert not any("lora_B" in named[id(parameter)] for parameter in others["params"])
    assert len(others["params"]) + len(factors["params"]) == len(single["params"])
    assert (others.get("lr_scale"), factors["lr_scale"]) == (None, 16.0)


PEFT_SETTINGS: dict[str, dict[str, Any]] = {
    "alpha": {"r": RANK, "lora_alpha": 32},
    "rslora": {"r": RANK, "lora_alpha": 32, "use_rslora": True},
    "alpha pattern": {"r": RANK, "lora_alpha": 1, "alpha_pattern": {"layers.0.self_attn.q_proj": 16, "down_proj": 8}},
    "rank pattern": {"r": 16, "lora_alpha": 9, "rank_pattern": {".*_proj": RANK}},
    "dora": {"r": RANK, "lora_alpha": 32, "use_dora": True},
}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", PEFT_SETTINGS)
def test_an_adapter_made_elsewhere_is_the_same_function_at_the_start(
    load: Callable[[str], Any], tmp_path: Path, name: str, rslora: bool
) -> None:
    base = get_peft_model(load("fp32"), PeftLoraConfig(target_modules=TARGETS, **PEFT_SETTINGS[name]))
    for parameter_name, parameter in base.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(4))
    base.save_pretrained(tmp_path)
    stored = formats.read_peft(tmp_path)
    continued = inject(load("fp32"), rslora=rslora, dora=name == "dora")
    lora.load_state(continued, lora.as_start(continued, stored.weights, stored.scales, "the folder"), "the folder")
    assert difference(logits(continued), logits(base.eval())) < 1e-5
    assert difference(logits(continued), logits(load("fp32"))) > 0.01


def test_patterns_go_by_the_names_of_the_model_that_was_trained(tmp_path: Path) -> None:
    full = "model.language_model.layers.0.self_attn.q_proj"  # shortened for the text model alone
    factors = {f"base_model.model.{full}.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file(factors, tmp_path / formats.PEFT_WEIGHTS)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "alpha_pattern": {full: 8}}
    (tmp_path / formats.PEFT_CONFIG).write_text(json.dumps(settings))
    stored = formats.read_peft(tmp_path)
    assert stored.scales == {"model.layers.0.self_attn.q_proj": 4.0}
    assert stored.weights.keys() == {f"model.layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB"}


@pytest.mark.parametrize("name", formats.OTHER_FUNCTIONS)
def test_factors_that_mean_something_else_are_refused(load: Callable[[str], Any], tmp_path: Path, name: str) -> None:
    model = inject(load("fp32"))
    formats.save_peft(model, tmp_path, lora.state(model), "")
    settings = json.loads((tmp_path / formats.PEFT_CONFIG).read_text())
    (tmp_path / formats.PEFT_CONFIG).write_text(json.dumps(settings | {name: [1]}))
    for use in (formats.read_peft, lambda folder: attach_peft_folder(load("fp32"), folder)):
        with pytest.raises(ModelError, match=rf"sets {name}, and only plain LoRA, rsLoRA and DoRA are read"):
            use(tmp_path)


@pytest.mark.parametrize(
    ("made_for", "known", "base", "is_said"),
    [
        ("meta-llama/Other-8B", "", "models/mine", True),
        ("meta-llama/Llama-8B", "", "models/llama-8b", False),
        ("a/b@v2", "", "a/b", False),
        ("", "", "a/b", False),
        ("embedded:language", "", "embedded:diffusion", True),
        ("models/other", "sha256:b", "models/mine", False),
        ("models/mine", "sha256:a", "copy/mine", True),
        ("meta-llama/Llama-8B", "meta-llama/Llama-8B@commit", "models/llama-8b", False),
    ],
)
def test_an_adapter_of_another_base_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], made_for: str, known: str, base: str, is_said: bool
) -> None:
    settings = {"peft_type": "LORA", "base_model_name_or_path": made_for}
    (tmp_path / formats.PEFT_CONFIG).write_text(json.dumps(settings))
    metadata = {"format": "pt"} | ({formats.BASE_CONTENT: known} if known else {})
    save_file({}, tmp_path / formats.PEFT_WEIGHTS, metadata=metadata)
    formats.warn_of_another_base(tmp_path, base, "sha256:b")
    assert (f"was trained on {made_for}, and model.base is {base}" in capsys.readouterr().err) is is_said
    save_file({}, tmp_path / "file.safetensors", metadata=metadata | ({"base": made_for} if made_for else {}))
    formats.warn_of_another_base(tmp_path / "file.safetensors", base, "sha256:b")
    assert (f"was trained on {made_for}, and model.base is {base}" in capsys.readouterr().err) is is_said
    formats.warn_of_another_base(tmp_path / "gone.safetensors", base, "sha256:b")  # the loader says that


def test_an_adapter_of_a_base_that_has_changed_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.safetensors"
    save_file({}, file, metadata={"base": "mine", formats.BASE_CONTENT: "sha256:a"})
    formats.warn_of_another_base(file, "mine", "sha256:b")
    assert f"{file} was trained on mine with other weights or settings than it has now" in capsys.readouterr().err


def test_a_start_that_would_be_another_function_is_refused(load: Callable[[str], Any], tmp_path: Path) -> None:
    trained = inject(load("fp32"), dora=True)
    formats.save_peft(trained, tmp_path, lora.state(trained), "")
    stored = formats.read_peft(tmp_path)
    for expected, settings in {
        "has rank 4, and lora.rank is 8; set lora.rank=4": {"rank": 8, "dora": True},
        "trained with dora=true, and lora.dora is false; set lora.dora=true": {},
        "does not fit: 6 tensors without a counterpart, first model.layers.0.self_attn.q_proj.lora_A": {
            "dora": True,
            "targets": TARGETS[1:],
        },
    }.items():
        with pytest.raises(ModelError, match=expected):
            lora.as_start(inject(load("fp32"), **settings), stored.weights, stored.scales, "the folder")
    mixed = {
        name: weight[:2] if "0.self_attn.q_proj.lora_A" in name else weight for name, weight in stored.weights.items()
    }
    with pytest.raises(ModelError, match=r"has rank 2, 4, and lora.rank is 4; only adapters of one rank"):
        lora.as_start(inject(load("fp32"), dora=True), mixed, stored.scales, "the folder")
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"init_lora_weights": true', '"init_lora_weights": "pissa"'))
    with pytest.raises(ModelError, match=r"init_lora_weights=pissa, which changes the base too"):
        formats.read_peft(tmp_path)
