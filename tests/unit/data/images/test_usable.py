"""A glance at images finds what reading them for the index finds, in the time that it is given."""

from pathlib import Path

import pytest
from PIL import Image

from finetune.data.images import usable
from finetune.data.images.index import ImageIndex
from finetune.errors import DataError

FILES = ["a.png", "b.png", "c.png"]
LIMIT = 10_000


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, name in enumerate(FILES):
        Image.new("L", (20, 10), number).save(tmp_path / name)
    return tmp_path


def test_it_finds_what_the_index_finds(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (root / "a.png").write_bytes(b"")
    Image.new("L", (200, 100)).save(root / "c.png")
    index = ImageIndex(root, cache=tmp_path_factory.mktemp("cache"), max_pixels=LIMIT)
    found, looked = usable.unreadable(root, FILES, LIMIT, 60)
    assert (found, looked) == (index.unreadable(list(index.hashes(FILES))), 3)
    assert set(found) == {"a.png", "c.png"}


def test_it_ends_in_time(root: Path) -> None:
    assert usable.unreadable(root, FILES, LIMIT, -1) == ({}, 1)


def test_a_file_that_is_gone_is_an_error(root: Path) -> None:
    (root / "b.png").unlink()
    with pytest.raises(DataError, match=r"b\.png: can't be read \(No such file or directory\)"):
        usable.unreadable(root, FILES, LIMIT, 60)
