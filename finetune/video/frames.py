"""`finetune frames`: images for training out of a video."""

import signal
from collections.abc import Sequence
from typing import Any

from finetune.errors import Interrupted
from finetune.reading import at_home
from finetune.video.annotate import require_packages
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
        made = extraction.extract(existing(settings.video), folder, settings, load)
    except KeyboardInterrupt:  # images take the folder's place when all are there
        line = f"stopped by Ctrl-C; {folder} is as it was; the same command begins again"
        raise Interrupted(line, signal.SIGINT) from None
    print(extraction.describe(made))
    return 0
