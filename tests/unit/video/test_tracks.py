"""Tracks and cuts by themselves: numbers that last through a shot, and scenes that begin where the picture changes."""

import json
from dataclasses import replace

import numpy as np
import pytest

from finetune.video.cuts import HIGH, WIDE, CutFinder
from finetune.video.tracks import Box, Detection, Tracked, Tracker, patience_s
from finetune.video.writer import Seen
from tests.unit.video import moving


def at(x: float, name: str = "car", y: float = 50) -> Detection:
    return Detection(name, (x, y, x + 40, y + 30), 0.9)


def numbers(tracker: Tracker, seconds: float, *found: Detection, scene: int = 0) -> list[int]:
    return [one.track for one in tracker.update(seconds, scene, found)]


def test_things_that_pass_one_another_keep_their_numbers() -> None:
    """Their boxes overlap on the way; where each one is expected says which is which."""
    tracker = Tracker()
    seen = [numbers(tracker, k / 5, at(15 * k), at(300 - 15 * k, y=65)) for k in range(20)]
    assert seen == [[1, 2]] * 20


def test_the_order_of_what_is_found_does_not_matter() -> None:
    one, other = Tracker(), Tracker()
    for k in range(10):
        first = numbers(one, k / 5, at(8 * k), at(200, name="boat"))
        second = numbers(other, k / 5, at(200, name="boat"), at(8 * k))
        assert len(set(first)) == len(set(second)) == 2
    assert first == [1, 2]
    assert second == [1, 2]


def test_what_is_hidden_for_a_moment_is_the_same_afterwards_and_later_another() -> None:
    tracker = Tracker()
    for k in range(5):
        numbers(tracker, k / 5, at(15 * k))
    assert numbers(tracker, 1.0) == []
    assert numbers(tracker, 1.4, at(15 * 7)) == [1]
    assert numbers(tracker, 3.5, at(15 * 8)) == [2]


def test_what_is_looked_at_seldom_keeps_its_number() -> None:
    tracker = Tracker(patience_s=patience_s(0.5))
    assert [numbers(tracker, 2.0 * k, at(15 * k)) for k in range(4)] == [[1]] * 4
    assert patience_s(30) == patience_s(2) == 2.0


def test_a_fast_thing_keeps_its_number_from_its_first_look_on() -> None:
    """At two looks a second its first two boxes are a box apart, and nothing is known of its motion."""
    tracker = Tracker(patience_s=patience_s(2))
    assert [numbers(tracker, k / 2, at(80 * k), at(20, y=150)) for k in range(5)] == [[1, 2]] * 5


def test_what_goes_behind_something_for_a_second_comes_out_as_the_same() -> None:
    """Its front edge stops there while it goes in, and its back edge stays while it comes out."""
    tracker = Tracker(patience_s=patience_s(10))
    seen = set()
    for k in range(50):
        left, right = 10.0 + 6 * k, 50.0 + 6 * k
        left, right = (left, min(right, 120)) if left < 120 else (max(left, 180), right)
        if right - left >= 8:
            seen |= set(numbers(tracker, k / 10, Detection("car", (left, 50, right, 80), 0.9)))
    assert seen == {1}


def test_neighbours_do_not_take_the_number_of_one_that_is_gone() -> None:
    """One that is about as near to another, one of another size, and one that is too far away."""
    for rest in ([at(80), at(-70)], [Detection("car", (60, 40, 160, 120), 0.9)], [at(250)]):
        tracker = Tracker()
        assert numbers(tracker, 0.0, at(0)) == [1]
        assert 1 not in numbers(tracker, 0.2, *rest)


@pytest.mark.parametrize(
    ("kind", "most_switches", "most_fragments"),
    [("crossing", 24, 42), ("crowd", 96, 70), ("fast", 20, 85), ("hidden", 9, 170), ("replaced", 15, 3)],
)
def test_of_simulated_shots_few_things_change_their_number(kind: str, most_switches: int, most_fragments: int) -> None:
    """At 1 to 10 looks a second, 40 shots each; by overlap alone: docs/decisions/0028-which-object-is-which.md."""
    found = [moving.errors(kind, rate, range(40)) for rate in (1, 2, 3, 5, 10)]
    assert sum(switches for switches, _ in found) <= most_switches
    assert sum(fragments for _, fragments in found) <= most_fragments


def test_a_track_is_of_one_class_and_of_one_scene() -> None:
    tracker = Tracker()
    assert numbers(tracker, 0.0, at(50)) == [1]
    assert numbers(tracker, 0.2, at(50, name="boat")) == [2]
    assert numbers(tracker, 0.4, at(50), scene=1) == [3]


def test_tracks_go_on_from_their_state() -> None:
    whole, cut = Tracker(), Tracker()
    for k in range(12):
        cut = Tracker.from_state(json.loads(json.dumps(cut.state())))
        assert whole.update(k / 5, 0, [at(11 * k)]) == cut.update(k / 5, 0, [at(11 * k)])


def test_motion_is_learnt_in_pixels_a_second() -> None:
    tracker = Tracker()
    for k in range(12):
        (one,) = tracker.update(k / 5, 0, [at(11 * k)])
    wanted: Box = (55, 0, 55, 0)
    assert np.allclose(one.motion, wanted, atol=0.1)


def test_between_two_looks_boxes_are_on_a_straight_way() -> None:
    still, gone = (Tracked("car", (x, 50, x + 40, 80), 0.9, x, (10.0, 0, 10, 0)) for x in (0, 100))
    seen = Seen(1.0, 0, (still, gone), 1.0)
    following = Seen(3.0, 0, (replace(still, box=(40, 30, 100, 80)),), 3.0)
    boxes = {one.track: box for one, box in seen.boxes(1.5, 9, following)}
    assert boxes == {0: (10, 45, 55, 80), 100: (105, 50, 145, 80)}  # the other wasn't found again: it goes on
    assert dict(seen.boxes(3.0, 9, following))[still] == following.objects[0].box
    # Drawn without knowing, until 2 s: from there the way is steeper, and no box jumps.
    late = replace(seen, drawn_until=2.0)
    assert dict(late.boxes(2.0, 9, following))[still] == dict(late.boxes(2.0, 9, None))[still] == (10, 50, 50, 80)
    assert dict(late.boxes(2.5, 9, following))[still] == (25, 40, 75, 80)
    # In another scene nothing is found again, and nothing moves on for longer than to the next look.
    assert dict(seen.boxes(8.0, 2, replace(following, scene=1)))[still] == (20, 50, 60, 80)


def cells(seed: int, shift: int = 0, light: int = 0) -> np.ndarray:
    picture = np.random.default_rng(seed).integers(40, 200, (3, HIGH, WIDE))
    picture = np.repeat(np.repeat(picture[:, ::6, ::6], 6, 1), 6, 2)[:, :HIGH, :WIDE]
    return np.clip(np.roll(picture, shift, 2) + light, 0, 255).astype(np.uint8)


def scenes(pictures: list[np.ndarray], rate: int = 25) -> list[int]:
    finder, found = CutFinder(), []
    for number, picture in enumerate(pictures):
        finder = CutFinder.from_state(json.loads(json.dumps(finder.state())))
        found.append(finder.look(number / rate, picture))
    return found


def test_a_cut_is_found_at_its_frame_and_motion_is_none() -> None:
    moving = [cells(1, shift=k) for k in range(40)] + [cells(2, shift=3 * k) for k in range(40)]
    assert scenes(moving) == [0] * 40 + [1] * 40


def test_a_fade_is_no_cut_and_a_flash_no_scene_of_its_own() -> None:
    assert scenes([cells(1, light=2 * k - 60) for k in range(60)]) == [0] * 60
    flash = [cells(1)] * 20 + [cells(1, light=120)] * 2 + [cells(1)] * 20
    assert max(scenes(flash)) <= 1
