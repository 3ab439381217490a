"""Training to the end, interrupted and resumed, refused and set aside: the properties a user relies on."""

import gc
import json
import re
import shutil
import signal
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from finetune import kinds
from finetune.adapters import lora
from finetune.config.schema import CheckpointChoice, Config, ExportFormat, Schedule, Weighting
from finetune.errors import Interrupted, ModelError, RunError
from finetune.language import tokenize
from finetune.memory import block_offload
from finetune.run.receipts import load_receipt, receipt_path
from finetune.run.records import Dataset
from finetune.stages.export import export
from finetune.stages.sample import sample
from finetune.stages.train import train
from finetune.training import checkpoint
from finetune.training.task import Task
from tests import cutting
from tests.tiny_models import change_weights, save_diffusion
from tests.unit.conftest import Setting, change_tasks

pytestmark = pytest.mark.sampled
CPU = torch.device("cpu")


def adapter(run_dir: str, step: int) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.at(Path(run_dir) / "checkpoints", step) / "adapter.safetensors")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_run_leaves_checkpoints_curves_and_a_receipt(config: Config, make_dataset: Callable[..., Dataset]) -> None:
    config.trainer.ema_decay = 0.9
    dataset, began = make_dataset(), time.monotonic()
    run = train(config, dataset)
    elapsed, run_dir = time.monotonic() - began, Path(config.run_dir)
    assert checkpoint.steps_on_disk(run_dir / "checkpoints") == [2, 4]
    assert run.steps == 4
    assert run.items == 16
    assert run.first_validation is not None
    assert run.best_validation is not None
    receipt = load_receipt(run_dir, "train")
    assert receipt is not None
    assert receipt.figures["last_loss"] == run.last_loss
    assert run.seconds < 0.9 * elapsed < receipt.seconds <= elapsed, "the stage is more than its steps"
    events = EventAccumulator(str(run_dir / "tensorboard" / run_dir.name), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    for tag in ("loss/step", "loss/smoothed", "train/learning_rate", "train/gradient_norm", "train/images_per_s"):
        assert [point.step for point in events.Scalars(tag)] == [1, 2, 3, 4]
    assert [point.step for point in events.Scalars("validation/mean")] == [0, 2, 4]
    assert "validation/t=100" in tags["scalars"]
    assert "system/memory_gib" in tags["scalars"]
    assert [image.step for image in events.Images("samples/0: a red robot")] == [0, 4]
    text = events.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "lora.rank: 4" in text
    assert {tag.partition("/")[0] for tag in tags["scalars"]} == {"loss", "validation", "train", "system"}
    assert min(tags["scalars"]).startswith("loss/")  # TensorBoard sorts by name, and opens with the first
    assert len(list((run_dir / "tensorboard" / run_dir.name).iterdir())) == 1
    metrics = HParamsPluginData.FromString(events.PluginTagToContent("hparams")["_hparams_/experiment"])
    named = {info.name.tag for info in metrics.experiment.metric_infos}
    assert named == {"loss/smoothed", "validation/mean", "train/images_per_s", "system/memory_gib"}
    assert named <= set(tags["scalars"])
    assert events.Scalars("loss/smoothed")[-1].value == pytest.approx(run.last_loss)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert ["validation/mean" in line for line in lines] == [True, False, True, False, True]
    assert ["loss/step" in line for line in lines] == [False, True, True, True, True]
    newest = checkpoint.load(checkpoint.at(run_dir / "checkpoints", 4))
    assert newest.averaged is not None
    assert not same(newest.averaged, newest.adapter)


def test_a_run_that_began_elsewhere_keeps_its_curves_in_one_place(
    config: Config, make_dataset: Callable[..., Dataset]
) -> None:
    config.trainer.steps, dataset = 2, make_dataset()
    train(config, dataset)
    board = Path(config.run_dir, "tensorboard")
    for file in (board / Path(config.run_dir).name).iterdir():
        file.rename(board / file.name)  # where 0.1 wrote them
    config.trainer.steps = 4
    train(config, dataset)
    events = EventAccumulator(str(board)).Reload()
    assert [point.step for point in events.Scalars("loss/step")] == [1, 2, 3, 4]


def test_the_loss_at_the_end_is_the_one_that_the_bar_shows(
    config: Config, make_dataset: Callable[..., Dataset]
) -> None:
    config.trainer.steps, config.trainer.save_every, config.trainer.validate_every = 20, 10, 0
    dataset, whole = make_dataset(), config.run_dir
    run = train(config, dataset)
    lines = [json.loads(line) for line in Path(whole, "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss/step"] for line in lines if "loss/step" in line]
    # Of 20 steps two count most: half the weight on each newest one.
    weights = [0.5**age for age in range(20)]
    mean = sum(weight * loss for weight, loss in zip(weights, reversed(losses), strict=True)) / sum(weights)
    assert run.last_loss == pytest.approx(mean)
    smoothed = [line["loss/smoothed"] for line in lines if "loss/smoothed" in line]
    assert (smoothed[0], smoothed[-1]) == (losses[0], run.last_loss)


def test_nothing_keeps_the_model_alive_after_training(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next stages need the memory: two models of 7 billion parameters don't fit a 24 GB GPU."""
    models: list[weakref.ref[torch.nn.Module]] = []

    def keep_reference(task: Task) -> None:
        models.append(weakref.ref(task.model))

    change_tasks(monkeypatch, keep_reference)
    train(setting.config, setting.dataset)
    gc.collect()
    assert len(models) == 1
    assert models[0]() is None


def test_a_finished_run_is_up_to_date(
    config: Config, make_dataset: Callable[..., Dataset], capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = make_dataset()
    first = train(config, dataset)
    capsys.readouterr()
    assert train(config, dataset) == first
    assert "train: up to date, skipped (4 steps)" in capsys.readouterr().err


def test_a_signal_after_the_last_step_does_not_promise_more_steps(
    config: Config, make_dataset: Callable[..., Dataset]
) -> None:
    with (
        cutting.cut(config.trainer.steps),
        pytest.raises(Interrupted, match=r"after step 4; .* exports what was trained"),
    ):
        train(config, make_dataset())


@pytest.mark.parametrize(("cut", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM), (3, signal.SIGINT)])
def test_a_run_interrupted_by_a_signal_and_resumed_equals_one_that_was_not(
    setting: Setting, tmp_path: Path, cut: int, number: signal.Signals
) -> None:
    config, dataset = setting.config, setting.dataset
    config.lora.dropout, config.trainer.ema_decay, config.trainer.log_every = 0.1, 0.9, 4
    config.run_dir = str(tmp_path / "whole")
    whole = train(config, dataset)
    config.run_dir = str(tmp_path / "cut")
    with cutting.cut(cut, number), pytest.raises(Interrupted, match=f"after step {cut}; .* goes on") as caught:
        train(config, dataset)
    assert caught.value.exit_code == 128 + number
    torch.rand(7)  # whatever else happens in the process must not matter
    run = train(config, dataset)
    assert run.items == whole.items
    assert same(adapter(str(tmp_path / "whole"), 4), adapter(config.run_dir, 4))
    averages = [checkpoint.load(checkpoint.at(tmp_path / name / "checkpoints", 4)).ema for name in ("whole", "cut")]
    assert averages[0] is not None
    assert averages[1] is not None
    assert same(averages[0], averages[1])
    curves = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "cut")]
    values = [[json.loads(line) for line in lines] for lines in curves]
    for name in ("loss/step", "train/padding"):  # padding is a share of all steps since it was last logged
        whole_values, cut_values = ([line.get(name) for line in lines] for lines in values)
        assert whole_values == cut_values


def test_kill_at_any_moment_leaves_the_last_complete_checkpoint(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the third step's second micro-batch is in the making, and while a checkpoint is being written."""
    config, dataset = setting.config, setting.dataset
    config.lora.dropout = 0.1
    config.run_dir = str(tmp_path / "whole")
    train(config, dataset)
    config.run_dir = str(tmp_path / "killed")

    class Killed(BaseException):
        """Stands for SIGKILL: nothing may catch it and clean up."""

    backward, calls = Accelerator.backward, []

    def die_between_micro_batches(accelerator: Accelerator, loss: torch.Tensor) -> None:
        calls.append(loss)
        if len(calls) == 7:
            raise Killed
        backward(accelerator, loss)

    monkeypatch.setattr(Accelerator, "backward", die_between_micro_batches)
    with pytest.raises(Killed):
        train(config, dataset)
    monkeypatch.undo()
    assert checkpoint.steps_on_disk(tmp_path / "killed" / "checkpoints") == [2]

    write_text = Path.write_text

    def die_while_saving(path: Path, *text: str, **options: str) -> int:
        if path.name == checkpoint.MANIFEST:  # the last file of a checkpoint
            raise Killed
        return write_text(path, *text, **options)

    monkeypatch.setattr(Path, "write_text", die_while_saving)
    with pytest.raises(Killed):
        train(config, dataset)
    monkeypatch.undo()
    assert checkpoint.steps_on_disk(tmp_path / "killed" / "checkpoints") == [2]
    train(config, dataset)
    assert same(adapter(str(tmp_path / "whole"), 4), adapter(config.run_dir, 4))
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*"))


def test_changed_settings_are_listed_and_nothing_is_lost(config: Config, make_dataset: Callable[..., Dataset]) -> None:
    dataset = make_dataset()
    train(config, dataset)
    before = adapter(config.run_dir, 4)
    config.optim.lr, config.seed = 5e-3, 3
    with pytest.raises(RunError, match=r"optim.lr: 0.01 -> 0.005; seed: 0 -> 3.*trainer.restart=true"):
        train(config, dataset)
    assert same(before, adapter(config.run_dir, 4))
    config.trainer.restart = True
    train(config, dataset)
    assert not same(before, adapter(config.run_dir, 4))
    assert same(before, adapter(config.run_dir + "/previous-1", 4))


def test_a_setting_that_is_newer_than_the_run_counts_as_its_default(
    config: Config, make_dataset: Callable[..., Dataset]
) -> None:
    dataset, folder = make_dataset(), Path(config.run_dir) / "checkpoints"
    train(config, dataset)
    last = checkpoint.load(checkpoint.at(folder, 4))
    older = {key: value for key, value in last.state.identity.items() if key != "loss.weighting"}
    checkpoint.save(folder, replace(last.state, identity=older), last.adapter, last.optimizer, last.ema)
    config.trainer.steps = 6
    config.loss.weighting = Weighting.uniform
    with pytest.raises(RunError, match=r"\(loss.weighting: min_snr -> uniform\)"):
        train(config, dataset)
    config.loss.weighting = Weighting.min_snr
    assert train(config, dataset).steps == 6


@pytest.mark.parametrize(
    ("held_out", "share", "said"),
    [(0, 0.1, "(under 20 none are)"), (0, 0.0, "(data.validation_share=0)"), (2, 0.1, "")],
)
def test_a_data_set_without_examples_held_out_is_announced(
    config: Config,
    make_dataset: Callable[..., Dataset],
    capsys: pytest.CaptureFixture[str],
    held_out: int,
    share: float,
    said: str,
) -> None:
    config.data.validation_share = share
    train(config, make_dataset(10, held_out))
    found = [line for line in capsys.readouterr().err.splitlines() if "no examples are held out" in line]
    assert [said in line for line in found] == ([True] if said else [])


def test_changed_captions_are_listed(config: Config, make_dataset: Callable[..., Dataset]) -> None:
    train(config, make_dataset(16))
    shorter = make_dataset(11)
    index = Path(shorter.index)
    index.write_text(index.read_text().replace('"image 4"', '"another caption"'))
    differences = r"1 caption changed: 004.png, 5 images removed: 011.png, 012.png, 013.png and 2 more"
    with pytest.raises(RunError, match=rf"{differences}.*trainer.restart=true"):
        train(config, shorter)
    Path(config.run_dir, "trained_on.json").unlink()
    with pytest.raises(RunError, match=r"other images and captions"):  # a run of an earlier version
        train(config, shorter)


def test_added_images_are_no_other_settings_and_the_adapter_is_offered(
    config: Config, make_dataset: Callable[..., Dataset]
) -> None:
    train(config, make_dataset(11))
    more = make_dataset(12)
    with pytest.raises(RunError, match=r"was trained with other data \(1 image added: 011.png\)") as error:
        train(config, more)
    assert "start_from" not in str(error.value), "there is no adapter yet"
    (Path(config.run_dir) / "adapter").mkdir()
    with pytest.raises(RunError, match=rf"another name=… and lora.start_from={re.escape(config.run_dir)}/adapter"):
        train(config, more)
    config.seed += 1
    with pytest.raises(RunError, match=r"other settings \(1 image added: 011.png; seed: 0 -> 1\).*lora.start_from="):
        train(config, more)


def test_changed_conversations_are_reported_without_hashes(language_config: Config) -> None:
    train(language_config, tokenize.build(language_config, None))
    language_config.data.validation_share = 0.3
    with pytest.raises(RunError, match=r"other conversations and template"):
        train(language_config, tokenize.build(language_config, None))


def test_more_steps_go_on_and_fewer_are_refused(config: Config, make_dataset: Callable[..., Dataset]) -> None:
    dataset = make_dataset()
    train(config, dataset)
    config.trainer.steps = 6
    assert train(config, dataset).steps == 6
    config.trainer.steps = 3
    with pytest.raises(RunError, match=r"already at step 6, past trainer.steps=3"):
        train(config, dataset)


def test_micro_batch_and_accumulation_may_be_exchanged_on_resume(
    config: Config, make_dataset: Callable[..., Dataset]
) -> None:
    dataset = make_dataset()
    train(config, dataset)
    config.trainer.steps, config.trainer.micro_batch, config.trainer.accumulate = 6, 4, 1
    found = train(config, dataset)
    assert (found.steps, found.micro_batch, found.effective) == (6, 4, 4)
    figures = json.loads((Path(config.run_dir) / "receipts" / "train.json").read_text())["figures"]
    assert (figures["micro_batch"], figures["effective_batch"], figures["processes"]) == (4, 4, 1)


def test_offloaded_blocks_change_nothing_and_may_be_switched_on_resume(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Training, validation and previews, all on a CPU."""
    config, dataset = setting.config, setting.dataset
    config.lora.dropout, config.optim.schedule = 0.2, Schedule.constant
    if config.model.kind == "diffusion":
        config.model.base = str(save_diffusion(tmp_path / "base", whole=True))  # a ring takes several blocks
    config.run_dir = str(tmp_path / "resident")
    resident = checkpoint.load(Path(train(config, dataset).checkpoint))
    monkeypatch.setattr(block_offload, "is_active", lambda model, _: model.offload)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 0))
    config.run_dir, config.model.offload, config.trainer.steps = str(tmp_path / "away"), True, 2
    capfd.readouterr()
    train(config, dataset)
    assert "model.offload: " in capfd.readouterr().err
    config.model.offload, config.trainer.steps = False, 4
    legs = checkpoint.load(Path(train(config, dataset).checkpoint))
    assert same(legs.adapter, resident.adapter)
    assert legs.state.first_validation == resident.state.first_validation


def test_a_damaged_checkpoint_is_named(config: Config, make_dataset: Callable[..., Dataset]) -> None:
    dataset = make_dataset()
    train(config, dataset)
    config.trainer.steps = 6
    newest = checkpoint.at(Path(config.run_dir) / "checkpoints", 4)
    file = newest / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"step-000004 is damaged.*adapter.safetensors.*delete that folder"):
        train(config, dataset)


def test_two_runs_in_one_process_do_not_disturb_one_another(
    config: Config, make_dataset: Callable[..., Dataset], tmp_path: Path
) -> None:
    config.lora.dropout = 0.1
    dataset = make_dataset()
    for name in ("first", "other", "second"):
        config.run_dir, config.seed = str(tmp_path / name), 5 if name == "other" else 0
        train(config, dataset)
    assert same(adapter(str(tmp_path / "first"), 4), adapter(str(tmp_path / "second"), 4))
    assert not same(adapter(str(tmp_path / "first"), 4), adapter(str(tmp_path / "other"), 4))


def test_only_the_newest_and_the_best_checkpoints_are_kept(
    config: Config, make_dataset: Callable[..., Dataset]
) -> None:
    config.trainer.steps, config.trainer.save_every, config.trainer.keep_checkpoints = 5, 1, 1
    run = train(config, make_dataset())
    kept = checkpoint.steps_on_disk(Path(config.run_dir) / "checkpoints")
    assert kept == sorted({5, run.best_step})


def test_a_run_can_continue_from_an_earlier_adapter(config: Config, make_dataset: Callable[..., Dataset]) -> None:
    dataset = make_dataset()
    export(config, train(config, dataset))
    before = adapter(config.run_dir, 4)
    for folder in ("", "adapter", "adapter/peft"):
        config.lora.start_from = str(Path(config.run_dir) / folder)
        assert same(before, lora.state(kinds.of(config).build_task(config, dataset, CPU).model))
    config.lora.start_from = str(Path(config.run_dir) / "nothing")
    with pytest.raises(ModelError, match=r"nothing/adapter_model.safetensors does not exist"):
        kinds.of(config).build_task(config, dataset, CPU)


def test_training_stops_early_and_the_best_checkpoint_is_exported(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    config = setting.config
    config.trainer.steps, config.trainer.save_every, config.trainer.patience = 60, 1, 2
    config.optim.lr, config.optim.warmup_steps = 1.0, 0  # far too much: it gets worse at once
    config.optim.schedule = Schedule.constant
    config.export.checkpoint, config.export.formats = CheckpointChoice.best, [ExportFormat.peft]
    run = train(config, setting.dataset)
    assert run.best_step is not None
    assert run.steps == run.best_step + 2 < 60
    assert f"since step {run.best_step}; stopping early" in capsys.readouterr().err
    assert train(config, setting.dataset) == run  # up to date: no more steps are taken
    exported = load_file(Path(export(config, run).folder) / "peft" / "adapter_model.safetensors")
    best = adapter(config.run_dir, run.best_step)
    assert same({name.removeprefix("base_model.model."): weight for name, weight in exported.items()}, best)


def with_own_base(config: Config, tmp_path: Path) -> Path:
    """The run gets a copy of its base, which a test may change."""
    base = shutil.copytree(config.model.base, tmp_path / "own_base")
    config.model.base = str(base)
    return base


def test_a_base_is_known_by_its_weights_wherever_it_lies(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, dataset = setting.config, setting.dataset
    base = with_own_base(config, tmp_path)
    config.export.formats = [ExportFormat.peft]
    run = train(config, dataset)
    exported = export(config, run)
    sample(config, exported)
    config.model.base = str(base.rename(tmp_path / "moved"))
    capsys.readouterr()
    assert train(config, dataset) == run
    sample(config, exported)
    assert capsys.readouterr().err.count("up to date") == 2
    change_weights(tmp_path / "moved")
    with pytest.raises(RunError, match=rf"model.base: .*{config.model.base}\).*trainer.restart=true"):
        train(config, dataset)
    export(config, run)
    sample(config, exported)
    assert "up to date" not in capsys.readouterr().err


def change_strength(folder: Path) -> None:
    file = next(folder.rglob("adapter_config.json"))
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"lora_alpha": 2 * settings["lora_alpha"]}))


@pytest.mark.parametrize("change", [change_weights, change_strength])
def test_an_adapter_to_start_from_is_known_by_its_content(
    config: Config, make_dataset: Callable[..., Dataset], tmp_path: Path, change: Callable[[Path], None]
) -> None:
    dataset = make_dataset()
    config.export.formats = [ExportFormat.peft]
    first = Path(export(config, train(config, dataset)).folder)
    config.run_dir, config.lora.start_from = str(tmp_path / "second"), str(first)
    train(config, dataset)
    change(first)
    with pytest.raises(RunError, match=r"lora.start_from: other files"):
        train(config, dataset)


def test_a_run_that_knew_its_base_by_name_goes_on_and_knows_the_weights_from_then_on(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, dataset = setting.config, setting.dataset
    base = with_own_base(config, tmp_path)
    monkeypatch.setattr(kinds.of(config), "contents", lambda _: {})  # as 0.1
    old = train(config, dataset)
    monkeypatch.undo()
    assert train(config, dataset) == old
    change_weights(base)
    with pytest.raises(RunError, match=r"model.base: other files"):
        train(config, dataset)


def test_an_unfinished_run_that_knew_its_base_by_name_goes_on(
    config: Config, make_dataset: Callable[..., Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, dataset = with_own_base(config, tmp_path), make_dataset()
    monkeypatch.setattr(kinds.of(config), "contents", lambda _: {})  # as 0.1
    with cutting.cut(2), pytest.raises(Interrupted):
        train(config, dataset)
    monkeypatch.undo()
    other = shutil.copytree(base, tmp_path / "other")
    config.model.base = str(other)
    with pytest.raises(RunError, match=r"model.base: .*own_base -> .*other"):
        train(config, dataset)
    config.model.base = str(base)
    train(config, dataset)
    change_weights(base)
    with pytest.raises(RunError, match=r"model.base: other files"):
        train(config, dataset)


def test_patience_counts_validations_and_not_saved_steps(
    config: Config, make_dataset: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lowest at step 2; three validations later, of which none is at a saved step, it is over, and that step saved."""
    losses = iter([5.0, 1.0, 2.0, 4.0, 3.0, 0.0])

    def give_losses(task: Task) -> None:
        monkeypatch.setattr(task, "validate", lambda _: {"mean": next(losses)})

    change_tasks(monkeypatch, give_losses)
    config.trainer.steps, config.trainer.save_every, config.trainer.validate_every = 40, 20, 2
    config.trainer.patience = 3
    run = train(config, make_dataset())
    assert (run.steps, run.best_step) == (8, 8)
    assert checkpoint.steps_on_disk(Path(config.run_dir) / "checkpoints") == [8]


@pytest.mark.parametrize("damage", ["lines", "bytes", "a folder", "a file for tensorboard"])
def test_damaged_curves_cost_no_run(
    config: Config, make_dataset: Callable[..., Dataset], damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    dataset, run_dir = make_dataset(), Path(config.run_dir)
    config.trainer.validate_every = 0
    with cutting.cut(2), pytest.raises(Interrupted):
        train(config, dataset)
    metrics = run_dir / "metrics.jsonl"
    if damage == "lines":
        metrics.write_text(metrics.read_text() + '[1]\n{"step": "2"}\n{"loss/step": 1.0}\n')
    elif damage == "bytes":
        metrics.write_bytes(metrics.read_bytes() + b"\xff\xfe\n")
    elif damage == "a folder":
        metrics.unlink()
        metrics.mkdir()
    else:
        shutil.rmtree(run_dir / "tensorboard")
        (run_dir / "tensorboard").write_text("no folder")
    capfd.readouterr()
    assert train(config, dataset).steps == 4
    (warning,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert str(run_dir / ("tensorboard" if "tensor" in damage else "metrics.jsonl")) in warning
    if metrics.is_file():
        steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
        assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize("damage", ["[]", "5", "{", '{"000.png": 1}', "\udcff"])
def test_damaged_names_of_what_was_trained_on_are_left_out(
    config: Config, make_dataset: Callable[..., Dataset], damage: str
) -> None:
    train(config, make_dataset())
    (Path(config.run_dir) / "trained_on.json").write_text(damage, errors="surrogateescape")
    with pytest.raises(RunError, match=r"other images and captions"):
        train(config, make_dataset(9))


def test_a_restart_is_spent_once_its_run_has_begun(config: Config, make_dataset: Callable[..., Dataset]) -> None:
    dataset, run_dir = make_dataset(), Path(config.run_dir)
    train(config, dataset)
    config.trainer.restart, config.trainer.save_every = True, 1
    with cutting.cut(2), pytest.raises(Interrupted, match=r"stopped by Ctrl-C after step 2; the same command goes on"):
        train(config, dataset)
    with cutting.cut(3), pytest.raises(Interrupted):
        train(config, dataset)
    assert [path.name for path in run_dir.glob("previous-*")] == ["previous-1"]
    train(config, dataset)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss/step" in line] == [1, 2, 3, 4]
    config.seed = 1  # another command
    train(config, dataset)
    receipt_path(run_dir, "report").write_text("{}")  # the whole line is done: typed again, it is meant again
    train(config, dataset)
    assert len(list(run_dir.glob("previous-*"))) == 3
