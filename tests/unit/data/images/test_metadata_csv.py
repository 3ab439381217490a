"""Captions in `metadata.csv`: read and checked as those in `metadata.jsonl`, and never written."""

import json
from pathlib import Path

import pytest
from PIL import Image

from finetune.data.images import folder
from finetune.data.images.metadata import generated
from finetune.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a.png", "b, c.png", "sub/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def found(root: Path, *lines: str, name: str = "metadata.csv") -> folder.Captions:
    (root / name).write_text("\n".join(lines), encoding="utf-8")
    return folder.captions(root, folder.images(root))


def test_cells_are_texts_as_they_are_written(root: Path) -> None:
    captions = found(
        root, "file_name,text,rating", 'a.png,"a wall, ""red""",5', '"b, c.png"," 007 ",', "sub\\d.png,None,1"
    )
    assert captions.texts == {"a.png": 'a wall, "red"', "b, c.png": "007", "sub/d.png": "None"}
    assert set(captions.sources.values()) == {"metadata.csv"}
    assert captions.strays == ()


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("column", ["text", "caption", "Prompt"])
def test_of_spreadsheets_and_other_tools(root: Path, separator: str, column: str) -> None:
    lines = [f"\ufefffile_name{separator}{column}\r", f"a.png{separator}mine\r", f"{separator}\r"]
    assert found(root, *lines).texts == {"a.png": "mine"}


def test_the_nearest_counts_and_then_jsonl(root: Path) -> None:
    (root / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "from jsonl"}\n')
    found(root, "file_name,text", "d.png,near", name="sub/metadata.csv")
    captions = found(root, "file_name,text", "a.png,from csv", "sub/d.png,far", '"b, c.png",')
    assert captions.texts == {"a.png": "from jsonl", "sub/d.png": "near"}
    assert captions.sources == {"a.png": "metadata.jsonl", "sub/d.png": "sub/metadata.csv"}
    assert captions.unused == {"a.png": "metadata.csv", "sub/d.png": "metadata.csv"}


def test_texts_of_no_image_are_named(root: Path) -> None:
    strays = found(root, "file_name,note,size", "gone.png,a wall,1", "a.png,a house,2", '"b, c.png",7,3').strays
    assert [stray.where for stray in strays] == [
        'metadata.csv, line 3: the caption must be called "text"; the columns are note'
    ]
    strays = found(root, "file_name,text", "gone.png,a wall").strays
    assert [stray.where for stray in strays] == ["metadata.csv, line 2: there is no image gone.png"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["image,text", "a.png,x"], ', line 2: has no "file_name"; expected a first line file_name,text and then one'),
        (["file_name,text", ",x"], ', line 2: has no "file_name"; expected a first line file_name,text'),
        (["file_name,text", "a.png,x", "./a.png,y"], ", line 3: a.png has a row on line 2 already; keep one of them"),
        (["file_name,text", "a.png,a wall, red"], ":2: has 3 cells for 2 columns; put double quotes around cells"),
        (["file_name,text", 'a.png,"a wall'], ":2: is not CSV"),
        (["file_name,text,Text", "a.png,x,y"], ', line 2: has "text" twice, in small and capital letters; keep one of'),
        (["file_name,text,text", "a.png,x,y"], ":1: has two columns called text; give one another name"),
    ],
)
def test_a_broken_table_is_named_with_the_line(root: Path, lines: list[str], said: str) -> None:
    with pytest.raises(DataError) as caught:
        found(root, *lines)
    assert f"metadata.csv{said}" in str(caught.value)


def test_a_table_that_is_not_utf8_or_cannot_be_read(root: Path) -> None:
    (root / "metadata.csv").write_bytes("file_name,text\na.png,Bär\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"metadata.csv:2: byte 8 of the line is not UTF-8 \(0xe4\); save the file as"):
        folder.captions(root, ["a.png"])
    (root / "metadata.csv").unlink()
    (root / "metadata.csv").mkdir()
    with pytest.raises(DataError, match=r"metadata.csv: can't be read \(Is a directory\)"):
        folder.captions(root, ["a.png"])
    with open(root / "large", "wb") as file:
        file.truncate(2 << 30)
    (root / "metadata.csv").rmdir()
    (root / "large").rename(root / "metadata.csv")
    with pytest.raises(DataError, match=r"metadata.csv: can't be read \(File too large\)"):
        folder.captions(root, ["a.png"])


def test_captions_are_written_beside_it_and_it_stays(root: Path) -> None:
    found(root, "file_name;text", "d.png;", name="sub/metadata.csv")
    before = (root / "sub/metadata.csv").read_bytes()
    folder.add_captions(root, {"sub/d.png": "generated"}, overwrite=False)
    assert (root / "sub/metadata.csv").read_bytes() == before
    (line,) = (root / "sub/metadata.jsonl").read_text().splitlines()
    assert json.loads(line) == {"file_name": "d.png", **generated("generated")}
    assert folder.captions(root, ["sub/d.png"]).texts == {"sub/d.png": "generated"}
