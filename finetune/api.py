"""What a notebook calls and the command line runs: one function per command, each of them `recipe -> record`.

Every call checks the whole configuration first, has of the run folder what the command's row in `stages.COMMANDS` says,
and brings the stages before its own up to date: a stage whose inputs haven't changed is skipped. A command of one stage
needs no function here. Heavy imports wait until a stage runs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from finetune import hub, kinds
from finetune.config import describe, hints, mistyped, recipes, renamed
from finetune.config.describe import as_dict
from finetune.config.model_kinds import model_kind
from finetune.config.schema import Config
from finetune.config.spelling import override, setting
from finetune.config.typed_text import Overrides, as_words
from finetune.config.validate import cautions, check
from finetune.diffusion import families
from finetune.errors import ConfigError, RunError
from finetune.planning.plan import Plan
from finetune.reporting import notebook
from finetune.run import libraries, ranks, rundir
from finetune.run.progress import say, taken_warnings
from finetune.run.receipts import load_record
from finetune.run.records import Adapter, Answers, CaptionSet, Dataset, Report, Result, Run, Samples, TextSet
from finetune.run.step_time import Profile
from finetune.stages import COMMANDS, Command
from finetune.training import distributed

if TYPE_CHECKING:
    from finetune.diffusion.brush import Brush
    from finetune.language.conversation import Conversation
    from finetune.stages.serve import Served, Serving

PROFILE = "profile"
"""In a run folder, the folder of `finetune profile`."""


def load(recipe: str, overrides: Overrides = ()) -> Config:
    """The configuration of a recipe with overrides: `["lora.rank=32"]`, `"lora.rank=32"` or `{"lora.rank": 32}`.

    Raises ConfigError, one line a problem.
    """
    from finetune.config import compose

    return compose.load(recipe, overrides, say)


def load_run(overrides: Overrides) -> Config:
    """What config.yaml says in the run folder that `run_dir`, or else `name`, chooses, with the other overrides.

    The folder may have been moved or renamed since: `run_dir` is where it is now. Raises ConfigError where no run is
    chosen and for wrong overrides, RunError for a damaged config.yaml.
    """
    from finetune.config import compose

    words = as_words(overrides)
    choice = _of_key("run_dir", words) or _of_key("name", words)
    run_dir = compose.apply(Config(), choice).run_dir if choice else ""
    written = rundir.written_config(Path(run_dir)) if run_dir else {}
    if not written:
        compose.refuse([*mistyped.stray_problems(words), _no_run(run_dir)])
    values = renamed.new_tree(written) | {"run_dir": run_dir}
    try:
        compose.refuse(describe.tree_problems(values))
        config = compose.from_plain(values)
    except ConfigError as error:
        file, reason = Path(run_dir) / rundir.CONFIG, str(error).splitlines()[0]
        raise RunError(f"{file} can't be used ({reason}); name its recipe, such as conf=pixar_style") from error
    return compose.apply(config, [word for word in words if word not in choice], say)


def train(recipe: str | Config, overrides: Overrides = ()) -> Result:
    """The whole line: captions, data set, training, export, samples, report; what is fresh is not done again.

    Several processes (torchrun, accelerate launch) train together; the first one does the rest.
    Raises Interrupted on SIGINT or SIGTERM after saving; the same call continues from there.
    """
    with _begun("train", recipe, overrides) as config:
        from finetune.stages import dataset, export, report, sample, train

        for line in cautions(config):
            say(f"warning: {line}")
        distributed.on_first_rank(lambda: kinds.require_resumable(config))
        captions = distributed.on_first_rank(lambda: _captions(config))
        data = distributed.on_first_rank(lambda: dataset.dataset(config, captions))
        run = train.train(config, data)

        def hand_out() -> Result:
            rundir.write_config(as_dict(config), Path(config.run_dir))  # the run now is what this configuration says
            adapter = export.export(config, run)
            samples = sample.sample(config, adapter)
            return Result(captions, data, run, adapter, samples, report.report(config))

        return distributed.on_first_rank(hand_out)


def plan(recipe: str | Config, overrides: Overrides = ()) -> Plan:
    """Whether the run fits `hardware`, and how it is fastest; nothing is written and no GPU is needed.

    Of one process: each of several takes as much. Raises ConfigError where several are to plan.
    """
    return cast(Plan, _stage("plan", recipe, overrides))


def profile(recipe: str | Config, overrides: Overrides = ()) -> Profile:
    """Where the time of a training step goes, from a few steps of the real trainer, and what would make it shorter.

    Data set and traces go to the folder `profile` of the run folder; what was trained there stays as it is.
    """
    config = _config(recipe, overrides, needs_prompts=False)
    with _begun("profile", replace(config, run_dir=str(Path(config.run_dir) / PROFILE)), ()) as config:
        from finetune.stages import dataset, profile, train

        data = dataset.dataset(config, _captions(config))
        return profile.profile(config, data, train.build_trainer)


def caption(recipe: str | Config, overrides: Overrides = ()) -> CaptionSet:
    """Captions for every image that has none, in the image folder's metadata.jsonl."""
    return cast(CaptionSet, _stage("caption", recipe, overrides))


def dataset(recipe: str | Config, overrides: Overrides = ()) -> Dataset | TextSet:
    """The encoded data set; captions come first where they are missing."""
    with _begun("dataset", recipe, overrides) as config:
        from finetune.stages.dataset import dataset

        return dataset(config, _captions(config))


def export(recipe: str | Config, overrides: Overrides = ()) -> Adapter:
    """The adapter of the finished run in every file format. Raises RunError where no run has finished."""
    with _begun("export", recipe, overrides) as config:
        from finetune.stages.export import export

        return export(_as_trained(config), _finished(config))


def sample(recipe: str | Config, overrides: Overrides = ()) -> Samples | Answers:
    """What base and tuned model make of the prompts; tuned by `sample.adapter`, or else by the run's adapter.

    With settings other than the run's own it is drawn into a folder apart, `samples_more/PROMPT-HASH/`.
    """
    with _begun("sample", recipe, overrides) as config:
        from finetune.stages.export import export
        from finetune.stages.sample import sample

        folder = Path(config.run_dir)
        run = None if config.sample.adapter else load_record(folder, "train", Run)
        trained = export(_as_trained(config), run) if run else None
        own = as_dict(config)["sample"] == rundir.written_config(folder).get("sample")
        return sample(config, trained or load_record(folder, "export", Adapter), own=own)


def report(recipe: str | Config, overrides: Overrides = ()) -> Report:
    """report.html again, from what the run folder holds. Raises RunError where no run has finished."""
    return cast(Report, _stage("report", recipe, overrides))


@contextmanager
def serve(recipe: str | Config, overrides: Overrides = ()) -> Iterator["Serving"]:
    """A server of the recipe's base and adapters inside the block, at `url`; see `finetune serve`."""
    with _begun("serve", recipe, overrides) as config:
        from finetune.stages.serve import serving

        typed = [override("conf", recipe), *as_words(overrides)] if isinstance(recipe, str) else []
        with serving(config, typed) as found:
            yield found


def serve_forever(config: Config, typed: Sequence[str] = ()) -> "Served":
    """The same until SIGINT or SIGTERM, as the command line does. typed: there, which makes up `config`."""
    with _begun("serve", config, ()):
        from finetune.stages.serve import serve

        return serve(config, typed)


def chat(recipe: str | Config, overrides: Overrides = ()) -> "Conversation":
    """The model that the recipe trained, to talk to: `reply = chat("pirate_chat")("Who are you?")`."""
    return cast("Conversation", _used("chat", recipe, overrides))


def draw(recipe: str | Config, overrides: Overrides = ()) -> "Brush":
    """The model that the recipe trained, to draw with: `image = draw("pixar_style")("a red robot, pixar style")`."""
    return cast("Brush", _used("draw", recipe, overrides))


def __getattr__(name: str) -> Callable[..., Any]:
    """A command without a function above."""
    if name not in COMMANDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return partial(_stage, name)


def _used(verb: str, recipe: str | Config, overrides: Overrides) -> Any:
    """Raises ConfigError for a model of another kind, ModelError where there is no adapter."""
    with _begun("serve", recipe, overrides) as config:
        facts = model_kind(config.model.kind)
        if facts.verb != verb:
            raise ConfigError(f"{config.name} is a recipe for a {facts.name} model; type finetune.{facts.verb}(…)")
        from finetune.stages.sample import adapter_path

        own = load_record(Path(config.run_dir), "export", Adapter)
        return kinds.of(config).use(config, adapter_path(config, own))


def _stage(command: str, recipe: str | Config, overrides: Overrides = ()) -> Any:
    """What the command's stage makes of the configuration."""
    with _begun(command, recipe, overrides) as config:
        record = getattr(import_module(f"finetune.stages.{command}"), command)(config)
    notebook.give_look(type(record))
    return record


@contextmanager
def _begun(command: str, recipe: str | Config, overrides: Overrides) -> Iterator[Config]:
    """The checked configuration; inside, the command has of the run folder what its row says."""
    with libraries.quiet_where_typed():
        row = COMMANDS[command]
        taken_warnings()  # of a command that failed
        config = _config(recipe, overrides, needs_prompts=row.needs_prompts)
        if not row.trains:
            ranks.require_single_process()
        if row.reads_data and (row.uses_device or not config.hardware.gpu):  # a plan may be for another machine
            kinds.require_data(config)
        if row.loads_base and hub.single_file(config.model.base) is None:
            hub.require(config.model.base)
        limited = _machine(config, row) if row.uses_device else nullcontext()
        folder, hint = Path(config.run_dir), hints.smaller(config, on_gpu=row.uses_device and _on_gpu(config))
        together = distributed.process_group() if row.trains else nullcontext()
        held = (
            rundir.held(folder, as_dict(config), owns_config=row.trains, hint=hint)
            if row.holds_folder
            else rundir.explained(folder, hint)
        )
        with together, held, limited:
            if row.needs_run:
                _finished(config)
            yield config


def _config(recipe: str | Config, overrides: Overrides, *, needs_prompts: bool) -> Config:
    """A checked configuration. Raises ConfigError with every problem at once."""
    ranks.check_launcher()
    if isinstance(recipe, str):
        config = load(recipe, overrides)
    elif overrides:
        from finetune.config import compose

        config = compose.apply(recipe, overrides, say)
    else:
        config = recipe
    problems = check(config) + families.problems(config.model.family)
    if needs_prompts and not config.sample.prompts:
        problems.append("sample.prompts is empty, nothing could be drawn; try 'sample.prompts=[\"a red robot\"]'")
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _on_gpu(config: Config) -> bool:
    from finetune.memory.device import pick_device

    return pick_device(config.hardware.device).type == "cuda"


def _machine(config: Config, row: Command) -> AbstractContextManager[None]:
    """Say, before anything is read or made, what this machine can't do of what is asked. Raises ConfigError.

    Inside, no more of its GPU is taken than `hardware.vram_gib`; afterwards torch's global state is as it was.
    """
    from finetune.adapters.formats import require_start
    from finetune.memory import block_offload
    from finetune.memory.device import borrowed, pick_device, pick_precision
    from finetune.training.optim import require_device

    device = pick_device(config.hardware.device)
    pick_precision(config.trainer.precision, device)
    if row.optimises:
        require_device(config.optim.name, device)
        if config.lora.start_from:
            require_start(Path(config.lora.start_from))
    if row.loads_base:
        kinds.of(config).require_device(config, device)
        kinds.of(config).require_base(config)
        hub.require_reachable(config.model.base)
    if row.optimises and config.lora.start_from:
        kinds.of(config).require_start(config)
    if config.model.offload:
        block_offload.warn_without_gpu(device)
    return borrowed(device, config.hardware.vram_gib)


def _captions(config: Config) -> CaptionSet | None:
    """The stage's record, or None where the examples are no images."""
    if not model_kind(config.model.kind).captioned:
        return None
    from finetune.stages.caption import caption

    return caption(config)


def _finished(config: Config) -> Run:
    """The run that finished in the run folder. Raises RunError if none did."""
    run = load_record(Path(config.run_dir), "train", Run)
    if run is None:
        way = "train first, with the same settings: finetune train conf=…"
        raise RunError(f"{config.run_dir} holds no finished run; {way}")
    return run


def _as_trained(config: Config) -> Config:
    """With the name and the trigger phrase that the run in its folder was trained with: they belong to its adapter.

    Raises RunError for a damaged config.yaml, and for a name in it that leads out of the run folder.
    """
    run_dir = Path(config.run_dir)
    written = rundir.written_config(run_dir)
    name, trigger = written.get("name", config.name), written.get("caption", {}).get("trigger", config.caption.trigger)
    found = replace(config, name=name, caption=replace(config.caption, trigger=trigger))
    wrong = [text for text in (name, trigger) if not isinstance(text, str)] or check(found)
    if wrong:
        raise RunError(f"{run_dir / rundir.CONFIG} is damaged ({wrong[0]}); the same `train` command writes it again")
    return found


def _of_key(key: str, words: Sequence[str]) -> list[str]:
    return [word for word in words if word.partition("=")[0] == key]


def _no_run(run_dir: str) -> str:
    """What to say, and to type, where there is no config.yaml."""
    here = f", and {run_dir} holds no run" if run_dir else ""
    trained = sorted(Path("outputs").glob("*/receipts/train.json"), key=lambda file: file.stat().st_mtime)
    example = setting("run_dir", str(trained[-1].parents[1])) if trained else "run_dir=outputs/NAME"
    there = ", ".join(recipes.recipe_files())
    return (
        f"conf= is missing{here}: say which run, such as {example}, or which recipe, such as conf=pixar_style; there "
        f"are: {there}"
    )
