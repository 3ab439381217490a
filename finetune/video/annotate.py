"""`finetune annotate`: what is in a video, as a labelled video, JSON lines, COCO, YOLO, CVAT and a page."""

import multiprocessing
import signal
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from finetune.config.recipes import shown
from finetune.errors import ConfigError, FinetuneError, Interrupted, RunError
from finetune.reporting.terminal import print_table
from finetune.run import libraries
from finetune.run.progress import plural, printable, say
from finetune.run.signals import Stop, catch_stop, cause, end_with_parent
from finetune.video.records import Annotated
from finetune.video.settings import Annotate, existing, parse

Job = tuple[Path, Path, Annotate]
"""A video, the folder for it, and how."""
GOES_ON = "the same command goes on behind the last piece of ten seconds"


def main(words: Sequence[str]) -> int:
    """Annotate one video, or all of a folder; the exit code is that of the last one that failed, else 0.

    Raises ConfigError for other words, DataError for what is no video, ModelError, RunError, Interrupted.
    """
    settings = parse(Annotate, "annotate", words)
    require_packages("annotate")
    try:
        with catch_stop() as asked:
            return _run(settings, asked)
    except KeyboardInterrupt:  # the second
        raise Interrupted(f"stopped by Ctrl-C; {GOES_ON}", signal.SIGINT) from None


def _run(settings: Annotate, asked: Stop) -> int:
    from finetune.video.source import videos_in

    if settings.video:
        video = existing(settings.video)
        target = Path(settings.run_dir or f"outputs/{settings.name or video.stem}")
        record, new = _annotated(video, target, settings, asked)
        _show(record, target, new=new)
        return 0
    folder = existing(settings.folder)
    videos = videos_in(folder)
    above = Path(settings.run_dir or f"outputs/{settings.name or folder.resolve().name}")
    jobs = [(video, above / _name(video, videos), settings) for video in videos]
    return _all(jobs, settings, asked)


def require_packages(command: str) -> None:
    try:
        import_module("av")
    except ImportError as error:
        raise ConfigError(f"`finetune {command}` needs av; type: pip install 'finetune[video]'") from error


def _all(jobs: Sequence[Job], settings: Annotate, asked: Stop) -> int:
    """One after the other, or by several processes, each on a GPU of its own. A video that fails stops no other."""
    import torch

    workers = min(len(jobs), settings.workers or max(1, torch.cuda.device_count()))
    if workers == 1:
        return _shown(jobs, (_attempt(job, asked) for job in jobs))
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    gpus = context.Queue()
    for number in range(workers):
        gpus.put(number)
    try:
        with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(gpus,)) as pool:
            return _shown(jobs, pool.map(_attempt_in_worker, jobs))
    except BrokenProcessPool as error:
        if asked.number is not None:  # a signal met a worker that was not ready for it
            raise Interrupted(f"stopped by {cause(asked.number)}; {GOES_ON}", asked.number) from error
        raise RunError(
            "a worker ended by itself (its last lines stand above), perhaps for lack of memory; try workers=1"
        ) from error


def _shown(jobs: Sequence[Job], results: Iterable[Any]) -> int:
    """Print what came of each as it comes; the exit code of the last that failed."""
    code, failed = 0, list[str]()
    for (video, target, _), result in zip(jobs, results, strict=True):
        if isinstance(result, Interrupted):
            raise result
        if isinstance(result, FinetuneError):
            say(f"error: {result}")
            code, failed = result.exit_code, [*failed, video.name]
        else:
            _show(result[0], target, new=result[1])
    names = f": {', '.join(failed)}" if failed else ""
    print(f"{plural(len(jobs) - len(failed), 'video')} annotated, {len(failed)} failed{names}")
    return code


def _begin(gpus: Any) -> None:
    """A worker starts: it takes a GPU for itself, where there are some, and heeds signals as long as it lives."""
    global _asked
    _asked = _signals.enter_context(catch_stop())
    end_with_parent()
    import torch

    libraries.in_command = True
    libraries.quieten()
    number = gpus.get()
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


def _attempt_in_worker(job: Job) -> Any:
    return _attempt(job, _asked)


def _attempt(job: Job, asked: Stop) -> Any:
    try:
        return _annotated(*job, asked)
    except FinetuneError as error:
        return error


def _annotated(video: Path, target: Path, settings: Annotate, asked: Stop) -> tuple[Annotated, bool]:
    from finetune.video.annotation import annotate, load_detector

    return annotate(video, target, replace(settings, video=str(video)), lambda: load_detector(settings), asked)


def _name(video: Path, videos: Sequence[Path]) -> str:
    """Of a video's folder: with its ending where two differ in that alone."""
    return video.stem if sum(other.stem == video.stem for other in videos) == 1 else video.name


def _show(record: Annotated, target: Path, *, new: bool) -> None:
    name = printable(Path(record.video).name)
    rows = [
        ("found", record.found),
        ("video", f"{record.seconds:g} s, {plural(record.looks, 'look')}, {plural(len(record.scenes), 'scene')}"),
        *([("speed", record.speed)] if new else []),
        ("report", f"{shown(target)}/report.html"),
        ("beside it", ", ".join(record.files)),
    ]
    print_table(name if new else f"{name}: up to date, skipped", ("", ""), rows)
    if record.damage:
        say(f"warning: {name} is damaged: {record.damage}")


_asked: Stop  # of this process, if it is a worker
_signals = ExitStack()
