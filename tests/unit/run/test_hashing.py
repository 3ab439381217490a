"""Hashes: equal for equal content, whatever it is called or in whichever order it was put together."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finetune.errors import ModelError
from finetune.run import hashing
from finetune.run.hashing import hash_adapter, hash_file, hash_files, hash_of


def test_hashes_differ_with_every_value() -> None:
    values: list[tuple[object, ...]] = [("a", "b"), ("ab",), ("a", "b", ""), ("a", 1), ("a", "1"), ("a", True)]
    assert len({hash_of(*some) for some in values}) == 6


def test_the_order_of_keys_makes_no_difference() -> None:
    assert hash_of({"a": 1, "b": 2}) == hash_of({"b": 2, "a": 1}) != hash_of({"a": 2, "b": 1})


def test_files_are_known_by_content_and_order_alone(tmp_path: Path) -> None:
    contents = {"a": b"ab", "b": b"c", "again": b"ab", "c": b"a", "d": b"bc"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    a, b, again, c, d = (tmp_path / name for name in contents)
    assert hash_file(a) == hashlib.sha256(b"ab").hexdigest()
    assert hash_files([a, b]) == hash_files([again, b])
    assert len({hash_files(files) for files in ([a, b], [b, a], [c, d], [a], [])}) == 5
    with pytest.raises(OSError, match="gone"):
        hash_file(tmp_path / "gone")


def test_a_name_that_is_not_utf8_has_a_hash():
    assert hash_of("\udcff") != hash_of("\udcfe")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_that_is_damaged_is_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert hash_adapter(tmp_path) == hash_files(
        [tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"]
    )
    with open(tmp_path / name, "r+b") as stream:
        stream.truncate(5 << 30)  # sparse
    monkeypatch.setattr(hashing, "hash_files", lambda _: pytest.fail("it was read"))
    with pytest.raises(ModelError, match=rf"{name} is damaged \(5368709120 bytes"):
        hash_adapter(tmp_path)
