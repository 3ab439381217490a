"""The export stage: where the GPU is too small for what it compares; what is up to date, equal, and copied."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from finetune import kinds
from finetune.adapters import formats
from finetune.config.schema import Config, Device, ExportFormat, Precision, Quantize
from finetune.run.receipts import load_record
from finetune.run.records import Adapter, Dataset, Run
from finetune.stages.export import export
from finetune.stages.train import train
from tests.end_to_end.command import contents
from tests.unit.conftest import Setting

pytestmark = pytest.mark.sampled
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def weights_of(adapter: Adapter) -> dict[str, Tensor]:
    return load_file(Path(adapter.folder) / "peft" / "adapter_model.safetensors")


def on_a_gpu(config: Config, write: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind's export is `write`, and there is a GPU where the configuration doesn't ask for the CPU."""
    kind, pick_device = kinds.of(config), kinds.of(config).pick_device  # type: ignore[attr-defined]

    def with_gpu(wanted: Device) -> torch.device:
        return pick_device(wanted) if wanted is Device.cpu else torch.device("cuda")

    config.hardware.device = Device.auto
    monkeypatch.setattr(kind, "export", write)
    monkeypatch.setattr(kind, "pick_device", with_gpu)


def test_a_gpu_too_small_for_the_comparison_leaves_it_to_the_cpu(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Half-written files of the attempt are gone, and the adapters are those of an export that fitted."""
    config = setting.config
    run = train(config, setting.dataset)
    fitting = weights_of(export(config, run))
    config.trainer.precision = Precision.fp16  # which a CPU can't do
    write = kinds.of(config).export
    tried: list[tuple[Device, list[str]]] = []

    def full(here: Config, run: Run, weights: Any, averaged: Any, folder: Path) -> Any:
        tried.append((here.hardware.device, sorted(path.name for path in folder.iterdir())))
        if here.hardware.device is not Device.cpu:
            (folder / "half").mkdir()
            (folder / "half.safetensors").write_bytes(b"half")
            raise FULL
        return write(here, run, weights, averaged, folder)

    on_a_gpu(config, full, monkeypatch)
    capfd.readouterr()
    config.name += "_again"
    found = export(config, run)
    assert tried == [(Device.auto, []), (Device.cpu, [])]
    assert "export: the GPU is too small; models are compared in CPU memory" in capfd.readouterr().err
    assert weights_of(found).keys() == fitting.keys()
    assert all(torch.equal(weight, fitting[name]) for name, weight in weights_of(found).items())
    assert not list(Path(found.folder).glob("half*"))


def test_a_quantised_image_model_is_compared_on_the_gpu_alone(
    config: Config, make_dataset: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(config, make_dataset())
    config.model.quantize, config.trainer.precision = Quantize.nf4, Precision.fp16

    def full(*_: Any) -> Any:
        raise FULL

    on_a_gpu(config, full, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        export(config, run)


def test_too_little_cpu_memory_is_not_tried_twice(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(setting.config, setting.dataset)
    setting.config.trainer.precision = Precision.fp16
    tried: list[bool] = []

    def full(*_: Any) -> Any:
        tried.append(True)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    on_a_gpu(setting.config, full, monkeypatch)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        export(setting.config, run)
    assert tried == [True]


# -- up to date, and equal -------------------------------------------------------------------------------------------

EVERY = {
    "diffusion": [ExportFormat.peft, ExportFormat.diffusers, ExportFormat.kohya],
    "language": [ExportFormat.peft, ExportFormat.merged],
}


def trained_run(setting: Setting) -> Run:
    config = setting.config
    config.export.formats, config.export.divergence = EVERY[config.model.kind], 10.0
    return train(config, setting.dataset)


def flip(file: Path) -> None:
    data, times = bytearray(file.read_bytes()), file.stat()
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.exhaustive
def test_any_damage_of_an_export_is_found_and_made_good(setting: Setting, capfd: pytest.CaptureFixture[str]) -> None:
    config, run = setting.config, trained_run(setting)
    folder = Path(export(config, run).folder)
    whole = contents(folder)
    files = [Path(file) for file in whole if Path(file).suffix in (".safetensors", ".json", ".md")]
    assert len(files) > 3
    damages = [flip, lambda file: file.write_bytes(file.read_bytes()[:-2]), Path.unlink]
    capfd.readouterr()
    for number, file in enumerate(files):
        damage = Path.unlink if file.name == "README.md" else damages[number % len(damages)]
        damage(file)  # type: ignore[operator]
        export(config, run)
        assert "up to date" not in capfd.readouterr().err, file
        assert contents(folder) == whole, file
    export(config, run)
    assert "export: up to date, skipped" in capfd.readouterr().err


def test_a_card_that_a_person_has_edited_stays(setting: Setting, capfd: pytest.CaptureFixture[str]) -> None:
    config, run = setting.config, trained_run(setting)
    card = Path(export(config, run).folder) / "README.md"
    card.write_text("My own words.")
    capfd.readouterr()
    export(config, run)
    assert "export: up to date, skipped" in capfd.readouterr().err
    assert card.read_text() == "My own words."


def test_what_a_person_changed_or_added_is_kept_when_the_export_is_made_again(
    setting: Setting, capfd: pytest.CaptureFixture[str]
) -> None:
    config, run = setting.config, trained_run(setting)
    folder = Path(export(config, run).folder)
    whole, settings = contents(folder), (folder / "peft" / "adapter_config.json").read_text()
    theirs = {"README.md": "My own card.", "cover/one.png": "an image", "peft/adapter_config.json": f"{settings} "}
    (folder / "cover").mkdir()
    for name, text in theirs.items():
        (folder / name).write_text(text)
    capfd.readouterr()
    export(config, run)
    kept = Path(config.run_dir, "adapter-kept-1")
    assert f"3 files changed or added since {folder} was made, first adapter/README.md: now in {kept}" in (
        capfd.readouterr().err
    )
    assert {name: (kept / name).read_text() for name in theirs} == theirs
    assert len([path for path in kept.rglob("*") if path.is_file()]) == 3
    assert contents(folder) == whole
    config.name += "_other"  # another export, of which nothing is a person's
    export(config, run)
    assert sorted(path.name for path in kept.parent.glob("*-kept-*")) == [kept.name]


def test_an_export_without_its_receipt_keeps_all_that_may_be_a_persons(setting: Setting) -> None:
    """What is as the new export is dropped: the receipt of a killed command was not written yet."""
    config, run = setting.config, trained_run(setting)
    card = Path(export(config, run).folder) / "README.md"
    card.write_text("My own card.")
    Path(config.run_dir, "receipts", "export.json").unlink()
    export(config, run)
    kept = [path for path in Path(config.run_dir, "adapter-kept-1").rglob("*") if path.is_file()]
    assert [(path.name, path.read_text()) for path in kept] == [("README.md", "My own card.")]


def test_equal_runs_give_equal_files(setting: Setting, tmp_path: Path) -> None:
    """Byte by byte, in every format; safetensors alone orders metadata at random."""
    config, found = setting.config, []
    for name in ("one", "other"):
        config.run_dir = str(tmp_path / name)
        run = trained_run(setting)
        folder = Path(export(config, run).folder)
        found.append({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()})
    one, other = found
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


def test_exported_files_know_their_base_by_content(setting: Setting) -> None:
    config, run = setting.config, trained_run(setting)
    adapter = export(config, run)
    base = (config.model.base, kinds.of(config).contents(config)["model.base"])
    files = {name: file for name, file in adapter.files.items() if name in ("peft", "kohya")}
    assert {formats.made_for(Path(adapter.folder, file)) for file in files.values()} == {base}


def test_a_copied_run_folder_works_on_itself(setting: Setting, tmp_path: Path) -> None:
    """The original may be trained again, renamed or deleted."""
    config, run = setting.config, trained_run(setting)
    original, copy = Path(config.run_dir), tmp_path / "copies" / "mine"
    before = contents(Path(export(config, run).folder))
    shutil.copytree(original, copy)
    config.seed, config.trainer.restart = 5, True
    export(config, train(config, setting.dataset))
    theirs = contents(original)
    config.seed, config.trainer.restart, config.run_dir = 0, False, str(copy)
    shutil.rmtree(copy / "adapter")
    again = load_record(copy, "train", Run)
    assert again is not None
    assert Path(again.checkpoint).is_relative_to(copy)
    adapter = export(config, again)
    assert adapter.folder == str(copy / "adapter")
    assert list(contents(Path(adapter.folder)).values()) == list(before.values())
    assert contents(original) == theirs
    receipts = "".join(file.read_text() for file in (copy / "receipts").iterdir())
    assert str(original) not in receipts
    assert str(copy) not in receipts
