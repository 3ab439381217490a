"""The caption stage from end to end, with a tiny captioner."""

import json
import shutil
import time

import pytest
from PIL import Image

from finetune.config.schema import CaptionConfig, Config, DataConfig, Device, HardwareConfig
from finetune.diffusion.captioner import Blip
from finetune.errors import DataError, ModelError
from finetune.run.receipts import load_receipt
from finetune.run.records import CaptionSet
from finetune.stages import caption as stage
from finetune.stages.caption import caption, wording
from tests.tiny_models import save_captioner


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_captioner(tmp_path_factory.mktemp("captioner")))


@pytest.fixture
def config(tmp_path, model):
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    for index in range(5):
        name = f"{index}.png" if index < 4 else f"sub/{index}.png"
        Image.new("RGB", (30 + index, 40), (index * 50, 90, 200 - index * 40)).save(root / name)
    return Config(
        run_dir=str(tmp_path / "run"),
        data=DataConfig(folder=str(root), cache=str(tmp_path / "cache")),
        caption=CaptionConfig(model=model, batch=2, max_new_tokens=5, trigger="pixar style"),
        hardware=HardwareConfig(device=Device.cpu),
    )


@pytest.fixture
def no_captioner(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("the captioner was loaded")

    monkeypatch.setattr(stage, "load_captioner", refuse)


def metadata(config):
    path = stage.Path(config.data.folder) / "metadata.jsonl"
    return {row["file_name"]: row["text"] for row in map(json.loads, path.read_text("utf-8").splitlines())}


def write_rows(config, **texts):
    lines = [json.dumps({"file_name": f"{name}.png", "text": text}) for name, text in texts.items()]
    (stage.Path(config.data.folder) / "metadata.jsonl").write_text("\n".join(lines), "utf-8")


def test_only_images_without_a_caption_are_captioned(config):
    write_rows(config, **{"1": "my own words"})
    (stage.Path(config.data.folder) / "2.txt").write_text("from a sidecar")
    captions = caption(config)
    texts = {item.file: item.text for item in captions.items}
    sources = {item.file: item.source for item in captions.items}
    assert list(texts) == ["0.png", "1.png", "2.png", "3.png", "sub/4.png"]
    assert texts["1.png"] == "my own words"
    assert texts["2.png"] == "from a sidecar"
    assert sources == {f: "user" if f in ("1.png", "2.png") else "generated" for f in texts}
    assert all(texts[file].endswith("pixar style") for file in ("0.png", "3.png", "sub/4.png"))
    assert metadata(config) == {file: text for file, text in texts.items() if file != "2.png"}
    receipt = load_receipt(stage.Path(config.run_dir), "caption")
    assert receipt.figures["images"] == 5
    assert receipt.figures["generated"] == 3
    assert receipt.figures["images_per_s"] > 0


def test_a_second_run_is_skipped_and_loads_nothing(config, no_captioner, monkeypatch, capsys):
    monkeypatch.undo()
    first = caption(config)
    monkeypatch.setattr(stage, "load_captioner", None)
    assert caption(config) == first
    assert "caption: up to date, skipped" in capsys.readouterr().err
    # The same contents under another time are up to date too.
    for path in stage.Path(config.data.folder).rglob("*.png"):
        path.write_bytes(path.read_bytes())
    caption(config)
    assert "caption: up to date, skipped" in capsys.readouterr().err


def test_being_up_to_date_follows_images_captions_and_settings(config, model, capsys):
    first = caption(config)
    root = stage.Path(config.data.folder)

    def again():
        capsys.readouterr()
        captions = caption(config)
        assert "up to date" not in capsys.readouterr().err
        return captions

    rows = metadata(config) | {"0.png": "corrected by hand"}
    write_rows(config, **{name.removesuffix(".png"): text for name, text in rows.items()})
    corrected = again()
    assert [item.text for item in corrected.items] == ["corrected by hand", *(i.text for i in first.items[1:])]
    assert [item.source for item in corrected.items] == ["user", *["generated"] * 4]
    Image.new("RGB", (20, 20), "white").save(root / "new.png")
    assert len(again().items) == 6
    Image.new("RGB", (20, 20), "black").save(root / "0.png")
    assert again().items[0].text == "corrected by hand"
    config.caption.prefix = "an image of"
    assert again().items[0].text == "corrected by hand"


@pytest.mark.parametrize("name", ["2.txt", "metadata.csv"])
def test_what_a_person_writes_later_counts_before_a_generated_caption(config, capsys, name):
    first = caption(config)
    later = stage.Path(config.data.folder) / name
    head = "file_name,text\n2.png," if name == "metadata.csv" else ""
    later.write_text(head + "my own words\n")
    capsys.readouterr()
    items = caption(config).items
    assert (items[2].text, items[2].source) == ("my own words", "user")
    assert [item.text for item in items[:2]] == [item.text for item in first.items[:2]]
    assert "warning" not in capsys.readouterr().err
    assert metadata(config)["2.png"] == first.items[2].text  # nothing is deleted
    config.caption.overwrite = True
    assert caption(config).items[2].source == "generated"


def test_the_second_of_a_persons_two_captions_is_named(config, capsys):
    caption(config)
    rows = {name.removesuffix(".png"): text for name, text in metadata(config).items()}
    write_rows(config, **rows | {"2": "corrected by hand"})
    (stage.Path(config.data.folder) / "2.txt").write_text("my own words")
    capsys.readouterr()
    assert caption(config).items[2].text == "corrected by hand"
    said = capsys.readouterr().err
    assert "1 image with two captions, first 2.png: the one in metadata.jsonl is used, the one in 2.txt is not" in said


def test_a_file_beside_an_image_that_is_not_read_is_named(config, capsys):
    (stage.Path(config.data.folder) / "0.json").write_text("{}")
    assert caption(config).items[0].source == "generated"
    assert "warning: not read: 1 file beside images without a caption, first 0.json" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["0.TXT", "0.caption", "0.png.txt"])
def test_captions_beside_images_are_trained_whatever_they_are_called(config, name):
    (stage.Path(config.data.folder) / name).write_text("my own words")
    first = caption(config).items[0]
    assert (first.text, first.source) == ("my own words", "user")
    assert "0.png" not in metadata(config)


@pytest.mark.parametrize("row", ['{"file_name": "0.jpg", "text": "mine"}', '{"file_name": "0.png", "words": "mine"}'])
def test_texts_of_no_image_stop_before_captions_are_made(config, no_captioner, row):
    root = stage.Path(config.data.folder)
    (root / "metadata.jsonl").write_text(row, "utf-8")
    (root / "zero.txt").write_text("mine")
    with pytest.raises(DataError, match=r"5 images without a caption, and 2 texts for no image") as error:
        caption(config)
    assert "metadata.jsonl, line 1: " in str(error.value)
    assert "zero.txt: there is no image zero" in str(error.value)
    assert (root / "metadata.jsonl").read_text("utf-8") == row


def test_texts_of_no_image_stop_nothing_where_every_image_has_its_caption(config, no_captioner, capsys):
    write_rows(config, **dict.fromkeys(["0", "1", "2", "3", "sub/4"], "mine"))
    (stage.Path(config.data.folder) / "notes.txt").write_text("shopping")
    assert {item.text for item in caption(config).items} == {"mine"}
    assert "warning: 1 text for no image, first notes.txt: there is no image notes" in capsys.readouterr().err


def test_a_captioned_image_may_go_and_another_come(config):
    caption(config)
    root = stage.Path(config.data.folder)
    (root / "0.png").unlink()
    Image.new("RGB", (20, 20), "white").save(root / "new.png")
    config.run_dir += "2"
    assert {item.file for item in caption(config).items} == {"1.png", "2.png", "3.png", "new.png", "sub/4.png"}


def test_who_wrote_a_caption_is_remembered_over_runs_and_run_folders(config):
    write_rows(config, **{"1": "my own words"})
    (stage.Path(config.data.folder) / "2.txt").write_text("from a sidecar")
    first = caption(config)
    assert [item.source for item in first.items] == ["generated", "user", "user", "generated", "generated"]
    config.caption.prefix = "other settings"
    assert caption(config).items == first.items
    shutil.rmtree(stage.Path(config.run_dir))
    assert caption(config).items == first.items
    config.run_dir += "2"
    assert caption(config).items == first.items
    write_rows(config, **{name.removesuffix(".png"): text for name, text in metadata(config).items()} | {"3": "mine"})
    config.run_dir += "3"
    assert [item.source for item in caption(config).items] == ["generated", "user", "user", "user", "generated"]


def test_who_wrote_a_caption_stands_beside_it(config):
    write_rows(config, **{"1": "my own words"})
    first = caption(config)
    root = stage.Path(config.data.folder)
    for gone in (config.run_dir, config.data.cache):
        shutil.rmtree(gone)
    assert caption(config).items == first.items
    rows = (root / "metadata.jsonl").read_text("utf-8").splitlines()
    rows[1] = rows[1].replace(metadata(config)["0.png"], "corrected by me")
    (root / "metadata.jsonl").write_text("\n".join(rows), "utf-8")
    (root / "2.txt").write_text("mine beside it")
    for gone in (config.run_dir, config.data.cache):
        shutil.rmtree(gone)
    items = {item.file: (item.text, item.source) for item in caption(config).items}
    assert items["0.png"] == ("corrected by me", "user")
    assert items["1.png"] == ("my own words", "user")
    assert items["2.png"] == ("mine beside it", "user"), "it counts before the captioner's"
    assert items["3.png"][1] == items["sub/4.png"][1] == "generated"


def test_a_cache_that_cannot_be_written_stops_no_caption(config, tmp_path):
    (tmp_path / "file").write_text("no folder")
    config.data.cache = str(tmp_path / "file")
    first = caption(config)
    assert {item.source for item in first.items} == {"generated"}
    config.caption.prefix = "other settings"
    assert caption(config).items == first.items, "the run's own record knows too"


def test_linked_folders_are_not_left_out_in_silence(config, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (stage.Path(config.data.folder) / "linked").symlink_to(tmp_path / "elsewhere")
    caption(config)
    assert "left out 1 linked folder, first linked" in capsys.readouterr().err


def test_nothing_to_caption_loads_no_captioner(config, no_captioner):
    for name in ("0", "1", "2", "3", "sub/4"):
        (stage.Path(config.data.folder) / f"{name}.txt").write_text("mine")
    config.caption.model = "/gone"
    captions = caption(config)
    assert {item.source for item in captions.items} == {"user"}
    assert not (stage.Path(config.data.folder) / "metadata.jsonl").exists()


def test_a_kill_loses_one_batch_at_most(config, monkeypatch):
    calls = []

    class Dying(Blip):
        def caption(self, images):
            images = list(images)
            calls.append(len(images))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return super().caption(images)

    monkeypatch.setattr(stage, "load_captioner", Dying)
    with pytest.raises(KeyboardInterrupt):
        caption(config)
    kept = metadata(config)
    assert set(kept) == {"0.png", "1.png"}
    captions = caption(config)
    assert calls == [2, 2, 2, 1], "only the three that were left"
    assert {item.file: item.text for item in captions.items}.items() >= kept.items()


@pytest.fixture
def large(config, monkeypatch):
    """Sixty images, in a folder whose metadata takes as many seconds to write as it has rows; a batch takes one."""
    root, clock, rows = stage.Path(config.data.folder), [0.0], []
    for index in range(60):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(root / f"more-{index:02}.png")
    write = stage.folder.add_captions

    def slow(folder, texts, *, overwrite):
        write(folder, texts, overwrite=overwrite)
        rows.append(len(metadata(config)))
        clock[0] += rows[-1]

    class Quick(Blip):
        def caption(self, images):
            clock[0] += 1.0
            return super().caption(images)

    monkeypatch.setattr(stage.folder, "add_captions", slow)
    monkeypatch.setattr(stage.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(stage, "load_captioner", Quick)
    monkeypatch.setattr(stage, "APART", 2.0)
    return rows


def test_metadata_of_a_large_folder_is_not_written_for_each_batch(config, large):
    captions = caption(config)
    assert len(metadata(config)) == len(captions.items) == 65
    assert sum(large) < 3 * 65  # for each of the 33 batches it would be a thousand


def test_an_interrupt_loses_no_caption_that_waits_to_be_written(config, large, monkeypatch):
    batches, remember = [], stage.authors.remember

    def interrupted(cache, worded):
        remember(cache, worded)
        batches.append(len(worded))

    monkeypatch.setattr(stage.authors, "remember", interrupted)
    monkeypatch.setattr(stage, "wording", lambda text, settings: text if len(batches) < 9 else int("no number"))
    with pytest.raises(ValueError, match="no number"):
        caption(config)
    assert len(metadata(config)) == sum(batches) == 18
    assert len(large) < 9


def test_a_caption_typed_meanwhile_is_kept(config, monkeypatch):
    class Slow(Blip):
        def caption(self, images):
            if not (stage.Path(config.data.folder) / "metadata.jsonl").exists():
                write_rows(config, **{"0": "typed meanwhile"})
            return super().caption(images)

    monkeypatch.setattr(stage, "load_captioner", Slow)
    first = caption(config).items[0]
    assert (first.text, first.source) == ("typed meanwhile", "user")


def test_a_text_file_that_comes_meanwhile_counts(config, monkeypatch):
    class Slow(Blip):
        def caption(self, images):
            (stage.Path(config.data.folder) / "0.txt").write_text("typed meanwhile")
            return super().caption(images)

    monkeypatch.setattr(stage, "load_captioner", Slow)
    assert caption(config).items[0].text == "typed meanwhile"


def test_captions_by_a_person_are_copied_before_they_are_overwritten(config, capsys):
    write_rows(config, **{"1": "my own words"})
    file = stage.Path(config.data.folder, "metadata.jsonl")
    before = file.read_text()
    config.caption.overwrite = True
    caption(config)
    copied = file.with_name("before-overwrite-metadata-1.jsonl")
    assert copied.read_text() == before
    assert str(copied) in capsys.readouterr().err
    assert "my own words" not in file.read_text()
    config.caption.trigger = "another"
    caption(config)  # replaces the captioner's words alone
    assert len(list(file.parent.glob("before-overwrite-*"))) == 1


def test_overwrite_captions_all_again_once(config, capsys):
    write_rows(config, **{"1": "my own words"})
    config.caption.overwrite = True
    captions = caption(config)
    assert {item.source for item in captions.items} == {"generated"}
    assert "my own words" not in metadata(config).values()
    caption(config)
    assert "caption: up to date, skipped" in capsys.readouterr().err


def test_a_captioner_without_words_leaves_the_caption_empty(config, monkeypatch, capsys):
    class Silent(Blip):
        def caption(self, images):
            return [""] * len(list(images))

    monkeypatch.setattr(stage, "load_captioner", Silent)
    config.caption.trigger = ""
    captions = caption(config)
    assert [(item.text, item.source) for item in captions.items] == [("", "generated")] * 5
    assert caption(config) == captions
    assert "caption: up to date, skipped" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prefix", "trigger", "text", "expected"),
    [
        ("", "", "a cat", "a cat"),
        ("", "pixar style", "a cat", "a cat, pixar style"),
        ("", "pixar style", "a cat in Pixar Style", "a cat in Pixar Style"),
        ("an image of", "pixar style", "a cat", "an image of a cat, pixar style"),
        ("pixar style, ", " pixar style ", "a cat", "pixar style, a cat"),
        ("", "pixar style", "", "pixar style"),
    ],
)
def test_wording(prefix, trigger, text, expected):
    assert wording(text, CaptionConfig(prefix=prefix, trigger=trigger)) == expected


def spoil(config):
    root = stage.Path(config.data.folder)
    (root / "0.png").write_bytes(b"")
    (root / "2.png").write_bytes((root / "2.png").read_bytes()[:60])


def test_all_bad_images_are_named_before_any_work(config, no_captioner):
    spoil(config)
    with pytest.raises(DataError, match=r"2 unreadable images; fix") as error:
        caption(config)
    assert "0.png: is empty" in str(error.value)
    assert "2.png: is" in str(error.value)
    assert "data.skip_bad=true" in str(error.value)


def test_bad_images_are_left_out_if_the_recipe_says_so(config, capsys):
    spoil(config)
    (stage.Path(config.data.folder) / "2.txt").write_text("the caption of a bad image")
    config.data.skip_bad = True
    captions = caption(config)
    assert [item.file for item in captions.items] == ["1.png", "3.png", "sub/4.png"]
    assert captions.skipped == ("0.png", "2.png")
    assert capsys.readouterr().err.count("warning: left out") == 2
    assert caption(config) == captions
    assert "caption: up to date, skipped" in capsys.readouterr().err
    assert load_receipt(stage.Path(config.run_dir), "caption").figures["skipped"] == 2


def test_all_images_bad(config):
    config.data.skip_bad = True
    for path in stage.Path(config.data.folder).rglob("*.png"):
        path.write_bytes(b"x")
    with pytest.raises(DataError, match=r"has no readable image left"):
        caption(config)


def test_a_folder_that_cannot_be_written_is_said_first(config, no_captioner, monkeypatch):
    def refuse(**options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(stage.folder.tempfile, "TemporaryFile", refuse)
    with pytest.raises(DataError, match=r"Read-only file system"):
        caption(config)


def test_unreadable_formats_are_mentioned(config, capsys):
    (stage.Path(config.data.folder) / "phone.heic").write_bytes(b"x")
    caption(config)
    assert (
        "warning: left out 1 image in formats that can't be read, first phone.heic; save such images as JPEG"
        in capsys.readouterr().err
    )


def test_missing_captioner_is_said_quickly(config):
    config.caption.model = "embedded:nobody"
    start = time.monotonic()
    with pytest.raises(ModelError, match=r"there is no embedded:nobody"):
        caption(config)
    assert time.monotonic() - start < 5


def test_the_record_survives_its_receipt(config):
    first = caption(config)
    assert isinstance(first, CaptionSet)
    assert caption(config) == first


def test_captions_in_a_csv_are_trained_and_stay(config, monkeypatch):
    table = stage.Path(config.data.folder) / "metadata.csv"
    table.write_text("file_name,text\n0.png,my own words\n1.png,\n", "utf-8")
    captions = caption(config)
    assert [item.source for item in captions.items] == ["user", *["generated"] * 4]
    assert captions.items[0].text == "my own words"
    assert sorted(metadata(config)) == ["1.png", "2.png", "3.png", "sub/4.png"]
    assert table.read_text("utf-8") == "file_name,text\n0.png,my own words\n1.png,\n"
    table.write_text("file_name,text\n0.png,my own words\n1.png,corrected here\n", "utf-8")
    assert caption(config).items[1].text == "corrected here"
    monkeypatch.setattr(config.caption, "overwrite", True)
    assert caption(config).items[0].source == "generated"
    assert "my own words" in table.read_text("utf-8")
