"""What fits which card: every base on four cards, as `finetune plan` has it.

    python -m scripts.bench.cards --bases sdxl,llama31_8b

plans those bases (all of them unless named; no card is needed), puts the results into scripts/bench/cards.jsonl, and
writes docs/cards.md and the short table in README.md from that file.
"""

import argparse
import datetime
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE, README = ROOT / "scripts" / "bench" / "cards.jsonl", ROOT / "docs" / "cards.md", ROOT / "README.md"
CARDS = {
    "rtx3060_12gb": "12 GB (RTX 3060)",
    "rtx4080": "16 GB (RTX 4080)",
    "rtx4090": "24 GB (RTX 4090)",
    "a6000": "48 GB (RTX A6000)",
}
# The recipes that are there for real models, sixteen pictures or rows a step; rows of conversations as README has them.
PICTURES = ("pixar_style_sd15",)
ROWS = ("pirate_chat", "data.length=2048", "trainer.accumulate=16", "sample.max_new_tokens=256", "optim.lr=2e-4")
BEGIN, END = "<!-- what fits: written by scripts/bench/cards.py -->", "<!-- end of what fits -->"
HEAD = """# What fits which card

The fastest settings that fit, of all that train the same thing, as `finetune plan` finds them: sixteen pictures (recipe
`pixar_style_sd15`, at each model's own resolution) or sixteen rows of 2,048 tokens (`pirate_chat`) in every optimiser
step, rank-16 adapters, AdamW. *GiB* is all that training takes of the card, context and slack included; *s a step* is
an estimate, right to about a fifth where it was compared. *Main memory* names the stages that this card is too small
for: they run there by themselves, which is slower. How far the GiB are from what was measured is in
[memory.md](memory.md). Nothing here was run on these cards.

| model | card | base in | settings | GiB | s a step | main memory |
|---|---|---|---|---|---|---|
"""
NOTE = """
¹ The card is too small for another stage, which then runs in main memory: [docs/cards.md](docs/cards.md) says which.
"""
TAIL = """
Planned on {date} by `python -m scripts.bench.cards`, without a card; the lines are in `scripts/bench/cards.jsonl`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", help="names of model presets, separated by commas; all unless given")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON lines; those of other bases stay")
    given = parser.parse_args()
    for base in given.bases.split(",") if given.bases else bases():
        kept = [line for line in read(given.out) if line["model"] != base]
        lines = sorted([*kept, *planned(base, tuple(CARDS))], key=_order)
        given.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
        print(base, flush=True)
    if given.out == RESULTS:
        lines = read(RESULTS)
        PAGE.write_text(page(lines))
        README.write_text(with_table(README.read_text(), lines))


def bases() -> list[str]:
    """Presets of real models, those of pictures first."""
    from finetune.config import recipes

    kinds = {
        name: "kind: diffusion" not in file.read_text()
        for name, file in recipes.preset_files()["model"].items()
        if not name.startswith("embedded")
    }
    return sorted(kinds, key=lambda name: (kinds[name], name))


def planned(base: str, cards: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A line for each card."""
    from finetune.config import compose, recipes
    from finetune.planning.machine import read as machine
    from finetune.stages.plan import plans

    pictures = "kind: diffusion" in recipes.preset_files()["model"][base].read_text()
    recipe, *words = PICTURES if pictures else ROWS
    configs = [compose.load(recipe, [f"model={base}", *words, f"hardware={card}"]) for card in cards]
    machines = [machine(config.hardware) for config in configs]
    for card, plan in zip(cards, plans(configs[0], machines), strict=True):
        chosen = plan.chosen
        yield {
            "model": base,
            "pictures": pictures,
            "card": card,
            "quantize": plan.quantize,
            "settings": list(chosen.overrides) if chosen else [],
            "gib": round(chosen.gib, 2) if chosen else None,
            "seconds": float(f"{chosen.seconds:.3g}") if chosen else None,
            "main_memory": [name for name, gib in plan.phases.items() if not gib],
            "problem": "; ".join(plan.problems),
            "date": datetime.date.today().isoformat(),
        }


def read(file: Path) -> list[dict[str, Any]]:
    """Lines of results; none where there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def page(lines: Sequence[dict[str, Any]]) -> str:
    """docs/cards.md."""
    rows = []
    for line in lines:
        words = " ".join(word.partition(".")[2] for word in line["settings"])
        told = words if not line["problem"] else f"does not fit: {line['problem']}"
        figures = f"{line['gib']:.1f} | {_seconds(line)}" if words else "– | –"
        stored = "16 bit" if line["quantize"] == "none" else line["quantize"]
        aside = ", ".join(line["main_memory"]) or "–"
        rows.append(f"| `{line['model']}` | {CARDS[line['card']]} | {stored} | {told} | {figures} | {aside} |\n")
    return HEAD + "".join(rows) + TAIL.format(date=max(line["date"] for line in lines))


def table(lines: Sequence[dict[str, Any]]) -> str:
    """README's short form: seconds a step by model and card."""
    found = {(line["model"], line["card"]): line for line in lines}
    models = list(dict.fromkeys(line["model"] for line in lines))
    head = f"| `model=` | {' | '.join(CARDS.values())} |\n|---|{'---|' * len(CARDS)}\n"
    rows = [f"| `{model}` | {' | '.join(_cell(found[model, card]) for card in CARDS)} |\n" for model in models]
    marked = any("¹" in row for row in rows)
    return head + "".join(rows) + (NOTE if marked else "")


def with_table(text: str, lines: Sequence[dict[str, Any]]) -> str:
    """README with `table` between its two markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(lines)}{END}{after}"


def _cell(line: dict[str, Any]) -> str:
    if line["problem"]:
        return "no"
    return f"{_seconds(line)} s{' ¹' if line['main_memory'] else ''}"


def _seconds(line: dict[str, Any]) -> str:
    return f"{line['seconds']:.1f}" if line["seconds"] < 10 else f"{line['seconds']:.0f}"


def _order(line: dict[str, Any]) -> tuple[int, int]:
    return bases().index(line["model"]), list(CARDS).index(line["card"])


if __name__ == "__main__":
    main()
