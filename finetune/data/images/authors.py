"""Which captions a captioner wrote; all others are a person's.

Its row in `metadata.jsonl` says so; the cache folder remembers it for texts that were moved or lost that mark. Both go
by the text: a caption that is corrected is no longer the captioner's.
"""

import unicodedata
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

from finetune.reading import read_bytes, require_file
from finetune.run.hashing import hash_of

FILE = "images/captioned.txt"  # in the cache folder; one key a line
MARK = "captioned"  # column of a row that was generated: a digest of its text
MARK_LENGTH = 16  # hexadecimal digits


def remember(cache: Path, captions: Mapping[str, str]) -> None:
    """Note that these captions, by file, were generated. A cache that can't be written forgets, that is all."""
    with suppress(OSError):
        (cache / FILE).parent.mkdir(parents=True, exist_ok=True)
        (cache / FILE).touch()
        require_file(cache / FILE)
        with open(cache / FILE, "a", encoding="ascii") as file:
            file.writelines(f"{key(name, text)}\n" for name, text in captions.items())


def remembered(cache: Path) -> set[str]:
    """The keys of all captions that were noted."""
    try:
        return set(read_bytes(cache / FILE).decode(errors="replace").split())
    except OSError:
        return set()


def key(file: str, text: str) -> str:
    """A caption's key. Of the path only the name counts: folders move."""
    return hash_of(unicodedata.normalize("NFC", PurePosixPath(file).name), text.strip())


def mark(text: str) -> str:
    """What stands in a generated caption's row beside it."""
    return hash_of(text.strip())[:MARK_LENGTH]
