"""`finetune annotate`: what is in a video, as a labelled video, JSON lines, COCO, YOLO, CVAT and a page."""

import multiprocessing
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from finetune.config.recipes import shown
from finetune.errors import ConfigError, FinetuneError
from finetune.run import libraries
from finetune.run.progress import plural, say
from finetune.video.records import Annotated
from finetune.video.settings import Annotate, existing, parse


def main(words: Sequence[str]) -> int:
    """Annotate one video, or all of a folder; the exit code is that of the last one that failed, else 0.

    Raises ConfigError for other words, DataError for what is no video, ModelError, RunError.
    """
    settings = parse(Annotate, "annotate", words)
    require_packages("annotate")
    from finetune.video.source import videos_in

    if settings.video:
        video = existing(settings.video)
        target = Path(settings.run_dir or f"outputs/{settings.name or video.stem}")
        record, new = _annotated(video, target, settings)
        _show(record, target, new=new)
        return 0
    folder = existing(settings.folder)
    videos = videos_in(folder)
    above = Path(settings.run_dir or f"outputs/{settings.name or folder.resolve().name}")
    jobs = [(video, above / _name(video, videos), settings) for video in videos]
    return _all(jobs, settings)


def require_packages(command: str) -> None:
    try:
        import_module("av")
    except ImportError as error:
        raise ConfigError(f"`finetune {command}` needs av; type: pip install 'finetune[video]'") from error


def _all(jobs: Sequence[tuple[Path, Path, Annotate]], settings: Annotate) -> int:
    """One after the other, or by several processes, each on a GPU of its own. A video that fails stops no other."""
    import torch

    workers = min(len(jobs), settings.workers or max(1, torch.cuda.device_count()))
    if workers == 1:
        return _shown(jobs, map(_attempt, jobs))
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    gpus = context.Queue()
    for number in range(workers):
        gpus.put(number)
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(gpus,)) as pool:
        return _shown(jobs, pool.map(_attempt, jobs))


def _shown(jobs: Sequence[tuple[Path, Path, Annotate]], results: Iterable[Any]) -> int:
    """Print what came of each as it comes; the exit code of the last that failed."""
    code, failed = 0, list[str]()
    for (video, target, _), result in zip(jobs, results, strict=True):
        if isinstance(result, FinetuneError):
            say(f"error: {result}")
            code, failed = result.exit_code, [*failed, video.name]
        else:
            _show(result[0], target, new=result[1])
    names = f": {', '.join(failed)}" if failed else ""
    print(f"{plural(len(jobs) - len(failed), 'video')} annotated, {len(failed)} failed{names}")
    return code


def _begin(gpus: Any) -> None:
    """A worker starts: it takes a GPU for itself, where there are some."""
    import torch

    libraries.in_command = True
    libraries.quieten()
    number = gpus.get()
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


def _attempt(job: tuple[Path, Path, Annotate]) -> Any:
    try:
        return _annotated(*job)
    except FinetuneError as error:
        return error


def _annotated(video: Path, target: Path, settings: Annotate) -> tuple[Annotated, bool]:
    from finetune.video.annotation import annotate, load_detector

    return annotate(video, target, replace(settings, video=str(video)), lambda: load_detector(settings))


def _name(video: Path, videos: Sequence[Path]) -> str:
    """Of a video's folder: with its ending where two differ in that alone."""
    return video.stem if sum(other.stem == video.stem for other in videos) == 1 else video.name


def _show(record: Annotated, target: Path, *, new: bool) -> None:
    print(f"{Path(record.video).name}: {'' if new else 'up to date, skipped; '}{record.found}")
    print(f"  {record.seconds:g} s, {plural(record.looks, 'look')}, {plural(len(record.scenes), 'scene')}")
    if record.damage:
        say(f"warning: {Path(record.video).name} is damaged: {record.damage}")
    if new:
        print(f"  {record.speed}")
    print(f"  {shown(target)}/report.html; beside it {', '.join(record.files)}")
