"""The schema: documented, checked all at once, true to the libraries it names things of; what memory hints say."""

import ast
import os
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetune import kinds
from finetune.config import describe, hints
from finetune.config import schema as module
from finetune.config.compose import load
from finetune.config.describe import as_dict
from finetune.config.model_kinds import MODEL_KINDS, model_kind
from finetune.config.schema import CheckpointChoice, Config, Quantize
from finetune.config.typed_text import PATHS
from finetune.config.validate import cautions, check
from finetune.errors import ConfigError


@pytest.fixture(scope="module")
def pixar_style() -> Config:
    return load("pixar_style")


@pytest.fixture
def config(pixar_style: Config) -> Config:
    """The recipe, to be changed."""
    return deepcopy(pixar_style)


def test_every_field_says_what_it_is() -> None:
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    sections = {"model", "data", "caption", "lora", "optim", "trainer", "loss", "hardware", "sample", "export", "serve"}
    sections |= {"profile", "cost"}
    for cls in (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Config")):
        for field, after in zip(cls.body, [*cls.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented or field.target.id in sections, f"{cls.name}.{field.target.id} has no docstring"


def test_keys_that_scripts_rely_on_are_there() -> None:
    promised = (
        "seed trainer.steps trainer.save_every trainer.micro_batch trainer.accumulate trainer.precision "
        "lora.rank lora.alpha optim.lr data.folder sample.prompts run_dir"
    )
    assert set(promised.split()) <= set(describe.leaf_types())


BAD = [
    ("seed", -1, "seed must be in 0 … 2^63-1, got -1"),
    ("run_dir", " ", "run_dir must name a folder"),
    ("data.cache", "", "data.cache must name a folder, got ''; try data.cache=outputs/.cache"),
    ("name", "style/v2", "name must be one name, no path, of at most 200 bytes, got 'style/v2'; try name=mine"),
    ("model.resolution", 100, "model.resolution must be a multiple of model.bucket_step=32, got 100; try model"),
    ("model.bucket_step", 0, "model.bucket_step must be a multiple of 16, got 0; try model.bucket_step=16"),
    ("model.bucket_step", 1, "model.bucket_step must be a multiple of 16, got 1; try model.bucket_step=16"),
    ("lora.rank", 0, "lora.rank must be at least 1, got 0; try lora.rank=16"),
    ("lora.alpha", 0.0, "lora.alpha must be above 0"),
    ("lora.dropout", 1.0, "lora.dropout must be in 0 … 1 (1 excluded)"),
    ("lora.targets", "all", "lora.targets=all is not a preset of this model; it offers: attention, attention_ff, wide"),
    ("optim.lr", 0.0, "optim.lr must be above 0, got 0.0; try optim.lr=0.0001"),
    ("optim.betas", [0.9], "optim.betas must be two numbers in 0 … 1 (1 excluded), got [0.9]; try 'optim.betas=[0.9,"),
    ("optim.betas", [0.9, float("nan")], "optim.betas must be two numbers in 0 … 1 (1 excluded), got [0.9, nan]"),
    ("data.max_aspect", float("inf"), "data.max_aspect must be a finite number, got inf; try data.max_aspect=2.0"),
    ("loss.noise_offset", float("nan"), "loss.noise_offset must be a finite number, got nan"),
    ("data.length", 1, "data.length must be at least 2, got 1; try data.length=2048"),
    ("trainer.steps", 0, "trainer.steps must be at least 1"),
    ("trainer.micro_batch", 0, "trainer.micro_batch must be at least 1"),
    (
        "trainer.activation_checkpointing",
        -1,
        "trainer.activation_checkpointing must be at least 0, got -1; try trainer.activation_checkpointing=1",
    ),
    ("data.validation_share", -0.1, "data.validation_share must be in 0 … 1"),
    ("loss.caption_dropout", 2.0, "loss.caption_dropout must be in 0 … 1"),
    ("lora.rank", 100_000, "lora.rank must be at most 16,384, got 100000; try lora.rank=16"),
    ("data.max_aspect", 1e308, "data.max_aspect must be at most 100, got 1e+308; try data.max_aspect=2.0"),
    ("trainer.steps", 10**400, "trainer.steps must be at most 1,000,000,000, got 1"),
    ("optim.eps", 1e308, "optim.eps must be at most 1,000,000,000"),
    ("sample.steps", 1001, "sample.steps must be at most 1,000"),
    ("sample.seeds", [], "sample.seeds must name at least one seed"),
    ("sample.seeds", [0, 2**63], "sample.seeds must name at least one seed, none beyond 2^63-1"),
    ("export.tolerance", 0.0, "export.tolerance must be above 0"),
    ("export.formats", [], "export.formats must name at least one format, got []; try 'export.formats=[peft]'"),
]


@pytest.mark.parametrize(("key", "value", "said"), BAD)
def test_check_names_a_bad_value(config: Config, key: str, value: object, said: str) -> None:
    _set(config, key, value)
    assert any(problem.startswith(said) for problem in check(config)), check(config)


def test_every_number_has_a_rule_that_its_default_keeps_and_help_shows() -> None:
    default = Config()
    for key, hint in describe.leaf_types().items():
        if hint in (int, float):
            assert key in describe.rules(), key
    for key, rule in describe.rules().items():
        section, _, name = key.rpartition(".")
        assert rule.holds(getattr(getattr(default, section) if section else default, name)), key
        assert f"ust {rule.meaning}." in describe.meanings()[key]


@pytest.mark.parametrize("name", ["", " ", ".", "..", ".cache", "a/b", "a\\b", "../up", "a\0", "ä" * 101])
def test_a_name_is_no_path(config: Config, name: str) -> None:
    config.name = name
    (problem,) = check(config)
    assert problem.startswith("name must be one name, no path, of at most 200 bytes, got ")


@pytest.mark.parametrize("name", ["mine", "2024_05_01", "größer v2.1", "a=b,c", "ä" * 100])
def test_a_name_may_be_what_a_file_may_be_called(config: Config, name: str) -> None:
    config.name = name
    assert check(config) == []


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize(("path", "said"), [("ä" * 128, "got 256, 256 a name"), ("a/" * 3000, "got 6,000, 1 a name")])
def test_a_path_is_one_that_file_systems_take(config: Config, key: str, path: str, said: str) -> None:
    _set(config, key, path)
    (problem,) = [line for line in check(config) if "file systems" in line]
    assert problem.startswith(f"{key} must be a path")
    assert said in problem


def test_a_path_may_be_long_a_list_of_paths_longer_and_a_template_too(config: Config) -> None:
    config.data.folder = "/".join(["a" * 255] * 15)
    config.data.file = os.pathsep.join(["a" * 255] * 50)
    config.data.chat_template = "{{ messages }}" * 1000
    assert not [line for line in check(config) if "file systems" in line]
    config.serve.adapters = {"mine": "a" * 256}
    assert any(line.startswith("serve.adapters must be a path") for line in check(config))


def test_settings_that_contradict_each_other_are_refused() -> None:
    config = load("pirate_chat", ["trainer.validate_every=0"])
    assert (config.trainer.patience, config.export.checkpoint) == (4, CheckpointChoice.best)
    assert [problem.partition("; ")[::2] for problem in check(config)] == [
        (
            "trainer.patience=4 needs validation losses, and trainer.validate_every=0 makes none",
            "try trainer.patience=0, or trainer.validate_every=100",
        ),
        (
            "export.checkpoint=best needs validation losses, and trainer.validate_every=0 makes none",
            "try export.checkpoint=last, or trainer.validate_every=100",
        ),
    ]
    off = ["trainer.validate_every=0", "trainer.patience=0", "export.checkpoint=last"]
    assert check(load("pirate_chat", off)) == []
    config = load("pirate_chat", ["lora.init=loftq"])
    assert check(config) == [
        "lora.init=loftq makes up for what nf4 loses; try lora.init=default, or model.quantize=nf4"
    ]
    config = load("pirate_chat", ["lora.init=pissa", "lora.start_from=outputs/a"])
    assert check(config) == ["lora.init=pissa does not start at outputs/a; set lora.init=default"]


@pytest.mark.parametrize("run_dir", ["images", "./images/", "linked", "images/../images"])
def test_a_run_does_not_draw_among_its_images(workdir: Path, run_dir: str) -> None:
    (workdir / "images").mkdir()
    (workdir / "linked").symlink_to("images")
    config = load("pixar_style", ["data.folder=images", f"run_dir={run_dir}", "name=mine"])
    (problem,) = check(config)
    assert "is the folder of the images" in problem
    assert problem.endswith("try run_dir=outputs/mine")
    config.run_dir = "images/runs/mine"  # which is left out of the images
    assert check(config) == []


def test_a_warm_up_longer_than_the_run_is_a_caution() -> None:
    assert cautions(load("pixar_style", ["optim.warmup_steps=50", "trainer.steps=50"])) == []
    config = load("pixar_style", ["optim.warmup_steps=100", "trainer.steps=50"])
    assert check(config) == []
    (line,) = cautions(config)
    assert line.startswith("optim.warmup_steps=100 is longer than the run (trainer.steps=50)")
    assert line.endswith("try optim.warmup_steps=5")


@pytest.mark.parametrize("settings", [["optim.lr=2"], ["optim.lr=0.01", "optim.lora_plus=16"], ["optim.lr=0.11"]])
def test_a_rate_beyond_the_optimisers_scale_is_refused_unless_it_is_meant(settings: list[str]) -> None:
    (problem,) = check(load("pixar_style", settings))
    assert problem.startswith("optim.lr=")
    offered = problem.rpartition("; try ")[2]
    assert offered == "optim.lr=1e-4, or optim.allow_large_lr=true if it is meant"
    for words in ("optim.lr=1e-4", "optim.allow_large_lr=true"):
        assert check(load("pixar_style", [*settings, words])) == []
    assert check(load("pixar_style", ["optim.lr=0.1"])) == []


def test_each_optimiser_has_its_own_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load("pixar_style", ["optim.lr=1"])
    monkeypatch.setattr(config.optim.name, "largest_lr", 10.0)  # as an optimiser that finds its own rate says
    assert check(config) == []


def test_a_rate_of_the_small_bases_is_a_caution_for_others() -> None:
    (line,) = cautions(load("pirate_chat", ["model.base=Qwen/Qwen3-0.6B"]))
    assert "optim.lr=0.002" in line
    assert cautions(load("pirate_chat", ["model.base=Qwen/Qwen3-0.6B", "optim.lr=1e-4"])) == []
    assert cautions(load("pirate_chat", ["model=qwen3_4b", "model.base=Qwen/Qwen3-0.6B"])) == []


def test_a_negative_prompt_needs_guidance() -> None:
    (problem,) = check(load("pixar_style", ["sample.negative=blurred"]))
    assert problem == "sample.negative is not looked at with sample.guidance=1; try sample.guidance=3"
    assert check(load("pixar_style", ["sample.negative=blurred", problem.rpartition("try ")[2]])) == []


def test_int8_layers_do_not_go_to_main_memory() -> None:
    config = load("pirate_chat", ["model.quantize=int8", "model.offload=true"])
    assert check(config) == [
        "model.offload=true needs model.quantize=nf4 or none: int8 layers stay on the GPU once used"
    ]


def test_check_names_all_bad_values_at_once(config: Config) -> None:
    for key, value, _ in BAD:
        if key != "model.bucket_step":  # hides the rule about multiples
            _set(config, key, value)
    assert len(check(config)) == len({key for key, _, _ in BAD}) - 1


def _set(config: Config, key: str, value: object) -> None:
    section, _, name = key.rpartition(".")
    setattr(getattr(config, section) if section else config, name, value)


def test_as_dict_holds_plain_values_only() -> None:
    plain = as_dict(load("pixar_style"))
    assert plain["trainer"]["precision"] == "auto"
    assert plain["export"]["formats"] == ["peft", "diffusers", "kohya"]


@pytest.mark.parametrize("preset", ["embedded", "sd15"])
def test_lora_targets_exist_in_the_unet(preset: str) -> None:
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
        )
    names = [name for name, _ in unet.named_modules()]
    for targets in load("pixar_style", [f"model={preset}"]).model.lora_targets.values():
        for target in targets:
            assert any(name.endswith(f".{target}") for name in names), target


# -- kinds of model ------------------------------------------------------------------------------------------------


def test_every_kind_of_model_has_a_recipe_to_begin_with() -> None:
    for name, kind in MODEL_KINDS.items():
        config = load(kind.example_recipe)
        assert (config.model.kind, kind.name) == (name, name)
        assert kind.data_key in describe.leaf_types()
        assert describe.kind_of(kind.data_key) == name
        assert set(config.export.formats) <= set(kind.export_formats)
        assert kind.captioned == (describe.kind_of("caption") == name)


def test_a_kind_that_there_is_not(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"^model\.kind=video is not known; allowed: diffusion, language$"):
        model_kind("video")
    config.model.kind, config.lora.rank = "video", 0
    problems = check(config)
    assert problems[0] == "model.kind=video is not known; allowed: diffusion, language"
    assert problems[1].startswith("lora.rank must be at least 1")


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("recipe", "setting", "smaller"),
    [
        ("pixar_style", "model.resolution=128", ["model.resolution=96", "model.resolution=64", "model.resolution=32"]),
        ("pixar_style", "model.resolution=64", ["model.resolution=32"]),
        ("pixar_style", "model.resolution=32", []),
        ("pirate_chat", "data.length=512", ["data.length=256", "data.length=128", "data.length=64"]),
        ("pirate_chat", "data.length=5", ["data.length=2"]),
        ("pirate_chat", "data.length=2", []),
    ],
)
def test_smaller_examples_are_named_and_hinted_at(recipe: str, setting: str, smaller: list[str]) -> None:
    config = load(recipe, [setting])
    found = list(model_kind(config.model.kind).smaller_examples(config))
    assert [words for words, _ in found] == smaller
    for words, changed in found:
        assert changed == load(recipe, [setting, words])
        assert check(changed) == []
    hint = hints.smallest(config, on_gpu=True)
    assert hint.startswith("try ")
    half = model_kind(config.model.kind).resize(config, 0.5)[0]
    assert (half in smaller and half in hint) if smaller else (half not in hint)
    config = load(recipe, [setting, "model.quantize=nf4"])
    assert "quantize" not in hints.smallest(config, on_gpu=True)
    assert smaller or hints.smallest(config, on_gpu=True) == "try a smaller base model"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("recipe", ["pixar_style", "pirate_chat"])
def test_the_hint_for_a_full_memory_offers_quantisation_only_where_it_is_not_refused(recipe: str, device: str) -> None:
    config = load(recipe, ["trainer.micro_batch=1", "trainer.activation_checkpointing=1"])
    quantised = replace(config, model=replace(config.model, quantize=Quantize.nf4))
    try:
        kinds.of(quantised).require_device(quantised, torch.device(device))
        works = True
    except ConfigError:
        works = False
    for hint in (hints.smallest, hints.smaller):
        assert ("model.quantize=nf4" in hint(config, on_gpu=device == "cuda")) == works
