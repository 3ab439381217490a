"""What the command line shows at the end: a short table, 80 columns wide, and what to type next."""

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.config.describe import as_dict
from finetune.config.recipes import shown
from finetune.config.schema import Config
from finetune.config.spelling import override
from finetune.planning.plan import KEYS, Plan
from finetune.reporting.facts import plan_tables
from finetune.reporting.text import WIDTH, result_facts, rich_table, text
from finetune.run.progress import plural, printable
from finetune.run.receipts import load_receipt, receipt_path
from finetune.run.records import Answers, Result
from finetune.run.step_time import Profile

STAGES = ("caption", "dataset", "train", "export", "sample", "report")
NOT_REPEATED = ("run_dir", "sample.prompts", "trainer.restart")  # the next command gives its own, or none
CLOCKS_DIFFER_S = 0.1  # those of files are coarser than ours


def show(config: Config, record: Any, overrides: Sequence[str] = (), *, began: float) -> None:
    """Print what a command left. overrides: the settings it was given, which the next commands repeat.

    began: when, as `time.time` counts.
    """
    if isinstance(record, Plan):
        _plan(record, overrides)
    elif isinstance(record, Profile):
        _profile(config, record, overrides)
    elif isinstance(record, Result):
        print_table(f"finetune train {_recipe(overrides, config.name)}", ("", ""), _result_rows(config, record, began))
        print("next")
        for line in _next(config, record, overrides):
            print(f"  {line}")
    else:
        print(printable(text(record)))


@dataclass(frozen=True)
class SweptRun:
    """One run of a sweep. overrides: the settings it was given; record: None where it failed."""

    overrides: Sequence[str]
    folder: str
    record: Any


def show_sweep(runs: Sequence[SweptRun]) -> None:
    """Print which settings led to which losses, where a sweep trained."""
    if not any(isinstance(run.record, Result) for run in runs):
        return
    common = set.intersection(*(set(run.overrides) for run in runs))
    rows = [
        (" ".join(word for word in run.overrides if word not in common), *_losses(run.record), shown(Path(run.folder)))
        for run in runs
    ]
    print_table(f"\n{plural(len(runs), 'run')}", ("settings", "loss", "validation", "folder"), rows)


def _losses(record: Any) -> tuple[str, str]:
    """Of the last steps, and the lowest of the validations."""
    if not isinstance(record, Result):
        return "failed", ""
    lowest = record.run.best_validation
    return f"{record.run.last_loss:.4f}", "–" if lowest is None else f"{lowest:.4f}"


def _result_rows(config: Config, result: Result, began: float) -> list[tuple[str, str]]:
    names, seconds = _seconds(Path(config.run_dir), began)
    facts = result_facts(result, as_dict(config))
    return [("stage", names), ("seconds", seconds), *((fact.label, fact.text) for fact in facts)]


def _recipe(overrides: Sequence[str], name: str) -> str:
    """The recipe as it was typed; a run may have another name."""
    return next((word for word in overrides if word.startswith("conf=")), override("conf", name))


def _plan(plan: Plan, overrides: Sequence[str]) -> None:
    for index, table in enumerate(plan_tables(plan)):
        title = f"\n{table.title}" if index else f"finetune plan {_recipe(overrides, plan.name)}"
        print_table(title, ("", *table.head), table.rows)
    print_table("", ("", ""), [("·", note) for note in plan.notes])
    if plan.fits and plan.chosen:
        words = [word for word in overrides if word.partition("=")[0].lstrip("+") not in KEYS.values()]
        settings = shlex.join(words or [override("conf", plan.name)])
        print(f"next\n  {_program()} train {settings} {' '.join(plan.chosen.overrides)}")


def _profile(config: Config, profile: Profile, overrides: Sequence[str]) -> None:
    if config.profile.json:
        print(json.dumps(asdict(profile) | {"gain": profile.gain}, indent=1))
        return
    print(text(profile))
    print("traces, to look at with https://ui.perfetto.dev")
    for each in (*profile.times, *([profile.checked] if profile.checked else [])):
        print(f"  {shown(Path(each.trace))}")
    words = [word for word in overrides if not word.lstrip("+").startswith("profile.")]
    settings = shlex.join(words or [override("conf", profile.name)])
    print("next")
    if profile.change:
        print(f"  {_program()} train {settings} {shlex.join(profile.change)}")
    print(f"  {_python_hot_spots(Path(config.run_dir) / 'profile' / 'python.svg', settings)}")


def _python_hot_spots(file: Path, settings: str) -> str:
    """How to see what Python does meanwhile, with a program that looks at it from outside."""
    sampler = Path(sys.executable).with_name("py-spy")
    if not (sampler.exists() or shutil.which(sampler.name)):
        return "pip install py-spy (this command then says how it shows what Python does)"
    return f"{_typed(sampler)} record -o {shlex.quote(shown(file))} -- {_program()} profile {settings}"


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table that is no wider than the terminal: long texts are folded in their column."""
    from rich.console import Console

    console = Console(width=min(WIDTH, Console().width), highlight=False, markup=False)
    console.print(rich_table(title, head, rows))


def _seconds(run_dir: Path, began: float) -> tuple[str, str]:
    """Stages above the seconds each took, none where it was skipped; what else took time, and the clock's total."""
    known: dict[str, float | None] = {}
    for stage in STAGES:
        if receipt := load_receipt(run_dir, stage):
            ran = receipt_path(run_dir, stage).stat().st_mtime >= began - CLOCKS_DIFFER_S
            known[stage] = receipt.seconds if ran else None
    total = time.time() - began
    known |= {"rest": max(0.0, total - sum(filter(None, known.values()))), "total": total}
    widths = {stage: max(3, len(stage)) for stage in known}
    columns = [
        (f"{stage:>3}", f"{'–':>{widths[stage]}}" if seconds is None else f"{seconds:>{widths[stage]}.0f}")
        for stage, seconds in known.items()
    ]
    head, figures = zip(*columns, strict=True)
    return "  ".join(head), "  ".join(figures)


def _next(config: Config, result: Result, overrides: Sequence[str]) -> list[str]:
    """Command lines to type next, for the way this program was started."""
    program = _program()
    board = _typed(Path(sys.executable).with_name("tensorboard"))
    wish = "What colour is the sea?" if isinstance(result.samples, Answers) else "a big green fish in space"
    prompt = f"{wish}, {result.adapter.trigger}".removesuffix(", ")
    run_dir = shown(Path(config.run_dir))
    words = [override("conf", config.name)] if not overrides else []
    words += [word for word in overrides if word.partition("=")[0].lstrip("+") not in NOT_REPEATED]
    if Path(run_dir) != Path("outputs") / config.name:
        words.append(override("run_dir", run_dir))
    words.append(override("sample.prompts", [prompt]))
    return [
        f"{board} {shlex.join(['--logdir', f'{run_dir}/tensorboard'])}",
        f"{program} sample {shlex.join(words)}",
    ]


def _program() -> str:
    """How this program was started."""
    python = Path(sys.executable)
    module = Path(sys.argv[0]).name in ("__main__.py", "-m")
    return f"{_typed(python)} -m finetune" if module else _typed(python.with_name("finetune"))


def _typed(program: Path) -> str:
    """How to call a program of this environment from here: by its name alone only where the shell finds that one."""
    found = shutil.which(program.name)
    if not program.exists() or (found and Path(found).absolute() == program):
        return program.name
    return shlex.quote(os.path.relpath(program) if program.is_relative_to(Path.cwd()) else str(program))
