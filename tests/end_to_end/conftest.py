"""What end-to-end tests share: a tiny base model, a few images, and settings with which a run takes a second."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

import finetune
from tests.tiny_models import save_diffusion

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture
def browser() -> Iterator["Browser"]:
    """The system's Chromium, for one test: Playwright holds an event loop that others then can't have."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not program:
        pytest.skip("needs Chromium on the path")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny pipeline."""
    return save_diffusion(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoded images, keyed by content: every test may use the same."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def images(workdir: Path) -> Path:
    """Four images in the current folder, each with a caption."""
    return paint(workdir / "images")


def paint(folder: Path) -> Path:
    folder.mkdir()
    for colour in ("red", "green", "blue", "white"):
        Image.new("RGB", (64, 64), colour).save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(f"a {colour} wall, pixar style")
    return folder


@pytest.fixture
def small(tiny_base: Path, shared_cache: Path, images: Path) -> list[str]:
    """The recipe on the tiny base: two steps, two images."""
    return settings(tiny_base, shared_cache)


def settings(base: Path, cache: Path) -> list[str]:
    return [
        "conf=pixar_style",
        *(f"model.base={base}", "model.resolution=32", "model.bucket_step=16", "hardware.device=cpu"),
        *("data.folder=images", f"data.cache={cache}", "run_dir=run", "optim.warmup_steps=0"),
        *("lora.rank=4", "lora.targets=attention", "optim.lr=1e-3"),
        *("trainer.steps=2", "trainer.micro_batch=2", "trainer.save_every=1", "trainer.validate_every=2"),
        *("sample.steps=1", "sample.seeds=[0]", "sample.previews=0", 'sample.prompts=["a red wall, pixar style"]'),
    ]


@pytest.fixture(scope="session")
def finished(tiny_base: Path, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which that recipe was run to its end."""
    work = tmp_path_factory.mktemp("finished")
    paint(work / "images")
    recipe, *overrides = settings(tiny_base, shared_cache)
    with contextlib.chdir(work):
        finetune.train(recipe.removeprefix("conf="), overrides)
    return work


@pytest.fixture
def trained(finished: Path, images: Path) -> Path:
    """The run folder of a finished run, with its images, in the current folder."""
    shutil.copytree(finished, images.parent, dirs_exist_ok=True)
    return Path("run")
