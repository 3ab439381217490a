"""Runs a program of anybody's, with the GPU's memory capped, and notes when its optimiser took its steps.

With --captions, when BLIP wrote captions instead.

python -m scripts.bench.stopwatch --gib 24 --out times.json SCRIPT.py ARGUMENT…
python -m scripts.bench.stopwatch --gib 24 --out times.json -m MODULE ARGUMENT…
"""

import argparse
import itertools
import json
import os
import runpy
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

LATE = 124  # exit code, as `timeout` has it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, required=True, help="all that torch may take of the GPU")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, help="end the program after so many; what was noted stays")
    parser.add_argument("--captions", action="store_true")
    parser.add_argument("--cpu", action="store_true", help="seconds of all cores, which other programs don't change")
    parser.add_argument("-m", dest="module", help="a module instead of a script")
    given, words = parser.parse_known_args()
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, given.gib * 2**30 / total))
    clock = time.process_time if given.cpu else time.perf_counter
    times: list[float] = [clock()]
    if given.captions:
        watch_captions(times, clock)
    else:
        register_optimizer_step_post_hook(lambda *_: times.append(clock()))
    if given.seconds:
        watchdog = threading.Timer(given.seconds, end, [given, times])
        watchdog.daemon = True
        watchdog.start()
    program = given.module or words.pop(0)
    sys.argv = [program, *words]
    try:
        if given.module:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program, run_name="__main__")
    finally:
        given.out.write_text(json.dumps(noted(times)))


def end(given: argparse.Namespace, times: list[float]) -> None:
    """As a machine without power: nothing of the program's own runs any more."""
    given.out.write_text(json.dumps(noted(times)))
    print(f"took more than {given.seconds:.0f} s", flush=True)
    os._exit(LATE)


def watch_captions(times: list[float], clock: Callable[[], float]) -> None:
    """Note each end of BLIP's `generate`, which waits for the GPU before every word."""
    from transformers import BlipForConditionalGeneration

    plain = BlipForConditionalGeneration.generate

    def generate(self: Any, *inputs: Any, **named: Any) -> Any:
        found = plain(self, *inputs, **named)
        times.append(clock())
        return found

    BlipForConditionalGeneration.generate = generate


def noted(times: list[float]) -> dict[str, Any]:
    """Seconds before the first step, of each later one, and the most memory that tensors took."""
    gaps = [after - before for before, after in itertools.pairwise(times)]
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return {"before_s": gaps[0] if gaps else None, "steps_s": gaps[1:], "gib": peak}


if __name__ == "__main__":
    main()
