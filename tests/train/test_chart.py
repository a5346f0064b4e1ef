"""Charts, checked by their pixels and by the numbers on their axes."""

import math

import pytest
from PIL import Image, ImageColor

from train.chart import BLUE, GREEN, HEIGHT, LEFT, RED, WIDTH, Figure, mixed_colour, ticks


def pixels(path, colour: str, box=None) -> int:
    with Image.open(path) as picture:
        part = picture.crop(box) if box else picture
        colours = part.convert("RGB").getcolors(maxcolors=1 << 24)
        return sum(count for count, value in colours if value == ImageColor.getrgb(colour))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 300, [0, 50, 100, 150, 200, 250, 300]),
        (0, 7, [0, 2, 4, 6]),
        (3, 3.05, [3, 3.01, 3.02, 3.03, 3.04, 3.05]),
        (-12, 41, [-10, 0, 10, 20, 30, 40]),
        (0, 2e6, [0, 5e5, 1e6, 1.5e6, 2e6]),
    ],
)
def test_axes_have_round_numbers(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_stacked_layers_have_the_areas_of_their_values(tmp_path):
    figure = Figure("title", "about", columns=1, rows=1)
    panel = figure.panel("", x=(0, 4), y=(0, 10))
    panel.stack([0, 1, 4], [([2, 1], GREEN), ([5, 0], RED), ([0, 9], BLUE)])
    figure.save(tmp_path / "chart.png")
    unit = WIDTH * HEIGHT / 40
    for colour, area in ((GREEN, 2 + 3), (RED, 5), (BLUE, 27)):
        assert pixels(tmp_path / "chart.png", colour) == pytest.approx(area * unit, rel=0.01)


def test_values_outside_of_the_axes_stay_inside_of_the_frame(tmp_path):
    figure = Figure("", "", columns=1, rows=1)
    panel = figure.panel("", x=(0, 1), y=(0, 1))
    panel.cell(-5, -5, 7, 9, GREEN)
    panel.line([-3, 4], [8, -2], RED)
    figure.save(tmp_path / "chart.png")
    assert pixels(tmp_path / "chart.png", GREEN) <= WIDTH * HEIGHT
    assert panel.at(-5, 9) == (panel.left, panel.top)


def test_a_line_has_gaps_where_there_is_no_number_and_dots_where_one_stands_alone(tmp_path):
    def red(ys):
        figure = Figure("", "", columns=1, rows=1)
        figure.panel("", x=(0, 4), y=(0, 1)).line(range(5), ys, RED)
        figure.save(tmp_path / "chart.png")
        return pixels(tmp_path / "chart.png", RED)

    whole = red([0.5] * 5)
    assert WIDTH * 0.98 <= whole <= 2 * WIDTH * 1.02  # two pixels high, or one between two paler ones
    assert red([0.5, 0.5, 0.5, math.nan, 0.5]) == pytest.approx(whole / 2, rel=0.1)
    assert 0 < red([math.nan, 0.5, math.nan, math.nan, math.nan]) < 40
    assert red([math.nan] * 5) == 0


def test_panels_fill_rows_and_an_axis_of_one_value_is_drawn(tmp_path):
    figure = Figure("", "", columns=2, rows=2)
    places = [figure.panel("", x=(3, 3), y=(0, 0)) for _ in range(4)]
    assert len({(panel.left, panel.top) for panel in places}) == 4
    assert places[0].top == places[1].top < places[2].top and places[0].left == places[2].left
    assert places[1].left - places[0].left >= WIDTH + LEFT
    figure.save(tmp_path / "chart.png")


def test_colours_go_from_white_to_full():
    assert mixed_colour(0, "#204060") == (255, 255, 255)
    assert mixed_colour(1, "#204060") == mixed_colour(3, "#204060") == (32, 64, 96)
