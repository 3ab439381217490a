"""Which images are for validation, where whoever made the folder says so: `"split": "validation"` (or `val`, `test`, …)
in its metadata.

Images that show nearly the same, such as frames of one scene of a film, belong on one side: by chance they would lie on
both, and the validation loss would tell how well they were learnt by heart.
"""

import posixpath
from collections.abc import Collection
from pathlib import Path

from finetune.data.images.folder import metadata_files
from finetune.data.images.metadata import key, read_rows
from finetune.data.splits import HELD_OUT
from finetune.errors import DataError

COLUMN, VALIDATION = "split", "validation"  # as the `datasets` library names it


def for_validation(folder: Path, files: Collection[str], share: float) -> frozenset[str]:
    """The images whose row says so; none where nobody said anything, or nothing is held out because `share` is 0.

    Raises DataError where no image would be left.
    """
    if not share:
        return frozenset()
    named = {
        key(posixpath.join(metadata.parent.relative_to(folder).as_posix(), name))
        for metadata in metadata_files(folder)
        for name, row in read_rows(metadata).items()
        if _is_held_out(row.values.get(COLUMN))
    }
    found = frozenset(file for file in files if key(file) in named)
    if found and len(found) == len(files):
        raise DataError(f'{folder}: every image is marked "{COLUMN}": "{VALIDATION}"; leave some for training')
    return found


def _is_held_out(split: object) -> bool:
    """Whether it names a split that is not trained on, by any of the names that files have."""
    return isinstance(split, str) and bool(HELD_OUT.search(split.strip()))
