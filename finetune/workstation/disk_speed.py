"""How fast a disk reads: a large file from end to end, and small blocks of it at random, past the memory that keeps
what was read.

The file is made for it and has no name, so that nothing is left of it, whatever ends the program.
"""

import json
import mmap
import os
import random
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

FILE_BYTES, BLOCK_BYTES = 512 << 20, 1 << 20
ROOM = 4  # times the file must fit into what is free
READ_BYTES, READERS, RANDOM_S = 4096, 8, 2.0  # as many readers as a training has data workers


def read(folder: Path) -> dict[str, Any]:
    """`{"way", "mb_per_s", "random_per_s"}` of the disk of a folder, or `{"error": why}`. Takes some seconds."""
    try:
        if shutil.disk_usage(folder).free < ROOM * FILE_BYTES:
            return {"error": f"too little free space for a test file of {FILE_BYTES >> 20} MiB"}
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            block = os.urandom(8 * BLOCK_BYTES)  # what can't be compressed
            for _ in range(FILE_BYTES // len(block)):
                file.write(block)
            os.fsync(file.fileno())
            path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
            return by_fio(path) if shutil.which("fio") else by_hand(path)
    except (OSError, subprocess.SubprocessError, ValueError, LookupError) as error:
        return {"error": f"no direct read in {folder} ({error})"}


def by_hand(path: str) -> dict[str, Any]:
    """With reads of our own. Raises OSError where the file system has none that pass memory by."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        began, buffer = time.perf_counter(), mmap.mmap(-1, BLOCK_BYTES)  # aligned, as direct reads want it
        for start in range(0, FILE_BYTES, BLOCK_BYTES):
            os.preadv(handle, [buffer], start)
        seconds = time.perf_counter() - began
        at_random = _random_per_s(handle)
    finally:
        os.close(handle)
    return {"way": "own", "mb_per_s": round(FILE_BYTES / seconds / 1e6), "random_per_s": round(at_random)}


def _random_per_s(handle: int) -> float:
    counts = [0] * READERS
    end = time.perf_counter() + RANDOM_S

    def read_randomly(reader: int) -> None:
        chosen, buffer = random.Random(reader), mmap.mmap(-1, READ_BYTES)
        while time.perf_counter() < end:
            os.preadv(handle, [buffer], READ_BYTES * chosen.randrange(FILE_BYTES // READ_BYTES))
            counts[reader] += 1

    readers = [threading.Thread(target=read_randomly, args=(reader,)) for reader in range(READERS)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    return sum(counts) / RANDOM_S


def by_fio(path: str) -> dict[str, Any]:
    """With fio, the same reads. Raises OSError, ValueError, LookupError and SubprocessError where it fails."""
    whole = _fio(path, "--rw=read", f"--bs={BLOCK_BYTES}")
    at_random = _fio(
        path, "--rw=randread", f"--bs={READ_BYTES}", f"--numjobs={READERS}", "--group_reporting", "--thread",
        "--time_based", f"--runtime={RANDOM_S}",
    )  # fmt: skip
    return {"way": "fio", "mb_per_s": round(whole["bw_bytes"] / 1e6), "random_per_s": round(at_random["iops"])}


def _fio(path: str, *flags: str) -> dict[str, float]:
    fixed = [
        "--name=read",
        f"--filename={path}",
        f"--size={FILE_BYTES}",
        "--readonly",
        "--direct=1",
        "--ioengine=psync",
    ]
    result = subprocess.run(
        ["fio", *fixed, "--output-format=json", *flags], capture_output=True, text=True, check=True, timeout=60
    )
    found: dict[str, float] = json.loads(result.stdout)["jobs"][0]["read"]
    return found
