"""The Python functions: order of the stages, the run folder's lock and configuration, errors."""

import errno
import os
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import finetune
from finetune import api
from finetune.config.describe import as_dict
from finetune.config.schema import Config, Device
from finetune.errors import ConfigError, ModelError, OutOfMemory, RunError
from finetune.run import rundir
from finetune.run.receipts import save_receipt
from finetune.run.records import Adapter, CaptionSet, Dataset, Report, Result, Run, Samples
from finetune.stages import COMMANDS, Command
from tests.conftest import Answer

pytestmark = pytest.mark.usefixtures("example_data")

RUN = Run("run", "run/checkpoints/step-4", 4, 1, 10, 1.0, 0.5, None, None, None, "images", 8, 1.0, 0.1, 0, "hash")
RECORDS: dict[str, Any] = {
    "caption": CaptionSet("pics", ()),
    "dataset": Dataset("index", 1, 0, {}, "empty"),
    "train": RUN,
    "export": Adapter("run/adapter", {"peft": "peft"}, {}, "base", ""),
    "sample": Samples("run/samples", "run/samples/grid.png", ()),
    "report": Report("run/report.html"),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...]]]:
    """Stages that only record their arguments."""
    seen: list[tuple[str, tuple[Any, ...]]] = []

    def recording(name: str) -> Callable[..., Any]:
        def stage(config: Config, *arguments: Any, **_: Any) -> Any:
            seen.append((name, arguments))
            return RECORDS[name]

        return stage

    import finetune.stages

    for name in RECORDS:
        module = types.ModuleType(f"finetune.stages.{name}")
        setattr(module, name, recording(name))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(finetune.stages, name, module, raising=False)
    return seen


@pytest.fixture
def plain(workdir: Path) -> Config:
    """A configuration that passes every check and loads nothing."""
    return finetune.load("smoke", ["run_dir=run"])


def stage_names(calls: list[tuple[str, tuple[Any, ...]]]) -> list[str]:
    return [name for name, _ in calls]


def finished(config: Config) -> None:
    save_receipt(Path(config.run_dir), "train", RUN, input_hash="", seconds=1.0, figures={})


# -- the public names ----------------------------------------------------------------------------------------------


def test_public_names_are_pinned() -> None:
    assert sorted(finetune.__all__) == [
        "Config", "caption", "chat", "dataset", "draw", "export", "load", "plan", "profile", "report", "sample",
        "serve", "train",
    ]  # fmt: skip
    assert all(getattr(finetune, name) for name in finetune.__all__)
    assert set(finetune.__all__) <= set(dir(finetune))


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(AttributeError, match=r"has no attribute 'tune'; it offers Config, caption, chat"):
        finetune.tune  # noqa: B018


@pytest.mark.parametrize(
    "code", ["import finetune", "import finetune; finetune.load('pixar_style'); finetune.train", "import finetune.cli"]
)
def test_importing_and_loading_do_not_import_torch(code: str) -> None:
    subprocess.run([sys.executable, "-c", f"{code}; import sys; assert 'torch' not in sys.modules"], check=True)


# -- the order of the stages ---------------------------------------------------------------------------------------


def test_train_runs_the_whole_line(plain: Config, calls: list[Any]) -> None:
    result = finetune.train(plain)
    assert calls == [
        ("caption", ()),
        ("dataset", (RECORDS["caption"],)),
        ("train", (RECORDS["dataset"],)),
        ("export", (RUN,)),
        ("sample", (RECORDS["export"],)),
        ("report", ()),
    ]
    assert result == Result(*RECORDS.values())


@pytest.mark.parametrize("verb", ["train", "dataset"])
def test_an_adapter_to_start_from_is_looked_for_before_anything_is_made(
    workdir: Path, calls: list[Any], verb: str
) -> None:
    Path("begun/checkpoints/step-000001").mkdir(parents=True)
    Path("begun/checkpoints/step-000001/adapter.safetensors").touch()
    for path in ("nowhere", "begun", "begun/checkpoints/step-000001"):
        config = finetune.load("smoke", ["run_dir=run", f"lora.start_from={path}"])
        if verb == "dataset":  # which has no use for it
            finetune.dataset(config)
            continue
        with pytest.raises(ModelError, match=rf"^lora.start_from={path} names no adapter; name a run folder"):
            finetune.train(config)
    assert stage_names(calls) == ([] if verb == "train" else ["caption", "dataset"] * 3)


def test_caption_and_dataset_run_what_they_need(plain: Config, calls: list[Any]) -> None:
    assert finetune.caption(plain) is RECORDS["caption"]
    assert finetune.dataset(plain) is RECORDS["dataset"]
    assert stage_names(calls) == ["caption", "caption", "dataset"]


def test_a_recipe_by_name_takes_overrides(workdir: Path, calls: list[Any]) -> None:
    finetune.caption("smoke", ["run_dir=here", "lora.rank=3"])
    assert yaml.safe_load(Path("here/config.yaml").read_text())["lora"]["rank"] == 3


@pytest.mark.parametrize("verb", ["export", "report"])
def test_what_needs_a_finished_run_says_how_to_get_one(plain: Config, calls: list[Any], verb: str) -> None:
    with pytest.raises(RunError, match=r"^run holds no finished run; .*train first"):
        getattr(finetune, verb)(plain)
    assert calls == []
    finished(plain)
    assert getattr(finetune, verb)(plain) is RECORDS[verb]


def test_sample_exports_a_finished_run_first(plain: Config, calls: list[Any]) -> None:
    finished(plain)
    finetune.sample(plain)
    assert calls == [("export", (RUN,)), ("sample", (RECORDS["export"],))]


@pytest.mark.parametrize("verb", ["export", "sample"])
def test_an_adapter_keeps_the_name_and_the_trigger_of_its_run(
    workdir: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    seen: list[Config] = []
    trained = finetune.load("smoke", ["run_dir=run", "name=mine", "caption.trigger=mine style"])
    finetune.train(trained)
    finished(trained)
    monkeypatch.setattr(
        sys.modules["finetune.stages.export"], "export", lambda config, run: seen.append(config) or RECORDS["export"]
    )
    getattr(finetune, verb)("smoke", ["run_dir=run", "export.tolerance=1e-3"])
    assert [(config.name, config.caption.trigger) for config in seen] == [("mine", "mine style")]
    assert seen[0].export.tolerance == 1e-3
    Path("run/config.yaml").write_text("a: [")
    with pytest.raises(RunError, match=r"run/config.yaml is damaged"):
        getattr(finetune, verb)("smoke", ["run_dir=run"])


@pytest.mark.parametrize("verb", ["train", "export", "sample"])
def test_offload_without_a_gpu_is_warned_about_once(
    plain: Config, calls: list[Any], capfd: pytest.CaptureFixture[str], verb: str
) -> None:
    plain.model.offload, plain.hardware.device = True, Device.cpu
    finished(plain)
    getattr(finetune, verb)(plain)
    line = "model.offload=true changes nothing without a CUDA GPU"
    assert capfd.readouterr().err.count(line) == 1
    plain.model.offload = False
    getattr(finetune, verb)(plain)
    assert line not in capfd.readouterr().err


def test_sample_draws_with_any_adapter(plain: Config, calls: list[Any]) -> None:
    finished(plain)
    finetune.sample(plain, ["sample.adapter=elsewhere"])
    assert calls == [("sample", (None,))]


def test_sample_draws_with_an_exported_adapter_whose_run_is_gone(plain: Config, calls: list[Any]) -> None:
    save_receipt(Path("run"), "export", RECORDS["export"], input_hash="", seconds=1.0, figures={})
    finetune.sample(plain)
    assert calls == [("sample", (RECORDS["export"],))]


def test_sample_without_any_adapter_is_an_error(plain: Config) -> None:
    with pytest.raises(ModelError, match=r"has no adapter; .*sample\.adapter="):
        finetune.sample(plain)


# -- a command without a function of its own -----------------------------------------------------------------------


@pytest.fixture
def add_command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Adds the command `look` with that row, whose stage is `work`."""

    def add(work: Callable[[Config], Any], **row: Any) -> None:
        module = types.ModuleType("finetune.stages.look")
        module.look = work  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(COMMANDS, "look", Command(help="look at it", **row))

    return add


def test_a_row_and_a_stage_make_a_command(plain: Config, add_command: Any, finetune_cli: Callable[..., Any]) -> None:
    add_command(lambda config: Report(f"{config.run_dir}/{config.seed}"))
    assert api.look(plain, ["seed=3"]) == Report("run/3")
    assert Path("run/config.yaml").is_file()
    assert "look at it" in finetune_cli("--help").out
    answer = finetune_cli("look", "conf=smoke", "run_dir=other", "seed=4")
    assert (answer.code, answer.out) == (0, "report: other/4\n")


def test_a_command_that_holds_no_folder_makes_none_and_keeps_nobody_out(plain: Config, add_command: Any) -> None:
    add_command(lambda config: Report(""), holds_folder=False)
    api.look(plain)
    assert not Path("run").exists()
    with rundir.held(Path("run"), as_dict(plain)):
        api.look(plain)
    add_command(lambda config: _failing(errno.ENOSPC)(), holds_folder=False)
    with pytest.raises(RunError, match="the disk of run is full"):
        api.look(plain)


def test_a_row_says_what_a_command_needs(plain: Config, add_command: Any) -> None:
    add_command(lambda config: Report(""), needs_run=True, holds_folder=False)
    with pytest.raises(RunError, match="holds no finished run"):
        api.look(plain)
    finished(plain)
    api.look(plain)
    add_command(lambda config: Report(""), needs_prompts=True)
    with pytest.raises(ConfigError, match=r"sample\.prompts is empty"):
        api.look(plain, ["sample.prompts=[]"])


def test_a_name_that_is_no_command_is_none_of_api() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'look'"):
        _ = api.look


# -- refusals before anything is touched ---------------------------------------------------------------------------


def test_every_bad_value_is_named_and_nothing_is_made(workdir: Path, calls: list[Any]) -> None:
    with pytest.raises(ConfigError) as raised:
        finetune.sample("smoke", ["lora.rank=0", "optim.lr=0", "sample.prompts=[]"])
    lines = str(raised.value).splitlines()
    assert [line.split()[0] for line in lines] == ["lora.rank", "optim.lr", "sample.prompts"]
    assert (calls, [path.name for path in workdir.iterdir()]) == ([], ["datasets"])


def test_a_warm_up_longer_than_the_run_is_said_in_one_line_by_train_alone(
    plain: Config, calls: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    finetune.train(plain)  # a shipped recipe says nothing
    assert capfd.readouterr().err == ""
    plain.optim.warmup_steps = 50
    finetune.caption(plain)
    finetune.train(plain)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: optim.warmup_steps=50 is longer than the run (trainer.steps=2)")


def test_overrides_apply_to_a_config_too(plain: Config, calls: list[Any]) -> None:
    with pytest.raises(ConfigError, match=r"lora.rank must be at least 1"):
        finetune.train(plain, ["lora.rank=0"])


# -- the run folder ------------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused_with_its_owner(plain: Config, calls: list[Any]) -> None:
    owner = rf"^run is in use by process {os.getpid()} since 20\d\d-.*run_dir=PATH"
    with rundir.held(Path(plain.run_dir), as_dict(plain)), pytest.raises(RunError, match=owner):
        finetune.caption(plain)
    assert calls == []
    finetune.caption(plain)  # free again


def test_a_folder_in_use_by_another_process(plain: Config, calls: list[Any]) -> None:
    code = (
        "import sys; from pathlib import Path; from finetune.run import rundir\n"
        "with rundir.held(Path('run'), {}): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"in use by process {other.pid} since"):
            finetune.caption(plain)
        other.kill()
        other.wait()
    finetune.caption(plain)  # the lock died with its process


def test_a_folder_in_use_by_a_process_that_has_not_left_its_name_yet(plain: Config, calls: list[Any]) -> None:
    with rundir.held(Path(plain.run_dir), as_dict(plain)):
        Path("run/.lock.json").unlink()
        with pytest.raises(RunError, match="in use by another process"):
            finetune.caption(plain)


def test_a_folder_that_cannot_be_made(plain: Config, calls: list[Any]) -> None:
    Path("file").write_text("")
    plain.run_dir = "file/run"
    with pytest.raises(RunError, match=r"run folder file/run \(Not a directory\).*run_dir=PATH"):
        finetune.caption(plain)


@pytest.mark.parametrize("there", [False, True])
def test_a_command_that_fails_at_once_leaves_no_folder(plain: Config, there: bool) -> None:
    plain.run_dir = "a/b/run"
    if there:
        Path("a/b/run").mkdir(parents=True)
    with pytest.raises(ModelError, match="has no adapter"):
        finetune.sample(plain)
    assert Path("a/b/run").exists() == there
    assert Path("a").exists() == there


def test_a_command_that_fails_later_leaves_what_it_has_done(
    plain: Config, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: Config, captions: Any) -> Any:
        save_receipt(Path(config.run_dir), "caption", RECORDS["caption"], input_hash="", seconds=1.0, figures={})
        raise RunError("no")

    monkeypatch.setattr(sys.modules["finetune.stages.dataset"], "dataset", fail)
    with pytest.raises(RunError, match="no"):
        finetune.dataset(plain)
    assert Path("run/receipts/caption.json").is_file()
    assert Path("run/config.yaml").is_file()


def test_a_read_only_folder(plain: Config, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_bytes", _failing(errno.EROFS))  # permissions don't bind root, who may run tests
    with pytest.raises(RunError, match=r"run folder run \(Read-only file system\).*run_dir=PATH"):
        finetune.caption(plain)
    assert calls == []


@pytest.mark.parametrize("where", ["probe", "stage"])
def test_a_full_disk(plain: Config, calls: list[Any], monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    if where == "probe":
        monkeypatch.setattr(Path, "write_bytes", _failing(errno.ENOSPC))
    else:
        monkeypatch.setattr(sys.modules["finetune.stages.caption"], "caption", _failing(errno.ENOSPC))
    with pytest.raises(RunError, match=r"disk of run is full.*run_dir=PATH"):
        finetune.caption(plain)


def test_a_file_that_is_too_large(plain: Config, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["finetune.stages.caption"], "caption", _failing(errno.EFBIG))
    with pytest.raises(RunError, match=r"file in run is too large .*ulimit -f.*run_dir=PATH"):
        finetune.caption(plain)


def test_a_file_of_the_run_folder_that_cannot_be_used_is_named(
    plain: Config, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any) -> None:
        (Path(plain.run_dir) / "trained_on.json").mkdir()
        (Path(plain.run_dir) / "trained_on.json").read_text()

    monkeypatch.setattr(sys.modules["finetune.stages.caption"], "caption", read)
    with pytest.raises(RunError, match=r"cannot use run/trained_on.json \(Is a directory\)"):
        finetune.caption(plain)


@pytest.mark.parametrize("then", ["fails", "ends", "writes"])
def test_a_run_folder_that_is_renamed_meanwhile(
    plain: Config, calls: list[Any], monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    def rename(*_: Any) -> Any:
        Path("run").rename("renamed")
        if then == "fails":
            Path("run/metrics.jsonl").write_text("{}")
        if then == "writes":
            rundir.write_config({}, Path("run"))
        return RECORDS["caption"]

    monkeypatch.setattr(sys.modules["finetune.stages.caption"], "caption", rename)
    with pytest.raises(RunError, match=r"run was renamed, moved or deleted .*type the same command") as error:
        finetune.caption(plain)
    assert ("delete what is in run now" in str(error.value)) == (then == "writes")
    assert Path("renamed/config.yaml").is_file()


def test_what_a_killed_process_left_is_removed_at_the_next_start(plain: Config, calls: list[Any]) -> None:
    Path("run/receipts").mkdir(parents=True)
    for name in ("receipts/.caption.json.123.tmp", ".config.yaml.123.tmp", "mine.tmp"):
        Path("run", name).write_text("half")
    finetune.caption(plain)
    assert [path.name for path in Path("run").rglob("*.tmp")] == ["mine.tmp"]


@pytest.mark.sampled
@pytest.mark.parametrize(
    "text",
    [
        *("name: ../../../x", "name: /tmp/x", "name: ''", "name: .", "name: [a]", "name: 5", "caption: {trigger: [a]}"),
        *(
            "caption: [a]",
            "caption: text",
            "sample: 5",
            "[]",
            "text",
            "5",
            "a: [",
            "2024-99-99",
            "? : :",
            "[" * 5000,
            "",
        ),
    ],
)
def test_a_damaged_or_hostile_config_yaml_is_one_line(plain: Config, calls: list[Any], text: str) -> None:
    """A name in it is part of exported files' names: nothing is written outside the run folder."""
    finished(plain)
    before = sorted(Path().iterdir())
    for content in (text.encode(), text.encode() + b"\n# \xff"):
        Path("run/config.yaml").write_bytes(content)
        with pytest.raises(RunError, match=r"run/config.yaml is damaged .*`train` command writes it again") as error:
            finetune.export(plain)
        assert "\n" not in str(error.value)
    assert calls == []
    assert sorted(Path().iterdir()) == before


def test_other_os_errors_keep_their_words(plain: Config, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["finetune.stages.caption"], "caption", _failing(errno.ENOENT))
    with pytest.raises(FileNotFoundError):
        finetune.caption(plain)


def _failing(number: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        (["trainer.micro_batch=6", "trainer.accumulate=2"], "try trainer.micro_batch=3 trainer.accumulate=4"),
        (["trainer.micro_batch=1"], "try trainer.activation_checkpointing=1"),
        (["trainer.micro_batch=1", "trainer.activation_checkpointing=2"], "try trainer.activation_checkpointing=1"),
        (
            ["trainer.micro_batch=1", "trainer.activation_checkpointing=1"],
            "try model.resolution=64, or a smaller base model",
        ),
    ],
)
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB\nlong advice"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_out_of_memory_suggests_what_to_try(
    plain: Config,
    calls: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    overrides: list[str],
    advice: str,
) -> None:
    def fail(config: Config) -> Any:
        raise error

    monkeypatch.setattr(sys.modules["finetune.stages.caption"], "caption", fail)
    with pytest.raises(OutOfMemory) as raised:
        finetune.train(plain, overrides)
    assert str(raised.value) == f"out of memory; {advice}"


def test_another_runtime_error_is_not_taken_for_memory(
    plain: Config, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: Config) -> Any:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(sys.modules["finetune.stages.caption"], "caption", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        finetune.train(plain)


# -- config.yaml ---------------------------------------------------------------------------------------------------


def test_config_yaml_is_the_same_from_python_and_the_command_line(
    workdir: Path, calls: list[Any], finetune_cli: Callable[..., Any]
) -> None:
    words = ["run_dir=run", "lora.rank=4", "optim.lr=1e-05", 'caption.prefix="ä, b"', "trainer.precision=bf16"]
    finetune.caption("smoke", words)
    python = Path("run/config.yaml").read_bytes()
    Path("run/config.yaml").unlink()
    assert finetune_cli("caption", "conf=smoke", *words).code == 0
    assert Path("run/config.yaml").read_bytes() == python
    assert yaml.safe_load(python) == as_dict(finetune.load("smoke", words))


def test_config_yaml_belongs_to_training(plain: Config, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def rank() -> int:
        return int(yaml.safe_load(Path("run/config.yaml").read_text())["lora"]["rank"])

    def refuse(config: Config, dataset: Dataset) -> Any:
        raise RunError("was trained with other settings")

    finetune.caption(plain, ["lora.rank=2"])
    assert rank() == 2  # there was none
    finetune.caption(plain, ["lora.rank=3"])
    assert rank() == 2
    finetune.train(plain, ["lora.rank=4"])
    assert rank() == 4
    finished(plain)
    finetune.sample(plain, ["lora.rank=5"])
    assert rank() == 4
    monkeypatch.setattr(sys.modules["finetune.stages.train"], "train", refuse)
    with pytest.raises(RunError, match="other settings"):
        finetune.train(plain, ["lora.rank=6"])
    assert rank() == 4  # still says how the run in this folder was trained


def test_two_runs_in_one_process_do_not_disturb_one_another(workdir: Path, calls: list[Any]) -> None:
    finetune.train("smoke", ["run_dir=one", "seed=1"])
    finetune.train("smoke", ["run_dir=two", "seed=2"])
    assert [yaml.safe_load(Path(name, "config.yaml").read_text())["seed"] for name in ("one", "two")] == [1, 2]


def test_records_survive_asdict() -> None:
    assert asdict(Result(*RECORDS.values()))["run"]["steps"] == 4
    assert api.train.__doc__


# -- the real stages, on models built in code ----------------------------------------------------------------------


def test_the_whole_line_with_tiny_models(config: Config) -> None:
    folder = Path(config.data.folder)
    folder.mkdir()
    for index, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (64, 64 if index % 2 else 40), colour).save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(f"a {colour} wall")
    first = finetune.train(config)
    assert first.run.steps == config.trainer.steps
    for path in (first.adapter.folder, first.samples.grid, first.report.file, config.run_dir + "/tensorboard"):
        assert Path(path).exists()
    before = Path(first.report.file).stat().st_mtime_ns, Path(first.samples.grid).stat().st_mtime_ns
    again = finetune.train(config)
    assert asdict(again) == asdict(first)
    assert before[1] == Path(first.samples.grid).stat().st_mtime_ns  # up to date, not drawn again
    drawn = finetune.sample(config, ['sample.prompts=["a blue wall","a red wall"]'])
    assert [item.prompt for item in drawn.items] == ["a blue wall", "a red wall"]
    assert Path(drawn.grid).is_file()
    assert Path(drawn.folder).parent == Path(config.run_dir, "samples_more")
    assert Path(drawn.folder).name.startswith("a-blue-wall-")
    assert before[1] == Path(first.samples.grid).stat().st_mtime_ns  # the run's own stay up to date
    assert finetune.sample(config) == first.samples
    assert before[1] == Path(first.samples.grid).stat().st_mtime_ns
    assert finetune.export(config) == first.adapter
    assert first._repr_html_()  # type: ignore[attr-defined]
    page = Path(first.report.file).read_text()
    assert "<li>no examples are held out (under 20 none are)" in page
    assert page.count("no examples are held out") == 1


@pytest.mark.parametrize("setting", ["hardware.device=cuda", "trainer.precision=fp16"])
@pytest.mark.parametrize("verb", ["train", "caption", "dataset", "sample"])
def test_what_the_machine_cannot_do_is_refused_before_anything_is_read(
    verb: str, setting: str, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=setting):
        getattr(finetune, verb)("smoke", [setting])
    assert [path.name for path in workdir.iterdir()] == ["datasets"]


def test_a_forgotten_variable_of_a_launcher_is_one_line(
    workdir: Path, finetune_cli: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    answer = finetune_cli("train", "conf=smoke")
    assert (answer.code, len(answer.errors)) == (2, 1)
    assert "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set" in answer.errors[0]
    assert [path.name for path in workdir.iterdir()] == ["datasets"]


@pytest.mark.parametrize(
    ("given", "expected"), [({}, "12000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "None")]
)
def test_threads_wait_for_work_as_long_as_the_user_says(given: dict[str, str], expected: str) -> None:
    plain = {name: value for name, value in os.environ.items() if name not in finetune.WAITING}
    program = "import os, finetune; print(os.environ.get('GOMP_SPINCOUNT'))"
    ended = subprocess.run([sys.executable, "-c", program], env=plain | given, capture_output=True, text=True)
    assert ended.stdout.strip() == expected
