"""What a server prints is pasted: the shell, Hydra and Python read the very names and settings."""

import ast
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import finetune
from finetune.config import compose
from finetune.config.schema import Config, ExportFormat
from finetune.config.spelling import override
from finetune.errors import ConfigError
from finetune.run.receipts import save_receipt
from finetune.run.records import Adapter
from finetune.serving.diffusion import ImageService
from finetune.serving.language import LanguageService
from finetune.stages.serve import serving

NAME = 'my run (2) = it\'s [ä], "x"'
ODD = {"name": NAME, "lora.rank": 3, "run_dir": "out/a=b,c [1]/it's"}


@pytest.mark.parametrize("recipe", ["smoke", "it's mine, [2]"])
def test_the_command_that_trains_what_is_served_is_the_recipe_with_its_settings(
    language_config: Config, workdir: Path, capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    (workdir / "conf").mkdir()
    (workdir / "conf" / "it's mine, [2].yaml").write_text("defaults: [smoke]\n")
    language_config.serve.port = 0
    given = [override("conf", recipe), *(override(key, value) for key, value in ODD.items())]
    with serving(language_config, [*given, "serve.port=0", "serve=default"]):
        words = shlex.split(capsys.readouterr().err.partition("train one: ")[2].splitlines()[0])
    assert words == ["finetune", "train", *given]
    again = finetune.load(recipe, words[3:])
    assert (again.name, again.lora.rank, again.run_dir) == tuple(ODD.values())


@pytest.mark.parametrize(("name", "recipe"), [("smoke", "conf=smoke"), (NAME, "conf=…")])
def test_a_server_of_a_run_folder_names_the_recipe_if_there_is_one_of_that_name(
    language_config: Config, capsys: pytest.CaptureFixture[str], name: str, recipe: str
) -> None:
    language_config.serve.port, language_config.name = 0, name
    with serving(language_config, ["run_dir=out"]):
        words = shlex.split(capsys.readouterr().err.partition("train one: ")[2].splitlines()[0])
    assert words == ["finetune", "train", recipe, "run_dir=out"]


def test_a_server_of_a_configuration_is_trained_with_that_configuration(
    language_config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    language_config.serve.port, language_config.sample.prompts = 0, []
    language_config.trainer.steps, language_config.trainer.validate_every = 1, 0
    with finetune.serve(language_config):
        offered = capsys.readouterr().err.partition("train one: ")[2].splitlines()[0]
    eval(offered, {"finetune": finetune, "config": language_config})
    with finetune.serve(language_config) as server:
        assert f"base:{language_config.name}" in server.models


def test_a_run_without_a_peft_folder_is_exported_with_one_besides(language_config: Config, tmp_path: Path) -> None:
    config = language_config
    config.run_dir, config.serve.port = str(tmp_path / "it's a=b, [1]"), 0
    record = Adapter(str(tmp_path), {"kohya": "x.safetensors", "ema": "y"}, {}, "base", "")
    save_receipt(Path(config.run_dir), "export", record, input_hash="", seconds=1.0, figures={})
    with pytest.raises(ConfigError) as error, serving(config):
        pass
    words = shlex.split(str(error.value).partition("type: ")[2])
    assert words[:2] == ["finetune", "export"]
    again = compose.apply(Config(), words[2:])
    assert (again.run_dir, again.export.formats) == (config.run_dir, [ExportFormat.kohya, ExportFormat.peft])


@pytest.mark.parametrize("key", ["", "KEY"])
@pytest.mark.parametrize("kind", [LanguageService, ImageService])
def test_the_requests_that_are_shown_name_the_model_as_it_is(kind: Any, key: str) -> None:
    canvas = SimpleNamespace(prompt='it\'s a "red" robot')
    service = SimpleNamespace(shelf=SimpleNamespace(default=f"base:{NAME}"), canvas=canvas)
    shell, python = kind.examples(service, "http://127.0.0.1:8000", key)
    assert shlex.split(shell)[0] == "curl"
    call = ast.parse(python, mode="eval").body
    assert isinstance(call, ast.Call)
    given = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    assert given["model"] == f"base:{NAME}"
    if kind is ImageService:
        assert given["prompt"] == canvas.prompt
    (client,) = (node for node in ast.walk(call) if isinstance(node, ast.Call) and node is not call)
    options = {word.arg: ast.literal_eval(word.value) for word in client.keywords}
    assert options == {"base_url": "http://127.0.0.1:8000/v1", "api_key": key or "none"}
