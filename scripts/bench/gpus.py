"""What fits which GPU: every base on four GPUs, as `finetune plan` estimates it.

    python -m scripts.bench.gpus --bases sdxl,llama31_8b

plans those bases (all of them unless named; no GPU is needed), puts the results into scripts/bench/gpus.jsonl, and
writes docs/gpus.md from that file: a short table of seconds and a long one of settings.
"""

import argparse
import datetime
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "scripts" / "bench" / "gpus.jsonl", ROOT / "docs" / "gpus.md"
GPUS = {
    "rtx3060_12gb": "12 GB (RTX 3060)",
    "rtx4080": "16 GB (RTX 4080)",
    "rtx4090": "24 GB (RTX 4090)",
    "a6000": "48 GB (RTX A6000)",
}
# The recipes for real models, with sixteen images or rows a step; the rows as docs/real_models.md sets them.
IMAGES = ("pixar_style_sd15",)
ROWS = ("pirate_chat", "data.length=2048", "trainer.accumulate=16", "sample.max_new_tokens=256", "optim.lr=2e-4")
HEAD = """# What fits which GPU

`finetune plan` made these tables without a GPU. They are estimates: nothing here was run on these GPUs. One optimiser
step is 16 images (recipe `pixar_style_sd15`, at each model's own resolution) or 16 rows of 2,048 tokens
(`pirate_chat`). The adapters have rank 16, the optimiser is AdamW. To plan your own run, see
[memory_plan.md](memory_plan.md).

## Seconds per step

These are estimated seconds for one optimiser step with the fastest settings that fit. *no* means that no settings fit.
Speeds were right to about a fifth where they were compared. An older GPU is slower, even with the same memory.

"""
LONG_HEAD = """
## Settings and memory

*GiB* is all the GPU memory that training needs, with the CUDA context and the allocator's slack. *On the CPU* names the
stages for which this GPU is too small: they run on the CPU automatically, which is slower. [memory.md](memory.md)
compares planned with measured GiB.

| model | GPU | base in | settings | GiB | s per step | on the CPU |
|---|---|---|---|---|---|---|
"""
NOTE = """
¹ The GPU is too small for another stage, which then runs on the CPU: the table below names it.
"""
TAIL = """
Planned on {date} with `python -m scripts.bench.gpus`, without a GPU. The lines are in `scripts/bench/gpus.jsonl`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", help="names of model presets, separated by commas; all unless given")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON lines; those of other bases stay")
    given = parser.parse_args()
    for base in given.bases.split(",") if given.bases else bases():
        kept = [line for line in read(given.out) if line["model"] != base]
        lines = sorted([*kept, *planned(base, tuple(GPUS))], key=_order)
        given.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
        print(base, flush=True)
    if given.out == RESULTS:
        PAGE.write_text(page(read(RESULTS)))


def bases() -> list[str]:
    """Presets of real models, image models first."""
    from finetune.config import recipes

    kinds = {
        name: "kind: diffusion" not in file.read_text()
        for name, file in recipes.preset_files()["model"].items()
        if not name.startswith("embedded")
    }
    return sorted(kinds, key=lambda name: (kinds[name], name))


def planned(base: str, gpus: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A line for each GPU."""
    from finetune.config import compose, recipes
    from finetune.planning.machine import read as machine
    from finetune.stages.plan import plans

    images = "kind: diffusion" in recipes.preset_files()["model"][base].read_text()
    recipe, *words = IMAGES if images else ROWS
    configs = [compose.load(recipe, [f"model={base}", *words, f"hardware={gpu}"]) for gpu in gpus]
    machines = [machine(config.hardware) for config in configs]
    for gpu, plan in zip(gpus, plans(configs[0], machines), strict=True):
        chosen = plan.chosen
        yield {
            "model": base,
            "images": images,
            "gpu": gpu,
            "quantize": plan.quantize,
            "settings": list(chosen.overrides) if chosen else [],
            "gib": round(chosen.gib, 2) if chosen else None,
            "seconds": float(f"{chosen.seconds:.3g}") if chosen else None,
            "on_cpu": [name for name, gib in plan.phases.items() if not gib],
            "problem": "; ".join(plan.problems),
            "date": datetime.date.today().isoformat(),
        }


def read(file: Path) -> list[dict[str, Any]]:
    """Lines of results; none where there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def page(lines: Sequence[dict[str, Any]]) -> str:
    """docs/gpus.md."""
    rows = "".join(map(_row, lines))
    return HEAD + table(lines) + LONG_HEAD + rows + TAIL.format(date=max(line["date"] for line in lines))


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The short table: seconds per step by model and GPU."""
    found = {(line["model"], line["gpu"]): line for line in lines}
    models = list(dict.fromkeys(line["model"] for line in lines))
    head = f"| `model=` | {' | '.join(GPUS.values())} |\n|---|{'---|' * len(GPUS)}\n"
    rows = [f"| `{model}` | {' | '.join(_cell(found[model, gpu]) for gpu in GPUS)} |\n" for model in models]
    marked = any("¹" in row for row in rows)
    return head + "".join(rows) + (NOTE if marked else "")


def _row(line: dict[str, Any]) -> str:
    """One line of the long table: its settings without the names of the groups."""
    words = " ".join(word.partition(".")[2] for word in line["settings"])
    settings = words if not line["problem"] else f"does not fit: {line['problem']}"
    figures = f"{line['gib']:.1f} | {_seconds(line)}" if words else "– | –"
    stored = "16 bit" if line["quantize"] == "none" else line["quantize"]
    on_cpu = ", ".join(line["on_cpu"]) or "–"
    return f"| `{line['model']}` | {GPUS[line['gpu']]} | {stored} | {settings} | {figures} | {on_cpu} |\n"


def _cell(line: dict[str, Any]) -> str:
    if line["problem"]:
        return "no"
    return f"{_seconds(line)} s{' ¹' if line['on_cpu'] else ''}"


def _seconds(line: dict[str, Any]) -> str:
    return f"{line['seconds']:.1f}" if line["seconds"] < 10 else f"{line['seconds']:.0f}"


def _order(line: dict[str, Any]) -> tuple[int, int]:
    return bases().index(line["model"]), list(GPUS).index(line["gpu"])


if __name__ == "__main__":
    main()
