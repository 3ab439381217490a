"""A whole set of conversations as token rows on disk, found by content and read memory-mapped.

One folder per key; the key hashes the files' bytes, the tokenizer with its template, and the settings, never a path or
a time. A damaged folder is made again; folders appear whole or not at all, and may be deleted at any time.
"""

import json
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.config.schema import LongRows
from finetune.data.text import formats, partial, readers
from finetune.data.text.formats import Source
from finetune.data.text.partial import ERRORS_KEPT
from finetune.data.text.template import SKIP
from finetune.data.text.tokens import Chat, Encoded
from finetune.data.text.workers import TRAINED, EncodeSettings, encode_stream
from finetune.errors import DataError, FinetuneError
from finetune.reading import read_text
from finetune.run.atomic import replace_folder
from finetune.run.hashing import hash_of
from finetune.run.progress import PLAIN_LINE_EVERY_S, plural, say

# N rows
MADE_BY = 1  # raised when the same input would give other rows
METADATA = "rows.json"
COLUMNS = {
    "tokens": np.uint32,  # ids of all rows end to end, the top bit set where trained
    "lengths": np.uint64,  # tokens of each row
    "trained": np.uint32,  # trained tokens of each row
    "rows": np.uint64,  # number of its conversation among those that could be read, from 0
    "groups": np.uint64,  # hash of that conversation's text
}
SMALLEST_SET = 20  # conversations; under it none is held out
READ_BLOCK = 1 << 24  # bytes, or tokens
PARTIAL, KEPT_S = ".partial", 7 * 86400.0  # how folders end that are being written, and how long one is kept


@dataclass(frozen=True)
class Figures:
    """What became of a set. conversations: rows read, usable or not. rows: what is trained on, after truncation.

    bad: left out as unusable (with the first few errors). long: over the length, of which left_out are gone whole.
    tokens, trained: after truncation. whole: trained tokens before it. shortened: answers of which the template leaves
    out a part. control: control tokens that stand in texts. seconds: time it took to read and encode, once.
    """

    conversations: int
    rows: int
    bad: int
    long: int
    left_out: int
    tokens: int
    trained: int
    whole: int
    shortened: int
    control: int
    seconds: float
    errors: tuple[str, ...]

    @property
    def truncated_share(self) -> float:
        """Share of trained tokens lost to the length, 0 … 1."""
        return 1 - self.trained / self.whole if self.whole else 0.0

    @property
    def rows_per_s(self) -> float:
        """Conversations read and encoded in a second."""
        return self.conversations / self.seconds if self.seconds else 0.0

    def lines(self) -> list[str]:
        """For people: what was read, and everything that didn't end up in training."""
        head = f"{plural(self.conversations, 'conversation')} as {plural(self.rows, 'row')} of {self.tokens:,} tokens"
        found = [f"{head}, {self.trained:,} trained ({self.rows_per_s:,.0f} conversations/s)"]
        if self.bad:
            found += [f"warning: left out {plural(self.bad, 'unusable row')}, such as:"]
            found += [error.removesuffix(f", {SKIP}") for error in self.errors]  # that is done already
        if self.long:
            found.append(
                f"warning: {plural(self.long, 'row')} over the length; {self.truncated_share:.2%} of trained tokens "
                f"are lost, {plural(self.left_out, 'row')} altogether"
            )
        if self.shortened:
            found.append(f"warning: the chat template leaves out a part of {plural(self.shortened, 'answer')}")
        if self.control:
            found.append(
                f"warning: messages contain {plural(self.control, 'control token')} as text, which is tokenised as such"
            )
        return found


class TokenStore:
    """Encoded rows on disk, memory-mapped. Pickles as its folder."""

    def __init__(self, folder: Path, figures: Figures, *, cached: bool) -> None:
        self.folder, self.figures, self.cached = folder, figures, cached
        self._arrays = {name: np.memmap(folder / f"{name}.bin", kind, "r") for name, kind in COLUMNS.items()}
        self.lengths: NDArray[np.int64] = self._arrays["lengths"].astype(np.int64)
        """Tokens of each row, (N,)."""
        self.trained: NDArray[np.int64] = self._arrays["trained"].astype(np.int64)
        """Trained tokens of each row, (N,)."""
        self._offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Encoded:
        if not 0 <= index < len(self):
            raise IndexError(index)
        tokens = self._arrays["tokens"][self._offsets[index] : self._offsets[index + 1]]
        return Encoded(np.asarray(tokens & ~TRAINED), np.asarray((tokens & TRAINED) != 0))

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.folder, self.figures, self.cached)

    def largest_id(self) -> int:
        """The largest token id of all rows."""
        tokens = self._arrays["tokens"]
        blocks = (tokens[first : first + READ_BLOCK] for first in range(0, len(tokens), READ_BLOCK))
        return max(int((block & ~TRAINED).max()) for block in blocks)

    def groups(self, indices: NDArray[np.int64]) -> list[int]:
        """A hash of the text of each of these rows' conversations, 64 bits."""
        return [int(group) for group in self._arrays["groups"][indices]]

    def conversation_index(self, index: int) -> int:
        """Which conversation a row comes from, counted from 0 among those that could be read."""
        return int(self._arrays["rows"][index])

    def split(self, share: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Indices to train on and to hold out, by the text's hash: about `share` (0 … 1) of different conversations.

        Conversations that are equal but for case and white space are on the same side, added rows don't move others,
        and sets under 20 conversations hold out none.
        """
        groups = np.asarray(self._arrays["groups"])
        everything = np.arange(len(self), dtype=np.int64)
        distinct = int((np.diff(self._arrays["rows"]) != 0).sum()) + 1
        if share <= 0 or distinct < SMALLEST_SET:
            return everything, everything[:0]
        held_out = groups < np.uint64(min(share, 1 - 2**-53) * 2.0**64)
        if not held_out.any():
            held_out = groups == groups.min()
        if held_out.all():
            return everything, everything[:0]
        return everything[~held_out], everything[held_out]

    def duplicates(self) -> int:
        """Conversations whose text stood there before, but for case and white space."""
        first_rows = np.diff(self._arrays["rows"].astype(np.int64), prepend=-1) != 0  # of each conversation
        groups = np.asarray(self._arrays["groups"])[first_rows]
        return len(groups) - len(np.unique(groups))


def encode_or_load(
    source: Source,
    chat: Chat,
    *,
    cache: Path,
    length: int,
    long_rows: LongRows,
    skip_bad: bool = False,
    workers: int = 0,
) -> TokenStore:
    """Every row of the source encoded, from the cache where it is there. Memory does not grow with the source.

    length: most tokens of a row. workers: processes that encode; 0 is one for each core. Raises DataError for unusable
    rows (unless `skip_bad`), where nothing is left, and where the cache can't be written.
    """
    from filelock import FileLock

    content = readers.content_hash(source.files)
    renamed = [dict(source.columns)] if source.columns else []  # rows from before there were any stay
    read_as = (source.format.value, source.named, *renamed, *source.aliases)
    key = hash_of(MADE_BY, content, *read_as, chat.content_hash, length, long_rows.value, skip_bad)
    folder = cache / f"rows-{key[:32]}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(cache)
        with FileLock(_lock(folder)):
            if (figures := _verified(folder, checksums=True)) is not None:
                return TokenStore(folder, figures, cached=True)
            half = folder.with_name(f".{folder.name}{PARTIAL}")
            _write(half, source, EncodeSettings(chat, length, long_rows, skip_bad), workers)
            with replace_folder(folder) as whole:
                for name in (METADATA, *(f"{name}.bin" for name in COLUMNS)):
                    (half / name).rename(whole / name)
            shutil.rmtree(half)
    except OSError as error:
        raise DataError(f"cannot use the cache {cache} ({error.strerror}); try data.cache=FOLDER") from error
    return TokenStore(folder, _read_metadata(folder)[0], cached=False)


def _lock(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _remove_abandoned(cache: Path) -> None:
    """Remove folders that killed processes left half written and nobody goes on with: whoever writes one holds its
    lock."""
    from filelock import FileLock, Timeout

    for left in [*cache.glob(".rows-*.tmp"), *cache.glob(f".rows-*{PARTIAL}")]:
        with suppress(Timeout, OSError), FileLock(_lock(cache / left.stem[1:]), timeout=0):
            if left.suffix != PARTIAL or time.time() - left.stat().st_mtime > KEPT_S:
                shutil.rmtree(left, ignore_errors=True)


def open_store(folder: Path, *, verify: bool = False) -> TokenStore:
    """The rows that `encode_or_load` wrote. Raises DataError where they are gone or damaged.

    verify: compare every byte with its checksum, and not the files' lengths alone.
    """
    figures = _verified(folder, checksums=verify)
    if figures is None:
        raise DataError(
            f"the token rows {folder} are damaged or gone; run the same command again and they are made again"
        )
    return TokenStore(folder, figures, cached=True)


def look(source: Source, chat: Chat, *, length: int, long_rows: LongRows, skip_bad: bool, seconds: float) -> int:
    """Encode rows for so many seconds, and keep nothing; how many were looked at, 0 for all of them.

    Raises DataError as `encode_or_load` does.
    """
    read, errors, totals = Counter[str](), list[str](), Counter[str]()
    stream = formats.read(source, bad=_noted(read, errors) if skip_bad else None)
    until = time.monotonic() + seconds
    for batch in encode_stream(stream, EncodeSettings(chat, length, long_rows, skip_bad), processes=1):
        totals.update(batch.counts)
        errors += batch.errors
        if time.monotonic() > until:
            return totals["conversations"]
    _require_rows(source, totals + read, errors, length)
    return 0


def _noted(read: Counter[str], errors: list[str]) -> Callable[[DataError], None]:
    """Counts an unusable row that is left out, and keeps the first few errors."""

    def bad(error: DataError) -> None:
        read.update(("conversations", "bad"))
        if len(errors) < ERRORS_KEPT:
            errors.append(str(error))

    return bad


def _require_rows(source: Source, totals: Counter[str], errors: list[str], length: int) -> None:
    if not totals["rows"]:
        unusable = f"{totals['bad']} are unusable, of {totals['left_out']} no trained token is within"
        raise DataError(
            f"{source.path}: nothing is left of {plural(totals['conversations'], 'row')}: {unusable} {length} tokens"
            + (f" ({errors[0]})" if errors else "")
            + "; allow longer rows with data.length, or choose: data.long_rows=keep_end"
        )


def _write(folder: Path, source: Source, settings: EncodeSettings, workers: int) -> None:
    """Encode into a folder, from where a killed command left off."""
    read: Counter[str] = Counter()
    errors: list[str] = []
    with partial.opened(folder, COLUMNS) as rows:
        before, began, last = rows.counts["conversations"], time.monotonic(), time.monotonic()
        if before:
            say(f"tokens: going on from conversation {before:,}")
        stream = formats.read(source, bad=_noted(read, errors) if settings.skip_bad else None)
        for batch in encode_stream(stream, settings, processes=workers, done=rows.batches):
            rows.add(batch)
            if time.monotonic() - last > PLAIN_LINE_EVERY_S:
                rows.note(folder)
                last, now = time.monotonic(), rows.counts["conversations"]
                rate = (now - before) / (last - began)
                say(f"tokens: {plural(now + read['conversations'], 'conversation')}, {rate:,.0f} conversations/s")
        totals, errors = rows.counts + read, [*errors, *rows.errors][:ERRORS_KEPT]
        _require_rows(source, totals, errors, settings.length)
    counts = {name: totals[name] for name in (*rows.counts, "bad")}
    figures = Figures(**counts, seconds=round(rows.seconds, 3), errors=tuple(errors))
    (folder / METADATA).write_text(json.dumps({"figures": asdict(figures), "sums": rows.sums, "sizes": rows.sizes}))


def _verified(folder: Path, *, checksums: bool) -> Figures | None:
    """The figures of a folder whose files are as long as written and, with `checksums`, the same; else None."""
    try:
        figures, sums, sizes = _read_metadata(folder)
        for name in COLUMNS:
            path, total = folder / f"{name}.bin", 0
            if path.stat().st_size != sizes[name]:
                return None
            if not checksums:
                continue
            with open(path, "rb") as file:
                while block := file.read(READ_BLOCK):
                    total = zlib.crc32(block, total)
            if total != sums[name]:
                return None
    except (OSError, ValueError, KeyError, TypeError, FinetuneError):
        return None
    return figures


def _read_metadata(folder: Path) -> tuple[Figures, dict[str, int], dict[str, int]]:
    metadata = json.loads(read_text(folder / METADATA))
    metadata["figures"]["errors"] = tuple(metadata["figures"]["errors"])
    return Figures(**metadata["figures"]), metadata["sums"], metadata["sizes"]


def _unpickled(folder: Path, figures: Figures, cached: bool) -> TokenStore:
    return TokenStore(folder, figures, cached=cached)
