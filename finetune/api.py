"""What a notebook calls and the command line runs: one function per verb, each of them `recipe -> record`.

Every call checks the whole configuration first, makes the run folder, holds its lock, and brings the stages before its
own up to date: a stage whose inputs haven't changed is skipped. Heavy imports wait until a stage runs.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from finetune.config import hints
from finetune.config.describe import as_dict
from finetune.config.model_kinds import model_kind
from finetune.config.schema import Config
from finetune.config.validate import cautions, check
from finetune.diffusion import families
from finetune.errors import ConfigError, RunError
from finetune.planning.plan import Plan
from finetune.reporting import notebook  # noqa: F401 - tells notebooks how each record looks
from finetune.run import ranks, rundir
from finetune.run.progress import say
from finetune.run.receipts import load_record
from finetune.run.records import Adapter, Answers, CaptionSet, Dataset, Report, Result, Run, Samples, TextSet
from finetune.training import distributed


def load(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a recipe with overrides such as `"lora.rank=32"`. Raises ConfigError, one line a problem."""
    from finetune.config import compose

    return compose.load(recipe, overrides, say)


def train(recipe: str | Config, overrides: Sequence[str] = ()) -> Result:
    """The whole line: captions, data set, training, export, samples, report; what is fresh is not done again.

    Several processes (torchrun, accelerate launch) train together; the first one does the rest.
    Raises Interrupted on SIGINT or SIGTERM after saving; the same call continues from there.
    """
    config = _config(recipe, overrides)
    _check_machine(config)
    with distributed.process_group(), _held(config, owns_config=True) as folder:
        from finetune.stages import dataset, export, report, sample, train

        for line in cautions(config):
            say(f"warning: {line}")
        captions = distributed.on_first_rank(lambda: _captions(config))
        data = distributed.on_first_rank(lambda: dataset.dataset(config, captions))
        run = train.train(config, data)

        def hand_out() -> Result:
            rundir.write_config(as_dict(config), folder)  # the run now is what this configuration says
            adapter = export.export(config, run)
            samples = sample.sample(config, adapter)
            return Result(captions, data, run, adapter, samples, report.report(config))

        return distributed.on_first_rank(hand_out)


def plan(recipe: str | Config, overrides: Sequence[str] = ()) -> Plan:
    """Whether the run fits `hardware`, and how it is fastest; nothing is written and no GPU is needed.

    Of one process: each of several takes as much. Raises ConfigError where several are to plan.
    """
    config = _config(recipe, overrides)
    ranks.require_single_process()
    from finetune.stages.plan import plan

    return plan(config)


def caption(recipe: str | Config, overrides: Sequence[str] = ()) -> CaptionSet:
    """Captions for every image that has none, in the image folder's metadata.jsonl."""
    config = _config(recipe, overrides)
    if not model_kind(config.model.kind).captioned:
        raise ConfigError(f"this recipe trains a {config.model.kind} model; only images have captions")
    _check_machine(config)
    with _held(config):
        from finetune.stages.caption import caption

        return caption(config)


def dataset(recipe: str | Config, overrides: Sequence[str] = ()) -> Dataset | TextSet:
    """The encoded data set; captions come first where they are missing."""
    config = _config(recipe, overrides)
    _check_machine(config)
    with _held(config):
        from finetune.stages.dataset import dataset

        return dataset(config, _captions(config))


def export(recipe: str | Config, overrides: Sequence[str] = ()) -> Adapter:
    """The adapter of the finished run in every file format. Raises RunError where no run has finished."""
    config = _config(recipe, overrides)
    _check_machine(config)
    with _held(config) as folder:
        from finetune.stages.export import export

        run = _finished(folder)
        return export(_as_trained(config, folder), run)


def sample(recipe: str | Config, overrides: Sequence[str] = ()) -> Samples | Answers:
    """What base and tuned model make of the prompts; tuned by `sample.adapter`, or else by the run's adapter.

    With settings other than the run's own it is drawn into a folder apart, `samples_more/HASH/`.
    """
    config = _config(recipe, overrides, draws=True)
    _check_machine(config)
    with _held(config) as folder:
        from finetune.stages.export import export
        from finetune.stages.sample import sample

        run = None if config.sample.adapter else load_record(folder, "train", Run)
        trained = export(_as_trained(config, folder), run) if run else None
        own = as_dict(config)["sample"] == rundir.written_config(folder).get("sample")
        return sample(config, trained or load_record(folder, "export", Adapter), own=own)


def report(recipe: str | Config, overrides: Sequence[str] = ()) -> Report:
    """report.html again, from what the run folder holds."""
    config = _config(recipe, overrides)
    with _held(config) as folder:
        from finetune.stages.report import report

        _finished(folder)
        return report(config)


def _config(recipe: str | Config, overrides: Sequence[str], *, draws: bool = False) -> Config:
    """A checked configuration; `draws` asks for prompts too. Raises ConfigError with every problem at once."""
    ranks.check_launcher()
    if isinstance(recipe, str):
        config = load(recipe, overrides)
    elif overrides:
        from finetune.config import compose

        config = compose.apply(recipe, overrides, say)
    else:
        config = recipe
    problems = check(config) + families.problems(config.model.family)
    if draws and not config.sample.prompts:
        problems.append("sample.prompts is empty, nothing could be drawn; try 'sample.prompts=[\"a red robot\"]'")
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _held(config: Config, *, owns_config: bool = False) -> AbstractContextManager[Path]:
    return rundir.held(Path(config.run_dir), as_dict(config), owns_config=owns_config, hint=hints.smaller(config))


def _check_machine(config: Config) -> None:
    """Say, before anything is read or made, what this machine can't do of what is asked. Raises ConfigError."""
    from finetune.memory import block_offload
    from finetune.memory.device import pick_device, pick_precision

    device = pick_device(config.hardware.device)
    pick_precision(config.trainer.precision, device)
    if config.model.offload:
        block_offload.warn_without_gpu(device)


def _captions(config: Config) -> CaptionSet | None:
    """The stage's record, or None where the examples are no images."""
    if not model_kind(config.model.kind).captioned:
        return None
    from finetune.stages.caption import caption

    return caption(config)


def _finished(folder: Path) -> Run:
    """The run that finished in this folder. Raises RunError if none did."""
    run = load_record(folder, "train", Run)
    if run is None:
        raise RunError(f"{folder} holds no finished run; type the same command with train first")
    return run


def _as_trained(config: Config, folder: Path) -> Config:
    """With the name and the trigger phrase that the run in this folder was trained with: they belong to its adapter."""
    written = rundir.written_config(folder)
    caption = replace(config.caption, trigger=written.get("caption", {}).get("trigger", config.caption.trigger))
    return replace(config, name=written.get("name", config.name), caption=caption)
