"""Finding and loading models: from disk, damaged, and without a network."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune import hub, reading
from finetune.config.schema import ModelConfig
from finetune.diffusion import meta, single_file
from finetune.diffusion import pipeline as pipeline_module
from finetune.diffusion.image_sampler import ImageSampler
from finetune.errors import ModelError
from finetune.language import causal_lm
from finetune.run import hashing
from tests.tiny_models import save_captioner, save_diffusion


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return save_diffusion(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def copy(pipeline, tmp_path):
    return shutil.copytree(pipeline, tmp_path / "copy")


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """An empty cache, and a name resolver that knows nobody."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def unknown(*arguments, **options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)


def unet(reference):
    from diffusers import UNet2DConditionModel

    return hub.load(UNet2DConditionModel, str(reference), subfolder="unet")


def in_cache(pipeline, cache, name="someone/tiny", commit="c0ffee" * 6):
    folder = cache / ("models--" + name.replace("/", "--"))
    shutil.copytree(pipeline, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    return folder / "snapshots" / commit


def test_a_local_folder_is_loaded_with_its_weights(pipeline):
    weights = load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    loaded = unet(pipeline)
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in weights.items())
    assert hub.resolve(str(pipeline)) == pipeline


def test_every_kind_of_part_can_be_loaded(pipeline):
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer

    base = str(pipeline)
    assert hub.load(CLIPTokenizer, base, subfolder="tokenizer")("a").input_ids
    assert hub.load(AutoTokenizer, base, subfolder="tokenizer")("a").input_ids
    assert hub.load(CLIPTextModel, base, subfolder="text_encoder", dtype=torch.float32)
    assert hub.load(AutoencoderKL, base, subfolder="vae", torch_dtype=torch.float32)
    assert hub.load(DDIMScheduler, base, subfolder="scheduler")
    assert hub.load(StableDiffusionPipeline, base).unet


def test_embedded_models_are_listed_where_one_is_missing(pipeline, tmp_path, monkeypatch):
    shutil.copytree(pipeline, tmp_path / "embedded" / "diffusion")
    (tmp_path / "embedded" / "unfinished").mkdir()
    monkeypatch.setattr(hub, "EMBEDDED", tmp_path / "embedded")
    assert hub.resolve("embedded:diffusion") == tmp_path / "embedded" / "diffusion"
    for reference in ("embedded:difusion", "embedded:unfinished", "embedded:", "embedded:../embedded/diffusion"):
        with pytest.raises(ModelError, match=r"there is no .*; this package carries: embedded:diffusion$"):
            hub.resolve(reference)


@pytest.mark.parametrize("reference", ["./gone", "/gone/away", "a/b/c", ""])
def test_paths_that_do_not_exist(reference):
    with pytest.raises(
        ModelError,
        match=r"no model folder .*model=embedded, model=embedded_language and caption=embedded come with the package",
    ):
        hub.resolve(reference)


def test_a_folder_without_a_model_says_which_file_it_lacks(tmp_path, pipeline):
    from transformers import AutoTokenizer

    neither = r"holds no model_index\.json \(of an image model\) and no config\.json \(of a language model"
    for ask in (hub.local, lambda folder: hub.load(AutoTokenizer, folder), hub.config_folder):
        with pytest.raises(ModelError, match=neither) as error:
            ask(str(tmp_path))
        assert "hf download" not in str(error.value)
    (tmp_path / "config.json").write_text("{}")
    hub.require(str(tmp_path))
    with pytest.raises(ModelError, match=r"holds no model_index\.json \(of an image model\); name the folder that"):
        single_file.find(ModelConfig(base=str(tmp_path)))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"holds no config\.json \(of a language model"):
        causal_lm.architecture(ModelConfig(kind="language", base=str(tmp_path)))
    hub.require("someone/tiny")  # which is none of this machine's


def test_hub_unreachable_says_so_within_seconds(no_network):
    start = time.monotonic()
    for ask in (unet, hub.content_hash):
        with pytest.raises(
            ModelError, match=r"not on disk \(.*hub can't be reached .*hf download.*model=embedded"
        ) as error:
            ask("someone/tiny")
        assert "\n" not in str(error.value)
    assert time.monotonic() - start < 5


def test_weights_that_are_not_on_this_machine(pipeline, no_network, tmp_path):
    hub.require_reachable("embedded:diffusion")
    with pytest.raises(ModelError, match=r"someone/tiny is not on disk .*hub can't be reached"):
        hub.require_reachable("someone/tiny")
    snapshot = in_cache(pipeline, tmp_path / "hub")
    hub.require_reachable("someone/tiny")
    assert hub.to_download("someone/tiny", "unet", "vae") == []
    for file in snapshot.glob("unet/*.safetensors"):
        file.unlink()
    assert hub.to_download("someone/tiny", "unet", "vae") == ["unet"]
    hub.require_weights("someone/tiny", "unet")
    assert hub.to_download(str(snapshot), "unet") == []
    with pytest.raises(ModelError, match=r"can't be used: .*/unet/\*\.safetensors is missing; it needs the ordinary"):
        hub.require_weights(str(snapshot), "vae", "unet")
    for file in snapshot.rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(ModelError, match=r"someone/tiny is not on disk .*hub can't be reached"):
        hub.require_reachable("someone/tiny")


def test_a_silent_network_is_given_up_on(no_network, monkeypatch):
    monkeypatch.setattr(hub, "HUB_ANSWER_S", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: time.sleep(1))
    start = time.monotonic()
    with pytest.raises(ModelError, match=r"hub can't be reached \(no answer within"):
        unet("someone/tiny")
    assert time.monotonic() - start < 0.9


def test_offline_mode_is_respected(no_network, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"hub can't be reached"):
        unet("someone/tiny")


@pytest.mark.parametrize(
    ("kind", "message"),
    [("GatedRepoError", "is gated: accept its licence"), ("RepositoryNotFoundError", "the hub has no public model")],
)
def test_refusals_of_the_hub(no_network, monkeypatch, kind, message):
    import huggingface_hub.errors as errors

    def refuse(*arguments, **options):
        raise getattr(errors, kind).__new__(getattr(errors, kind))

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    with pytest.raises(ModelError, match=message):
        unet("someone/tiny")


def test_a_cached_model_needs_no_network(pipeline, no_network, tmp_path):
    snapshot = in_cache(pipeline, tmp_path / "hub")
    assert hub.resolve("someone/tiny") == "someone/tiny"
    assert unet("someone/tiny")
    assert hub.content_hash("someone/tiny") == f"someone/tiny@{snapshot.name}"
    assert hub.content_hash("someone/tiny", "vae") == f"someone/tiny@{snapshot.name}/vae"
    assert hub.content_hash(f"someone/tiny@{snapshot.name}") == hub.content_hash("someone/tiny")
    shutil.rmtree(snapshot / "unet")
    with pytest.raises(ModelError, match=r"hub can't be reached"):
        unet("someone/tiny")


def test_identity_is_of_content_and_of_the_parts_asked_for(copy, pipeline, tmp_path):
    assert hub.content_hash(str(copy)) == hub.content_hash(str(pipeline))
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    os.utime(file, (0, 0))
    (copy / "README.md").write_text("new")
    assert hub.content_hash(str(copy)) == hub.content_hash(str(pipeline))
    weights = load_file(file)
    name = next(iter(weights))
    weights[name] = weights[name] + 1
    save_file(weights, file, metadata={"format": "pt"})
    assert hub.content_hash(str(copy)) != hub.content_hash(str(pipeline))
    assert hub.content_hash(str(copy), "vae") == hub.content_hash(str(pipeline), "vae")
    assert hub.content_hash(str(copy), "vae") != hub.content_hash(str(copy), "text_encoder*", "tokenizer*")
    (copy / "vae" / "config.json").write_text(
        json.dumps(json.loads((copy / "vae" / "config.json").read_text()) | {"x": 1})
    )
    assert hub.content_hash(str(copy), "vae") != hub.content_hash(str(pipeline), "vae")


def test_identity_of_large_files_sees_every_byte_and_reads_them_once(copy, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "REMEMBERED_BYTES", 1000)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    file, read = copy / "unet" / "diffusion_pytorch_model.safetensors", []
    plain = hashing.hash_file
    monkeypatch.setattr(hashing, "hash_file", lambda path: read.append(path) or plain(path))
    monkeypatch.setattr(hashing, "RACY_NS", -(10**12))  # files of a test are young
    before = hub.content_hash(str(copy))
    assert file in read
    read.clear()
    assert hub.content_hash(str(copy)) == before
    assert not read
    data, times = bytearray(file.read_bytes()), file.stat()
    data[-7] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as `touch -r` does
    assert hub.content_hash(str(copy)) != before
    assert read == [file]
    data[-7] ^= 1
    file.write_bytes(data)
    assert hub.content_hash(str(copy)) == before
    read.clear()
    for damage in (b"", b"[]", b'["x", {}]', b"{"):
        (tmp_path / "home" / hub.HASHES).write_bytes(damage)
        assert hub.content_hash(str(copy)) == before
    assert read.count(file) == 4


@pytest.mark.parametrize("kind", ["empty", "short", "long", "header", "text", "huge"])
def test_damaged_weights_are_named(copy, kind):
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    data = file.read_bytes()
    assert reading.damage(file) == ""
    header = int.from_bytes(data[:8], "little")
    file.write_bytes(
        {
            "empty": b"",
            "short": data[:-100],
            "long": data + b"more",
            "header": data[:8] + b"\xff" * header + data[8 + header :],
            "text": b"version https://git-lfs.github.com/spec/v1\n",
            "huge": b"\xff" * 8 + data,
        }[kind]
    )
    with pytest.raises(ModelError, match=rf"{file} is damaged \(.+\); copy or download it again"):
        unet(copy)


def test_memory_that_runs_out_is_no_damage(pipeline, monkeypatch):
    from diffusers import UNet2DConditionModel

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.51 GiB")

    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        unet(pipeline)


def test_missing_weights_are_not_made_up(copy):
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["conv_in.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"conv_in.weight|can't be loaded as UNet2DConditionModel"):
        unet(copy)
    from transformers import CLIPTextModel

    file = copy / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    lost = next(name for name in weights if "fc1.weight" in name)
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weight of CLIPTextModel, first .*fc1.weight"):
        hub.load(CLIPTextModel, str(copy), subfolder="text_encoder")


def test_pickled_weights_are_refused(copy):
    from transformers import CLIPTextModel

    file = copy / "text_encoder" / "model.safetensors"
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()
    with pytest.raises(ModelError, match=r"text_encoder can't be loaded as CLIPTextModel: .*safetensors"):
        hub.load(CLIPTextModel, str(copy), subfolder="text_encoder")
    torch.save({}, copy / "unet" / "diffusion_pytorch_model.bin")
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"unet can't be loaded as UNet2DConditionModel"):
        unet(copy)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer"])
def test_a_missing_part_is_named(copy, part):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    loader = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}.get(
        part, CLIPTokenizer
    )
    shutil.rmtree(copy / part)
    with pytest.raises(ModelError, match=rf"{part} can't be loaded as {loader.__name__}") as error:
        hub.load(loader, str(copy), subfolder=part)
    assert "\n" not in str(error.value)


def test_code_that_comes_with_a_model_is_never_run(tmp_path):
    from transformers import AutoTokenizer

    folder = save_captioner(tmp_path / "captioner")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", None]}
    config["tokenizer_class"] = "Evil"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with contextlib.suppress(ModelError):  # refused or loaded without it: both will do
        hub.load(AutoTokenizer, str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_long_reason_is_cut_between_words(no_network, monkeypatch):
    def fail(*arguments, **options):
        raise OSError("unfortunately " * 20)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    with pytest.raises(ModelError, match=r"hub can't be reached \((unfortunately ){8}…\)"):
        unet("someone/tiny")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("dtype", lambda entry: entry | {"dtype": []}),
        ("shape", lambda entry: entry | {"shape": [*entry["shape"], 2]}),
        ("overlap", lambda entry: entry | {"data_offsets": [0, entry["data_offsets"][1]]}),
        ("half a character", lambda entry: entry | {"dtype": "\ud800"}),
    ],
)
def test_every_damage_of_a_safetensors_header_is_seen(copy, name, change):
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    last = max((key for key in header if key != "__metadata__"), key=lambda key: header[key]["data_offsets"])
    text = json.dumps(header | {last: change(header[last])}).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(ModelError, match=r"is damaged \(its safetensors header is unreadable"):
        unet(copy)


@pytest.mark.parametrize("changed", [{"down_block_types": False}, {"block_out_channels": "16"}])
@pytest.mark.parametrize("build", [meta.backbone, pipeline_module.load_backbone])
def test_whatever_a_library_makes_of_a_configuration_is_a_model_error(copy, changed, build):
    file = copy / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(ModelError, match="unet"):
        build(ModelConfig(base=str(copy)), torch.float32)


@pytest.mark.parametrize("changed", [{"model_max_length": None}, {"bos_token": "x" * 1000}])
def test_parts_that_do_not_belong_together_are_named_at_their_first_use(copy, changed):
    file = copy / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    encoder = pipeline_module.TextEncoder(ModelConfig(base=str(copy)), torch.device("cpu"))
    with pytest.raises(ModelError, match=r"the text encoders and tokenizers of .*copy failed"):
        encoder.encode(["a red wall"])


def changed_part(copy, part, **changed):
    file = copy / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


@pytest.mark.parametrize(
    ("part", "changed"),
    [
        ("unet", {"freq_shift": "x"}),
        ("vae", {"scaling_factor": "x"}),
        ("scheduler", {"timestep_spacing": "x"}),
    ],
)
def test_parts_that_fail_when_the_first_image_is_drawn_are_named(copy, part, changed):
    changed_part(copy, part, **changed)
    model, cpu = ModelConfig(base=str(copy)), torch.device("cpu")
    backbone = pipeline_module.load_backbone(model, torch.float32)
    sampler = ImageSampler(model, ["a wall"], "", cpu, torch.float32)
    with pytest.raises(ModelError, match=r"the unet, scheduler or autoencoder of .*copy failed"):
        sampler.generate(backbone, [("a wall", 0)], width=32, height=32, steps=2, guidance=1.0)


def test_what_fails_after_the_first_image_stays_itself(copy):
    model, cpu = ModelConfig(base=str(copy)), torch.device("cpu")
    backbone = pipeline_module.load_backbone(model, torch.float32)
    sampler = ImageSampler(model, ["a wall"], "", cpu, torch.float32)
    draw = partial(sampler.generate, backbone, [("a wall", 0)], width=32, height=32, steps=1, guidance=1.0)
    draw()
    backbone.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        draw()


def test_a_base_without_text_encoders_is_not_planned(copy):
    shutil.rmtree(copy / "text_encoder")
    with pytest.raises(ModelError, match="has no text encoder"):
        meta.text_encoders(ModelConfig(base=str(copy)))


def fail(*_):
    raise ZeroDivisionError("not about a file")


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("an illegal memory access was encountered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
        MemoryError(),
    ],
)
def test_a_failing_gpu_and_a_lack_of_memory_are_not_taken_for_a_damaged_file(error):
    with pytest.raises(type(error)), hub.explained(lambda reason: f"the file is damaged ({reason})"):
        raise error


def test_a_model_index_that_is_no_object(copy):
    (copy / "model_index.json").write_text("[1, 2]")
    with pytest.raises(ModelError, match=r"model_index.json is damaged .it holds no JSON object"):
        hub.model_index(str(copy))


@pytest.mark.parametrize("use", [hub.content_hash, lambda base: pipeline_module.load_vae_model(ModelConfig(base=base))])
def test_a_configuration_without_end_is_not_read(copy, use):
    with open(copy / "vae" / "config.json", "r+b") as file:
        file.truncate(1 << 34)
    with pytest.raises(ModelError, match=r"vae/config.json is damaged \(17179869184 bytes are too many for it\)"):
        use(str(copy))


PROGRAM = """
import gc
from finetune import hub
from finetune.run import libraries
libraries.in_command = {in_command}
hub.keep_libraries()
first = gc.get_freeze_count()
later = [[] for _ in range(1000)]
hub.keep_libraries()
assert gc.get_freeze_count() == first  # what was made since may be a model
print(first)
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("in_command", [True, False])
def test_libraries_are_kept_out_of_searches_for_cycles_once_and_in_a_command_only(in_command):
    program = PROGRAM.format(in_command=in_command)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 100_000) == in_command
