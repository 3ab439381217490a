"""Records in a notebook: complete in themselves, escaped, and never an error because a file is gone."""

import base64
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from finetune.reporting.tables import duration, file_size, rate
from finetune.reporting.texts import MOST_MARKED
from finetune.reporting.thumbnails import data_uri, fitting
from finetune.run.records import (
    Adapter,
    Answer,
    Answers,
    Caption,
    CaptionSet,
    Dataset,
    Report,
    Result,
    Run,
    Sample,
    Samples,
    TextSet,
)

EVIL = '<script>alert("1")</script>'


def run_record(folder: Path, **values: object) -> Run:
    facts = {
        "folder": str(folder),
        "checkpoint": str(folder / "checkpoints/step-000004"),
        "steps": 4,
        "trainable": 25,
        "total": 1000,
        "first_loss": 0.5,
        "last_loss": 0.25,
        "first_validation": 0.4,
        "best_validation": 0.3,
        "best_step": 4,
        "unit": "images",
        "items": 16,
        "seconds": 8.0,
        "peak_gib": 1.5,
        "skipped_steps": 0,
        "training_hash": "h",
    }
    return Run(**(facts | values))  # type: ignore[arg-type]


def captions(folder: Path) -> CaptionSet:
    Image.new("RGB", (300, 200), "red").save(folder / "a.png")
    items = (Caption("a.png", f"a red wall {EVIL}", "generated"), Caption("gone.png", "gone", "user"))
    return CaptionSet(str(folder), items, ("broken.png",))


def text_set(**values: object) -> TextSet:
    facts = {
        "rows": "cache/rows-1",
        "content": "c",
        "source": "chat.jsonl: messages (recognised)",
        "train": 180,
        "validation": 20,
        "tokens": 20_000,
        "trained": 5000,
        "truncated_share": 0.0,
        "packs": 88,
        "fill_share": 0.97,
        "trained_share": 0.25,
        "preview": "user: hi\nassistant: ⟦ahoy</s>⟧",
        "bad": 0,
        "cached": False,
    }
    return TextSet(**(facts | values))  # type: ignore[arg-type]


def decoded(html: str) -> list[Image.Image]:
    found = re.findall(r"data:image/\w+;base64,([A-Za-z0-9+/=]+)", html)
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in found]


def test_captions_show_thumbnails_beside_texts(tmp_path: Path) -> None:
    html = captions(tmp_path)._repr_html_()
    assert [image.size for image in decoded(html)] == [(96, 64)]
    assert "2 images" in html
    assert "gone.png can&#x27;t be shown" in html or "gone.png can't be shown" in html
    assert "<script" not in html


def test_long_lists_are_cut_and_counted(tmp_path: Path) -> None:
    items = tuple(Caption(f"{number}.png", "text", "user") for number in range(75))
    assert "and 15 more in metadata.jsonl" in CaptionSet(str(tmp_path), items)._repr_html_()


def test_dataset_shows_its_shapes() -> None:
    html = Dataset("index", 36, 4, {"128x96": 40}, "empty", 3, 40, 0)._repr_html_()
    for words in ("36", "40 of 128x96 pixels", "held out"):
        assert words in html


def test_conversations_show_their_figures_and_what_is_trained() -> None:
    html = text_set()._repr_html_()
    for words in ("messages (recognised)", "180", "20,000", "5,000 (25.0%)", "88 packs, 97.0% filled, 25.0% with"):
        assert words in html
    assert "assistant: <mark>ahoy&lt;/s&gt;</mark>" in html
    for absent in ("lost", "unusable"):
        assert absent not in html
    html = text_set(truncated_share=0.0123, bad=3, cached=True)._repr_html_()
    for words in ("1.23%", "unusable rows", "found in the cache"):
        assert words in html


@pytest.mark.parametrize(
    ("marked", "shown"),
    [
        ("a ⟧ b ⟦c ⟦ d⟧ e", "a ⟧ b <mark>c ⟦ d</mark> e"),
        ("⟦never closed", "<mark>never closed</mark>"),
        (f"⟦{EVIL}⟧", "<mark>&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;</mark>"),
        ("⟦" + "long " * MOST_MARKED + "⟧", "long long</mark> …"),
        ("nothing is trained", "nothing is trained"),
    ],
)
def test_any_text_may_stand_in_a_marked_row(marked: str, shown: str) -> None:
    html = text_set(preview=marked)._repr_html_()
    assert shown in re.sub(r"(long ?)+(?=</mark>)", "long long", html)
    assert html.count("<mark>") == html.count("</mark>") <= 1


def test_answers_stand_side_by_side(tmp_path: Path) -> None:
    items = (Answer(f"Who are you? {EVIL}", 0, "a helper\n  of sorts", "a pirate"), Answer("Be silent.", 0, "", EVIL))
    html = Answers(str(tmp_path), str(tmp_path / "answers.md"), items)._repr_html_()
    assert html.index("Who are you?") < html.index("a helper\n  of sorts") < html.index("a pirate")
    assert html.count("<th ") == 4, "base and tuned for each prompt, no seed"
    assert "<em>nothing</em>" in html
    assert "<script" not in html
    again = [Answer("p", seed, f"base {seed}", f"tuned {seed}") for seed in range(70)]
    html = Answers(str(tmp_path), str(tmp_path / "answers.md"), tuple(again))._repr_html_()
    assert ">seed</th>" in html
    assert "tuned 59" in html
    assert "and 10 more in answers.md" in html


def test_run_shows_its_curve_and_figures(tmp_path: Path) -> None:
    lines = [{"step": step, "loss/step": 1 / step, "loss/smoothed": 1 / step} for step in (1, 2, 3)]
    broken = '{"step": 4, "loss/st'  # the process was killed here
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + broken)
    html = run_record(tmp_path)._repr_html_()
    assert "<svg" in html
    for words in ("0.5000 → 0.2500", "0.4000 → 0.3000 (step 4)", "2.0 images/s", "1.50 GiB", "2.50%", "8.0 s"):
        assert words in html


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"micro_batch": 2, "effective": 8}, "2 × 4 accumulated = effective batch 8"),
        ({"micro_batch": 2, "effective": 8, "processes": 2}, "2 × 2 accumulated × 2 processes = effective batch 8"),
        ({"micro_batch": 2, "effective": 5}, "2 at most, effective batch 5"),
        ({"micro_batch": 2}, "2 at most"),
    ],
)
def test_a_run_says_how_its_steps_were_cut_up(tmp_path: Path, values: dict[str, int], words: str) -> None:
    assert f">{words}<" in run_record(tmp_path, **values)._repr_html_()


def test_a_run_on_conversations_counts_tokens(tmp_path: Path) -> None:
    html = run_record(tmp_path, unit="tokens", items=56_960)._repr_html_()
    for words in ("tokens seen", "56,960", "7,120 tokens/s"):
        assert words in html
    assert "image" not in html
    assert (rate(18.46), rate(99.96), rate(1234.5)) == ("18.5", "100.0", "1,234")


def test_run_without_curves_or_validation_still_shows(tmp_path: Path) -> None:
    html = run_record(
        tmp_path,
        first_validation=None,
        best_validation=None,
        best_step=None,
        skipped_steps=3,
        oom_fallbacks="micro-batch 1",
    )._repr_html_()
    assert "memory ran out; went on with" in html
    assert "<svg" not in html
    assert "validation" not in html
    assert "3 (loss or gradient not finite)" in html


def test_adapter_lists_files(tmp_path: Path) -> None:
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter.safetensors").write_bytes(b"0" * 2500)
    adapter = Adapter(str(tmp_path), {"peft": "peft", "ema": "ema.safetensors"}, {"peft": 1.25e-7}, "base", EVIL)
    html = adapter._repr_html_()
    for words in ("2.5 KB", "1.2e-07", "average of the weights", "gone"):
        assert words in html
    whole = Adapter(str(tmp_path), {"peft": "peft", "merged": "merged"}, {"peft": 0.0, "merged": 0.012}, "base", "")
    assert "1.2e-02 nats a token (KL)" in whole._repr_html_()
    assert "<script" not in html


def test_samples_show_the_grid(tmp_path: Path) -> None:
    Image.new("RGB", (2400, 1200), "navy").save(tmp_path / "grid.png")
    samples = Samples(str(tmp_path), str(tmp_path / "grid.png"), (Sample("p", 0, "t.png", "b.png"),))
    assert [image.size for image in decoded(samples._repr_html_())] == [(1600, 800)]
    (tmp_path / "grid.png").write_bytes(b"not an image")
    assert "<em>" in samples._repr_html_()
    assert Samples("", "", ())._repr_html_() == Answers("", "", ())._repr_html_() == ""


def test_what_train_returns_shows_everything(tmp_path: Path) -> None:
    samples = Samples(str(tmp_path), str(tmp_path / "grid.png"), ())
    adapter = Adapter(str(tmp_path), {}, {}, "base", "toy")
    dataset = Dataset("index", 1, 0, {}, "empty")
    html = Result(captions(tmp_path), dataset, run_record(tmp_path), adapter, samples, Report("r"))._repr_html_()
    for words in ("images seen", "trigger phrase", "to train on"):
        assert words in html
    answers = Answers(str(tmp_path), str(tmp_path / "answers.md"), (Answer("p", 0, "hello", "ahoy"),))
    html = Result(None, text_set(), run_record(tmp_path, unit="tokens"), adapter, answers, Report("r"))._repr_html_()
    for words in ("ahoy", "tokens seen", "rows to train on"):
        assert words in html


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1", "I;16", "F"])
def test_pictures_of_any_mode_become_small_and_opaque(tmp_path: Path, mode: str) -> None:
    file = tmp_path / "image.tif"
    Image.new(mode, (400, 200)).save(file)
    uri = data_uri(file, 50)
    assert uri is not None
    assert decoded(uri)[0].size == (50, 25)


def test_transparency_is_white_and_sixteen_bits_keep_their_brightness(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("I;16", (8, 8), 257 * 200).save(tmp_path / "deep.png")
    clear, deep = (decoded(str(data_uri(tmp_path / name, 50)))[0] for name in ("clear.png", "deep.png"))
    assert clear.getpixel((0, 0)) == (255, 255, 255)
    assert deep.getpixel((0, 0)) == (200, 200, 200)


def test_turned_pictures_are_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (200, 100)).save(tmp_path / "turned.jpg", exif=exif)
    assert decoded(str(data_uri(tmp_path / "turned.jpg", 50)))[0].size == (25, 50)


def test_pictures_share_a_budget(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.png" for number in range(4)]
    for file in files:
        Image.effect_noise((300, 300), 90).save(file)
    roomy, tight, none = (fitting(files, (256, 64), budget) for budget in (10_000_000, 40_000, 5000))
    assert decoded(str(roomy[files[0]]))[0].size == (256, 256)
    assert decoded(str(tight[files[0]]))[0].size == (64, 64)
    assert 0 < sum(uri is not None for uri in none.values()) < 4
    assert sum(len(uri) for uri in none.values() if uri) <= 5000


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_file_sizes(tmp_path: Path) -> None:
    assert file_size(tmp_path) == "gone"
    (tmp_path / "a").write_bytes(b"0" * 999)
    assert file_size(tmp_path) == "999 B"
    (tmp_path / "a").write_bytes(b"0" * 3_200_000)
    assert file_size(tmp_path / "a") == "3.2 MB"
