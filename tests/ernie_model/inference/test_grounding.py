"""Boxes and points: what is read, what is refused, and where they lie in pixels."""

import json
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ernie_model.inference.grounding import (
    GRID,
    Box,
    Grounding,
    Point,
    draw,
    last_json,
    parse_grounding,
    rescale,
    to_grid,
    to_pixels,
)

CAT = Box(1, 2, 3, 4, "cat")


@pytest.mark.parametrize(
    "text, boxes, points",
    [
        ('{"bbox_2d": [1, 2, 3, 4], "label": "cat"}', [CAT], []),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "cat"}, {"bbox_2d": [5, 6, 7, 8]}]', [CAT, Box(5, 6, 7, 8)], []),
        ('{"label": "cat", "bbox_2d": [[1, 2, 3, 4], [5, 6, 7, 8.5]]}', [CAT, Box(5, 6, 7, 8.5, "cat")], []),
        ("[1, 2, 3, 4]", [Box(1, 2, 3, 4)], []),
        ("It is at [[1, 2, 3, 4], [5, 6, 7, 8]].", [Box(1, 2, 3, 4), Box(5, 6, 7, 8)], []),
        ('First [9, 9, 10, 10]; no:\n```json\n{"bbox_2d": [1, 2, 3, 4], "label": "cat"}\n```', [CAT], []),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "cat"}', [CAT], []),  # the list was not closed: the object is whole
        ('{"bbox_2d": [-5, 2, 3000, 4], "label": 7}', [Box(0, 2, 1000, 4)], []),
        ('[{"point_2d": [1, 2], "label": "eye"}, {"point_2d": [3, -4]}]', [], [Point(1, 2, "eye"), Point(3, 0)]),
        ("[[1, 2], [3, 4]]", [], [Point(1, 2), Point(3, 4)]),
        ("<|LOC_BEGIN|><|LOC_1|><|LOC_2|><|LOC_3|><|LOC_4|><|LOC_END|>", [Box(1, 2, 3, 4)], []),
        ("a <|LOC_1|><|LOC_2|><|LOC_3|><|LOC_4|><|LOC_SEP|><|LOC_7|><|LOC_8|>", [Box(1, 2, 3, 4)], [Point(7, 8)]),
        ("[]", [], []),
    ],
)
def test_what_is_read(text, boxes, points):
    assert parse_grounding(text) == Grounding(tuple(boxes), tuple(points), 0, True)


@pytest.mark.parametrize(
    "entry",
    [
        "[3, 2, 1, 4]",  # left and right swapped
        "[1, 4, 3, 2]",
        "[1, 2, 1, 4]",  # no width
        "[1200, 2, 1300, 4]",  # none after clamping
        "[1, 2, NaN, 4]",
        "[1, 2, 1e999, 4]",
        "[1, 2, -Infinity, 4]",
        "[1, 2, 3]",
        "[1, 2, 3, 4, 5]",
        '["1", 2, 3, 4]',
        "[true, 2, 3, 4]",
        "[null, 2, 3, 4]",
        '{"bbox_2d": null}',
        '{"bbox_2d": {"x1": 1}}',
        '{"label": "cat"}',
    ],
)
def test_what_is_refused_leaves_the_others(entry):
    assert parse_grounding(f"[{entry}, [1, 2, 3, 4]]") == Grounding((Box(1, 2, 3, 4),), (), 1, True)


def test_a_huge_integer_is_a_coordinate_like_others():
    assert parse_grounding(f"[1, 2, {10**400}, 4]").boxes == (Box(1, 2, 1000, 4),)


def test_nothing_to_read_is_told_from_an_empty_list():
    assert parse_grounding("There is no cat [sic] {here}") == Grounding()
    assert parse_grounding("[]").found


def test_there_is_a_cap():
    text = json.dumps([[1, 2, 3, 4]] * 5)
    assert parse_grounding(text, most=3) == Grounding((Box(1, 2, 3, 4),) * 3, (), 2, True)


json_like = st.text('[]{}":,-1.e \nbox_2dlabel<|LOC>', max_size=60)


@given(st.one_of(st.text(max_size=40), json_like))
def test_no_text_makes_it_raise(text):
    for box in parse_grounding(text).boxes:
        assert 0 <= box.x1 < box.x2 <= 1000 and 0 <= box.y1 < box.y2 <= 1000


def test_hostile_texts_do_not_take_long():
    start = time.process_time()
    for text in ("[" * 50_000, "[1," * 20_000, '{"a":' * 20_000, "[" * 900 + "]" * 900):
        parse_grounding(text)
    assert time.process_time() - start < 10  # 1 s; 16 s if every bracket is tried


def test_the_last_json_is_the_outermost():
    assert last_json('x {"a": [1]} y [2, {"b": 3}] z') == [2, {"b": 3}]
    assert last_json("no") is None


# ------------------------------------------------------------------------------------------------------- between grids

sizes = st.tuples(st.integers(1, 5000), st.integers(1, 5000))
on_grid = st.lists(st.integers(0, 1000), min_size=4, max_size=4)


def test_the_grid_lies_over_the_original_picture():
    assert to_pixels(Box(100, 200, 300, 400), (640, 480)) == (64, 96, 192, 192)
    assert to_grid((64, 96, 192, 192), (640, 480)) == (100, 200, 300, 400)
    assert rescale((64, 96), (640, 480), (320, 120)) == (32, 24)


@given(on_grid, sizes, sizes)
def test_there_and_back(numbers, original, resized):
    """Exact but for rounding where nothing is rounded to whole units; then within half a unit of what was."""
    there = rescale(rescale(numbers, GRID, original), original, resized)
    assert there == pytest.approx(rescale(numbers, GRID, resized), rel=1e-12)
    assert to_grid(there, resized) == tuple(numbers)
    pixels = [round(n) for n in rescale(numbers, GRID, original)]
    for place, (n, back) in enumerate(zip(numbers, rescale(pixels, original, GRID), strict=True)):
        assert abs(n - back) * original[place % 2] / 1000 <= 0.5 + 1e-9
    grid = to_grid(pixels, original)
    for place, (pixel, back) in enumerate(zip(pixels, rescale(grid, GRID, original), strict=True)):
        assert abs(pixel - back) * 1000 / original[place % 2] <= 0.5 + 1e-9


# ---------------------------------------------------------------------------------------------------- on the picture


def test_lines_lie_on_the_edges_of_the_box():
    picture = draw(Image.new("RGB", (100, 50), "white"), [Box(200, 200, 600, 800)], color="red")
    red = np.argwhere((np.asarray(picture) == (255, 0, 0)).all(-1))
    assert red.min(0).tolist() == [10, 20] and red.max(0).tolist() == [39, 59]
    assert len(red) == 2 * (40 + 30) - 4


def test_labels_and_points_stay_inside_and_leave_the_original_alone():
    image = Image.new("L", (120, 80), 255)
    picture = draw(image, [Box(900, 0, 1000, 100, "a rather long label"), Point(0, 1000, "p"), Point(500, 500)])
    assert picture.size == (120, 80) and picture.mode == "RGB" and image.getextrema() == (255, 255)
    assert picture.getpixel((60, 40)) != (255, 255, 255)
