"""Files become one data set: several paths, folders with litter, and folders with splits."""

import json
import os
import shlex
from pathlib import Path

import pytest

import finetune
from finetune.config.schema import Config
from finetune.errors import DataError
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


def test_what_of_a_folder_is_no_conversation_is_named_and_changes_nothing(
    language_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "set"
    (folder / "older").mkdir(parents=True)
    lines = Path(language_config.data.file).rename(folder / "mine.jsonl").read_text()
    language_config.data.file = str(folder)
    before = tokenize.inputs(language_config, None)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "older" / "1.jsonl").write_text(lines)
    assert tokenize.inputs(language_config, None) == before
    record = tokenize.build(language_config, None)
    assert record.train + record.validation == 40
    said = capsys.readouterr().err
    assert "dataset: not read: config.json (no column of it is one of conversations)" in said
    assert f"dataset: folders are not searched: older; name one: data.file={folder}/older" in said
    language_config.data.file = str(folder / "config.json")
    with pytest.raises(DataError, match=r"config.json:1: its columns \(model_type\) are of no known format"):
        tokenize.build(language_config, None)


def test_long_lists_of_files_are_cut() -> None:
    assert tokenize._names([Path(f"{number}.json") for number in range(10)]).endswith("6.json, 7.json and 2 more")
