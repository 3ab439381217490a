"""`finetune frames`: images for training out of a video."""

import shlex
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.errors import Interrupted
from finetune.reading import at_home
from finetune.reporting.terminal import print_table
from finetune.run.progress import plural, printable
from finetune.run.signals import catch_stop
from finetune.video.annotate import GOES_ON, require_packages
from finetune.video.records import Extracted
from finetune.video.settings import Annotate, Frames, existing, parse


def main(words: Sequence[str]) -> int:
    """Fill a folder with images; the exit code is 0.

    Raises ConfigError, DataError, ModelError, RunError, Interrupted.
    """
    settings = parse(Frames, "frames", words)
    require_packages("frames")
    from finetune.video import annotation, extraction

    detection = Annotate(
        detector=settings.detector, threshold=settings.threshold, classes=settings.crops, device=settings.device
    )

    def load() -> Any:
        return annotation.load_detector(detection)

    folder = at_home(settings.folder)
    try:
        with catch_stop() as asked:
            made = extraction.extract(existing(settings.video), folder, settings, load, asked)
    except KeyboardInterrupt:  # the second
        raise Interrupted(f"stopped by Ctrl-C; {GOES_ON}", signal.SIGINT) from None
    _show(made)
    return 0


def _show(made: Extracted) -> None:
    """What was taken, and what to type next."""
    rows = [
        ("images", f"{made.images:,}, {made.validation:,} of them for validation"),
        ("video", plural(made.scenes, "scene")),
        ("taken", f"{made.frames} of {made.candidates} stretches gave a sharp frame unlike the others"),
        ("folder", made.folder),
    ]
    print_table(printable(Path(made.video).name), ("", ""), rows)
    words = ["train", "conf=pixar_style", f"data.folder={made.folder}", f"name={Path(made.folder).name}"]
    print(f"next\n  {shlex.join(['finetune', *words])}")
