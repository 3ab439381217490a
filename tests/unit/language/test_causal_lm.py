"""Language models: what a pack's rows see, what the output layer says, how a base is stored, what is refused."""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention import varlen
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.adapters import attach, formats, lora
from finetune.config.schema import LoraConfig, ModelConfig, Quantize
from finetune.errors import ConfigError, ModelError
from finetune.language import causal_lm
from finetune.language import varlen_attention as own_varlen
from finetune.language.losses import logits
from tests.tiny_language_models import CHATS, save_language
from tests.tiny_models import save_captioner
from tests.unit.language.packs import LENGTHS, adapted, distance, gradients, packs

pytestmark = pytest.mark.sampled


torch.set_num_threads(1)

CPU = torch.device("cpu")
TARGETS = {"phi3": ["qkv_proj", "down_proj"], "glm4": ["q_proj", "gate_up_proj"]}
Base = Callable[..., Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A saved tiny model of an architecture, made once."""
    made: dict[str, Path] = {}

    def get(architecture: str = "llama") -> Path:
        if architecture not in made:
            made[architecture] = save_language(tmp_path_factory.mktemp(architecture), architecture)
        return made[architecture]

    return get


def load(folder: Path, dtype: torch.dtype = torch.float32, device: torch.device = CPU, **wanted: object) -> nn.Module:
    return causal_lm.load_model(ModelConfig(kind="language", base=str(folder), **wanted), dtype, device)


# Packs


@pytest.mark.parametrize("architecture", CHATS)
def test_rows_of_a_pack_get_what_each_gets_alone(base: Base, architecture: str) -> None:
    model = adapted(load(base(architecture)), TARGETS.get(architecture, ["q_proj", "v_proj", "down_proj"]))
    ids_BL, positions_BL, segments_BL = packs()
    with torch.no_grad():
        packed_BLD = causal_lm.packed_hidden_states(model, ids_BL, positions_BL, segments_BL)
        for pack, lengths in enumerate(LENGTHS):
            for row in range(len(lengths)):
                mine = segments_BL[pack] == row
                alone_1LD = model.model(input_ids=ids_BL[pack, mine][None], use_cache=False).last_hidden_state
                torch.testing.assert_close(packed_BLD[pack, mine], alone_1LD[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mistral_sliding"])
def test_without_segments_a_slot_sees_all_before_it_whatever_the_positions(base: Base, architecture: str) -> None:
    model = load(base(architecture))
    ids_BL, positions_BL, _ = packs()
    plain_BL = torch.arange(ids_BL.shape[1]).expand_as(ids_BL)
    with torch.no_grad():
        expected_BLD = model.model(input_ids=ids_BL, use_cache=False).last_hidden_state
        torch.testing.assert_close(causal_lm.packed_hidden_states(model, ids_BL, plain_BL, None), expected_BLD)
        before_BLD = causal_lm.packed_hidden_states(model, ids_BL, positions_BL, None)
        ids_BL[:, 0] = 7
        after_BLD = causal_lm.packed_hidden_states(model, ids_BL, positions_BL, None)
    assert not torch.allclose(before_BLD[:, 4], after_BLD[:, 4])


def test_positions_that_disagree_with_the_segments_are_refused(base: Base) -> None:
    model = load(base())
    ids_BL, positions_BL, segments_BL = packs()
    with pytest.raises(ValueError, match="start again"):
        causal_lm.packed_hidden_states(model, ids_BL, torch.arange(ids_BL.shape[1]).expand_as(ids_BL), segments_BL)
    with pytest.raises(ValueError, match="start again"):
        causal_lm.packed_hidden_states(model, ids_BL, positions_BL, torch.zeros_like(segments_BL))


@pytest.mark.parametrize("architecture", CHATS)
def test_activation_checkpointing_gives_the_same_gradients(base: Base, architecture: str) -> None:
    """Nothing has to be done for the embedding's output to carry a gradient."""
    model = adapted(load(base(architecture)), TARGETS.get(architecture, ["q_proj", "down_proj"]))
    kept = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(layer.gradient_checkpointing for layer in model.get_decoder().layers)
    assert distance(gradients(model), kept) < 1e-6


# The output layer


@pytest.mark.parametrize("architecture", CHATS)
def test_the_head_gives_the_models_own_logits(base: Base, architecture: str) -> None:
    model = load(base(architecture))
    ids_BL = packs()[0]
    with torch.no_grad():
        states_BLD = causal_lm.packed_hidden_states(
            model, ids_BL, torch.arange(ids_BL.shape[1]).expand_as(ids_BL), None
        )
        found_NV = logits(causal_lm.head(model), states_BLD.flatten(0, 1))
        expected_BLV = model(input_ids=ids_BL, use_cache=False).logits
    torch.testing.assert_close(found_NV, expected_BLV.flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_capped_scores_are_computed_where_the_cap_is_known(base: Base) -> None:
    assert load(base("gemma2")).config._attn_implementation == "eager"
    assert load(base("gemma3")).config._attn_implementation == "sdpa"


def test_softcap_and_scale_are_read_off_the_architecture(base: Base) -> None:
    assert causal_lm.head(load(base("gemma2"))).softcap == 2.0
    assert causal_lm.head(load(base("granite"))).scale == 1 / 8
    assert causal_lm.head(load(base("cohere"))).scale == 1 / 16
    plain = causal_lm.head(load(base("llama")))
    assert (plain.softcap, plain.scale, plain.bias) == (None, 1.0, None)


# Loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_is_frozen_in_eval_mode_and_in_the_dtype_asked_for(base: Base, dtype: torch.dtype) -> None:
    model = load(base(), dtype)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_of_a_model_that_reads_images_the_language_model_is_taken(
    base: Base, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = AutoModelForCausalLM.from_pretrained(base("gemma3")).eval()
    capfd.readouterr()
    model = load(base("gemma3"))
    assert capfd.readouterr().err == ""  # no report of weights left out
    assert type(model).__name__ == "Gemma3ForCausalLM"
    ids_BL = packs()[0]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids_BL).logits, whole(input_ids=ids_BL).logits)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ids_BL).logits, model(input_ids=ids_BL).logits)


def test_an_adapter_of_the_language_model_fits_the_whole_model(base: Base, tmp_path: Path) -> None:
    """Whoever loads the base as it is released, images and all, gets what was trained, as we do with the part."""
    settings, targets = LoraConfig(rank=2, alpha=4.0, dropout=0.0), ["q_proj", "down_proj"]
    trained = lora.inject(load(base("gemma3")), settings, targets, seed=0)
    for parameter in lora.adapter_parameters(trained):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    formats.save_peft(trained, tmp_path, lora.state(trained), str(base("gemma3")))
    ids_BL = packs()[0]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)  # PEFT only warns of weights that have no place
        expected = trained.eval()(input_ids=ids_BL).logits
        whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base("gemma3")), str(tmp_path)).eval()
        part = attach.attach_peft_folder(load(base("gemma3")), tmp_path)
        assert torch.allclose(whole(input_ids=ids_BL).logits, expected, atol=1e-5)
        assert torch.allclose(part(input_ids=ids_BL).logits, expected, atol=1e-5)
        assert not torch.allclose(expected, load(base("gemma3"))(input_ids=ids_BL).logits, atol=1e-2)
    continued = lora.inject(load(base("gemma3")), settings, targets, seed=0)
    lora.load_state(continued, formats.read_peft_folder(tmp_path), "the folder")
    assert all(torch.equal(weight, lora.state(trained)[name]) for name, weight in lora.state(continued).items())


@pytest.mark.parametrize("quantize", [Quantize.int8, Quantize.nf4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma3"])
def test_a_quantised_base_trains_on_a_cpu(
    base: Base, architecture: str, dtype: torch.dtype, quantize: Quantize, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = base(architecture)
    capfd.readouterr()
    model = load(folder, dtype, quantize=quantize)
    kind = bitsandbytes.nn.Linear4bit if quantize is Quantize.nf4 else bitsandbytes.nn.Linear8bitLt
    linear = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert {name for name, layer in model.named_modules() if isinstance(layer, kind)} == linear - {"lm_head"}
    assert {model.get_input_embeddings().weight.dtype, causal_lm.head(model).weight.dtype} == {dtype}
    adapted(model, TARGETS.get(architecture, ["q_proj", "down_proj"]))
    gradients(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=packs()[0])
    gradients(model.train())  # an evaluation leaves the weights as training needs them
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("quantize", [Quantize.int8, Quantize.nf4])
def test_quantised_layers_follow_autocast(base: Base, quantize: Quantize) -> None:
    layer = load(base(), quantize=quantize).get_submodule("model.layers.0.mlp.up_proj")
    norm = torch.randn(1, 3, 32)  # in fp32, as layer norms give it in autocast
    plain = layer(norm)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        followed = layer(norm)
    assert (plain.dtype, followed.dtype) == (torch.float32, torch.bfloat16)
    assert torch.allclose(followed.float(), plain, rtol=0.05, atol=0.02)


def test_gradients_through_nf4_are_those_of_the_weights_it_stands_for(base: Base) -> None:
    packed = load(base(), quantize=Quantize.nf4)
    plain = load(base())
    for name, layer in packed.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            assert layer.weight.quant_state.nested
            assert layer.weight.dtype == torch.uint8
            plain.get_submodule(name).weight.data = weight
    targets = ["q_proj", "up_proj", "down_proj"]
    assert distance(gradients(adapted(packed, targets)), gradients(adapted(plain, targets))) < 1e-5


def test_a_base_that_is_stored_quantised_is_read_as_it_is(base: Base, tmp_path: Path) -> None:
    load(base(), quantize=Quantize.nf4).save_pretrained(tmp_path)
    gradients(adapted(load(tmp_path), ["q_proj"]))
    with pytest.raises(ModelError, match=r"\(bitsandbytes\) .*model\.quantize=none"):
        load(tmp_path, quantize=Quantize.int8)


# Tokens


def test_new_control_tokens_stand_behind_the_vocabulary_at_the_mean_of_all_others(base: Base) -> None:
    for architecture in ("llama", "gemma3"):  # a head of its own, and the embedding's
        plain, before = load(base(architecture)), torch.random.get_rng_state()
        grown = load(base(architecture), added_tokens=["<|note|>", "<|end_note|>", "<|im_end|>"])
        assert torch.equal(torch.random.get_rng_state(), before)
        tokenizer = causal_lm.load_tokenizer(str(base(architecture)), ["<|note|>", "<|end_note|>", "<|im_end|>"])
        old = len(causal_lm.load_tokenizer(str(base(architecture))))
        ids = tokenizer("a<|note|>b<|end_note|>", add_special_tokens=False).input_ids
        assert [index for index in ids if index >= old] == [old, old + 1]
        assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"
        for name in ("get_input_embeddings", "get_output_embeddings"):
            known, weight = (getattr(model, name)().weight for model in (plain, grown))
            assert weight.shape == (old + 2, known.shape[1])
            assert torch.equal(weight[:old], known)
            torch.testing.assert_close(weight[old:], known.mean(0).expand(2, -1))
        assert not any(parameter.requires_grad for parameter in grown.parameters())


def test_spare_rows_of_the_embedding_are_used_first(base: Base, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base())
    old = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(old + 8)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(base()).save_pretrained(tmp_path)
    weight = load(tmp_path, added_tokens=["<|note|>"]).get_input_embeddings().weight
    assert len(weight) == old + 8
    torch.testing.assert_close(weight[old], weight[:old].mean(0))


@pytest.mark.parametrize("token", ["a", "", " ", "<|note|> "])
def test_what_can_not_become_a_control_token_is_refused(base: Base, token: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.added_tokens: .* try one like <\|note\|>"):
        causal_lm.load_tokenizer(str(base()), [token])


# Offloaded blocks


def test_a_load_does_not_warn_about_offload_without_a_gpu(base: Base, capfd: pytest.CaptureFixture[str]) -> None:
    folder = base()
    capfd.readouterr()
    load(folder, offload=True)
    assert capfd.readouterr().err == ""


# Attention for rows of many lengths


def reference_varlen(
    query_NHE: Tensor, key_NHE: Tensor, value_NHE: Tensor, cu_seqlens: Tensor, key_borders: Tensor,
    longest: int, longest_key: int, *, scale: float, window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """What torch's kernel computes, as its documentation says; it needs a GPU."""
    assert torch.equal(cu_seqlens, key_borders)
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.diff().max() <= longest == longest_key
    left, right = window_size
    parts = []
    for begin, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        distance_LL = torch.arange(stop - begin)[:, None] - torch.arange(stop - begin)
        seen_LL = (distance_LL >= -right) & ((distance_LL <= left) if left >= 0 else True)
        scores_HLL = torch.einsum("lhe,mhe->hlm", query_NHE[begin:stop], key_NHE[begin:stop]) * scale
        weights_HLL = scores_HLL.masked_fill(~seen_LL, -torch.inf).softmax(-1)
        parts.append(torch.einsum("hlm,mhe->lhe", weights_HLL, value_NHE[begin:stop]))
    return torch.cat(parts)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral_sliding", "gemma3", "phi3", "glm4", "granite"])
def test_varlen_attention_isolates_rows_as_masks_do(
    base: Base, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = TARGETS.get(architecture, ["q_proj", "down_proj"])
    masked = adapted(load(base(architecture)), targets)
    model = adapted(load(base(architecture)), targets)
    monkeypatch.setattr(varlen, "varlen_attn", reference_varlen)
    own_varlen.enable(model)
    found, expected = (causal_lm.packed_hidden_states(each, *packs()) for each in (model, masked))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    expected_gradients = gradients(masked)
    assert distance(gradients(model), expected_gradients) < 1e-5
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert distance(gradients(model), expected_gradients) < 1e-5


def test_a_kernel_is_taken_only_if_it_computes_what_it_should(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(base("gemma3"))

    def works(kernel: Callable[..., Tensor]) -> bool:
        monkeypatch.setattr(varlen, "varlen_attn", kernel)
        return own_varlen.self_test(model, torch.bfloat16, CPU)

    def missing(*_: object, **__: object) -> Tensor:
        raise NotImplementedError("no kernel for this GPU")

    assert works(reference_varlen)
    assert not works(missing)
    assert not works(lambda *states, window_size, **rest: reference_varlen(*states, window_size=(-1, 0), **rest))
    whole = torch.tensor([0, 8], dtype=torch.int32)
    assert not works(lambda q, k, v, _, __, *rest, **others: reference_varlen(q, k, v, whole, whole, *rest, **others))
    assert not works(lambda q, *rest, **others: reference_varlen(q.detach(), *rest, **others) + 0 * q)
    fitting = {name: own_varlen.supports(load(base(name)), torch.bfloat16) for name in ("llama", "gemma3", "gemma2")}
    assert fitting == {"llama": True, "gemma3": True, "gemma2": False}


def test_without_cu_seqlens_varlen_attention_is_the_models_own(base: Base) -> None:
    model, plain = load(base("gemma3")), load(base("gemma3"))
    own_varlen.enable(model)
    written = [each.generate(packs()[0], max_new_tokens=8, do_sample=False, pad_token_id=3) for each in (model, plain)]
    assert torch.equal(*written)
    ids_BL, positions_BL, _ = packs()
    with torch.no_grad():
        found, expected = (causal_lm.packed_hidden_states(each, ids_BL, positions_BL, None) for each in (model, plain))
    assert torch.equal(found, expected)


def test_attention_without_cu_seqlens_fails_instead_of_mixing_rows(base: Base) -> None:
    model = load(base())
    own_varlen.enable(model)
    for layer in model.model.layers:  # as if the architecture did not pass them on
        attention = layer.self_attn.forward
        layer.self_attn.forward = lambda *_, attention=attention, cu_seq_lens_q, **rest: attention(**rest)
    with pytest.raises(RuntimeError, match="must match"):
        causal_lm.packed_hidden_states(model, *packs())


def test_cu_seqlens_are_those_of_all_packs_end_to_end() -> None:
    segments_BL = packs(length=18)[2]
    assert own_varlen.cu_seqlens(segments_BL).tolist() == [0, 9, 10, 16, 18, 21, 33, 36]
    assert own_varlen.cu_seqlens(torch.zeros(2, 3)).tolist() == [0, 3, 6]


# What is refused


def test_bases_that_are_no_language_models_are_refused(base: Base, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"diffusion model .*model=qwen3_4b"):
        load(tiny_base)
    with pytest.raises(ModelError, match=r"blip model .*model=qwen3_4b"):
        load(save_captioner(tmp_path / "captioner"))
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(tmp_path)


def test_a_base_without_a_tokenizer_is_refused(base: Base, tmp_path: Path) -> None:
    folder = shutil.copytree(base(), tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        causal_lm.load_tokenizer(str(folder))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", ["", "[]", "null", "5", "{"])
def test_a_damaged_tokenizer_is_one_line(base: Base, tmp_path: Path, name: str, damage: str) -> None:
    folder = shutil.copytree(base(), tmp_path / "damaged")
    (folder / name).write_text(damage)
    with pytest.raises(ModelError, match=str(folder)) as error:
        causal_lm.load_tokenizer(str(folder))
    assert "\n" not in str(error.value)


def test_a_tokenizer_with_a_setting_of_another_type_is_one_line(base: Base, tmp_path: Path) -> None:
    folder = shutil.copytree(base(), tmp_path / "odd")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": {}}))
    with pytest.raises(ModelError, match=rf"^the tokenizer of {folder} failed \(.*'dict'.*\); get its files again"):
        causal_lm.load_tokenizer(str(folder))


def test_storage_that_the_machine_can_not_compute_in_is_refused(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no kernel\nfor this GPU")

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", fail)
    with pytest.raises(ModelError, match=r"model\.quantize=nf4 .*no kernel for this GPU.*model\.quantize=none"):
        load(base(), quantize=Quantize.nf4)


def test_a_quantised_release_with_an_image_part_is_refused(base: Base, tmp_path: Path) -> None:
    folder = shutil.copytree(base("gemma3"), tmp_path / "quantised")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "gptq", "bits": 4},' + config[1:])
    with pytest.raises(ModelError, match=r"stored quantised \(gptq\)"):
        load(folder)


def test_a_model_whose_packs_or_logits_work_in_an_unknown_way_is_refused(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:  # rows that see one another
        seen = causal_lm.packed_hidden_states
        patch.setattr(
            causal_lm, "packed_hidden_states", lambda model, ids, positions, segments: seen(model, ids, positions, None)
        )
        with pytest.raises(ModelError, match=r"LlamaForCausalLM.*logits differ by 0\.\d+"):
            load(base(), torch.bfloat16)
    with monkeypatch.context() as patch:  # a softcap that the head leaves out
        own = causal_lm.head
        patch.setattr(causal_lm, "head", lambda model: dataclasses.replace(own(model), softcap=None))
        with pytest.raises(ModelError, match=r"Gemma2ForCausalLM.*logits differ"):
            load(base("gemma2"))


# What only a GPU can show


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", own_varlen.HALF)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral_sliding", "gemma3", "phi3", "glm4"])
def test_torchs_kernel_isolates_rows_as_masks_do(base: Base, architecture: str, dtype: torch.dtype) -> None:
    gpu = torch.device("cuda")
    targets = TARGETS.get(architecture, ["q_proj", "down_proj"])
    model = adapted(load(base(architecture), dtype, gpu), targets)
    assert own_varlen.is_enabled(model)
    masked = adapted(load(base(architecture), dtype, gpu), targets)
    masked.set_attn_implementation("sdpa")
    exact = adapted(load(base(architecture), torch.float32, gpu), targets)
    true = gradients(exact)
    assert distance(gradients(model), true) < 2 * distance(gradients(masked), true) + 1e-3
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert distance(gradients(model), true) < 2 * distance(gradients(masked), true) + 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", [Quantize.int8, Quantize.nf4])
def test_a_quantised_base_trains_on_a_gpu(base: Base, quantize: Quantize) -> None:
    models = (load(base(), torch.bfloat16, device, quantize=quantize) for device in (torch.device("cuda"), CPU))
    gpu, cpu = (gradients(adapted(model, ["q_proj", "down_proj"])) for model in models)
    assert distance(gpu, cpu) < 0.1
