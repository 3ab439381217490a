"""The cache: content in, content out, and damage is noticed."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from finetune.data import cache
from finetune.errors import DataError, RunError
from finetune.run.hashing import hash_of

TENSORS = {"mean": torch.arange(6.0).reshape(2, 3), "std": torch.ones(2, 3, dtype=torch.bfloat16)}
VALUES = {name: tensor.tolist() for name, tensor in TENSORS.items()}


@pytest.fixture
def store(tmp_path):
    return cache.Cache(tmp_path / "cache")


def test_round_trip_with_notes(store):
    key = hash_of("image", 1)
    assert not store.has(key)
    path = store.put(key, TENSORS, lost="the tail … ü")
    assert path == store.path(key) == store.folder / key[:2] / f"{key}.safetensors"
    assert store.has(key)
    assert store.notes(key)["lost"] == "the tail … ü"
    back = cache.read(path)
    assert set(back) == set(TENSORS)
    assert all(torch.equal(back[name], TENSORS[name]) and back[name].dtype == TENSORS[name].dtype for name in TENSORS)
    assert [item.name for item in path.parent.iterdir()] == [path.name], "no temporary files stay"


def test_views_are_stored_as_they_look(store):
    wide = torch.arange(12.0).reshape(3, 4)
    assert torch.equal(cache.read(store.put("ab" * 32, {"t": wide.T}))["t"], wide.T)


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "header", "text"])
def test_a_damaged_entry_is_removed_and_can_be_made_anew(store, damage):
    key = hash_of("x")
    path = store.put(key, TENSORS)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-1] ^= 1
    elif damage == "header":
        data[10] ^= 0xFF
    else:
        data = {"empty": b"", "truncated": data[:-5], "text": b"not a tensor file at all"}[damage]
    path.write_bytes(data)
    assert not store.has(key)
    assert not path.exists()
    store.put(key, TENSORS)
    assert store.has(key)


def test_reading_a_missing_or_damaged_entry_names_it(store):
    with pytest.raises(DataError, match=r"cached example .*gone.safetensors can't be read"):
        cache.read(store.folder / "gone.safetensors")
    path = store.put("cd" * 32, TENSORS)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DataError, match=r"the same command encodes it again"):
        cache.read(path)


def test_one_changed_bit_is_not_trained_on_and_the_entry_is_made_again(store):
    path = store.put("ef" * 32, TENSORS)
    cache.read(path)
    data, times = bytearray(path.read_bytes()), path.stat()
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(DataError, match=r"damaged.*; the same command encodes it again"):
        cache.read(path)
    assert not path.exists()  # so the same command does


@pytest.mark.parametrize("bit", range(8))
def test_no_changed_bit_of_an_entry_is_passed_over(store, bit):
    path = store.put("ef" * 32, TENSORS, lost="the tail … ü")
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        if store.has("ef" * 32):  # as JSON it may say the same: white space, hexadecimal digits of a letter
            assert {name: tensor.tolist() for name, tensor in cache.read(path).items()} == VALUES
            assert store.notes("ef" * 32)["lost"] == "the tail … ü"


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot use the cache .*try data.cache=FOLDER"):
        cache.Cache(tmp_path / "file").put("ab", TENSORS)


def test_an_entry_that_cannot_be_read(store):
    store.path("ab").mkdir(parents=True)
    with pytest.raises(RunError, match=r"delete the cache folder"):
        store.has("ab")


def test_an_entry_longer_than_its_header_says_is_made_again(store):
    path = store.put("ab", TENSORS)
    with open(path, "r+b") as file:
        file.truncate(1 << 36)
    assert not store.has("ab")
    assert not path.exists()


def test_entries_that_are_as_old_as_they_were_are_not_read(store, monkeypatch):
    paths = [store.put("ab", TENSORS), store.put("cd", TENSORS)]
    written = max(path.stat().st_ctime_ns for path in paths)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda _: pytest.fail("an entry was read"))
        assert cache.whole(paths, since_ns=written)
        assert not cache.whole([*paths, paths[0].with_name("other")], since_ns=written)
    for path in paths:
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert not cache.whole(paths, since_ns=written)
    assert not any(path.exists() for path in paths), "both are made again"


def test_what_killed_processes_left_is_removed_and_what_others_write_is_not(store):
    folder = store.put("ab" * 32, TENSORS).parent
    ended = subprocess.Popen(["true"])
    ended.wait()
    left, written = (folder / f".{'ab' * 32}.safetensors.{number}.tmp" for number in (ended.pid, os.getppid()))
    for path in (left, written, folder / ".mine.1.tmp"):
        path.write_bytes(b"half")
    store.remove_abandoned()
    assert not left.exists()
    assert written.exists()
    assert (folder / ".mine.1.tmp").exists(), "somebody else's"


def test_a_writer_whose_file_was_taken_for_abandoned_writes_it_again(store, monkeypatch):
    replace, removed = os.replace, []

    def remove_first(source, target):
        if not removed:
            removed.append(source)
            source.unlink()
        replace(source, target)

    monkeypatch.setattr(os, "replace", remove_first)
    assert torch.equal(cache.read(store.put("ab", TENSORS))["mean"], TENSORS["mean"])
    assert removed
