"""Files become one data set: several paths, folders with litter, and folders with splits."""

import json
import os
import shlex
from pathlib import Path

import pytest

import finetune
from finetune.config.schema import Config
from finetune.language import tokenize


def test_files_of_any_kind_are_trained_together(language_config: Config, tmp_path: Path) -> None:
    lines = Path(language_config.data.file).read_text().splitlines()
    (tmp_path / "first.jsonl").write_text("\n".join(lines[:10]))  # no line end behind the last row
    (tmp_path / "second.json").write_text(json.dumps([json.loads(line) for line in lines[10:25]], indent=1))
    language_config.data.file = os.pathsep.join(str(tmp_path / name) for name in ("first.jsonl", "second.json"))
    record = tokenize.build(language_config, None)
    assert record.train + record.validation == 25
    assert "messages (recognised), 2 files" in record.source


def test_a_folder_is_trained_without_litter_and_other_splits(
    language_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Path(language_config.data.file).read_text().splitlines(keepends=True)
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(lines[:30]))
    (folder / "test.jsonl").write_text("".join(lines[30:]))
    for name in ("._train.jsonl", "._part.parquet"):
        (folder / name).write_bytes(b"\x00\x05\x16\x07")
    language_config.data.file = str(folder)
    record = tokenize.build(language_config, None)
    assert record.train + record.validation == 30
    said = [line for line in capsys.readouterr().err.splitlines() if "not trained on" in line]
    assert len(said) == 1
    assert "test.jsonl (by name a test or validation split" in said[0]
    (word,) = shlex.split(said[0].partition("too: ")[2].removesuffix(")"))
    language_config.data.file = finetune.load("pirate_chat", word).data.file
    assert language_config.data.file == f"{folder}{os.pathsep}{folder / 'test.jsonl'}"
    record = tokenize.build(language_config, None)
    assert record.train + record.validation == 40
