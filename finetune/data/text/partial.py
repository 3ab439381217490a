"""Token rows that are being written: a file for each column, and how far they are, so that a killed command goes on."""

import json
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from finetune.data.text.workers import EncodedBatch
from finetune.reading import read_text
from finetune.run.atomic import replace_file
from finetune.run.hashing import hash_of

PROGRESS = "progress.json"
ERRORS_KEPT = 5
READ_BLOCK = 1 << 24  # bytes


@dataclass
class Partial:
    """What is written so far. batches: so many of `encode_stream`. seconds: that it took, earlier commands included.

    counts, errors: of all batches, the first few errors. sums, sizes: CRC-32 and bytes of each column's file.
    """

    files: dict[str, IO[bytes]]
    batches: int = 0
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    sums: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.began = time.monotonic() - self.seconds

    def add(self, batch: EncodedBatch) -> None:
        """Write a batch behind those before."""
        for name, file in self.files.items():
            data = getattr(batch, name).tobytes()
            file.write(data)
            self.sums[name] = zlib.crc32(data, self.sums.get(name, 0))
            self.sizes[name] = self.sizes.get(name, 0) + len(data)
        self.batches += 1
        self.counts.update(batch.counts)
        self.errors += batch.errors[: ERRORS_KEPT - len(self.errors)]
        self.seconds = time.monotonic() - self.began

    def note(self, folder: Path) -> None:
        """From here a later command goes on. Not flushed to disk: sums tell what a power cut took."""
        for file in self.files.values():
            file.flush()
        noted = (self.batches, self.seconds, self.counts, self.errors, self.sums, self.sizes)
        replace_file(folder / PROGRESS, json.dumps([hash_of(noted), noted]).encode(), durable=False)


@contextmanager
def opened(folder: Path, columns: Iterable[str]) -> Iterator[Partial]:
    """The rows of a folder `NAME.bin` for each column, to be written on; from the beginning if they are damaged.

    An error leaves nothing of them, an interrupt all. Raises OSError.
    """
    names = list(columns)
    if (noted := _noted(folder, names)) is None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    with ExitStack() as stack:
        found = Partial({name: stack.enter_context(open(folder / f"{name}.bin", "ab")) for name in names}, *noted or ())
        try:
            yield found
        except Exception:  # the same rows would end in it again, or the disk is full
            shutil.rmtree(folder, ignore_errors=True)
            raise
        except BaseException:
            found.note(folder)
            raise


def _noted(folder: Path, names: Sequence[str]) -> tuple[Any, ...] | None:
    """The fields of `Partial` as they were noted last, if the files are still as they were then."""
    try:
        checksum, noted = json.loads(read_text(folder / PROGRESS))
        batches, seconds, counts, errors, sums, sizes = noted
        for name in names:
            with open(folder / f"{name}.bin", "r+b") as file:
                file.truncate(sizes[name])  # behind the note, what was written before the kill
                if _sum(file) != sums[name] or checksum != hash_of(noted):
                    return None
        return batches, seconds, Counter(counts), errors, sums, sizes
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _sum(file: IO[bytes]) -> int:
    """CRC-32 of a file."""
    total = 0
    while block := file.read(READ_BLOCK):
        total = zlib.crc32(block, total)
    return total
