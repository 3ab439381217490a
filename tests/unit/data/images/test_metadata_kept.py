"""Rows of a metadata file are kept while its content stays, and are those of the file whoever wrote it, and when."""

import json
import os
from pathlib import Path

import pytest

from finetune.data.images import folder, metadata
from finetune.errors import DataError
from finetune.run import hashing


def write(file: Path, *texts: str) -> None:
    rows = (json.dumps({"file_name": f"{number}.png", "text": text}) for number, text in enumerate(texts))
    file.write_text("\n".join(rows) + "\n")


def texts(file: Path) -> list[str]:
    return [row.text for row in metadata.read_rows(file).values()]


def test_rows_are_kept_while_the_content_stays(tmp_path: Path) -> None:
    file = tmp_path / "metadata.jsonl"
    write(file, "a", "b")
    first = metadata.read_rows(file)
    assert metadata.read_rows(file) is first
    write(file, "a", "b")
    assert metadata.read_rows(file) is first, "the same content at another time"


@pytest.mark.parametrize("young", [True, False])
def test_a_change_that_keeps_size_and_time_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, young: bool
) -> None:
    monkeypatch.setattr(hashing, "RACY_NS", 10**12 if young else -(10**12))
    file = tmp_path / "metadata.jsonl"
    for text in ("a", "b", "a", "c"):
        write(file, text)
        os.utime(file, ns=(1, 1))
        assert texts(file) == [text] == texts(file)


def test_what_is_kept_of_written_captions_is_what_the_file_says(tmp_path: Path) -> None:
    file = tmp_path / "metadata.jsonl"
    file.write_text('\ufeff{"file_name": "a.png", "text": "mine", "n": 1}\r\n\n{"file_name": "./b.png", "text": ""}\n')
    folder.add_captions(tmp_path, {"b.png": "ein Bär\u2028", "c.png": "new"}, overwrite=False)
    kept = metadata.read_rows(file)
    (tmp_path / "copy").mkdir()
    copied = file.rename(tmp_path / "copy" / file.name)
    assert metadata.read_rows(copied) == kept
    assert [row.number for row in kept.values()] == [1, 2, 3]
    assert metadata.read_rows(copied) is not kept


def test_few_files_are_kept_and_no_broken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "MOST_ROWS", 3)
    files = [tmp_path / name / "metadata.jsonl" for name in "ab"]
    for file in files:
        file.parent.mkdir()
        write(file, "x", "y")
    first, second = map(metadata.read_rows, files)
    assert metadata.read_rows(files[1]) is second
    assert metadata.read_rows(files[0]) is not first
    files[0].write_text("{")
    for _ in range(2):
        with pytest.raises(DataError, match="is not JSON"):
            metadata.read_rows(files[0])
