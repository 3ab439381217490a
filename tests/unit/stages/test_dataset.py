"""The dataset stage and what it builds, with a tiny Stable Diffusion."""

import dataclasses
import json
import os
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from finetune import kinds
from finetune.config.schema import CaptionConfig, Config, DataConfig, Device, HardwareConfig, ModelConfig
from finetune.data.cache import read
from finetune.data.images import decode, folder
from finetune.diffusion import encode
from finetune.diffusion.encode import Path, hold_out
from finetune.diffusion.pipeline import TextEncoder, Vae
from finetune.errors import DataError
from finetune.run.receipts import load_receipt
from finetune.run.records import Caption, CaptionSet
from finetune.stages.dataset import dataset
from tests.tiny_models import save_diffusion

pytestmark = pytest.mark.sampled
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_diffusion(tmp_path_factory.mktemp("base") / "tiny"))


SIZES = [(64, 64), (90, 60), (60, 90), (33, 40), (100, 100)]


@pytest.fixture
def config(tmp_path, base):
    (tmp_path / "images").mkdir()
    for index, size in enumerate(SIZES):
        image(tmp_path / "images" / f"{index}.png", size, index)
    return Config(
        run_dir=str(tmp_path / "run"),
        model=ModelConfig(base=base, resolution=32, bucket_step=8),
        data=DataConfig(folder=str(tmp_path / "images"), cache=str(tmp_path / "cache")),
        caption=CaptionConfig(trigger="toy"),
        hardware=HardwareConfig(device=Device.cpu),
    )


def image(path, size, seed):
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def captions(config, **texts):
    files = sorted(path.name for path in Path(config.data.folder).iterdir())
    items = tuple(Caption(file, texts.get(f"_{file[:-4]}", f"image {file}, toy"), "user") for file in files)
    return CaptionSet(config.data.folder, items)


@pytest.fixture
def loads(monkeypatch):
    """Counts how often each encoder is loaded and what it is given."""
    counted = Counter()

    def counting(name, load):
        def loading(*arguments):
            counted[name] += 1
            encoder = load(*arguments)
            encode = encoder.encode
            encoder.encode = lambda batch: counted.update({f"{name} encoded": len(batch)}) or encode(batch)
            return encoder

        return loading

    monkeypatch.setattr(encode, "TextEncoder", counting("text", TextEncoder))
    monkeypatch.setattr(encode, "Vae", counting("vae", Vae))
    return counted


@pytest.mark.parametrize("flip", [False, True])
def test_the_cache_is_planned_as_large_as_it_gets(config, flip):
    config.data.flip, config.lora.targets = flip, "attention"
    config.model.lora_targets = {"attention": ["to_q"]}
    workload = kinds.of(config).workload(config)
    memory_model = workload.build(config.model, torch.float32, False, 1e9)
    dataset(config, captions(config))
    entries = [load_file(file) for file in Path(config.data.cache).rglob("*/*.safetensors")]
    size = sum(tensor.nbytes for entry in entries for tensor in entry.values())
    assert 0.6 * size < workload.examples.cached * memory_model.entry_bytes < 1.8 * size  # a caption counts twice


def test_every_image_with_its_own_caption_latents_and_bucket(config, base):
    """The error to guard against: latents of one image trained with the caption of another."""
    record = dataset(config, captions(config))
    found = list(record.examples())
    assert [example.file for example in found] == [f"{index}.png" for index in range(5)]
    assert (record.train, record.validation) == (5, 0)
    encoder, vae = TextEncoder(config.model, CPU), Vae(config.model, CPU)
    for example, size in zip(found, SIZES, strict=True):
        image, crop = decode.resize_and_crop(
            decode.open_rgb(Path(config.data.folder) / example.file, 10**6), example.bucket
        )
        assert example.crop == crop
        assert example.caption == f"image {example.file}, toy"
        expected = vae.encode(encode.pixels(image)[None])[0]
        stored = read(Path(example.latents))
        assert set(stored) == {"mean", "std"}
        assert stored["mean"].shape == (4, example.bucket[1] // 4, example.bucket[0] // 4)
        assert all(torch.allclose(stored[name], expected[name], atol=1e-5) for name in expected)
        assert torch.allclose(
            read(Path(example.text))["embedding"], encoder.encode([example.caption])[0]["embedding"], atol=1e-5
        )
        assert (example.bucket[0] > example.bucket[1]) == (size[0] > size[1])
    assert torch.allclose(read(Path(record.empty_text))["embedding"], encoder.encode([""])[0]["embedding"], atol=1e-5)
    assert record.buckets == dict(Counter(f"{e.bucket[0]}x{e.bucket[1]}" for e in found))
    figures = load_receipt(Path(config.run_dir), "dataset").figures
    assert figures["train"] == 5
    assert figures["encoded"] == 5 + 6
    assert figures["examples_per_s"] > 0


def test_a_second_run_is_skipped_and_a_deleted_cache_is_made_again(config, loads, capsys):
    first = dataset(config, captions(config))
    assert loads == {"text": 1, "vae": 1, "text encoded": 6, "vae encoded": 5}
    assert dataset(config, captions(config)) == first
    assert "dataset: up to date, skipped" in capsys.readouterr().err
    shutil.rmtree(config.data.cache)
    again = dataset(config, captions(config))
    assert again.encoded == first.encoded
    Path(again.index).unlink()
    assert dataset(config, captions(config)).cached == first.encoded, "the index alone needs no encoder"
    assert loads["vae"] == 2


def test_only_what_changed_is_encoded(config, loads):
    dataset(config, captions(config))
    loads.clear()
    dataset(config, captions(config, _1="a new caption, toy"))
    assert loads == {"text": 1, "text encoded": 1}
    loads.clear()
    image(Path(config.data.folder) / "2.png", (60, 90), 77)
    dataset(config, captions(config))
    assert loads == {"vae": 1, "vae encoded": 1}
    loads.clear()
    (Path(config.data.folder) / "0.png").rename(Path(config.data.folder) / "renamed.png")
    os.utime(Path(config.data.folder) / "1.png", (1, 1))
    record = dataset(config, captions(config, _renamed="image 0.png, toy"))
    assert loads == {}, "names and times are no content"
    assert [example.file for example in record.examples()][-1] == "renamed.png"
    config.model.resolution = 40
    dataset(config, captions(config))
    assert loads["vae encoded"] == 5


def test_another_run_shares_the_cache_and_another_model_does_not(config, loads, tmp_path):
    first = dataset(config, captions(config))
    config.run_dir = str(tmp_path / "other")
    second = dataset(config, captions(config))
    assert second.encoded == 0
    assert [e.latents for e in first.examples()] == [e.latents for e in second.examples()]
    config.model.base = str(save_diffusion(tmp_path / "retrained", seed=1))
    third = dataset(config, captions(config))
    assert third.encoded == first.encoded
    assert [e.key for e in first.examples()] == [e.key for e in third.examples()], (
        "noise does not depend on the encoder"
    )


def test_entries_of_another_version_of_the_decoding_are_not_used(config, loads, monkeypatch):
    first = dataset(config, captions(config))
    monkeypatch.setattr(encode, "MADE_BY", encode.MADE_BY + 1)
    config.data.max_aspect += 0.5  # the stage is not up to date
    second = dataset(config, captions(config))
    assert loads["vae encoded"] == 2 * len(SIZES)
    assert [e.key for e in first.examples()] == [e.key for e in second.examples()], "the noise stays the same"


@pytest.mark.parametrize("damage", [lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: b""])
@pytest.mark.parametrize("part", ["latents", "text"])
def test_an_entry_that_is_damaged_under_an_up_to_date_dataset_is_made_again(config, loads, damage, part):
    entry = Path(getattr(next(dataset(config, captions(config)).examples()), part))
    whole = entry.read_bytes()
    loads.clear()
    entry.write_bytes(damage(whole))
    dataset(config, captions(config))
    assert loads == ({"vae": 1, "vae encoded": 1} if part == "latents" else {"text": 1, "text encoded": 1})
    assert entry.read_bytes() == whole


def test_an_entry_does_not_depend_on_what_else_is_encoded(config):
    """As after a kill while encoding, and in a cache that other runs have filled in part."""

    def entries():
        found = dataset(config, captions(config)).examples()
        return {path: Path(path).read_bytes() for example in found for path in (example.latents, example.text)}

    many(config, 8)
    whole = entries()
    for path in sorted(whole)[::3]:
        Path(path).unlink()
    assert entries() == whole
    for path in Path(config.data.folder).glob("m[1-7].png"):
        path.unlink()
    shutil.rmtree(config.data.cache)
    assert entries().items() <= whole.items()


def test_an_image_that_changes_before_it_is_encoded_is_not_stored_as_the_old_one(config, monkeypatch):
    read_images = encode.read_images

    def changing(*arguments):
        found = read_images(*arguments)
        image(Path(config.data.folder) / "3.png", SIZES[3], 99)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(encode, "read_images", changing)
        with pytest.raises(DataError, match=r"3.png: was changed while it was prepared; run the same command again"):
            dataset(config, captions(config))
    assert len(list(dataset(config, captions(config)).examples())) == len(SIZES)


def test_a_damaged_entry_is_made_again(config, loads):
    record = dataset(config, captions(config))
    loads.clear()
    latents = Path(next(record.examples()).latents)
    whole = {name: tensor.clone() for name, tensor in read(latents).items()}
    latents.write_bytes(latents.read_bytes()[:-3])
    Path(record.index).unlink()
    dataset(config, captions(config))
    assert loads == {"vae": 1, "vae encoded": 1}
    assert all(torch.allclose(tensor, whole[name], atol=1e-5) for name, tensor in read(latents).items())


def test_flipping_adds_the_mirrored_image(config, base):
    config.data.flip = True
    found = list(dataset(config, captions(config)).examples())
    assert [(e.file, e.flipped) for e in found[:4]] == [
        ("0.png", False),
        ("0.png", True),
        ("1.png", False),
        ("1.png", True),
    ]
    assert len({example.key for example in found}) == 10
    image, _ = decode.resize_and_crop(decode.open_rgb(Path(config.data.folder) / "0.png", 10**6), found[0].bucket)
    mirrored = encode.pixels(image).flip(-1)
    expected = Vae(config.model, CPU).encode(mirrored[None])[0]["mean"]
    assert torch.allclose(read(Path(found[1].latents))["mean"], expected, atol=1e-5)


def many(config, count):
    for index in range(count):
        image(Path(config.data.folder) / f"m{index}.png", (40, 40), 100 + index)


def test_a_held_out_image_is_never_trained_on(config):
    many(config, 20)
    for index in range(3):  # the same bytes under other names
        shutil.copy(Path(config.data.folder) / f"m{index}.png", Path(config.data.folder) / f"copy{index}.png")
    config.data.flip, config.data.validation_share = True, 0.25
    record = dataset(config, captions(config))
    found = list(record.examples())
    content = {e.file: (Path(config.data.folder) / e.file).read_bytes() for e in found}
    held, trained = ({content[e.file] for e in found if e.held_out is side} for side in (True, False))
    assert held
    assert not held & trained
    assert not any(example.flipped for example in found if example.held_out)
    assert record.validation == len([e for e in found if e.held_out]) == round(0.25 * 28)
    assert record.train == 2 * (28 - record.validation)


def test_holding_out_is_by_content_and_stable():
    hashes = [f"{index:064x}" for index in range(100)]
    chosen = hold_out(hashes, 0.1)
    assert len(chosen) == 10
    assert hold_out(hashes[::-1], 0.1) == chosen
    more = hold_out([*hashes, *(f"{index:064x}" for index in range(100, 110))], 0.1)
    assert len(chosen & more) >= 8
    assert hold_out(hashes[:19], 0.5) == set()
    assert len(hold_out(hashes[:20], 0.1)) == 2
    assert hold_out(hashes, 0.0) == set()
    assert len(set(hashes[:20]) - hold_out(hashes[:20], 0.99)) >= 2
    assert hold_out([hashes[0]] * 30, 0.5) == set()
    assert len(hold_out([hashes[0]] * 28 + hashes[1:3], 0.5)) <= 1


def test_one_image_works_with_a_warning(config, capsys):
    for index in range(1, 5):
        (Path(config.data.folder) / f"{index}.png").unlink()
    record = dataset(config, captions(config))
    assert (record.train, record.validation) == (1, 0)
    assert "warning: only one image" in capsys.readouterr().err


def test_a_long_caption_is_warned_about_every_time(config, capsys):
    long = captions(config, _3="toy " + "abcdefghij " * 30 + "the end")
    dataset(config, long)
    first = capsys.readouterr().err
    assert re.search(r"warning: the caption of 3.png is truncated: \d+ words dropped: ", first)
    assert "e n d" in first or "the end" in first
    config.data.flip = True  # not up to date, and its captions are in the cache
    dataset(config, long)
    assert "the caption of 3.png is truncated" in capsys.readouterr().err


def test_missing_triggers_and_enlarged_images_are_counted(config, capsys):
    record = dataset(config, captions(config, _1="no phrase", _2="TOY"))
    errors = capsys.readouterr().err
    assert "warning: no trigger phrase 'toy' in 1 of 5 captions, first 1.png" in errors
    assert "learnt without it; add it to them in metadata.jsonl" in errors
    assert "enlarged" not in errors
    image(Path(config.data.folder) / "tiny.png", (10, 12), 5)
    record = dataset(config, captions(config))
    assert record.upscaled == 1
    assert "warning: smaller than the bucket and enlarged: 1 of 6 images, first tiny.png" in capsys.readouterr().err


def test_the_warning_about_triggers_names_the_file_and_ends_when_it_is_obeyed(config, capsys):
    root = Path(config.data.folder)
    for number in range(5):
        (root / f"{number}.txt").write_text("a toy" if number < 3 else "no phrase")
    texts = folder.captions(root, folder.images(root)).texts
    dataset(config, CaptionSet(str(root), tuple(Caption(file, text, "user") for file, text in texts.items())))
    assert "2 of 5 captions, first 3.png" in (said := capsys.readouterr().err)
    assert "add it to them in 3.txt and 1 other file" in said
    for number in (3, 4):
        (root / f"{number}.txt").write_text("no phrase, toy")
    found = folder.captions(root, folder.images(root))
    items = tuple(Caption(file, text, "user") for file, text in found.texts.items())
    dataset(config, CaptionSet(str(root), items))
    assert "warning" not in capsys.readouterr().err
    assert not found.unused
    assert not found.strays


def test_copies_of_an_image_are_said(config, capsys):
    dataset(config, captions(config))
    assert "more than once" not in capsys.readouterr().err
    root = Path(config.data.folder)
    (root / "copy.png").write_bytes((root / "1.png").read_bytes())
    assert dataset(config, captions(config)).train == 6
    assert "warning: more than once: 1 image, copy.png is 1.png; " in capsys.readouterr().err


def test_how_much_is_cut_away_is_said_where_it_is_much(config, capsys):
    dataset(config, captions(config))
    assert "cut away" not in capsys.readouterr().err
    image(Path(config.data.folder) / "long.png", (3000, 60), 5)
    dataset(config, captions(config))
    assert re.search(r"more than half is cut away: 1 of 6 images, most of long.png \(9\d%\)", capsys.readouterr().err)


def test_repeats_of_kohyas_folders_are_said_where_they_differ(config, capsys):
    root = Path(config.data.folder)
    for number, inner in enumerate(("10_toy style", "2024_05", "10_other/in")):
        (root / inner).mkdir(parents=True)
        (root / f"{number}.png").rename(root / inner / f"{number}.png")

    def said():
        files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
        dataset(config, CaptionSet(config.data.folder, tuple(Caption(file, "toy", "user") for file in files)))
        return "repeats of 2 and 10, as of kohya's scripts, which are not read" in capsys.readouterr().err

    assert not said()
    (root / "2_few").mkdir()
    (root / "3.png").rename(root / "2_few" / "3.png")
    assert said()


def test_inks_without_a_profile_are_said_every_time(config, capsys):
    Image.new("CMYK", (64, 64), (10, 200, 30, 40)).save(Path(config.data.folder) / "0.png", format="JPEG")
    for trigger in ("toy", "other"):  # two commands with something to do
        config.caption.trigger = trigger
        dataset(config, captions(config))
        assert "warning: CMYK without a colour profile: 1 of 5 images, first 0.png" in capsys.readouterr().err


def test_animations_are_said(config, capsys):
    frames = [Image.new("RGB", (64, 64), (shade, 0, 0)) for shade in (0, 90, 200)]
    frames[0].save(Path(config.data.folder) / "0.png", format="GIF", save_all=True, append_images=frames[1:])
    dataset(config, captions(config))
    assert "warning: only the first frame is trained: 1 of 5 images, first 0.png" in capsys.readouterr().err


def test_bad_images_are_all_named_or_skipped(config, loads):
    listed = captions(config)
    root = Path(config.data.folder)
    (root / "0.png").write_bytes(b"")
    (root / "4.png").write_bytes((root / "4.png").read_bytes()[:3000])
    with pytest.raises(DataError, match=r"2 unreadable images") as error:
        dataset(config, listed)
    assert "0.png: is empty" in str(error.value)
    assert "4.png: is" in str(error.value)
    assert not loads, "nothing was encoded before"
    config.data.skip_bad = True
    assert [e.file for e in dataset(config, listed).examples()] == ["1.png", "2.png", "3.png"]
    for path in root.iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"has no readable image with a caption"):
        dataset(config, listed)


def test_the_index_is_plain_lines_sorted_by_file(config):
    listed = captions(config)
    record = dataset(config, dataclasses.replace(listed, items=listed.items[::-1]))
    lines = [json.loads(line) for line in Path(record.index).read_text("utf-8").splitlines()]
    assert [line["file"] for line in lines] == sorted(line["file"] for line in lines)
    assert Path(record.index).parent == Path(config.run_dir)


def test_pixels_are_in_minus_one_to_one():
    image = Image.new("RGB", (5, 3), (255, 0, 0))
    pixels_3HW = encode.pixels(image)
    assert pixels_3HW.shape == (3, 3, 5)
    assert pixels_3HW[0].eq(1).all()
    assert pixels_3HW[1:].eq(-1).all()


def test_conversations_in_a_file_whose_name_is_not_utf8(language_config):
    file = Path(language_config.data.file)
    language_config.data.file = str(file.rename(file.with_name(os.fsdecode(b"B\xe4r.jsonl"))))
    assert "B\\udce4r.jsonl: " in dataset(language_config, None).source
