"""How fast conversations become token rows, and in how much memory.

    python -m scripts.bench.rows --rows 1000000 --work /tmp/rows

writes that many generated conversations, runs `finetune dataset` on them and prints one JSON line: rows a second, and
the most memory that the command and its processes held together, files that the system keeps cached aside.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
CHUNK = 20_000
SEEDS = 200_000_000  # that nothing else uses
LOOK_EVERY_S = 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    given = parser.parse_args()
    file = given.work / f"{given.rows}.jsonl"
    if not file.exists():
        given.work.mkdir(parents=True, exist_ok=True)
        write(file, given.rows)
    print(json.dumps(measure(file, given.rows, given.work, given.workers)), flush=True)


def write(file: Path, rows: int) -> None:
    """`rows` conversations, one JSON line each."""
    starts = range(SEEDS, SEEDS + rows, CHUNK)
    with ProcessPoolExecutor() as pool, file.open("w") as out:
        for start, lines in zip(starts, pool.map(chunk, starts), strict=True):
            out.writelines(lines[: rows - (start - SEEDS)])


def chunk(start: int) -> list[str]:
    from scripts.toytalk.compose import sample_conversation

    return [json.dumps({"messages": sample_conversation(seed).messages}) + "\n" for seed in range(start, start + CHUNK)]


def measure(file: Path, rows: int, work: Path, workers: int) -> dict[str, Any]:
    """One run of the command on a cold cache."""
    words = ["dataset", "conf=pirate_chat", f"data.file={file}", f"run_dir={work / 'run'}", f"data.workers={workers}"]
    command = subprocess.Popen(
        [sys.executable, "-m", "finetune", *words, f"data.cache={work / f'cache-{time.time():.0f}'}"], cwd=ROOT
    )
    most: list[int] = [0]
    watcher = threading.Thread(target=watch, args=(command, most))
    watcher.start()
    began = time.monotonic()
    code = command.wait()
    seconds = time.monotonic() - began
    watcher.join()
    return {
        "rows": rows,
        "file_mib": round(file.stat().st_size / 2**20, 1),
        "workers": workers,
        "cores": os.cpu_count(),
        "exit_code": code,
        "seconds": round(seconds, 1),
        "rows_a_second": round(rows / seconds),
        "most_memory_mib": round(most[0] / 2**20, 1),
    }


def watch(command: "subprocess.Popen[bytes]", most: list[int]) -> None:
    """Keep the largest sum of private memory of the command and its children."""
    while command.poll() is None:
        most[0] = max(most[0], sum(private(process) for process in tree(command.pid)))
        time.sleep(LOOK_EVERY_S)


def tree(pid: int) -> Iterator[psutil.Process]:
    try:
        process = psutil.Process(pid)
        yield process
        yield from process.children(recursive=True)
    except psutil.NoSuchProcess:
        return


def private(process: psutil.Process) -> int:
    """Resident memory that is not shared: pages of memory-mapped files come and go as the system likes."""
    try:
        memory = process.memory_info()
    except psutil.NoSuchProcess:
        return 0
    return int(memory.rss - memory.shared)


if __name__ == "__main__":
    main()
