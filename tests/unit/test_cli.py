"""The command line: what it answers, what it refuses, and in which words."""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune import api, errors
from finetune.config import describe, recipes
from finetune.config.schema import Config
from finetune.errors import ConfigError
from finetune.planning.plan import Plan, Setting
from finetune.reporting import terminal
from finetune.run.receipts import receipt_path, save_receipt
from finetune.run.records import Adapter, CaptionSet, Dataset, Report, Result, Run, Samples
from finetune.run.room import Need
from finetune.stages import COMMANDS

Cli = Callable[..., Any]


def python(*words: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program of its own: what it imports and where it writes is nobody else's."""
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.sampled
@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp437"])
def test_a_terminal_that_lacks_letters_ends_no_command(workdir: Path, encoding: str) -> None:
    """`→`, `×` and the user's own words are on the screen of most commands."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    words = [sys.executable, "-m", "finetune", "train", "conf=smoke", "caption.trigger=猫 ä", "--cfg", "job"]
    ended = subprocess.run(words, capture_output=True, cwd=workdir, env=environment, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert b"trigger: " in ended.stdout


@pytest.mark.parametrize("closed", ["2>&-", "0<&- 1>&- 2>&-"])
def test_a_command_without_standard_streams_keeps_its_exit_code(closed: str) -> None:
    line = f"exec {shlex.quote(sys.executable)} -m finetune plan conf=nobody {closed}"
    assert subprocess.run(["bash", "-c", line], check=False).returncode == ConfigError.exit_code


# -- help ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["train", "--help"]])
def test_help_lists_commands_and_recipes(finetune_cli: Cli, words: list[str]) -> None:
    answer = finetune_cli(*words)
    assert answer.code == 0
    for name in [
        *COMMANDS,
        *recipes.recipe_files(),
        "conf=pixar_style",
        "trainer.micro_batch",
        "data.file",
        " model ",
    ]:
        assert name in answer.out


@pytest.mark.parametrize("words", [["--help"], ["annotate", "--help"], ["--help", "frames"]])
def test_help_fits_a_terminal(finetune_cli: Cli, words: list[str]) -> None:
    assert max(map(len, finetune_cli(*words).out.splitlines())) <= 80


def test_help_of_a_video_command_lists_its_settings(finetune_cli: Cli) -> None:
    shown = finetune_cli("annotate", "--help", "conf=toy_video").out.splitlines()
    assert shown[:3] == ["settings of annotate", "video=", "    The video file."]
    assert "rate=5" in shown
    assert "detector=" in shown
    assert "margin=0.15" in finetune_cli("frames", "--help").out.splitlines()


def test_help_shows_each_recipes_first_comment_line(finetune_cli: Cli, workdir: Path) -> None:
    (workdir / "conf").mkdir()
    (workdir / "conf" / "mine.yaml").write_text("# Images of my garden.\nseed: 3\n")
    assert re.search(r"^  mine +Images of my garden\.$", finetune_cli("--help").out, re.MULTILINE)


def test_help_imports_neither_torch_nor_hydra() -> None:
    code = "import sys; from finetune.cli import main; main(['--help']); print({'torch', 'hydra'} & {*sys.modules})"
    assert python("-c", code).stdout.endswith("set()\n")


def test_help_with_a_recipe_shows_keys_and_presets(finetune_cli: Cli) -> None:
    answer = finetune_cli("train", "conf=pixar_style", "--help")
    assert answer.code == 0
    assert "lora: all_linear, default, r32" in answer.out
    assert "caption_dropout" in answer.out
    assert max(map(len, answer.out.splitlines())) <= 80


@pytest.mark.parametrize("first", ["--help", "help", "-h"])
def test_every_key_is_shown_with_its_value_and_meaning(finetune_cli: Cli, first: str) -> None:
    answer = finetune_cli(first, "conf=pirate_chat", "lora.rank=7")
    assert (answer.code, answer.err) == (0, "")
    lines = answer.out.splitlines()
    texts = describe.meanings()
    assert texts.keys() == describe.leaf_types().keys()
    assert texts["lora.rank"].endswith(" Must be at least 1, at most 16,384.")
    assert lines[lines.index("lora.rank=7") + 1] == "    " + texts["lora.rank"]
    assert "sample.guidance=7.5" not in lines  # a setting of image models


@pytest.mark.parametrize("words", ["--cfg job train conf=smoke", "--cfg job conf=smoke train"])
def test_flags_may_stand_before_the_command(finetune_cli: Cli, words: str) -> None:
    answer = finetune_cli(*words.split())
    assert (answer.code, yaml.safe_load(answer.out)["name"]) == (0, "smoke")


def test_version(finetune_cli: Cli) -> None:
    assert finetune_cli("--version").out.startswith("finetune ")


# -- the configuration, shown --------------------------------------------------------------------------------------


def test_cfg_job_prints_the_configuration_as_yaml(finetune_cli: Cli) -> None:
    answer = finetune_cli("train", "conf=pixar_style", "lora.rank=7", "--cfg", "job")
    assert (answer.code, answer.err) == (0, "")
    shown = yaml.safe_load(answer.out)
    assert shown["lora"]["rank"] == 7
    assert shown["name"] == "pixar_style"
    assert "hydra" not in shown
    assert "conf" not in shown


@pytest.mark.parametrize("words", ["--cfg job seed=5", "seed=5 --cfg job", "-c job seed=5 -p seed"])
def test_settings_may_stand_on_both_sides_of_a_flag(finetune_cli: Cli, words: str) -> None:
    answer = finetune_cli("train", "conf=smoke", *words.split())
    assert answer.code == 0
    assert "5" in answer.out


def test_info_lists_what_a_configuration_is_made_of() -> None:
    answer = python("-m", "finetune", "train", "conf=smoke", "--info", "defaults")  # sets up logging: not in here
    assert answer.returncode == 0
    assert "conf/pixar_style" in answer.stdout


def test_showing_a_configuration_does_not_import_torch_or_write() -> None:
    code = (
        "import sys; from finetune.cli import main; main(['train', 'conf=pixar_style', '--cfg', 'job']); "
        "print('torch' in sys.modules)"
    )
    assert python("-c", code).stdout.endswith("False\n")


def test_data_that_is_not_there_is_said_before_the_libraries_are_imported(workdir: Path) -> None:
    code = (
        "import sys; from finetune.cli import main\n"
        "for verb in ('train', 'dataset', 'caption', 'plan', 'profile'): main([verb, 'conf=smoke'])\n"
        "for verb in ('train', 'dataset', 'plan', 'profile'): main([verb, 'conf=pirate_chat'])\n"
        "print({'torch', 'transformers', 'diffusers', 'datasets'} & sys.modules.keys())"
    )
    answer = python("-c", code, cwd=workdir)
    assert answer.stdout == "set()\n"
    lines = answer.stderr.splitlines()
    assert [" ".join(line.split()[1:5]) for line in lines] == ["there is no folder"] * 5 + [
        "there is no datasets/pirate_chat/conversations.jsonl;"
    ] * 4
    assert not list(workdir.iterdir())


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian", "conf=pixar_style"], ["no command called 'trian'; did you mean train?"]),
        (["train"], ["conf= is missing: say which recipe"]),
        (["train", "conf=smoke", f"optim.lr={'1' * 400}"], ["optim.lr must be a number, got 1111"]),
        (["train", "conf=pixar_stile"], ["no recipe called 'pixar_stile'; did you mean pixar_style? there are: "]),
        (
            ["train", "conf=pixar_style", "lora.rnak=4", "optm.lr=1", "rank=3"],
            [
                "no key called lora.rnak; did you mean lora.rank?",
                "no key called optm.lr; did you mean optim.lr?",
                "no key called rank; did you mean lora.rank?",
            ],
        ),
        (
            ["train", "conf=pixar_style", "lora.rank=big", "seed=x", "trainer.precision=bf61", "data.flip=3"],
            [
                "lora.rank must be a whole number, got 'big'",
                "seed must be a whole number, got 'x'",
                "trainer.precision must be one of auto, fp32, bf16, fp16, got 'bf61'; did you mean bf16?",
                "data.flip must be true or false, got 3",
            ],
        ),
        (
            ["train", "conf=pixar_style", "trainer.activation_checkpointing=true"],
            ["trainer.activation_checkpointing must be 0 (none), 1 (every block) or n (every n-th block), got True"],
        ),
        (["train", "conf=pixar_style", "lora=r33"], ["no lora preset called 'r33'; did you mean r32?"]),
        (["train", "conf=pixar_style", "lora.rank=1,2"], ["lora.rank got several values (1,2)"]),
        (
            ["train", "conf=pixar_style", "caption.trigger=a robot, blue"],
            ["caption.trigger got several values (a robot, blue); if that is one text, quote it twice: "],
        ),
        (
            ["train", "pixar_style"],
            ["'pixar_style' is not a setting; settings are written key=value, such as conf=pix", "conf= is"],
        ),
        (
            ["train", "conf=smoke", "~lora.rank"],
            ["~lora.rank would delete a setting, which is not possible; give it a va"],
        ),
        (["train", "conf=smoke", 'caption.prefix="a'], ['cannot read caption.prefix="a; text with spaces']),
        (["train", "conf=smoke", "sample.prompts=[a:"], ["cannot read sample.prompts=[a:; a list of texts is quoted"]),
        (["train", "conf=smoke", "lora.rank = 8"], ["cannot read lora.rank = 8; write it without spaces: lora.rank=8"]),
        (
            ["train", "conf=smoke", "lora.rank=8,"],
            ["cannot read lora.rank=8,; lora.rank must be a whole number, got '8,'"],
        ),
        (
            ["train", "conf=smoke", "lora.rang=8,"],
            ["cannot read lora.rang=8,; no key called lora.rang; did you mean lo"],
        ),
        (
            ["train", "conf=smoke", "optim.lr=1e-4 lora.rank=8"],
            ["cannot read optim.lr=1e-4 lora.rank=8; optim.lr must be a number, got '1e-4 lora.rank=8'"],
        ),
        (
            ["train", "conf=smoke", "model=some/sd one"],
            ["no model preset called 'some/sd one'; type 'model.base=\"some/sd one\"' and the preset of its"],
        ),
        (["resume", "conf=smoke"], ["no command called 'resume'; did you mean train?"]),
        (["train", "conf=smoke", "hardware=gpu"], ["no hardware preset called 'gpu'; did you mean auto?"]),
        (
            ["train", "conf=smoke", "data.folder", "=", "my/pics"],
            ["'data.folder = my/pics' is not a setting; write it without spaces: data.folder=my/pics"],
        ),
        (["train", "conf=smoke", "--multirn"], ["no flag called --multirn; did you mean --multirun?"]),
        (
            ["--multirun", "conf=smoke", "seed=1,2"],
            ["say which command, such as: finetune train --multirun conf=smoke"],
        ),
        (["train", "conf=smoke", "-x"], ["no flag called -x"]),
        (
            ["train", "conf=smoke", "lora.rank=0", "optim.lr=-1"],
            ["lora.rank must be at least 1, got 0; try lora.rank=16", "optim.lr must be above 0, got -1.0"],
        ),
        (["sample", "conf=smoke", "sample.prompts=[]"], ["sample.prompts is empty"]),
        (["train", "conf=smoke", "data.folder=???"], ["data.folder is not set; type data.folder=…"]),
        (
            ["train", "conf=smoke", "name=${nothing}"],
            [r"Interpolation key 'nothing' not found; ${…} takes the value of another key, and \${…} is a text"],
        ),
    ],
)
def test_bad_configuration_gets_one_line_a_problem(
    finetune_cli: Cli, workdir: Path, words: list[str], said: list[str]
) -> None:
    answer = finetune_cli(*words)
    assert answer.code == errors.ConfigError.exit_code
    assert answer.out == ""
    assert len(answer.errors) == len(said), answer.err
    for line, start in zip(answer.errors, said, strict=True):
        assert line.startswith(f"error: {start}")
    assert list(workdir.iterdir()) == []  # nothing was made for a command that was refused


def test_unreadable_yaml_is_named(finetune_cli: Cli, workdir: Path) -> None:
    (workdir / "conf" / "lora").mkdir(parents=True)
    (workdir / "conf" / "broken.yaml").write_text("seed: 1\nlora: [\n")
    (workdir / "conf" / "lora" / "list.yaml").write_text("- 1\n")
    for chosen, said in {
        "conf=broken": "error: conf/broken.yaml, line 3 is not readable YAML: ",
        "lora=list": "error: conf/lora/list.yaml is not readable YAML: it holds a list",
    }.items():
        answer = finetune_cli("train", "conf=pixar_style", chosen)
        assert answer.code == errors.ConfigError.exit_code
        assert answer.err.startswith(said)
    unread = finetune_cli("train", "conf=pixar_style", "--cfg", "job")
    assert (unread.code, unread.err) == (0, ""), "a file that is not chosen stops nothing"


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.FinetuneError("no"), 1),
        (errors.DataError("no"), 3),
        (errors.ModelError("no"), 4),
        (errors.OutOfMemory("no"), 5),
        (errors.RunError("no"), 6),
        (errors.TrainingError("no"), 7),
        (errors.ExportError("no"), 8),
        (errors.Interrupted("no", 2), 130),
        (errors.Interrupted("no", 15), 143),
    ],
)
def test_each_error_has_its_exit_code(
    finetune_cli: Cli, workdir: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    monkeypatch.setattr(api, "train", _raising(error))
    answer = finetune_cli("train", "conf=smoke")
    assert (answer.code, answer.err) == (code, "no\n" if isinstance(error, errors.Interrupted) else "error: no\n")


def test_debug_shows_the_traceback(finetune_cli: Cli, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "train", _raising(errors.DataError("empty")))
    answer = finetune_cli("train", "conf=smoke", "--debug")
    assert answer.code == 3
    assert "Traceback" in answer.err
    assert answer.errors[-1] == "error: empty"


def test_a_bug_is_one_line_too(finetune_cli: Cli, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "train", _raising(ZeroDivisionError("division by zero")))
    answer = finetune_cli("train", "conf=smoke")
    assert answer.code == 1
    assert answer.errors == [
        "error: unexpected ZeroDivisionError: division by zero; --debug shows where, please report it"
    ]


def test_a_python_without_the_packages_is_told_where_they_are(
    finetune_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "hydra", None)
    answer = finetune_cli("train", "conf=smoke")
    assert answer.code == 1
    way = "take the Python that finetune was installed with: source .venv/bin/activate"
    assert answer.errors == [f"error: {sys.executable} has no package hydra; {way}"]


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("train", "interrupted; what is finished is kept: the same command goes on from there\n"),
        ("plan", "interrupted\n"),
    ],
)
def test_ctrl_c_outside_training(
    finetune_cli: Cli, workdir: Path, monkeypatch: pytest.MonkeyPatch, command: str, line: str
) -> None:
    monkeypatch.setattr(api, command, _raising(KeyboardInterrupt()))
    answer = finetune_cli(command, "conf=smoke")
    assert (answer.code, answer.err) == (130, line)


def _raising(error: BaseException) -> Callable[[Config], Any]:
    def raise_it(config: Config) -> Any:
        raise error

    return raise_it


# -- sweeps --------------------------------------------------------------------------------------------------------


def test_multirun_gives_each_job_a_folder_of_its_own(
    finetune_cli: Cli, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Config] = []
    monkeypatch.setattr(api, "caption", seen.append)
    monkeypatch.setattr(terminal, "show", lambda *_, began: None)
    assert finetune_cli("caption", "conf=smoke,pixar_style", "lora.rank=4,16", "--multirun").code == 0
    folders = [config.run_dir for config in seen]
    assert [config.lora.rank for config in seen] == [4, 16, 4, 16]
    assert folders[0] == str(workdir / "outputs/multirun/smoke/lora.rank=4")
    assert folders[3] == str(workdir / "outputs/multirun/pixar_style/lora.rank=16")
    assert len(set(folders)) == 4


def test_multirun_takes_names_and_texts_as_one_run_does(
    finetune_cli: Cli, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workdir / "conf").mkdir()
    for name in ("größe", "mit Leerzeichen", "a=b (2)"):
        (workdir / f"conf/{name}.yaml").write_text("defaults: [smoke]\n", encoding="utf-8")
    seen: list[Config] = []
    monkeypatch.setattr(api, "caption", seen.append)
    monkeypatch.setattr(terminal, "show", lambda *_, began: None)
    monkeypatch.setenv("HOME", str(workdir / "home"))
    assert finetune_cli("caption", "conf=größe,smoke,mit Leerzeichen,a=b (2)", "--multirun").code == 0
    assert [config.name for config in seen] == ["größe", "smoke", "mit Leerzeichen", "a=b (2)"]
    assert [config.run_dir for config in seen] == [str(workdir / f"outputs/multirun/{c.name}/all") for c in seen]
    seen.clear()
    words = ["data.folder=~/my pics,~/Bilder für mich", "caption.trigger=Mädchen,'a, b'"]
    assert finetune_cli("caption", "conf=größe", *words, "--multirun").code == 0
    assert [(config.data.folder, config.caption.trigger) for config in seen] == [
        (str(workdir / f"home/{folder}"), trigger)
        for folder in ("my pics", "Bilder für mich")
        for trigger in ("Mädchen", "a, b")
    ]
    assert len({config.run_dir for config in seen}) == 4
    for typed in ("größe,b", "choice(größe,b)", 'choice("größe",b)', "choice(größe, 'b')"):
        seen.clear()
        assert finetune_cli("caption", "conf=smoke", f"name={typed}", "--multirun").code == 0
        assert [config.name for config in seen] == ["größe", "b"]


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("spellings", "folders"),
    [
        (["name=größe,b", 'name="größe",b', "name='größe','b'", "name=choice(größe,b)"], ["name=-größe-", "name=b"]),
        (["sample.prompts=['größe'],[b]", 'sample.prompts=["größe"],["b"]'], ["sample.prompts=--größe--", "sample."]),
        (['data.folder=a b,"c"', "data.folder='a b',c"], ["data.folder=-a-b-", "data.folder=c"]),
    ],
)
def test_one_value_has_one_run_folder_however_it_is_quoted(
    finetune_cli: Cli, monkeypatch: pytest.MonkeyPatch, spellings: list[str], folders: list[str]
) -> None:
    seen: list[Config] = []
    monkeypatch.setattr(api, "caption", seen.append)
    monkeypatch.setattr(terminal, "show", lambda *_, began: None)
    for typed in spellings:
        assert finetune_cli("caption", "conf=smoke", typed, "--multirun").code == 0
    found = [Path(config.run_dir).name for config in seen]
    assert found == found[:2] * len(spellings)
    assert [name[: len(start)] for name, start in zip(found, folders, strict=False)] == folders


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("typed", "sets"),
    [
        ("sample.prompts=[größe],[b]", [["größe"], ["b"]]),
        ('sample.prompts=[größe, "a, b"], [x: y]', [["größe", "a, b"], ["x: y"]]),
        ("sample.prompts=choice([größe],[b])", [["größe"], ["b"]]),
        ("sample.prompts=[x [1], größe]", [["x [1]", "größe"]]),
    ],
)
def test_several_lists_are_offered_as_they_can_be_read(
    finetune_cli: Cli, monkeypatch: pytest.MonkeyPatch, typed: str, sets: list[list[str]]
) -> None:
    seen: list[Config] = []
    monkeypatch.setattr(api, "caption", seen.append)
    monkeypatch.setattr(terminal, "show", lambda *_, began: None)
    (line,) = finetune_cli("caption", "conf=smoke", typed, "--multirun").errors
    offered = line.partition("a list of texts is quoted twice: ")[2]
    assert finetune_cli("caption", "conf=smoke", *shlex.split(offered), "--multirun").code == 0
    assert [config.sample.prompts for config in seen] == sets


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("typed", "name", "path"),
    [
        ("serve.adapters={größe:run}", "gro_e", "run"),
        ('serve.adapters={"formal": "my run"}', "formal", "my run"),
        ("serve.adapters={'formal':größe}", "formal", "größe"),
        ("serve.adapters.größe=my run", "gro_e", "my run"),
    ],
)
def test_a_name_that_the_grammar_does_not_take_is_offered_as_it_does(
    finetune_cli: Cli, typed: str, name: str, path: str
) -> None:
    words = ["serve", "conf=pirate_chat", "--cfg", "job"]
    (line,) = finetune_cli(*words, typed).errors
    assert line.startswith(f"error: cannot read {typed}; ")
    offered = line.partition("(others stand in a recipe's file): ")[2]
    answer = finetune_cli(*words, *shlex.split(offered))
    assert (answer.code, f"    {name}: {path}\n" in answer.out) == (0, True)


@pytest.mark.sampled
@pytest.mark.parametrize("typed", ["'größe','b'", '"größe","b"', "größe,b", "'größe',b", "größe,'b'"])
def test_several_texts_are_offered_as_one(finetune_cli: Cli, typed: str) -> None:
    words = ["plan", "conf=pirate_chat", "--cfg", "job"]
    (line,) = finetune_cli(*words, f"name={typed}").errors
    offered = re.search(r"quote it twice: (.*); several runs need --multirun", line)
    assert offered is not None
    assert "\nname: größe,b\n" in f"\n{finetune_cli(*words, *shlex.split(offered[1])).out}"


@pytest.mark.sampled
@pytest.mark.parametrize(
    "call", ["shuffle(größe,b)", 'shuffle("größe",b)', 'sort(b,"größe")', "choice(größe)", "tag(ä,b)"]
)
def test_a_function_that_cannot_hold_a_text_is_refused_with_what_can(
    finetune_cli: Cli, workdir: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    seen: list[Config] = []
    monkeypatch.setattr(api, "caption", seen.append)
    monkeypatch.setattr(terminal, "show", lambda *_, began: None)
    answer = finetune_cli("caption", "conf=smoke", f"caption.trigger={call}", "--multirun")
    (line,) = answer.errors
    assert answer.code == ConfigError.exit_code
    assert line.startswith(f"error: cannot read caption.trigger={call}; one text is quoted twice: ")
    one, _, several = line.partition("quoted twice: ")[2].partition("; several values have only commas between them: ")
    for offered in (one, several):
        assert finetune_cli("caption", "conf=smoke", *shlex.split(offered), "--multirun").code == 0
    texts = call.partition("(")[2].removesuffix(")").replace('"', "").split(",")
    assert [config.caption.trigger for config in seen] == [call, *texts]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("conf=größe,", "error: cannot read conf=größe,; text with spaces, commas, colons or brackets is quoted"),
        ("conf=smoke,größe", "error: conf got several values"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_one_line(finetune_cli: Cli, word: str, said: str) -> None:
    answer = finetune_cli("caption", word)
    assert answer.code == 2
    assert [line.startswith(said) for line in answer.errors] == [True]


def test_multirun_below_a_folder_of_ones_own(finetune_cli: Cli, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Config] = []
    monkeypatch.setattr(api, "caption", seen.append)
    monkeypatch.setattr(terminal, "show", lambda *_, began: None)
    finetune_cli("caption", "conf=smoke", "seed=1,2", "run_dir=mine", "-m")
    assert [config.run_dir for config in seen] == [str(workdir / f"mine/smoke/seed={n}") for n in (1, 2)]


def test_a_tilde_is_the_home_folder(finetune_cli: Cli, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Config] = []
    monkeypatch.setattr(api, "caption", seen.append)
    monkeypatch.setattr(terminal, "show", lambda *_, began: None)
    monkeypatch.setenv("HOME", str(workdir / "home"))
    assert finetune_cli("caption", "conf=smoke", "data.folder=~/pics", "run_dir=~/out").code == 0
    assert finetune_cli("caption", "conf=smoke", "run_dir=~/out", "seed=1,2", "-m").code == 0
    assert seen[0].data.folder == str(workdir / "home/pics")
    folders = ["out", "out/smoke/seed=1", "out/smoke/seed=2"]
    assert [config.run_dir for config in seen] == [str(workdir / "home" / folder) for folder in folders]


def test_multirun_goes_on_after_a_failure_and_reports_it(
    finetune_cli: Cli, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def caption(config: Config) -> None:
        seen.append(config.seed)
        if config.seed == 1:
            raise errors.DataError("no images")

    monkeypatch.setattr(api, "caption", caption)
    monkeypatch.setattr(terminal, "show", lambda *_, began: None)
    answer = finetune_cli("caption", "conf=smoke", "seed=1,2", "-m")
    assert (seen, answer.code) == ([1, 2], 3)
    assert "error: no images" in answer.errors


def test_multirun_stops_at_an_interruption(finetune_cli: Cli, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def caption(config: Config) -> None:
        seen.append(config.seed)
        raise errors.Interrupted("saved", 15)

    monkeypatch.setattr(api, "caption", caption)
    assert finetune_cli("caption", "conf=smoke", "seed=1,2", "-m").code == 143
    assert seen == [1]


def test_a_sweep_ends_with_a_table_of_its_runs(
    finetune_cli: Cli, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(config: Config) -> Result:
        if config.seed == 2:
            raise errors.DataError("no images")
        return _result()

    monkeypatch.setattr(api, "train", train)
    monkeypatch.setattr(terminal, "show", lambda *_, began: None)
    answer = finetune_cli("train", "conf=smoke", "seed=1,2", "run_dir=mine", "-m")
    table = [line.split() for line in answer.out.splitlines() if line.startswith(("settings", "seed="))]
    assert table[0] == ["settings", "loss", "validation", "folder"]
    assert [(row[0], row[-1]) for row in table[1:]] == [(f"seed={n}", f"mine/smoke/seed={n}") for n in (1, 2)]
    assert "failed" in table[2]


# -- what a command leaves on the screen ---------------------------------------------------------------------------


def test_third_party_warnings_stay_quiet(workdir: Path) -> None:
    code = """
import sys, warnings
from finetune import api, cli
from finetune.reporting import terminal
def caption(config):
    warnings.warn_explicit("chatter", FutureWarning, "other.py", 1, module="transformers.models")
    warnings.warn_explicit("worth knowing", UserWarning, "ours.py", 1, module="finetune.data")
api.caption, terminal.show = caption, lambda *_, began: None
sys.exit(cli.main(["caption", "conf=smoke", *sys.argv[1:]]))
"""
    assert python("-c", code).stderr == "warning: worth knowing\n"
    assert "chatter" in python("-c", code, "--debug").stderr


def test_settings_reach_the_end_as_they_were_typed(
    finetune_cli: Cli, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(api, "caption", lambda config: seen.append(config.run_dir))
    monkeypatch.setattr(terminal, "show", lambda config, record, overrides, began: seen.append(overrides))
    words = ["conf=smoke", "seed=3", "run_dir=out/${seed}"]
    assert finetune_cli("caption", *words).code == 0
    assert seen == ["out/3", words]


def test_the_clock_starts_with_the_command_and_not_with_its_process(
    finetune_cli: Cli, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell's last command takes over its process, with all that the shell did before."""
    seen: list[float] = []
    monkeypatch.setattr(api, "caption", lambda _: None)
    monkeypatch.setattr(terminal, "show", lambda *_, began: seen.append(began))
    before = time.time()
    assert finetune_cli("caption", "conf=smoke").code == 0
    assert before <= seen[0] <= time.time()


def test_the_next_commands_repeat_the_settings(capsys: pytest.CaptureFixture[str], workdir: Path) -> None:
    overrides = ["conf=big", "name=mine", "model=sd15", "caption.prefix=a b", "run_dir=z", "sample.prompts=[x]"]
    terminal.show(Config(name="mine", run_dir="z"), _result(), overrides, began=time.time())
    out = capsys.readouterr().out
    assert out.splitlines()[0].rstrip() == "finetune train conf=big"  # the recipe, which a run of another name keeps
    assert "sample conf=big name=mine model=sd15 'caption.prefix=a b' run_dir=z 'sample.prompts=[" in out


def test_train_ends_with_a_table_and_the_next_commands(capsys: pytest.CaptureFixture[str], workdir: Path) -> None:
    config = Config(name="mine", run_dir="outputs/mine")
    result = _result()
    for stage, seconds in (("caption", 3.2), ("train", 61.0)):
        save_receipt(Path(config.run_dir), stage, Report("x"), input_hash="", seconds=seconds, figures={})
    skipped = receipt_path(Path(config.run_dir), "caption")
    os.utime(skipped, (0, 0))
    terminal.show(config, result, began=time.time() - 100)
    out = capsys.readouterr().out
    assert max(map(len, out.split("next\n")[0].splitlines())) <= 80
    for words in (
        "caption  train  rest  total",
        "      –     61    39    100",  # the clock's
        "1,200 images (in 150 steps, 133 visits an image)",
        "20.0 images/s",
        "1.50 GiB",
        "0.5000 → 0.2500",
        "0.4000 → 0.3000 (best at step 100)",
        "outputs/mine/adapter",
        "outputs/mine/samples/grid.png",
        "outputs/mine/report.html",
        "tensorboard --logdir outputs/mine/tensorboard",
        "sample conf=mine 'sample.prompts=[\"a big green fish in space, pixar style\"]'",
    ):
        assert words in out


def _result() -> Result:
    run = Run("outputs/mine", "c", 150, 1, 100, 0.5, 0.25, 0.4, 0.3, 100, "images", 1200, 60.0, 1.5, 0, "hash")
    return Result(
        CaptionSet("pics", ()),
        Dataset("i", 9, 1, {}, "e"),
        run,
        Adapter("outputs/mine/adapter", {}, {}, "base", "pixar style"),
        Samples("outputs/mine/samples", "outputs/mine/samples/grid.png", ()),
        Report("outputs/mine/report.html"),
    )


def test_misspelt_keys_wrong_types_and_wrong_values_are_named_at_once(finetune_cli: Cli) -> None:
    answer = finetune_cli(
        "train", "conf=pixar_style", "lora.rnk=3", "trainer.steps=abc", "seed=-1", "lora.dropout=2", "run_dir=nowhere"
    )
    assert answer.code == 2
    assert [line.split(" ", 1)[1].split(",")[0] for line in answer.errors] == [
        "no key called lora.rnk; did you mean lora.rank?",
        "trainer.steps must be a whole number",
        "seed must be in 0 … 2^63-1",
        "lora.dropout must be in 0 … 1 (1 excluded)",
    ]


# -- plan ----------------------------------------------------------------------------------------------------------


def planned(**changes: Any) -> Plan:
    fast = Setting(2, 4, 0, False, False, 0.25, 8, {"weights": 5.0, "activations": 10.0, "CUDA itself": 0.5})
    own = Setting(8, 1, 0, False, False, 0.5, 8, {"weights": 5.0, "activations": 40.0})
    phases = {"training": fast.gib, "encoding images": 3.0, "export": 7.25}
    found = Plan("smoke", "a/base", "a GPU", 23.5, "bf16", "none", "images", fast, own, (), phases, (), ("x" * 150,))
    return replace(found, **changes)


def test_plan_prints_a_table_of_80_columns_and_what_to_type(
    finetune_cli: Cli, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(
        api,
        "plan",
        lambda config: planned(
            cpu_gib={"export": 46.04, "training": 3.0},
            disk=Need(5e8, 1234, 3, 2e10),
            free_bytes=2e10,
            notes=("try 'export.formats=[peft]'", "x" * 150),
        ),
    )
    answer = finetune_cli("plan", "conf=smoke", "data.folder=images", "trainer.micro_batch=8", "trainer.accumulate=1")
    assert answer.code == 0, answer.err
    for word in ("weights", "CUDA itself", "phases", "export", "fastest", "own, too large", "32.0", "15.50"):
        assert word in answer.out
    assert "export.formats=[peft]" in answer.out  # no markup of a terminal
    assert "1,234 checkpoints of 500 MB" in answer.out
    assert "CPU memory  at most 46.0 GiB for export, 3.0 GiB for training" in answer.out
    table, command = answer.out.split("next\n")
    assert max(map(len, table.splitlines())) <= 80
    assert command.strip().endswith(
        "train conf=smoke data.folder=images trainer.micro_batch=2 trainer.accumulate=4 "
        "trainer.activation_checkpointing=0"
    )
    assert not (workdir / "outputs").exists()


def test_plan_says_in_one_line_and_an_exit_code_that_nothing_fits(
    finetune_cli: Cli, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = "training needs 30.0 GiB at least, and a GPU has 23.5; model.resolution=512 would fit"
    monkeypatch.setattr(api, "plan", lambda config: planned(chosen=None, problems=(problem,)))
    answer = finetune_cli("plan", "conf=smoke")
    assert answer.code == errors.OutOfMemory.exit_code == 5
    assert answer.err == f"error: {problem}\n"
    assert "next\n" not in answer.out
    short = "the disk of run is too small"
    for problems, code in (((problem,), errors.OutOfMemory.exit_code), ((), errors.RunError.exit_code)):
        found = planned(problems=problems, shortage=short)
        monkeypatch.setattr(api, "plan", lambda config, found=found: found)
        answer = finetune_cli("plan", "conf=smoke")
        assert (answer.code, answer.errors) == (code, [f"error: {line}" for line in (*problems, short)])
        assert "next\n" not in answer.out


def test_a_very_long_value_does_not_fill_the_screen(workdir: Path, finetune_cli: Cli) -> None:
    answer = finetune_cli("train", "conf=pixar_style", f"lora.rank={'x' * 100_000}")
    (line,) = answer.errors
    assert (answer.code, len(line) < 2100) == (2, True)
    assert line.startswith("error: lora.rank must be a whole number, got 'xxx")
