"""The plan: the fastest setting that fits the GPU, or what would fit where none does."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi

import finetune
from finetune import hub, kinds
from finetune.config import recipes
from finetune.config.describe import as_dict
from finetune.config.schema import Config, Device, LoraInit, Optimizer, Precision, Quantize
from finetune.diffusion import tiling
from finetune.errors import ConfigError, DataError, ModelError
from finetune.memory import block_offload
from finetune.planning import choice, speed
from finetune.planning.candidates import Candidates, Phase, parts
from finetune.planning.machine import read
from finetune.planning.plan import Plan, Setting
from finetune.run import rundir
from finetune.run.records import TextSet
from finetune.stages import plan as stage
from finetune.stages.dataset import dataset
from finetune.stages.plan import plan, plans
from tests.presets import preset, shortened
from tests.tiny_models import save_diffusion

pytestmark = pytest.mark.sampled


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The hub is never asked."""
    requested: list[str] = []
    monkeypatch.setattr(HfApi, "model_info", lambda self, name, **_: requested.append(name))
    yield
    assert not requested


def on_a_gpu(config: Config, gib: float = 24.0, effective: int = 4) -> Config:
    config.hardware.device, config.hardware.gpu, config.hardware.vram_gib = Device.cuda, "a GPU", gib
    config.hardware.tflops, config.hardware.fp32_tflops, config.hardware.gb_per_s = 100.0, 50.0, 1000.0
    config.trainer.precision, config.trainer.micro_batch, config.trainer.accumulate = Precision.auto, effective, 1
    config.sample.prompts = ["a red robot"]
    config.caption.model = "embedded:captioner"
    return config


@pytest.fixture
def training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other phase is traced."""
    monkeypatch.setattr(Candidates, "phases", lambda self, micro_batch: iter(()))


@pytest.fixture(params=["diffusion", "language"])
def roomy(request: pytest.FixtureRequest) -> Config:
    return on_a_gpu(request.getfixturevalue("config" if request.param == "diffusion" else "language_config"))


def candidates_of(config: Config) -> Candidates:
    """On the machine of the configuration."""
    return Candidates(kinds.of(config).workload(config), read(config.hardware))


def consistent(found: Plan) -> None:
    assert found.chosen is not None
    assert found.phases["training"] == found.chosen.gib
    settings = [found.chosen, *found.others, found.requested]
    assert {setting.micro_batch * setting.accumulate for setting in settings} == {4}
    assert all(setting.gib <= found.budget_gib for setting in (found.chosen, *found.others))
    fitting = [setting for setting in settings if setting.gib <= found.budget_gib]
    assert found.chosen.seconds == min(setting.seconds for setting in fitting)


@pytest.mark.usefixtures("training_alone")
def test_the_fastest_that_fits_whatever_the_budget(
    roomy: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "AROUND_REPLAY_S", 0.0)  # would be most of so small a step
    if roomy.data.folder:
        Path(roomy.data.folder).mkdir()
        Path(roomy.data.folder, "1.png").write_bytes(b"not opened")
    before = sorted(tmp_path.rglob("*"))
    found = plan(roomy)
    consistent(found)
    assert found.fits
    assert any(note.startswith(f"{kinds.of(roomy).FACTS.data_key} is counted, not read") for note in found.notes)
    assert found.chosen is not None
    largest = found.chosen.gib
    roomy.hardware.vram_gib = largest - 1e-4
    tighter = plan(roomy)
    assert tighter.chosen is not None
    consistent(tighter)
    assert tighter.chosen.gib < largest
    assert tighter.chosen.seconds >= found.chosen.seconds
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written


@pytest.mark.usefixtures("training_alone")
def test_what_is_not_on_this_machine_is_named_in_a_plan_for_another(roomy: Config, tmp_path: Path) -> None:
    roomy.data.folder, roomy.data.file = roomy.data.folder and "nowhere", roomy.data.file and "nowhere"
    roomy.lora.start_from = "nowhere"
    bare = shutil.copytree(hub.resolve(roomy.model.base), tmp_path / "bare", ignore=shutil.ignore_patterns("*.saf*"))
    roomy.model.base = str(bare)
    found = finetune.plan(roomy)
    assert found.disk is not None
    assert found.free_bytes is None  # of another disk
    assert found.download == {}
    weights, missing, adapter = (note for note in found.notes if note.startswith("warning: "))
    assert weights.startswith(f"warning: {bare} can't be used: {bare}/")
    assert missing.startswith("warning: there is no ")
    assert adapter.startswith("warning: lora.start_from=nowhere names no adapter")
    roomy.hardware.gpu, roomy.hardware.device = "", Device.cpu
    with pytest.raises(DataError, match=r"^there is no .*nowhere"):
        finetune.plan(roomy)


def test_what_the_machine_cannot_do_is_refused_as_training_refuses_it(config: Config, language_config: Config) -> None:
    config.model.quantize, language_config.optim.name = Quantize.nf4, Optimizer.adamw8bit
    for wrong, said in ((config, "model.quantize=nf4 of an image model"), (language_config, "optim.name=adamw8bit")):
        with pytest.raises(ConfigError, match=f"^{said} needs a CUDA GPU"):
            plan(wrong)


def test_conversations_that_changed_since_they_were_read_are_looked_at_again(language_config: Config) -> None:
    rundir.write_config(as_dict(language_config), Path(language_config.run_dir))
    file, record = Path(language_config.data.file), dataset(language_config, None)
    os.utime(file, (0, 0))
    found = kinds.of(language_config).examples(language_config)
    assert found is not None
    assert isinstance(record, TextSet)
    assert (found.per_epoch, found.measured) == (record.packs, True)
    entry_bytes = candidates_of(language_config).memory_model.entry_bytes
    assert found.cached * entry_bytes == pytest.approx(Path(record.rows, "tokens.bin").stat().st_size)
    file.write_text('{"a": 1}')
    os.utime(file, (2**32, 2**32))
    with pytest.raises(DataError, match="known format"):
        kinds.of(language_config).examples(language_config)


@pytest.mark.usefixtures("training_alone")
@pytest.mark.parametrize(("fast", "offload"), [(True, False), (False, False), (True, True)])
def test_the_plan_says_what_is_faster_only_where_it_is(config: Config, fast: bool, offload: bool) -> None:
    on_a_gpu(config)
    config.trainer.fast, config.model.offload = fast, offload
    memory_model = candidates_of(config).memory_model
    assert any("trainer.fast" in note for note in memory_model.notes) == memory_model.replayed(0, False)
    assert memory_model.replayed(0, False) == (fast and not offload)


@pytest.mark.usefixtures("training_alone")
def test_a_full_gpu_that_is_not_here_may_have_a_monitor(roomy: Config) -> None:
    chosen = plan(roomy).chosen
    assert chosen is not None
    roomy.hardware.vram_gib = chosen.gib + 0.5
    (line,) = [note for note in plan(roomy).notes if "monitor" in note]
    assert f"hardware.vram_gib={chosen.gib - 0.5:.1f}" in line
    roomy.hardware.vram_gib = chosen.gib + 1.5
    assert not any("monitor" in note for note in plan(roomy).notes)


def test_a_plan_counts_the_data_and_times_every_phase(roomy: Config) -> None:
    config, path = roomy, Path(roomy.data.folder or roomy.data.file)
    path.unlink(missing_ok=True)
    assert kinds.of(config).examples(config) is None
    if config.model.kind == "diffusion":
        path.mkdir()
        for number in range(6):
            (path / f"{number}.png").write_bytes(b"not opened")
        (path / "5.txt").write_text("a caption")
    else:
        row, size = '{"text": "a"}\n', 6 * 10 * config.data.length
        path.write_text(row + " " * (size - len(row)))
    found = plan(config)
    expected = found.steps * found.effective / (6 if config.model.kind == "diffusion" else 0.8 * 10)
    assert found.epochs == pytest.approx(expected)
    assert found.guessed == (config.model.kind == "language")
    assert found.seconds.keys() == found.phases.keys()
    assert all(seconds and seconds > 0 for seconds in found.seconds.values())
    assert found.download == {}  # the base is here


def test_several_machines_share_what_was_traced_and_nothing_else(roomy: Config) -> None:
    roomy.trainer.validate_every = 0
    large = read(on_a_gpu(roomy).hardware)
    machines = [replace(large, vram_gib=size, gb_per_s=speed) for size, speed in ((24.0, 1000.0), (0.7, 500.0))]
    together = list(plans(roomy, machines))
    assert together == [next(plans(roomy, [machine])) for machine in machines]
    assert together[0].requested.seconds <= together[1].requested.seconds


def test_phases_are_those_of_the_run(roomy: Config) -> None:
    images = {"captioning", "encoding texts", "encoding images"} if roomy.model.kind == "diffusion" else set()
    assert plan(roomy).phases.keys() == {"training", "validation", "sampling", "export"} | images
    roomy.trainer.validate_every, roomy.sample.prompts = 0, []
    assert plan(roomy).phases.keys() == {"training", "export"} | images


@pytest.mark.usefixtures("training_alone")
def test_activation_checkpointing_and_offloading_are_tried_before_it_says_no(
    language_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = plan(on_a_gpu(language_config))
    levels = [setting.checkpointing for setting in (found.chosen, *found.others) if setting]
    assert set(levels) == {0}
    least = candidates_of(language_config).setting(1, 1)
    monkeypatch.setattr("finetune.planning.candidates.WORKSPACES_GIB", 0.0)
    language_config.hardware.vram_gib = least.gib - 0.1  # without room for the workspaces
    found = plan(language_config)
    assert found.chosen is not None
    assert found.chosen.checkpointing == 1 or found.chosen.offload


@pytest.mark.usefixtures("training_alone")
def test_one_line_where_nothing_fits(roomy: Config) -> None:
    roomy.hardware.vram_gib = 0.55
    found = plan(roomy)
    assert not found.fits
    assert found.chosen is None
    assert any(line.startswith("training needs 0.") and "a GPU has 0.6" in line for line in found.problems)
    assert found.phases["training"] > found.budget_gib


@pytest.mark.usefixtures("training_alone")
def test_what_would_fit_is_named(language_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    class Large(Candidates):
        def setting(self, micro_batch: int, checkpointing: int, away: bool = False) -> Setting:
            found = super().setting(micro_batch, checkpointing, away)
            return replace(found, parts=found.parts | {"weights": 100.0})

        def least_gib(self) -> float:
            return super().least_gib() if self.workload.model.quantize is Quantize.nf4 else 100.0

    for module in (stage, choice):
        monkeypatch.setattr(module, "Candidates", Large)
    found = plan(on_a_gpu(language_config))
    assert found.chosen is None
    assert found.problems[0].endswith("; model.quantize=nf4 would fit")


@pytest.mark.usefixtures("training_alone")
@pytest.mark.parametrize("quantize", [Quantize.none, Quantize.nf4])
def test_the_mildest_change_that_fits_is_named(
    roomy: Config, monkeypatch: pytest.MonkeyPatch, quantize: Quantize
) -> None:
    """First how the base is stored, then smaller examples."""
    on_a_gpu(roomy, 0.5).hardware.device = Device.cpu  # where nothing can be offloaded
    roomy.model.quantize, roomy.model.resolution, roomy.data.length = quantize, 64, 64
    smaller = {
        "diffusion": [f"model.resolution={side}" for side in (48, 32, 16)],
        "language": [f"data.length={length}" for length in (32, 16, 8)],
    }[roomy.model.kind]
    expected = ["model.quantize=int8", "model.quantize=nf4", *(f"model.quantize=nf4 {words}" for words in smaller)]
    if quantize is Quantize.nf4 or not kinds.of(roomy).FACTS.quantizes_on_cpu:
        expected = smaller
    own = candidates_of(roomy)
    for count, words in enumerate([*expected, ""], 1):  # the last time nothing fits
        least_gib = iter([*[100.0] * (count - 1), 0.0, 0.0][: len(expected)])
        made = iter([own, *(SimpleNamespace(least_gib=partial(next, least_gib)) for _ in expected)])
        monkeypatch.setattr(stage, "Candidates", lambda *_, made=made: next(made))
        (problem,) = next(plans(roomy, [read(roomy.hardware)])).problems
        assert problem.endswith(f"; {words} would fit" if words else "try a smaller base model")


def test_a_phase_that_does_not_fit_says_what_to_do(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    advice = {
        "captioning": "caption.batch=1",
        "encoding texts": "more CPU memory",
        "encoding images": "finetune dataset with these settings and hardware=cpu first",
        "validation": "trainer.validate_every=0",
        "sampling": "'sample.prompts=[]', and finetune sample",
        "export": "finetune export with these settings and hardware=cpu",
    }
    monkeypatch.setattr(
        Candidates, "phases", lambda self, micro_batch: (Phase(name, 30.0, "", None) for name in advice)
    )
    found = plan(on_a_gpu(config))
    assert found.chosen is not None
    assert not found.fits
    for line, (phase, words) in zip(found.problems, advice.items(), strict=True):
        assert line.startswith(f"{phase} needs 30.0 GiB at least, and a GPU has 24.0; try ")
        assert words in line


def test_without_a_gpu_every_phase_has_one_option(roomy: Config) -> None:
    roomy.hardware.device = Device.cpu
    candidates = candidates_of(roomy)
    assert not candidates.machine.cuda
    assert {len(list(options)) for _, options in candidates.memory_model.phases(1, candidates.held)} == {1}


def test_the_advice_of_a_plan_whose_samples_do_not_fit_helps(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.diffusion.memory_model.WORKSPACE_GIB_PER_MEGAPIXEL", 1e6)
    (problem,) = plan(on_a_gpu(config)).problems
    assert problem.startswith("sampling needs ")
    assert "try 'sample.prompts=[]', and finetune sample" in problem
    config.sample.prompts = []
    assert plan(config).fits


@pytest.mark.exhaustive
def test_exports_are_in_fp32_where_that_fits_or_is_offloaded(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.model.base = str(save_diffusion(tmp_path / "base", whole=True))  # a ring takes several blocks
    monkeypatch.setattr(block_offload, "RING_SLOTS", 1)  # a ring of two is all that this model has

    def weights(gib: float, *, offloaded: bool) -> float:
        on_a_gpu(config, gib).model.offload = offloaded
        candidates = candidates_of(config)
        trace = next(iter(dict(candidates.memory_model.phases(1, candidates.held))["export"])).trace
        assert trace is not None
        return sum(trace.held[name] for name in trace.held if name in ("weights", "ring of blocks"))

    whole = weights(24.0, offloaded=False)
    assert weights(24.0, offloaded=True) == whole
    in_16_bit, partly = weights(0.5001, offloaded=False), weights(0.5001, offloaded=True)
    assert in_16_bit == pytest.approx(whole / 2, rel=0.1)  # adapters stay in fp32
    assert partly < whole


def test_phases_take_less_memory_on_a_smaller_gpu(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images one by one, then in tiles; captions one by one, then in CPU memory: the first option that fits."""
    monkeypatch.setattr(tiling, "TILE", 16)
    on_a_gpu(config).sample.seeds = [0, 1, 2, 3]
    candidates = candidates_of(config)
    images = ["4 images at once", "2 images at once", "one image at once"]
    expected = {
        "encoding texts": ["", "fewer captions at once", "in CPU memory, which is slower"],
        "sampling": ["", *images, "one image at once, decoded in tiles"],
        "export": ["", "in CPU memory, which is slower"],
    }
    phases = dict(candidates.memory_model.phases(1, candidates.held))
    for name, words in expected.items():
        options = list(phases[name])
        assert [option.words for option in options] == words
        sizes = [sum(parts(option.trace, candidates.machine).values()) if option.trace else 0.0 for option in options]
        assert sizes == sorted(set(sizes), reverse=True)
        for size, taken in zip(sizes, words, strict=True):
            small = candidates.on(replace(candidates.machine, vram_gib=size))
            monkeypatch.setattr(small.memory_model, "phases", lambda *_, found=(name, options): [found])
            assert [(phase.name, phase.gib, phase.words) for phase in small.phases(1)] == [(name, size, taken)]


@pytest.mark.usefixtures("training_alone")
def test_what_cannot_be_traced_is_in_the_notes(language_config: Config) -> None:
    language_config.lora.init, language_config.lora.dora = LoraInit.pissa, True
    language_config.model.quantize = Quantize.nf4
    notes = "\n".join(plan(on_a_gpu(language_config)).notes)
    assert "lora.init=pissa isn't traced" in notes
    assert "lora.dora on a quantised base isn't traced" in notes


@pytest.mark.usefixtures("training_alone")
def test_new_tokens_are_counted(language_config: Config) -> None:
    language_config.model.added_tokens = ["<|note|>"]
    found = plan(on_a_gpu(language_config))
    assert found.fits


def test_rows_longer_than_the_base_reads_are_refused(language_config: Config) -> None:
    language_config.data.length = 1000
    with pytest.raises(ConfigError, match=r"data.length=1000 .* try data.length=256"):
        plan(on_a_gpu(language_config))


@pytest.mark.usefixtures("training_alone")
def test_on_a_cpu(roomy: Config) -> None:
    roomy.hardware.device, roomy.hardware.gpu = Device.cpu, ""
    (found,) = plans(roomy, [read(roomy.hardware)])
    assert found.precision == "fp32"
    assert found.chosen is not None
    assert "CUDA itself" not in found.chosen.parts
    assert "measured now" in found.notes[0]


@pytest.mark.parametrize("name", recipes.preset_files()["model"])
def test_every_preset_plans_without_weights(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few layers but for the embedded model, of which alone all phases of images are traced too."""
    config = on_a_gpu(Config(name=name, model=preset(name)), effective=2)
    config.lora.targets = "attention"
    config.data.folder = config.data.file = "somewhere"
    if config.model.kind == "diffusion" and name != "embedded":
        monkeypatch.setattr(Candidates, "phases", lambda self, micro_batch: iter(()))
        config.model.resolution = 256  # fits at once: what takes more memory is traced three times
    if name != "embedded":
        config.model.base = str(shortened(config.model.base, tmp_path / name))
        config.data.length = 256
    found = plan(config)
    assert found.fits, found.problems
    assert found.chosen is not None
    assert found.chosen.micro_batch * found.chosen.accumulate == 2


def test_a_base_without_configuration_is_named(config: Config) -> None:
    config.model.base = "somebody/something"
    with pytest.raises(ModelError, match="hf download somebody/something"):
        plan(on_a_gpu(config))


@pytest.mark.usefixtures("training_alone")
def test_from_python_with_a_table(config: Config) -> None:
    found = finetune.plan(on_a_gpu(config))
    shown = found._repr_html_()  # type: ignore[attr-defined]
    assert all(word in shown for word in ("CUDA itself", "training", "fastest", "a GPU"))
    hopeless = replace(found, chosen=None, problems=("training needs <all>",))
    assert "training needs &lt;all&gt;" in hopeless._repr_html_()  # type: ignore[attr-defined]
