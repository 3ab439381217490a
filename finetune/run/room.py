"""What a run will write, and whether its disk has room for it."""

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.run.progress import plural, size_text


@dataclass(frozen=True)
class Need:
    """What is still to be written into a run folder, at most. checkpoint, exports: bytes of one, and of all exports.

    checkpoints: how many there may be at once, beside those of today. kept: of them when the exports are written.
    """

    checkpoint: float
    checkpoints: int
    kept: int
    exports: float

    @property
    def bytes(self) -> float:
        """At the worst moment."""
        return max(self.checkpoints * self.checkpoint, self.kept * self.checkpoint + self.exports)

    @property
    def parts(self) -> str:
        """What it is made of."""
        checkpoints = f"{plural(self.checkpoints, 'checkpoint')} of {size_text(self.checkpoint)}"
        return f"{checkpoints}, {size_text(self.exports)} of exports"

    def shortage(self, run_dir: Path, free: float, keep_checkpoints: int) -> str:
        """What to say where so many bytes are free and they don't suffice; empty where they do."""
        if self.bytes <= free:
            return ""
        fewer = " or trainer.keep_checkpoints=1" if keep_checkpoints > 1 else ""
        return (
            f"the disk of {run_dir} is too small: {size_text(free)} are free, and up to {size_text(self.bytes)} will "
            f"be written ({self.parts}); free some space, or try run_dir=PATH{fewer}"
        )


def usage(path: Path) -> Any:
    """Bytes of the disk that a path is on, or would be on: `total`, `used`, `free`; None where they can't be told."""
    try:
        found = shutil.disk_usage(existing(path.absolute()))
    except OSError:
        return None
    return found if found.total else None  # some network disks don't say how large they are


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(each for each in (path, *path.parents) if each.exists())


def is_empty(folder: Path) -> bool:
    """Whether nothing is in a folder that this user could read, or it is none."""
    try:
        return not any(folder.iterdir())
    except OSError:
        return True


def unwritable(folder: Path) -> OSError | None:
    """Why nothing can be written into a folder, which may not be there yet; None where it can."""
    above = existing(folder)
    if not above.is_dir():
        number = errno.EEXIST if above == folder else errno.ENOTDIR
    elif not os.access(above, os.W_OK | os.X_OK):
        number = errno.EACCES
    else:
        return None
    return OSError(number, os.strerror(number))
