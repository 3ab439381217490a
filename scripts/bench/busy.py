"""How much longer a step of the examples takes on a CPU beside programs that compute all the time.

    python -m scripts.bench.busy --out outputs/busy

trains each example alone and beside two such programs in turn, so that both meet the same machine, and prints a JSON
line for each pair and a table at the end. Nothing else should run meanwhile.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripts.bench.speed import WARM_UP, timed

RECIPES = ("stained_glass_style", "pirate_chat")  # both kinds of model; nothing is written beside their data
SPIN = "while True: pass"
LIMIT_S = 3600.0  # of a run; a busy machine may be very busy


def main() -> None:
    given = arguments(sys.argv[1:])
    lines = []
    for number in range(given.pairs):
        for recipe in given.recipes:
            lines.append(pair(recipe, given.steps, given.programs, given.out))
            print(json.dumps({"pair": number + 1} | lines[-1]), flush=True)
    print(table(lines, given.programs))


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="run folders, made anew each time")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help=f"of each run; the first {WARM_UP} don't count")
    parser.add_argument("--programs", type=int, default=2, help="that compute besides")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    given = parser.parse_args(words)
    if given.steps <= WARM_UP + 1:
        parser.error(f"--steps must be more than {WARM_UP + 1}")
    return given


def pair(recipe: str, steps: int, programs: int, out: Path) -> dict[str, Any]:
    """Seconds of the median step alone and beside the programs."""
    alone = step_s(recipe, steps, out)
    with busy(programs):
        beside = step_s(recipe, steps, out)
    return {"recipe": recipe, "alone_s": alone, "beside_s": beside}


def step_s(recipe: str, steps: int, out: Path) -> float:
    """Of a run on the CPU. Ends the program if the run fails."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "run", ignore_errors=True)
    noted = timed(["-m", "finetune", *command(recipe, steps, out.resolve())], out, "train", LIMIT_S)
    if "said" in noted:
        raise SystemExit("\n".join(noted["said"]))
    return statistics.median(noted["steps_s"][WARM_UP:])


def command(recipe: str, steps: int, out: Path) -> list[str]:
    folders = [f"run_dir={out / 'run'}", f"data.cache={out / 'cache'}"]
    plain = ["trainer.validate_every=0", "trainer.patience=0", "export.checkpoint=last", "export.formats=[peft]"]
    nothing_drawn = ["sample.previews=0", "sample.prompts=[]"]
    fixed = [f"trainer.steps={steps}", "hardware.device=cpu"]
    return ["train", f"conf={recipe}", *fixed, *folders, *plain, *nothing_drawn]


@contextmanager
def busy(programs: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Inside, so many processes compute."""
    started = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(programs)]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def table(lines: Sequence[dict[str, Any]], programs: int) -> str:
    """Medians of all pairs of a recipe; also of their own factors, because the machine changes between pairs."""
    rows = [
        f"| recipe | alone, s a step | beside {programs}, s a step | factor | smallest | largest |",
        "|---" * 6 + "|",
    ]
    for recipe in dict.fromkeys(line["recipe"] for line in lines):
        own = [line for line in lines if line["recipe"] == recipe]
        alone, beside = (statistics.median(line[key] for line in own) for key in ("alone_s", "beside_s"))
        factors = [line["beside_s"] / line["alone_s"] for line in own]
        found = (statistics.median(factors), min(factors), max(factors))
        rows.append(f"| `{recipe}` | {alone:.3f} | {beside:.3f} | {' | '.join(f'{factor:.2f}' for factor in found)} |")
    return "\n".join([f"{os.cpu_count()} CPU cores, pairs: {len(own)}", *rows])


if __name__ == "__main__":
    main()
