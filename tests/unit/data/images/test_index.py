"""What is known of images without reading them: hashed once, and again whenever they may have changed."""

import os
import time

import pytest
from PIL import Image

from finetune.data.images import decode, index
from finetune.data.images.index import ImageIndex
from finetune.errors import DataError
from finetune.run import progress

LIMIT = 10_000


@pytest.fixture
def root(tmp_path):
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for number, name in enumerate(["a.png", "b.png", "sub/c.png"]):
        put(tmp_path / "images" / name, number)
    return tmp_path / "images"


@pytest.fixture
def hashed(monkeypatch):
    """The contents that were hashed, in any order."""
    seen, plain = [], index.content_hash
    monkeypatch.setattr(index, "content_hash", lambda data: seen.append(data) or plain(data))
    return seen


FILES = ["a.png", "b.png", "sub/c.png"]


def put(path, grey, size=(20, 10), *, age_s=60.0):
    """A grey image that was last changed a while ago."""
    Image.new("L", size, grey).save(path)
    aged(path, age_s)


def aged(path, age_s):
    changed = time.time() - age_s
    os.utime(path, (changed, changed))


def opened(root, *, limit=LIMIT):
    return ImageIndex(root, cache=root.parent / "cache", max_pixels=limit)


def hashes(root):
    return opened(root).hashes(FILES)


def test_hashes_are_of_bytes_alone(root):
    (root / "b.png").write_bytes((root / "a.png").read_bytes())
    found = hashes(root)
    assert found["a.png"] == found["b.png"] == index.content_hash((root / "a.png").read_bytes())
    assert found["a.png"] != found["sub/c.png"]


def test_a_missing_file_is_named(root):
    for name in ("gone.png", "sub"):
        with pytest.raises(DataError, match=rf"{name}: can't be read"):
            opened(root).hashes([name])


def test_files_are_read_once(root, hashed):
    first = hashes(root)
    assert len(hashed) == 3
    assert hashes(root) == first
    again = opened(root)
    assert again.unreadable(list(again.hashes(FILES))) == {}
    assert again.size("a.png") == (20, 10)
    assert len(hashed) == 3


@pytest.mark.parametrize("change", ["content", "older", "same times", "mode"])
def test_a_file_whose_size_or_times_changed_is_hashed_again(root, hashed, change):
    hashes(root)
    hashed.clear()
    path, before = root / "b.png", (root / "b.png").stat()
    if change == "content":
        put(path, 200)
    elif change == "older":
        aged(path, 120)
    elif change == "same times":  # as `cp -p` leaves it: of the same length, too
        path.write_bytes(bytes(before.st_size))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        path.chmod(0o600)
    assert hashes(root)["b.png"] == index.content_hash(path.read_bytes())
    assert len([data for data in hashed if data == path.read_bytes()]) == 2  # here and in the line above


def test_a_file_changed_just_before_it_was_read_is_not_trusted(root, hashed):
    aged(root / "b.png", 0.5)  # a second write within the clock's tick would leave the same times
    hashes(root)
    hashed.clear()
    hashes(root)
    assert len(hashed) == 1
    aged(root / "b.png", 3)
    hashes(root)
    hashed.clear()
    hashes(root)
    assert not hashed


@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "flipped", "not text", "another format"])
def test_a_damaged_index_is_ignored(root, hashed, damage, monkeypatch):
    first = hashes(root)
    file = opened(root).path
    data = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    elif damage == "flipped":
        position = data.index(first["a.png"].encode())
        data[position] = ord("0") if data[position] != ord("0") else ord("1")
        file.write_bytes(data)
    elif damage == "another format":
        monkeypatch.setattr(index, "FORMAT", "images-0")
    else:
        file.write_bytes({"empty": b"", "cut": data[:-40], "not text": b"\xff\xfe"}[damage])
    hashed.clear()
    assert hashes(root) == first
    assert len(hashed) == 3


def test_an_index_that_cannot_be_written_stops_nothing(root):
    (root.parent / "cache").write_text("a file where the folder should be")
    assert set(hashes(root)) == set(FILES)


def test_content_that_decoded_once_is_not_decoded_again(root, monkeypatch):
    hashes(root)
    monkeypatch.setattr(decode, "check", None)
    aged(root / "a.png", 30)
    (root / "b.png").rename(root / "renamed.png")
    found = opened(root)
    files = list(found.hashes(["a.png", "renamed.png", "sub/c.png"]))
    assert found.unreadable(files) == {}
    assert found.size("renamed.png") == (20, 10)


def test_rows_of_files_that_are_gone_are_dropped(root):
    hashes(root)
    (root / "b.png").unlink()
    aged(root / "a.png", 30)
    opened(root).hashes(["a.png"])
    assert set(opened(root).rows) == {"a.png", "sub/c.png"}


def test_bad_images_are_looked_at_each_time_they_are_asked_for(root):
    (root / "b.png").write_bytes(b"")
    put(root / "sub/c.png", 5, size=(200, 100))
    for _ in range(2):
        found = opened(root)
        found.hashes(FILES)
        assert set(found.unreadable(FILES)) == {"b.png", "sub/c.png"}
        assert "is empty" in found.unreadable(FILES)["b.png"]
        assert "try data.max_pixels=20000" in found.unreadable(FILES)["sub/c.png"]
    found = opened(root, limit=20_000)
    found.hashes(FILES)
    assert set(found.unreadable(FILES)) == {"b.png"}, "what was too large before"
    assert found.size("sub/c.png") == (200, 100)
    lower = opened(root, limit=500)
    lower.hashes(FILES)
    assert set(lower.unreadable(FILES)) == {"b.png", "sub/c.png"}, "and is again"


def test_an_image_that_was_fixed_is_no_longer_bad(root):
    (root / "b.png").write_bytes(b"")
    found = opened(root)
    found.hashes(FILES)
    assert set(found.unreadable(FILES)) == {"b.png"}
    put(root / "b.png", 3)
    found.hashes(FILES)
    assert found.unreadable(FILES) == {}


def test_an_interrupt_keeps_what_was_read(root, hashed, monkeypatch):
    plain = decode.file_bytes

    def file_bytes(path):
        if path.name == "c.png":
            raise KeyboardInterrupt
        return plain(path)

    with monkeypatch.context() as patched:
        patched.setattr(decode, "file_bytes", file_bytes)
        with pytest.raises(KeyboardInterrupt):
            hashes(root)
    hashed.clear()
    hashes(root)
    assert len(hashed) == 1


def test_two_folders_have_an_index_each(root, tmp_path):
    (tmp_path / "other").mkdir()
    put(tmp_path / "other" / "a.png", 99)
    other = ImageIndex(tmp_path / "other", cache=tmp_path / "cache", max_pixels=LIMIT)
    assert other.hashes(["a.png"])["a.png"] != opened(root).hashes(["a.png"])["a.png"]
    assert other.path.parent == opened(root).path.parent
    assert other.path != opened(root).path


def test_a_kill_loses_no_more_than_a_minute_of_looking(root, hashed, monkeypatch):
    monkeypatch.setattr(index, "AT_ONCE", 1)
    monkeypatch.setattr(index, "SAVED_EVERY_S", -1.0)
    plain = index._save

    def killed(path, rows):
        plain(path, rows)
        if len(rows) == 2:
            monkeypatch.setattr(index, "_save", lambda *_: None)  # a killed process does nothing more
            raise KeyboardInterrupt

    monkeypatch.setattr(index, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        hashes(root)
    assert len(hashed) == 2
    monkeypatch.setattr(index, "_save", plain)
    assert len(hashes(root)) == 3
    assert len(hashed) == 3


def test_long_reading_says_how_far_it_is(root, monkeypatch, capsys):
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.0)
    hashes(root)
    assert capsys.readouterr().err == f"reading the images of {root}: 1 of 3 so far\n"
