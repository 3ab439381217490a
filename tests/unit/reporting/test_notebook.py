"""Records in a notebook: complete in themselves, escaped, and never an error because a file is gone."""

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from finetune.config.schema import Config
from finetune.planning.plan import Plan
from finetune.reporting.notebook import RENDERERS, html
from finetune.reporting.tables import MOST_MARKED
from finetune.reporting.thumbnails import data_uri, fitting
from finetune.run.records import Adapter, Answer, Answers, Caption, CaptionSet, Dataset, Report, Result, Sample, Samples
from tests.unit.reporting.records import parts, returned_records, run_record, text_set

EVIL = '<script>alert("1")</script>'


def captions(folder: Path) -> CaptionSet:
    Image.new("RGB", (300, 200), "red").save(folder / "a.png")
    items = (Caption("a.png", f"a red wall {EVIL}", "generated"), Caption("gone.png", "gone", "user"))
    return CaptionSet(str(folder), items, ("broken.png",))


def decoded(text: str) -> list[Image.Image]:
    found = re.findall(r"data:image/\w+;base64,([A-Za-z0-9+/=]+)", text)
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in found]


def test_every_record_that_a_command_returns_has_a_look() -> None:
    assert returned_records() >= {Plan, Result, CaptionSet, Report}
    assert set(RENDERERS) == {Config, *returned_records(), *parts(Result)}
    assert all(record._repr_html_ is draw for record, draw in RENDERERS.items())  # type: ignore[attr-defined]


def test_records_get_their_look_with_the_first_command() -> None:
    code = "import finetune; finetune.train; from finetune.run.records import Run; Run._repr_html_"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_captions_show_thumbnails_beside_texts(tmp_path: Path) -> None:
    shown = html(captions(tmp_path))
    assert [image.size for image in decoded(shown)] == [(128, 85)]
    assert "2 images, 1 captioned by the model, 1 by you, 1 unreadable and left out" in shown
    assert "gone.png can&#x27;t be shown" in shown or "gone.png can't be shown" in shown
    assert "<script" not in shown


def test_long_lists_are_cut_and_counted(tmp_path: Path) -> None:
    items = tuple(Caption(f"{number}.png", "text", "user") for number in range(75))
    assert "and 15 more in metadata.jsonl" in html(CaptionSet(str(tmp_path), items))


def test_dataset_shows_its_shapes() -> None:
    shown = html(Dataset("index", 36, 4, {"128x96": 40}, "empty", 3, 40, 0))
    for words in ("36", "40 of 128x96 pixels", "held out"):
        assert words in shown


def test_conversations_show_their_figures_and_what_is_trained() -> None:
    shown = html(text_set())
    for words in ("messages (recognised)", "180", "20,000", "5,000 (25.0%)", "88 packs, 97.0% filled, 25.0% with"):
        assert words in shown
    assert "assistant: <mark>ahoy&lt;/s&gt;</mark>" in shown
    for absent in ("cut off", "unusable"):
        assert absent not in shown
    shown = html(text_set(truncated_share=0.0123, bad=3, cached=True))
    for words in ("1.23%", "unusable rows", "found in the cache"):
        assert words in shown


@pytest.mark.parametrize(
    ("marked", "expected"),
    [
        ("a ⟧ b ⟦c ⟦ d⟧ e", "a ⟧ b <mark>c ⟦ d</mark> e"),
        ("⟦never closed", "<mark>never closed</mark>"),
        (f"⟦{EVIL}⟧", "<mark>&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;</mark>"),
        ("⟦" + "long " * MOST_MARKED + "⟧", "long long</mark> …"),
        ("nothing is trained", "nothing is trained"),
    ],
)
def test_any_text_may_stand_in_a_marked_row(marked: str, expected: str) -> None:
    shown = html(text_set(preview=marked))
    assert expected in re.sub(r"(long ?)+(?=</mark>)", "long long", shown)
    assert shown.count("<mark>") == shown.count("</mark>") <= 2, "one in the note"


def test_answers_stand_side_by_side(tmp_path: Path) -> None:
    items = (Answer(f"Who are you? {EVIL}", 0, "a helper\n  of sorts", "a pirate"), Answer("Be silent.", 0, "", EVIL))
    shown = html(Answers(str(tmp_path), str(tmp_path / "answers.md"), items))
    assert shown.index("Who are you?") < shown.index("a helper\n  of sorts") < shown.index("a pirate")
    assert shown.count("<th ") == 4, "base and tuned for each prompt, no seed"
    assert "<em>empty answer</em>" in shown
    assert "<script" not in shown
    again = [Answer("p", seed, f"base {seed}", f"tuned {seed}") for seed in range(70)]
    shown = html(Answers(str(tmp_path), str(tmp_path / "answers.md"), tuple(again)))
    assert ">seed</th>" in shown
    assert "tuned 59" in shown
    assert "and 10 more in answers.md" in shown


def test_run_shows_its_curve_and_figures(tmp_path: Path) -> None:
    lines = [{"step": step, "loss/step": 1 / step, "loss/smoothed": 1 / step} for step in (1, 2, 3)]
    broken = '{"step": 4, "loss/st'  # the process was killed here
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + broken)
    shown = html(run_record(tmp_path))
    assert "<svg" in shown
    for words in ("0.5000 → 0.2500", "0.4000 → 0.3000 (best at step 4)", "2.0 images/s", "1.50 GiB", "2.50%", "8.0 s"):
        assert words in shown


def test_a_run_on_conversations_counts_tokens(tmp_path: Path) -> None:
    shown = html(run_record(tmp_path, unit="tokens", items=56_960))
    for words in ("56,960 tokens (in 4 steps)", "7,120 tokens/s"):
        assert words in shown
    assert "image" not in shown


def test_run_without_curves_or_validation_still_shows(tmp_path: Path) -> None:
    run = run_record(tmp_path, first_validation=None, best_validation=None, best_step=None)
    assert "<svg" not in html(run)
    assert "validation" not in html(run)


def test_adapter_lists_files(tmp_path: Path) -> None:
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter.safetensors").write_bytes(b"0" * 2500)
    adapter = Adapter(str(tmp_path), {"peft": "peft", "ema": "ema.safetensors"}, {"peft": 1.25e-7}, "base", EVIL)
    shown = html(adapter)
    for words in ("2.5 KB", "1.2e-07", "average of the weights", "gone"):
        assert words in shown
    whole = Adapter(str(tmp_path), {"peft": "peft", "merged": "merged"}, {"peft": 0.0, "merged": 0.012}, "base", "")
    assert "1.2e-02 nats per token (KL)" in html(whole)
    assert "<script" not in shown


def test_samples_show_the_grid(tmp_path: Path) -> None:
    Image.new("RGB", (2400, 1200), "navy").save(tmp_path / "grid.png")
    samples = Samples(str(tmp_path), str(tmp_path / "grid.png"), (Sample("p", 0, "t.png", "b.png"),))
    assert [image.size for image in decoded(html(samples))] == [(1600, 800)]
    (tmp_path / "grid.png").write_bytes(b"not an image")
    assert "<em>" in html(samples)
    assert html(Samples("", "", ())) == html(Answers("", "", ())) == ""


def test_what_train_returns_shows_everything(tmp_path: Path) -> None:
    samples = Samples(str(tmp_path), str(tmp_path / "grid.png"), ())
    adapter = Adapter(str(tmp_path), {}, {}, "base", "toy")
    dataset = Dataset("index", 1, 0, {}, "empty")
    shown = html(Result(captions(tmp_path), dataset, run_record(tmp_path), adapter, samples, Report("r")))
    for words in ("16 images", "trigger phrase", "to train on"):
        assert words in shown
    answers = Answers(str(tmp_path), str(tmp_path / "answers.md"), (Answer("p", 0, "hello", "ahoy"),))
    shown = html(Result(None, text_set(), run_record(tmp_path, unit="tokens"), adapter, answers, Report("r")))
    for words in ("ahoy", "16 tokens", "rows to train on"):
        assert words in shown


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
    roomy, tight, least = (fitting(files, (256, 64), budget) for budget in (10_000_000, 40_000, 5000))
    assert decoded(str(roomy[files[0]]))[0].size == (256, 256)
    assert decoded(str(tight[files[0]]))[0].size == (64, 64)
    assert least == tight, "the smallest side there is"
