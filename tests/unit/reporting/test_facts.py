"""Facts: the same labels, numbers and words wherever a record is shown."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.planning.plan import Plan, Setting
from finetune.reporting.facts import (
    caption_counts,
    difference,
    duration,
    file_size,
    plan_tables,
    rate,
    run_facts,
    text_set_facts,
    update_scale,
)
from finetune.run.records import Caption, CaptionSet, Dataset
from finetune.run.room import Need
from tests.unit.reporting.records import run_record, text_set


def texts(folder: Path, *, held_out: bool = True, **values: object) -> dict[str, str]:
    dataset = None if held_out else Dataset("index", 0, 0, {}, "")
    return {fact.label: fact.text for fact in run_facts(run_record(folder, **values), dataset)}


def test_a_run_says_what_it_did_and_took(tmp_path: Path) -> None:
    assert texts(tmp_path, micro_batch=2, effective=4) == {
        "trained on": "16 images (in 4 steps)",
        "effective batch": "4 (2 × 2 accumulated)",
        "loss": "0.5000 → 0.2500 (first step → end, smoothed)",
        "validation loss": "0.4000 → 0.3000 (best at step 4)",
        "trained parameters": "25 (2.50% of 1,000)",
        "training time": "8.0 s",
        "speed": "2.0 images/s",
        "peak memory": "1.50 GiB",
    }


@pytest.mark.parametrize(
    ("values", "label", "text"),
    [
        ({"micro_batch": 2, "effective": 8, "processes": 2}, "effective batch", "8 (2 × 2 accumulated, 2 processes)"),
        ({"micro_batch": 2, "effective": 5}, "effective batch", "5 (micro-batch 2 at most)"),
        ({"best_step": None}, "validation loss", "0.4000 → 0.3000"),
        ({"held_out": False}, "validation loss", "0.4000 → 0.3000 (best at step 4, on training examples)"),
        (
            {"planned_gib": 19.0, "dry_run_gib": 19.11, "measured_gib": 19.2},
            "peak memory",
            "1.50 GiB (planned 19.00, dry run 19.11, training 19.20)",
        ),
        (
            {"oom_fallbacks": "micro-batch 1 instead of 4"},
            "memory ran out",
            "continued with micro-batch 1 instead of 4",
        ),
        ({"skipped_steps": 3}, "skipped steps", "3 (loss or gradient not finite)"),
    ],
)
def test_what_happened_is_said(tmp_path: Path, values: dict[str, Any], label: str, text: str) -> None:
    assert texts(tmp_path, **values)[label] == text


def test_what_did_not_happen_is_not_mentioned(tmp_path: Path) -> None:
    plain = texts(tmp_path, first_validation=None, best_validation=None, best_step=None)
    assert plain.keys().isdisjoint({"validation loss", "effective batch", "memory ran out", "skipped steps"})


def test_conversations_say_what_was_lost_only_where_something_was() -> None:
    assert len(text_set_facts(text_set(truncated_share=0.01, bad=3))) == len(text_set_facts(text_set())) + 2


def test_captions_are_counted_by_who_wrote_them() -> None:
    items = tuple(Caption(f"{number}.jpg", "text", "user" if number else "generated") for number in range(1200))
    assert caption_counts(CaptionSet("f", items)) == "1,200 images, 1 captioned by the model, 1,199 by you"
    assert caption_counts(CaptionSet("f", items[:1], ("a", "b"))).endswith("0 by you, 2 unreadable and left out")


def test_differences_have_their_unit() -> None:
    found = {"peft": 0.0, "kohya": 1.25e-7, "merged": 0.012}
    assert [difference(name, found) for name in ("peft", "kohya", "merged", "ema")] == [
        "no difference",
        "1.2e-07",
        "1.2e-02 nats per token (KL)",
        "average of the weights",
    ]


def test_a_plan_shows_settings_memory_and_phases() -> None:
    fast = Setting(2, 4, 2, True, True, 0.25, 8, {"weights": 5.0, "activations": 10.0, "rest": 0.001})
    own = Setting(8, 1, 1, False, False, 500.0, 8, {"weights": 50.0})
    phases = {"training": 15.0, "encoding": 0.0, "export": 30.0}
    plan = Plan("n", "base", "a GPU", 20.0, "bf16", "nf4", "images", fast, own, (), phases, (), (), {"export": 9.5})
    plan = replace(plan, seconds={"training": 150.0, "encoding": None, "export": 0.0})
    facts, settings, step, shown = plan_tables(plan)
    assert ("precision", "bf16, base in nf4") in facts.rows
    assert ("CPU memory", "at most 9.5 GiB for export") in facts.rows
    assert [row[1:] for row in settings.rows] == [
        ("2 × 4", "1 block in 2", "activations + blocks", "15.0", "0.25", "32.0"),
        ("8 × 1", "all blocks", "no", "50.0", "500", "0.02"),
    ]
    assert settings.rows[1][0] == "own, too large"
    assert step.rows == [("weights", "5.00"), ("activations", "10.00")]
    assert [row[1:] for row in shown.rows] == [
        ("15.00", "2 min 30 s", "█" * 18),
        ("–", "unknown", "in CPU memory"),
        ("30.00", "none", "█" * 24 + " too large"),
        ("", "2 min 30 s", "and what is unknown"),
    ]


def test_a_plan_shows_each_setting_once() -> None:
    fast, next_ = (Setting(size, 8 // size, 0, False, False, 0.5, 8, {"weights": 5.0}) for size in (8, 4))
    plan = Plan("n", "base", "a GPU", 20.0, "bf16", "none", "images", fast, fast, (next_,), {"training": 5.0}, (), ())
    assert [row[:2] for row in plan_tables(plan)[1].rows] == [("fastest, own", "8 × 1"), ("next", "4 × 2")]
    plan = replace(plan, requested=replace(next_, seconds=0.6))
    assert [row[:2] for row in plan_tables(plan)[1].rows] == [("fastest", "8 × 1"), ("next, own", "4 × 2")]


def test_a_plan_says_how_often_each_example_is_seen_at_which_rate_and_what_is_downloaded() -> None:
    fast = Setting(2, 4, 2, True, True, 0.25, 8, {"weights": 5.0})
    plan = Plan("n", "base", "a GPU", 20.0, "bf16", "nf4", "images", fast, fast, (), {"training": 5.0}, (), ())
    told = replace(plan, steps=250, effective=16, epochs=111.1, lr=1e-4, lr_scale=2.0, download={"a/b": 4.27e9})
    rows = dict(row[:2] for row in plan_tables(told)[0].rows)
    assert rows["training"] == "250 steps of 16 (111 visits an image)"
    assert rows["learning rate"] == "0.0001 (× alpha / rank = 0.0002)"
    assert rows["to download"] == "about 4.3 GB for a/b"
    assert "disk" not in rows
    told = replace(told, disk=Need(2e6, 4, 3, 5e6))
    parts = "4 checkpoints of 2 MB, 5 MB of exports"
    assert dict(row[:2] for row in plan_tables(told)[0].rows)["disk"] == f"about 11 MB ({parts})"
    counted = replace(told, cache_bytes=1e6, free_bytes=2e9)
    shown = dict(row[:2] for row in plan_tables(counted)[0].rows)["disk"]
    assert shown == f"about 12 MB ({parts}, 1 MB of cache); 2.0 GB free"
    rows = dict(row[:2] for row in plan_tables(replace(told, unit="tokens", epochs=3.2, guessed=True))[0].rows)
    assert rows["training"] == "250 steps of 16 (roughly 3.2 passes over the data)"


@pytest.mark.parametrize("unit", ["images", "tokens"])
def test_one_is_not_called_many(tmp_path: Path, unit: str) -> None:
    for items, expected in ((1, f"1 {unit[:-1]} ("), (2, f"2 {unit} ("), (1234, f"1,234 {unit} (")):
        assert texts(tmp_path, items=items, unit=unit)["trained on"].startswith(expected)


def test_a_run_says_how_often_each_example_was_seen_and_at_which_rate(tmp_path: Path) -> None:
    run = run_record(tmp_path, micro_batch=2, effective=4)
    settings = {"optim": {"lr": 1e-4}, "lora": {"rank": 16, "alpha": 32.0}}
    of_images = {fact.label: fact.text for fact in run_facts(run, Dataset("index", 5, 1, {}, ""), settings)}
    assert of_images["trained on"] == "16 images (in 4 steps, 3.2 visits an image)"
    assert of_images["learning rate"] == "0.0001 (× alpha / rank = 0.0002)"
    of_texts = {fact.label: fact.text for fact in run_facts(run, text_set(packs=8))}
    assert of_texts["trained on"].endswith("in 4 steps, 2.0 passes over the data)")
    assert update_scale({"rank": 16, "alpha": 32.0, "rslora": True}) == 8.0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_rates() -> None:
    assert (rate(18.46), rate(99.96), rate(1234.5)) == ("18.5", "100.0", "1,234")


def test_file_sizes(tmp_path: Path) -> None:
    assert file_size(tmp_path) == "gone"
    (tmp_path / "a").write_bytes(b"0" * 999)
    assert file_size(tmp_path) == "999 B"
    (tmp_path / "a").write_bytes(b"0" * 3_200_000)
    assert file_size(tmp_path / "a") == "3.2 MB"
