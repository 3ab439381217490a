"""What the tests of videos have in common."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest

from finetune.run.progress import taken_warnings
from finetune.video.annotation import annotate
from finetune.video.records import Annotated
from finetune.video.settings import Annotate
from tests.unit.video.films import FRAMES, RATE, SquareFinder, film, odd_scenes, regular


@pytest.fixture(autouse=True)
def _warnings_taken() -> Iterator[None]:
    """A stage that another test runs in this process would put them into its receipt."""
    yield
    taken_warnings()


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Annotate:
    """With a folder in place of a detector: who finds is passed beside."""
    folder = tmp_path_factory.mktemp("detector")
    (folder / "config.json").write_text("{}")
    return Annotate(video="film.mp4", detector=str(folder), images=True, batch=3)


@pytest.fixture(scope="session")
def long_film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four scenes, in turn every two seconds, with sound, in an odd size, from 3 s on."""
    times = [Fraction(3) + time for time in regular(FRAMES, RATE)]
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    return film(path, times, unit=Fraction(1, 12800), draw=odd_scenes, sound=True, pix_fmt="yuv444p")


@pytest.fixture(scope="session")
def done(long_film: Path, settings: Annotate, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Annotated]:
    folder = tmp_path_factory.mktemp("run") / "film"
    return folder, annotate(long_film, folder, settings, SquareFinder)[0]
