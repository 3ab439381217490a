"""The schema: documented, checked all at once, true to the libraries it names things of."""

import ast
from pathlib import Path

import pytest

from finetune.config import describe
from finetune.config import schema as module
from finetune.config.compose import load
from finetune.config.describe import as_dict
from finetune.config.schema import Config
from finetune.config.validate import check


def test_every_field_says_what_it_is() -> None:
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    sections = {"model", "data", "caption", "lora", "optim", "trainer", "loss", "hardware", "sample", "export"}
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
    ("model.resolution", 100, "model.resolution must be a multiple of model.bucket_step=32, got 100; try model"),
    ("model.bucket_step", 0, "model.bucket_step must be at least 1"),
    ("lora.rank", 0, "lora.rank must be at least 1, got 0; try lora.rank=16"),
    ("lora.alpha", 0.0, "lora.alpha must be above 0"),
    ("lora.dropout", 1.0, "lora.dropout must be in 0 … 1 (1 excluded)"),
    ("lora.targets", "all", "lora.targets=all is not a preset of this model; it offers: attention, attention_ff, wide"),
    ("optim.lr", 0.0, "optim.lr must be above 0, got 0.0; try optim.lr=1e-4"),
    ("optim.betas", [0.9], "optim.betas must be two numbers"),
    ("trainer.steps", 0, "trainer.steps must be at least 1"),
    ("trainer.micro_batch", 0, "trainer.micro_batch must be at least 1"),
    (
        "trainer.activation_checkpointing",
        -1,
        "trainer.activation_checkpointing must be at least 0, got -1; try trainer.activation_checkpointing=1",
    ),
    ("data.validation_share", -0.1, "data.validation_share must be in 0 … 1"),
    ("loss.caption_dropout", 2.0, "loss.caption_dropout must be in 0 … 1"),
    ("sample.seeds", [], "sample.seeds must name at least one seed"),
    ("export.tolerance", 0.0, "export.tolerance must be above 0"),
]


@pytest.mark.parametrize(("key", "value", "said"), BAD)
def test_check_names_a_bad_value(key: str, value: object, said: str) -> None:
    config = load("pixar_style")
    _set(config, key, value)
    assert any(problem.startswith(said) for problem in check(config)), check(config)


def test_int8_layers_do_not_go_to_main_memory() -> None:
    config = load("pirate_chat", ["model.quantize=int8", "model.offload=true"])
    assert check(config) == [
        "model.offload=true needs model.quantize=nf4 or none: int8 layers stay on the GPU once used"
    ]


def test_check_names_all_bad_values_at_once() -> None:
    config = load("pixar_style")
    for key, value, _ in BAD:
        if key != "model.bucket_step":  # hides the rule about multiples
            _set(config, key, value)
    assert len(check(config)) == len(BAD) - 1


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
