"""Images that whoever made the folder keeps from training."""

import json
from pathlib import Path

import pytest

from finetune.data.images.split import for_validation


@pytest.mark.parametrize("named", ["validation", "Validation", " val ", "valid", "dev", "test", "TEST", "eval"])
def test_whatever_a_split_is_called_it_is_not_trained_on(tmp_path: Path, named: str) -> None:
    others = ["train", "training", "contest", "", None, 1, ["test"]]
    splits = [named, *others]
    rows = [{"file_name": f"{number}.png", "split": split} for number, split in enumerate(splits)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [f"{number}.png" for number in range(len(splits))]
    assert for_validation(tmp_path, files, 0.2) == {"0.png"}
    assert for_validation(tmp_path, files, 0.0) == set()
