"""What the command line shows at the end: a short table, 80 columns wide, and what to type next."""

import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.config.recipes import shown
from finetune.config.schema import Config
from finetune.planning.plan import KEYS, Plan
from finetune.reporting import plan_tables
from finetune.run.records import Adapter, Answers, CaptionSet, Dataset, Report, Result, Samples, TextSet, load_receipt

STAGES = ("caption", "dataset", "train", "export", "sample", "report")
NOT_REPEATED = ("run_dir=", "sample.prompts=", "trainer.restart=")  # the next command gives its own, or none
NUMBERS = ("GiB", "s/step", "images/s", "tokens/s")
WIDTH = 80  # columns; a narrower terminal gets its own width


def show(config: Config, record: Any, overrides: Sequence[str] = ()) -> None:
    """Print what a command left. overrides: the settings it was given, which the next commands repeat."""
    if isinstance(record, Plan):
        _plan(record, overrides)
    elif isinstance(record, Result):
        recipe = next((word for word in overrides if word.startswith("conf=")), f"conf={config.name}")
        _table(config, record, recipe)
        print("next")
        for line in _next(config, record, overrides):
            print(f"  {line}")
    else:
        print(_line(record))


def _line(record: Any) -> str:
    if isinstance(record, CaptionSet):
        generated = sum(item.source == "generated" for item in record.items)
        bad = f", {len(record.skipped)} skipped" if record.skipped else ""
        where = Path(record.folder) / "metadata.jsonl"
        return f"captions: {len(record.items)} images, {generated} by the model{bad}; correct them in {where}"
    if isinstance(record, Dataset):
        buckets = ", ".join(f"{name} ({count})" for name, count in record.buckets.items())
        return f"dataset: {record.train} to train, {record.validation} held out; {buckets}"
    if isinstance(record, TextSet):
        rows = f"{record.train:,} rows to train, {record.validation:,} held out"
        return f"dataset: {rows}; {record.tokens:,} tokens, {record.trained:,} of them trained"
    if isinstance(record, Adapter):
        return f"adapter: {record.folder} ({', '.join(record.files.values())})"
    if isinstance(record, Answers):
        told = (f"{item.prompt}\n  base:  {item.base}\n  tuned: {item.tuned}\n" for item in record.items)
        return f"{''.join(told)}samples: {record.page}"
    if isinstance(record, Samples):
        return f"samples: {record.page}"
    if isinstance(record, Report):
        return f"report: {record.file}"
    raise TypeError(f"no line for a {type(record).__name__}")


def _table(config: Config, result: Result, recipe: str) -> None:
    from rich.console import Console
    from rich.table import Table

    run = result.run
    table = Table(title=f"finetune train {recipe}", title_justify="left", show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    names, seconds = _seconds(Path(config.run_dir))
    table.add_row("stage", names)
    table.add_row("seconds", seconds)
    table.add_row(
        "speed", f"{run.items_per_s:,.1f} {run.unit}/s, {run.steps} steps, peak memory {run.peak_gib:.2f} GiB"
    )
    table.add_row("batch", run.batch)
    if run.memory_summary:
        table.add_row("training", run.memory_summary)
    if run.oom_fallbacks:
        table.add_row("memory", f"ran out; went on with {run.oom_fallbacks}")
    table.add_row("loss", f"{run.first_loss:.4f} → {run.last_loss:.4f} (first step → mean of the last 10 %)")
    if run.first_validation is not None and run.best_validation is not None:
        at = f" at step {run.best_step}" if run.best_step is not None else ""
        on = "" if result.dataset.validation else ", on examples that were trained on"
        table.add_row("validation", f"{run.first_validation:.4f} → {run.best_validation:.4f}{at}{on}")
    if run.skipped_steps:
        table.add_row("skipped", f"{run.skipped_steps} steps with a loss or gradient that was not finite")
    table.add_row("adapter", shown(Path(result.adapter.folder)))
    drawn = "answers" if isinstance(result.samples, Answers) else "grid"
    table.add_row(drawn, shown(Path(result.samples.page)) if result.samples.page else "none (sample.prompts is empty)")
    table.add_row("report", shown(Path(result.report.file)))
    console = Console(width=min(WIDTH, Console().width), highlight=False)
    console.print(table)


def _plan(plan: Plan, overrides: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=min(WIDTH, Console().width), highlight=False)

    def show(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(title=title, title_justify="left", show_header=any(head), box=None, pad_edge=False)
        for name in head:
            table.add_column(name, justify="right" if name in NUMBERS else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)

    show(f"finetune plan conf={plan.name}", ("", ""), plan_tables.facts(plan))
    head, rows = plan_tables.settings_head(plan.unit), plan_tables.choices(plan)
    show("\nsettings of the same effective batch", ("", *head), [(name, *row) for name, row in rows])
    show("\na training step", ("", "GiB"), plan_tables.memory(plan))
    show("\nphases, each at its worst moment", ("", "GiB", ""), plan_tables.phases(plan))
    for note in plan.notes:
        lines = textwrap.wrap(note, console.width, initial_indent="· ", subsequent_indent="  ", break_on_hyphens=False)
        console.print("\n".join(lines), style="dim")
    if plan.fits and plan.chosen:
        words = [word for word in overrides if word.partition("=")[0] not in KEYS.values()]
        settings = " ".join(map(shlex.quote, words or [f"conf={plan.name}"]))
        print(f"next\n  {_program()} train {settings} {' '.join(plan.chosen.overrides)}")


def _seconds(run_dir: Path) -> tuple[str, str]:
    """Stages above the seconds each took when it last ran: a fresh stage shows its earlier figure."""
    receipts = {stage: load_receipt(run_dir, stage) for stage in STAGES}
    known = {stage: receipt.seconds for stage, receipt in receipts.items() if receipt}
    known["total"] = sum(known.values())
    cells = [(stage, f"{seconds:.0f}") for stage, seconds in known.items()]
    widths = [max(map(len, cell)) for cell in cells]
    head, figures = zip(*cells, strict=True)
    return _row(head, widths), _row(figures, widths)


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _next(config: Config, result: Result, overrides: Sequence[str]) -> list[str]:
    """Command lines to type next, for the way this program was started."""
    program = _program()
    board = _typed(Path(sys.executable).with_name("tensorboard"))
    wish = "What colour is the sea?" if isinstance(result.samples, Answers) else "a big green fish in space"
    prompt = f"{wish}, {result.adapter.trigger}".removesuffix(", ")
    run_dir = shown(Path(config.run_dir))
    words = [f"conf={config.name}"] if not overrides else []
    words += [word for word in overrides if not word.startswith(NOT_REPEATED)]
    if Path(run_dir) != Path("outputs") / config.name:
        words.append(f"run_dir={run_dir}")
    settings = " ".join(map(shlex.quote, words))
    wanted = shlex.quote(f'sample.prompts=["{prompt}"]')
    return [
        f"{board} --logdir {shlex.quote(f'{run_dir}/tensorboard')}",
        f"{program} sample {settings} {wanted}",
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
