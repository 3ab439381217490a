"""Charts: every point in its place, whatever the values."""

import math
import re
import xml.etree.ElementTree as Xml

import pytest

from finetune.reporting.charts import HEIGHT, MOST_POINTS, WIDTH, Line, line_chart, tick_texts, ticks


def numbers(path: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", path)]


def curve(svg: str, index: int = 0) -> list[tuple[float, float]]:
    paths = [item.get("d", "") for item in Xml.fromstring(svg).iter("path") if "fill" in item.attrib]
    flat = numbers(paths[index])
    return list(zip(flat[::2], flat[1::2], strict=True))


def test_higher_values_are_drawn_higher_and_later_ones_further_right() -> None:
    corners = curve(line_chart("Loss", [Line("loss", [(0, 3.0), (1, 2.0), (2, 1.0)])], y_label="loss"))
    assert [x for x, _ in corners] == sorted(x for x, _ in corners)
    assert [y for _, y in corners] == sorted(y for _, y in corners)  # y grows downwards


@pytest.mark.parametrize(
    "points",
    [
        [(0, 0.0)],
        [(5, 1.0), (10, 1.0)],
        [(0, 0.0), (1, 0.0)],
        [(1, 1e-12), (2, 3e-12)],
        [(1, -4.0), (2, 1e9)],
        [(number, math.sin(number)) for number in range(5000)],
    ],
)
def test_any_values_stay_inside_the_drawing(points: list[tuple[float, float]]) -> None:
    svg = line_chart("Loss", [Line("each", points, faint=True), Line("loss", points)], y_label="loss")
    for index in (0, 1):
        corners = curve(svg, index)
        assert 1 <= len(corners) <= MOST_POINTS
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in corners)


def test_thinning_keeps_the_spike() -> None:
    points = [(number, 100.0 if number == 1234 else 1.0) for number in range(10_000)]
    assert min(y for _, y in curve(line_chart("Loss", [Line("loss", points)], y_label="loss"))) < HEIGHT / 4


def test_one_outlier_of_a_faint_line_does_not_flatten_the_rest() -> None:
    points = [(number, 1000.0 if number == 50 else 1.0 + number % 2) for number in range(200)]
    texts = re.findall(r">([\d.,]+)<", line_chart("Norm", [Line("each step", points, faint=True)], y_label="norm"))
    assert "1,000" not in texts


def test_words_are_escaped_and_the_mark_is_named() -> None:
    svg = line_chart("A & B", [Line("<i>", [(0, 1.0), (1, 2.0)])], y_label="x<y", mark=(1, 2.0, "best <2>"))
    assert {item.text for item in Xml.fromstring(svg).iter()} >= {"A & B", "x<y", "best <2>"}
    assert "<i>" not in svg


def test_no_points_no_chart() -> None:
    assert line_chart("Loss", [Line("loss", [])], y_label="loss") == ""


def test_ticks_are_round_and_enclose_the_values() -> None:
    assert tick_texts(ticks(0.061, 0.089)) == ["0.060", "0.065", "0.070", "0.075", "0.080", "0.085", "0.090"] or (
        ticks(0.061, 0.089)[0] <= 0.061 and ticks(0.061, 0.089)[-1] >= 0.089
    )
    assert ticks(1, 150, whole=True) == [0, 50, 100, 150]
    assert tick_texts([0.0, 2e-4, 4e-4]) == ["0", "2e−4", "4e−4"]
    assert tick_texts([-10.0, 0.0]) == ["−10", "0"]


def test_a_logarithmic_axis_spaces_equal_ratios_equally_and_has_room_for_its_labels() -> None:
    svg = line_chart("P", [Line("p", [(0, 20000.0), (1, 200.0), (2, 2.0)])], y_label="perplexity", log=True)
    first, second, third = (y for _, y in curve(svg))
    assert second - first == pytest.approx(third - second, abs=0.11)
    labels = [text.text for text in Xml.fromstring(svg).iter("text") if text.get("text-anchor") == "end"]
    assert labels == ["1e0", "1e1", "1e2", "1e3", "1e4", "1e5"]
    assert curve(line_chart("P", [Line("p", [(0, 5.0), (1, 5.0)])], y_label="p", log=True))
