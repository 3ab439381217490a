"""Folders of images and captions as users have them."""

import glob
import json
import os
import zipfile

import pytest
from PIL import Image

from finetune.data.images import folder, walk
from finetune.data.images.metadata import generated
from finetune.errors import DataError, RunError
from finetune.run import progress


@pytest.fixture(params=["images", "odd [name] *", ".hidden/images"])
def root(tmp_path, request):
    path = tmp_path / request.param
    path.mkdir(parents=True)
    return path


def put(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / name, format="PNG")


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


def test_images_are_found_recursively_whatever_they_are_called(root):
    put(root, "b.png", "test_1.JPG", "train/deep/x.webp", "validation/Ü ä.png", "[1].png", ".hidden.png", ".dir/a.png")
    (root / "notes.txt").write_text("no image")
    assert folder.images(root) == ["[1].png", "b.png", "test_1.JPG", "train/deep/x.webp", "validation/Ü ä.png"]


def test_the_same_files_are_listed_as_by_imagefolder(root):
    import datasets

    put(root, "a.png", "__b.png", "__dir/c.png", ".dir/d.png", "sub/.e.png", "folder.png/f.jpg", "sub/g.webp")
    (root / "outside").mkdir()
    (root / "link.png").symlink_to(root / "a.png")
    (root / "linked").symlink_to(root / "sub")
    (root / "broken.png").symlink_to(root / "gone.png")
    pattern = f"{glob.escape(str(root))}/**"
    table = datasets.load_dataset("imagefolder", data_files={"train": pattern}, split="train", streaming=True)
    listed = [row["image"]["path"] for row in table.cast_column("image", datasets.Image(decode=False))]
    assert folder.images(root) == sorted(folder.Path(path).relative_to(root).as_posix() for path in listed)


def test_archives_are_passed_over(root):
    (root / "b.zip").write_bytes(b"")
    with pytest.raises(DataError, match=r"b.zip is packed; unpack it and name the folder of your images"):
        folder.images(root / "b.zip")
    put(root, "a.png")
    with zipfile.ZipFile(root / "more.zip", "w") as archive:
        archive.write(root / "a.png", "b.png")
    assert folder.images(root) == ["a.png"]


def test_what_systems_and_tools_leave_beside_images_is_neither_image_nor_text(root):
    put(root, "a.png", "._a.png", ".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/._a.png", "@eaDir/a.png/THUMB.jpg")
    put(root, "#recycle/old.png", "$RECYCLE.BIN/S-1/$R1.png", "System Volume Information/x.png", "sub/@eaDir/b.jpg")
    for name in (
        "Thumbs.db",
        "desktop.ini",
        ".DS_Store",
        "._a.txt",
        "._b.heic",
        "README.json",
        "package.json",
        "Icon\r",
    ):
        (root / name).write_text("[.ShellClassInfo]")
    (root / "@eaDir" / "a.txt").write_text("a text")
    (root / "a.txt").write_text("my words")
    assert folder.images(root) == ["a.png"]
    assert folder.unsupported_files(root) == []
    found = folder.captions(root, ["a.png"])
    assert (found.texts, found.strays, found.unread) == ({"a.png": "my words"}, (), ())


def test_listing_reads_no_image(root):
    (root / "a.jpg").write_bytes(b"")
    assert folder.images(root) == ["a.jpg"]


def test_a_relative_folder_with_dots(root, monkeypatch):
    put(root, "a.png")
    (root / "sub").mkdir()
    monkeypatch.chdir(root / "sub")
    assert folder.images(folder.Path("../sub/..")) == ["a.png"]


def test_bad_folders_say_what_to_type(root):
    with pytest.raises(DataError, match=r"is empty.*data.folder="):
        folder.images(root)
    (root / "a.heic").write_bytes(b"x")
    (root / "b.txt").write_text("x")
    with pytest.raises(DataError, match=r"has no images \(found: 1 .heic, 1 .txt\).*\.png.*data.folder="):
        folder.images(root)
    with pytest.raises(DataError, match=r"there is no folder .*gone.*data.folder="):
        folder.images(root / "gone")
    with pytest.raises(DataError, match=r"is a file; name the folder that holds it"):
        folder.images(root / "b.txt")
    put(root, ".only-hidden.png")
    with pytest.raises(DataError, match=r"has no images"):
        folder.images(root)
    assert folder.unsupported_files(root) == ["a.heic"]


def test_a_name_that_is_not_utf8_is_said(tmp_path):
    put(tmp_path, "a.png")
    (tmp_path / "a.png").rename(tmp_path / os.fsdecode(b"B\xe4r.png"))
    with pytest.raises(DataError, match=r"1 file name not in UTF-8, first b'B\\xe4r.png'"):
        folder.images(tmp_path)


def test_odd_names_are_images_like_others(root):
    put(root, "a::b.png", "zip://c.png", "back\\slash.png")
    files = folder.images(root)
    assert files == ["a::b.png", "back\\slash.png", "zip:/c.png"]
    folder.add_captions(root, dict.fromkeys(files, "words"), overwrite=False)
    assert folder.captions(root, files).texts == dict.fromkeys(files, "words")


def test_linked_folders_are_named(root, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    put(tmp_path / "elsewhere", "a.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"has no images, and linked folders are not followed: linked; .*data.folder="):
        folder.images(root)
    put(root, "b.png")
    assert folder.images(root) == ["b.png"]
    assert folder.linked_folders(root) == ["linked"]


def test_captions_from_metadata_then_from_sidecar(root):
    put(root, "a.png", "b.png", "c.png", "d.png", "sub/e.png", "sub/f.png")
    write(root / "metadata.jsonl", {"file_name": "a.png", "text": "from metadata"}, {"file_name": "d.png", "text": " "})
    write(root / "sub/metadata.jsonl", {"file_name": "./e.png", "text": "nested \u2028 text"})
    (root / "a.txt").write_text("from the sidecar")
    (root / "b.txt").write_bytes("\ufeffein Bär\r\n".encode())
    (root / "sub/f.txt").write_text("\n")
    files = folder.images(root)
    assert folder.captions(root, files).texts == {
        "a.png": "from metadata",
        "b.png": "ein Bär",
        "sub/e.png": "nested \u2028 text",
    }


@pytest.mark.parametrize("name", ["001.TXT", "001.caption", "001.jpg.txt", "001.JPG.Caption", "001.cap", "001.text"])
def test_text_files_of_other_tools_are_captions(root, name):
    put(root, "sub/001.jpg", "sub/002.jpg")
    (root / "sub" / name).write_text("my own words\n")
    found = folder.captions(root, folder.images(root))
    assert found.texts == {"sub/001.jpg": "my own words"}
    assert found.sources == {"sub/001.jpg": f"sub/{name}"}
    assert not found.strays


def test_a_text_belongs_to_the_image_of_its_very_name_first(root):
    put(root, "Cat.png", "cat.png", "dog.png", "dog.jpg")
    (root / "Cat.txt").write_text("upper")
    (root / "CAT.png.txt").write_text("any")
    (root / "dog.txt").write_text("both")
    found = folder.captions(root, folder.images(root))
    assert found.texts == {"Cat.png": "upper", "cat.png": "any", "dog.jpg": "both", "dog.png": "both"}


@pytest.mark.parametrize(
    "row",
    [
        {"file_name": "sub/a.png", "caption": "mine"},
        {"file_name": "sub/a.png", "Text": "mine", "caption": "other"},
        {"file_name": "sub/a.png", "text": " ", "prompt": "mine"},
        {"file_name": "sub\\a.png", "text": "mine"},
        {"file_name": ".\\sub\\a.png", "text": "mine"},
    ],
)
def test_rows_of_other_tools_are_captions(root, row):
    put(root, "sub/a.png")
    write(root / "metadata.jsonl", row)
    found = folder.captions(root, ["sub/a.png"])
    assert found.texts == {"sub/a.png": "mine"}
    assert not found.strays
    folder.add_captions(root, {"sub/a.png": "generated"}, overwrite=False)
    assert rows(root / "metadata.jsonl") == [row], "what a person wrote stays"
    folder.add_captions(root, {"sub/a.png": "generated"}, overwrite=True)
    assert rows(root / "metadata.jsonl") == [row | generated("generated")]


def test_what_runs_drew_is_no_image_to_train_on(root):
    put(root, "a.png", "outputs/mine/samples/0.png", "receipts/b.png")
    (root / "outputs/mine/receipts").mkdir()
    for receipts in ("receipts", "outputs/mine/receipts"):
        write(root / receipts / "caption.json", {})
    (root / "outputs/mine/config.yaml").write_text("name: mine")
    (root / "outputs/mine/samples/note.txt").write_text("of no image")
    assert folder.images(root) == ["a.png", "receipts/b.png"]
    assert folder.run_folders(root) == ["outputs/mine"]
    strays = folder.captions(root, ["a.png"]).strays
    assert [stray.where.partition(":")[0] for stray in strays] == ["receipts/caption.json"]
    assert folder.images(root / "outputs/mine") == ["samples/0.png"], "where it is named, it is meant"


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("notes.txt", "x", "notes.txt: there is no image notes"),
        ("sub/b.caption", "x", "sub/b.caption: there is no image b"),
        ("meta_cap.json", "{}", "meta_cap.json: captions are read from metadata.jsonl and metadata.csv only"),
        ("captions.csv", "file,text", "captions.csv: captions are read from metadata.jsonl and metadata.csv only"),
        ("captions.xlsx", "PK", "captions.xlsx: captions are read from metadata.jsonl and metadata.csv only"),
        ("Metadata.JSONL", "{}", "Metadata.JSONL: captions are read from metadata.jsonl and metadata.csv only"),
        (
            "sub/metadata.parquet",
            "PAR1",
            "sub/metadata.parquet: captions are read from metadata.jsonl and metadata.csv only",
        ),
        (
            "metadata.jsonl",
            '{"file_name": "b.png", "words": "x", "rating": 1}',
            'metadata.jsonl, line 1: the caption must be called "text"; the columns are words',
        ),
    ],
)
def test_texts_that_fit_no_image_are_named(root, name, text, where):
    put(root, "a.png", "b.png", "sub/c.png")
    (root / name).write_text(text)
    found = folder.captions(root, folder.images(root))
    assert [stray.where for stray in found.strays] == [where]


def test_texts_that_are_no_captions_are_passed_over(root):
    put(root, "a.png", "b.png", "readme.png")
    (root / "photo.heic").write_bytes(b"x")
    (root / "sub").mkdir()
    for name in ("README.txt", "sub/LICENSE.txt", "photo.txt", ".hidden.txt", "a.json"):
        (root / name).write_text("words")
    (root / "b.txt").write_text("a caption")
    write(root / "metadata.jsonl", {"file_name": "b.png", "words": "x"}, {"file_name": "a.png", "text": "", "by": "me"})
    found = folder.captions(root, folder.images(root))
    assert found.strays == ()
    assert found.unread == ("a.json",)
    assert found.texts == {"b.png": "a caption", "readme.png": "words"}


def test_files_beside_images_that_may_hold_their_captions_are_named(root):
    put(root, "a.png", "b.png", "sub/c.png")
    for name in ("a.md", "a.captions", "a.docx", "b.txt", "b.json", "sub/c.png.TAGS", "notes.md", "a.npz"):
        (root / name).write_text("words")
    unread = folder.captions(root, folder.images(root)).unread
    assert set(unread) == {"a.md", "a.captions", "a.docx", "sub/c.png.TAGS"}


def test_the_other_of_two_captions_is_named(root):
    put(root, "a.png", "sub/b.png", "c.png")
    write(
        root / "metadata.jsonl", {"file_name": "a.png", "text": "one  two"}, {"file_name": "sub/b.png", "text": "far"}
    )
    write(root / "sub/metadata.jsonl", {"file_name": "b.png", "text": "near"})
    (root / "a.txt").write_text("one two\n")
    (root / "c.txt").write_text("tags")
    (root / "c.caption").write_text("a sentence")
    found = folder.captions(root, folder.images(root))
    assert found.texts == {"a.png": "one  two", "sub/b.png": "near", "c.png": "tags"}
    assert found.sources == {"a.png": "metadata.jsonl", "sub/b.png": "sub/metadata.jsonl", "c.png": "c.txt"}
    assert found.unused == {"sub/b.png": "metadata.jsonl", "c.png": "c.caption"}


def test_names_match_across_unicode_forms(root):
    put(root, "Ba\u0308r.png")  # as macOS writes it
    write(root / "metadata.jsonl", {"file_name": "B\u00e4r.png", "text": "a bear"})
    assert folder.captions(root, folder.images(root)).texts == {"Ba\u0308r.png": "a bear"}
    folder.add_captions(root, {"Ba\u0308r.png": "another"}, overwrite=True)
    assert rows(root / "metadata.jsonl") == [{"file_name": "B\u00e4r.png", **generated("another")}]


def test_rows_of_images_that_are_gone_are_named(root):
    put(root, "a.png")
    write(root / "metadata.jsonl", {"file_name": "gone.png", "text": "x"}, {"file_name": "../a.png", "text": "x"})
    found = folder.captions(root, ["a.png"])
    assert found.texts == {}
    assert [stray.where for stray in found.strays] == [
        "metadata.jsonl, line 1: there is no image gone.png",
        "metadata.jsonl, line 2: there is no image ../a.png",
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"file_name": "a.png", "text": "x"', "line 2: is not JSON"),
        (b"[1]", 'line 2: has no "file_name"'),
        (b'{"text": "x"}', 'line 2: has no "file_name"'),
        (b'{"file_name": 3}', 'line 2: has no "file_name"'),
        (b'{"file_name": "a.png", "text": 5}', 'line 2: "text" must be a text, got 5'),
        (b'{"file_name": "a.png", "Caption": ["x"]}', 'line 2: "Caption" must be a text'),
        (b'{"file_name": "a.png", "text": "x \\ud83d"}', "line 2: holds half a character"),
        (
            b'{"file_name": "a.png", "text": "x", "text": "y"}',
            'line 2: has the key "text" twice in one object .*keep one',
        ),
        (
            b'{"file_name": "a.png", "text": "x", "Text": "y"}',
            'line 2: has "text" twice, in small and capital letters;',
        ),
        (b'{"file_name": "./z.png"}', "line 2: z.png has a row on line 1 already"),
        (b'{"file_name": "a.png", "text": "B\xe4r"}', r"byte 56 is not UTF-8 \(0xe4\); save the file as UTF-8"),
    ],
)
def test_broken_metadata_is_named_with_the_line(root, line, reason):
    (root / "metadata.jsonl").write_bytes(b'{"file_name": "z.png"}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"metadata.jsonl(:|,) {reason}"):
        folder.captions(root, ["a.png"])


def test_sidecar_that_is_not_utf8(root):
    (root / "a.txt").write_bytes("ein Bär".encode("latin-1"))
    with pytest.raises(DataError, match=r"a.txt: byte 5 is not UTF-8 \(0xe4\)"):
        folder.captions(root, ["a.png"])


def test_sidecar_that_cannot_be_read(root, monkeypatch):
    (root / "a.txt").write_text("x")

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folder.Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"a.txt: can't be read \(Permission denied\)"):
        folder.captions(root, ["a.png"])


def test_other_metadata_is_refused_not_ignored(root):
    (root / "metadata.parquet").write_text("PAR1")
    with pytest.raises(
        DataError, match=r"metadata.parquet: captions are read from metadata.jsonl and metadata.csv only"
    ):
        folder.captions(root, ["a.png"])


def test_writing_keeps_what_the_user_put_there(root):
    put(root, "a.png", "b.png", "c.png", "d.png")
    kept = '{"file_name": "a.png",   "text": "mine", "rating": 5}'
    (root / "metadata.jsonl").write_text(f'{kept}\n\n{{"rating": 1, "file_name": "b.png", "text": null}}\n', "utf-8")
    folder.add_captions(root, {"a.png": "generated", "b.png": "ein Bär", "c.png": "new"}, overwrite=False)
    assert (root / "metadata.jsonl").read_text("utf-8").splitlines()[0] == kept, "an untouched row stays as it stands"
    assert rows(root / "metadata.jsonl")[1:] == [
        {"rating": 1, "file_name": "b.png", **generated("ein Bär")},
        {"file_name": "c.png", **generated("new")},
    ]
    folder.add_captions(root, {"a.png": "generated"}, overwrite=True)
    assert rows(root / "metadata.jsonl")[0] == {"file_name": "a.png", **generated("generated"), "rating": 5}
    assert sorted(path.suffix for path in root.iterdir()) == [".jsonl", *[".png"] * 4], "no temporary files stay"


def test_captions_go_to_the_nearest_metadata(root):
    put(root, "a.png", "sub/b.png", "sub/deep/c.png", "other/d.png")
    write(root / "sub/metadata.jsonl", {"file_name": "b.png", "text": "there"})
    folder.add_captions(root, {"sub/deep/c.png": "c", "other/d.png": "d"}, overwrite=False)
    assert rows(root / "sub/metadata.jsonl")[1] == {"file_name": "deep/c.png", **generated("c")}
    assert rows(root / "metadata.jsonl") == [{"file_name": "other/d.png", **generated("d")}]
    assert set(folder.captions(root, folder.images(root)).texts) == {"sub/b.png", "sub/deep/c.png", "other/d.png"}


def test_imagefolder_reads_what_is_written(tmp_path):
    import datasets

    put(tmp_path, "mine.png", "one.png", "sub/two.png")
    write(tmp_path / "metadata.jsonl", {"file_name": "mine.png", "text": "by me"})
    folder.add_captions(tmp_path, {"one.png": "first", "sub/two.png": "second"}, overwrite=False)
    table = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="train", streaming=True)
    assert sorted(row["text"] for row in table.cast_column("image", datasets.Image(decode=False))) == [
        "by me",
        "first",
        "second",
    ]


def test_a_folder_that_cannot_be_written_is_said_before_any_work(root, monkeypatch):
    put(root, "a.png")
    folder.check_writable(root, ["a.png"])

    def refuse(**options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(folder.tempfile, "TemporaryFile", refuse)
    with pytest.raises(
        DataError, match=r"captions can't be written .*metadata.jsonl \(Read-only file system\).*data.folder="
    ):
        folder.check_writable(root, ["a.png"])


def test_a_full_disk_loses_nothing(root, monkeypatch):
    put(root, "a.png")
    write(root / "metadata.jsonl", {"file_name": "z.png", "text": "mine"})
    before = (root / "metadata.jsonl").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match=r"No space left on device"):
        folder.add_captions(root, {"a.png": "new"}, overwrite=False)
    assert (root / "metadata.jsonl").read_bytes() == before
    assert len(list(root.iterdir())) == 2


def test_a_caption_without_end_is_not_read(tmp_path):
    (tmp_path / "a.png").touch()
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(1 << 34)
    with pytest.raises(DataError, match=r"a.txt: can't be read \(File too large\)"):
        folder.captions(tmp_path, ["a.png"])


def test_files_with_captions_are_those_that_are_read(root):
    put(root, "a.png", "deep/b.png")
    write(root / "deep" / "metadata.jsonl", {"file_name": "b.png", "text": "b"})
    for name in ("a.txt", "notes.txt", ".hidden.txt"):
        (root / name).write_text("a")
    assert {path.relative_to(root).as_posix() for path in folder.caption_files(root)} == {
        "a.txt",
        "deep/metadata.jsonl",
    }


def test_a_long_look_is_said_and_what_is_obviously_no_folder_of_images_refused(tmp_path, monkeypatch, capsys):
    home = tmp_path / "home"
    for name in ("project/src", "project/.git", ".cache/huge", "__pycache__"):
        (home / name).mkdir(parents=True)
        for number in range(30):
            (home / name / f"{number}.py").touch()
    monkeypatch.setattr(walk, "MOST_OTHERS", 20)
    monkeypatch.setattr(walk, "OTHERS_AN_IMAGE", 3)
    with pytest.raises(DataError, match=rf"{home} is no folder of images: 0 images among its first 2\d files and fold"):
        folder.images(home)
    put(home, *(f"{number}.png" for number in range(11)))  # one for three others is much
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.0)
    assert len(folder.images(home)) == 11
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"looking for images in {home} and below: ")


def test_what_stands_beside_images_does_not_count_against_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(walk, "MOST_OTHERS", 20)
    (tmp_path / "labels").mkdir()
    for number in range(40):
        (tmp_path / f"labels/{number}.txt").touch()
    put(tmp_path, "a.png")
    assert folder.images(tmp_path) == ["a.png"]


def test_a_folder_of_hidden_files_says_so(tmp_path):
    put(tmp_path, ".a.png")
    with pytest.raises(DataError, match=r"has nothing but what is hidden \(\.a\.png\); put images into it"):
        folder.images(tmp_path)
