"""Rewards: by hand, by the published numbers, and against garbage."""

import json
import logging
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from train.config import UserError
from train.rewards.base import Attempt
from train.rewards.boxes import CAP
from train.rewards.number import Quantity, quantities, stated
from train.rewards.registry import REWARDS, check_options, needs_answer, reward_named
from train.rewards.temporal import interval


def score(name: str, answer: str, expected: str, **options) -> float | None:
    return reward_named(name)(Attempt(answer=answer), expected, **options)


# ------------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize(
    "answer, expected, value",
    [
        ("  The\n Cat. ", "the cat", 1),
        ("“Stop”", "stop", 1),
        ("ｓｔｏｐ", "Stop", 1),  # NFKC
        ("the cat", "cat", 0),
        ("1,000", "1000", 0),
        ("7 7", "7", 0),
        ("", "7", 0),
    ],
)
def test_exact(answer, expected, value):
    assert score("exact", answer, expected) == value


def test_other_right_answers_count():
    assert score("exact", "NYC", "New York", also=["nyc"]) == 1
    assert score("edit_distance", "NYC", "New York", also=["nyc"]) == 1
    assert score("anls", "NYC", "New York") == 0


@pytest.mark.parametrize(
    "answer, expected, distance, anls",
    [
        ("kitten", "sitting", 4 / 7, 4 / 7),  # d = 3
        ("abc", "xyz", 0, 0),
        ("ab", "ax", 0.5, 0.5),
        ("a", "axy", 1 / 3, 0),  # below one half
        ("", "", 1, 1),
        ("", "a", 0, 0),
    ],
)
def test_edit_distance_and_anls(answer, expected, distance, anls):
    assert score("edit_distance", answer, expected) == pytest.approx(distance)
    assert score("anls", answer, expected) == pytest.approx(anls)


# ----------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "text, value",
    [
        *((text, 1234.5) for text in ("1,234.5", "1 234.5", "1'234.5", "1.234,5", "1234.5", "$1,234.5", "**1,234.5**")),
        ("12,5", 12.5),
        ("1,200", 1200),
        ("1.234.567", 1234567),
        ("3/4", 0.75),
        ("1.2e-3", 0.0012),
        ("1.2 × 10^-3", 0.0012),
        ("3 thousand", 3000),
        ("1.2 million people", 1.2e6),
        ("12k", 12000),
        ("−5", -5),
        ("１２", 12),
        (".5", 0.5),
        ("12.", 12),
        ("3 pm", 3),
    ],
)
def test_ways_to_write_a_number(text, value):
    (found,) = quantities(text)
    assert found == Quantity(pytest.approx(value)), text


@pytest.mark.parametrize("text", ["", "many", "1.2.3", "10²", "5/0", "9" * 400, "x12", "nan", "inf"])
def test_what_is_no_number(text):
    assert quantities(text) == []


def test_units():
    assert quantities("1.5 kΩ") == [Quantity(1500, unit="ohm")] == quantities("1500 Ohms")
    assert quantities("250 mA") == [Quantity(0.25, unit="A")]
    assert score("number", "1.5 kΩ", "1500 ohm") == 1
    assert score("number", "0.25", "0.25 A") == 1
    assert score("number", "0.25 V", "0.25 A") == 0
    assert score("number", "0.25 mA", "0.25 A") == 0
    assert score("number", "12 visitors", "12 people") == 1


@pytest.mark.parametrize(
    "text, value",
    [
        ("I = 2 A, so U = 10 V", 10),
        ("In 2020 there were 5. The answer is 350.", 350),
        ("First \\boxed{3}, no: \\boxed{\\frac{} 4} as 2 + 2 = 4", 4),
        ("4, yes, 4.0", 4),
        ("In 2020 it was 350", None),
        ("between 10 and 12", None),
        ("10-12", None),
        ("10 or 12", None),
    ],
)
def test_an_answer_commits_itself_to_one_number(text, value):
    found = stated(text)
    assert (found and found.value) == value


@pytest.mark.parametrize(
    "answer, expected, options, value",
    [
        ("105", "100", {"tolerance": 0.05}, 1),
        ("21", "20", {"tolerance": 0.05}, 1),  # 1.05 * 20 is 21 but for rounding
        ("105.1", "100", {"tolerance": 0.05}, 0),
        ("105", "100", {}, 0),
        ("103", "100", {"tolerance": 3, "relative": False}, 1),
        ("104", "100", {"tolerance": 3, "relative": False}, 0),
        ("0.01", "0", {"tolerance": 0.05}, 0),
        ("2011", "2010", {"tolerance": 0.05}, 0),  # a year
        ("2010", "2010", {"tolerance": 0.05}, 1),
        ("2011", "2010", {"tolerance": 0.05, "years": False}, 1),
        ("2011", "2010 visitors", {"tolerance": 0.05}, 1),
        ("12.5%", "12.5 %", {}, 1),
        ("12.5", "12.5%", {}, 1),
        ("0.125", "12.5%", {}, 1),
        ("12.5%", "0.125", {}, 1),
        ("0.125%", "12.5%", {}, 0),
        ("-5", "5", {}, 0),
        ("5", "many", {}, None),
    ],
)
def test_number(answer, expected, options, value):
    assert score("number", answer, expected, **options) == value


@pytest.mark.parametrize(
    "answer, expected, hard, soft",
    [
        ("5", "5", 1, 1),
        ("4", "5", 0, 0.8),
        ("11", "5", 0, 0),
        ("Three.", "3", 1, 1),
        ("There are three dogs", "3", 1, 1),
        ("three or four", "3", 0, 0),
        ("3.5", "3", 0, 0),
        ("0", "0", 1, 1),
        ("none", "0", 0, 0),
        ("3", "a few", None, None),
    ],
)
def test_counting(answer, expected, hard, soft):
    assert score("counting", answer, expected) == hard
    assert score("counting", answer, expected, soft=True) == (soft if soft is None else pytest.approx(soft))


# ----------------------------------------------------------------------------------------------------------- choices

OPTIONS = ["a cat", "a dog", "a fox"]


@pytest.mark.parametrize(
    "answer, value",
    [
        *(
            (text, 1)
            for text in ("B", "b", "(b)", "**B**", "B) a dog", "b) a dog", "Answer: B", "\\boxed{B}", "I think B")
        ),
        *(
            (text, 1)
            for text in (
                "a dog",
                "It is a dog.",
                "The answer is a dog",
                "The answer is B because A is wrong",
                "B is right",
            )
        ),
        *(
            (text, 0)
            for text in (
                "A or B",
                "answer: A or B",
                "a cat or a dog",
                "not B, A",
                "A",
                "d",
                "The answer is A because B is wrong",
            )
        ),
        *((text, 0) for text in ("", "a doghouse", "A) a cat B) a dog C) a fox")),
    ],
)
def test_multiple_choice(answer, value):
    assert score("multiple_choice", answer, "B", options=OPTIONS) == value
    assert score("multiple_choice", answer, "a dog", options=OPTIONS) == value


def test_multiple_choice_without_the_options_texts():
    assert score("multiple_choice", "(C)", "C") == 1
    assert score("multiple_choice", "a dog", "C") == 0
    assert score("multiple_choice", "C", "some words") is None
    assert score("multiple_choice", "It is a dog house", "B", options=["house", "dog house"]) == 1


# --------------------------------------------------------------------------------------------------- boxes and points

GOLD = '[{"bbox_2d": [0, 0, 100, 100]}, {"bbox_2d": [200, 200, 300, 300]}]'
SPAM = '[{"bbox_2d": [0, 0, 100, 80]}, {"bbox_2d": [210, 200, 300, 300]}, {"bbox_2d": [500, 500, 600, 600]}]'


def test_spam_costs_precision():
    """IoU 0.8, 0.9 and 0: of three boxes said two are hits at 0.5, one at 0.85; or as much of one as they overlap."""
    assert score("grounding_f1", SPAM, GOLD) == pytest.approx(0.8)
    assert score("grounding_f1", SPAM, GOLD, iou=0.85) == pytest.approx(0.4)
    assert score("grounding_f1", SPAM, GOLD, iou=None) == pytest.approx(2 * (0.8 + 0.9) / 5)


def test_pairs_are_chosen_together():
    """The larger box said lies best on the smaller right one's place too: one by one, a hit is lost."""
    gold = '[{"bbox_2d": [0, 0, 10, 10]}, {"bbox_2d": [0, 0, 10, 6]}]'
    said = '[{"bbox_2d": [0, 0, 10, 7]}, {"bbox_2d": [0, 0, 10, 10]}]'
    assert score("grounding_f1", said, gold, iou=0.85) == 1  # 6/7 and 1


def test_labels_must_match_where_there_are_any():
    gold, said = '[{"bbox_2d": [0,0,9,9], "label": "Cat"}]', '[{"bbox_2d": [0,0,9,9], "label": "%s"}]'
    assert score("grounding_f1", said % "cat", gold) == 1
    assert score("grounding_f1", said % "dog", gold) == 0
    assert score("grounding_f1", said % "dog", gold, labels=False) == 1
    assert score("grounding_f1", said % "dog", "[[0,0,9,9]]") == 1


def test_nothing_to_find():
    assert score("grounding_f1", "[]", "[]") == 1
    assert score("grounding_f1", "[[0,0,9,9]]", "[]") == 0
    assert score("grounding_f1", "nothing", "[]") == 0
    assert score("grounding_f1", "[]", "[[0,0,9,9]]") == 0
    assert score("grounding_f1", "[]", "no boxes") is None


def test_too_many_boxes_earn_nothing():
    right, wrong = "[0,0,9,9]", "[500,500,600,600]"
    some = f"[{','.join([right] + [wrong] * (CAP - 1))}]"
    assert score("grounding_f1", some, f"[{right}]") == pytest.approx(2 / (CAP + 1))
    assert score("grounding_f1", f"{some[:-1]},{wrong}]", f"[{right}]") == 0


def test_broken_boxes_are_no_boxes():
    """The parser's own rules: tests of grounding.py."""
    gold = "[[0,0,9,9]]"
    assert score("grounding_f1", "Here: [0, 0, 9, 9] ok", gold) == 1
    assert score("grounding_f1", "[[0,0,9,9], [9,9,0,0], 5]", gold) == 1
    assert score("grounding_f1", "[[9,9,0,0]]", gold) == 0
    assert score("grounding_f1", "[[9,9,0,0]]", "[]") == 0
    assert score("grounding_f1", '{"point_2d": [5, 5]}', gold) == 0


def test_points():
    gold = '[{"point_2d": [100, 100]}, {"point_2d": [500, 500]}]'
    assert score("points", '[{"point_2d": [130, 140]}, {"point_2d": [500, 551]}]', gold) == 0.5  # 50 and 51 away
    assert score("points", "[[130, 140], [500, 551]]", gold, radius=51) == 1
    # a right box: anywhere inside
    boxes = '[{"bbox_2d": [0, 0, 400, 400], "label": "a"}]'
    assert score("points", '[{"point_2d": [399, 1], "label": "a"}]', boxes) == 1
    assert score("points", '[{"point_2d": [401, 1], "label": "a"}]', boxes) == 0
    assert score("points", '[{"point_2d": [399, 1], "label": "b"}]', boxes) == 0
    # as many hits as possible: the first point is near both
    assert score("points", "[[300, 300], [270, 300]]", "[[310, 300], [349, 300]]") == 1


# --------------------------------------------------------------------------------------------------------------- times


@pytest.mark.parametrize(
    "answer, value",
    [
        ('{"start": 4.0, "end": 8.0}', 1 / 3),
        ("From 4.0 s to 8.0 s.", 1 / 3),
        ("4-8", 1 / 3),
        ("[2, 6]", 1),
        ('{"start": 7, "end": 8}', 0),
        ('{"start": 6, "end": 2}', 0),
        ('{"start": 2}', 0),
        ("at 2", 0),
    ],
)
def test_temporal_iou(answer, value):
    gold = '{"start": 2, "end": 6}'
    assert score("temporal_iou", answer, gold) == pytest.approx(value)
    assert score("temporal_iou", answer, gold, iou=0.5) == float(value >= 0.5)
    assert score("temporal_iou", answer, '{"start": 2, "end": 2}') is None


# ----------------------------------------------------------------------------------------------------------------- JSON

FORM = '{"name": "Ann Lee", "sum": 12.5, "paid": true, "items": [1, 2]}'


@pytest.mark.parametrize(
    "answer, value",
    [
        ('```json\n{"name": "ann  lee", "sum": "12.50", "paid": true, "items": [1, 2]}\n```', 1),
        ('{"name": "Ann", "sum": 12.5, "paid": true, "items": [1, 2]}', 4 / 5),
        ('{"name": "Ann Lee"}', 1 / 5),
        ('{"name": "Ann Lee", "sum": 12.5, "paid": 1, "items": [2, 1]}', 2 / 5),
        ('{"name": "Ann Lee", "sum": 12.5, "paid": true, "items": [1, 2], "date": "x"}', 5 / 6),  # invented
        ("Ann Lee", 0),
        ("[1]", 0),
    ],
)
def test_json_fields(answer, value):
    assert score("json_fields", answer, FORM) == pytest.approx(value)


def test_json_fields_of_nothing():
    assert score("json_fields", "{}", "{}") == 1
    assert score("json_fields", "{}", "no object") is None
    assert score("json_fields", '{"a": 104}', '{"a": 100}', tolerance=0.05) == 1


def test_json_valid():
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    assert score("json_valid", '```json\n{"a": 1}\n```', "", schema=schema) == 1
    assert score("json_valid", '{"a": "1"}', "", schema=schema) == 0
    assert score("json_valid", "[1]", "") == 1
    assert score("json_valid", "Here: [1]", "") == 0
    assert score("json_valid", "[NaN]", "") == 0
    assert score("json_valid", "[1]", "", schema='{"type": 5}') is None
    assert score("json_valid", "[1]", "", schema={"$ref": "https://example.org/s.json"}) is None  # nothing is fetched


# --------------------------------------------------------------------------------------------- tools, and the registry


def test_tool_success():
    tool_success = reward_named("tool_success")
    assert tool_success(Attempt(answer="", num_calls=4, num_failed_calls=1), "") == 0.75
    assert tool_success(Attempt(answer=""), "") == 0


JUNK = st.one_of(
    st.text(),
    st.text(alphabet='0123456789.,-+eE%/ []{}":bx_2dA()', max_size=60),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=5)
            | st.dictionaries(
                st.sampled_from(["bbox_2d", "point_2d", "label", "start", "end", "a"]) | st.text(max_size=3),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    ).map(lambda value: json.dumps(value)),
)


@pytest.mark.parametrize("name", REWARDS)
@given(answer=JUNK, expected=JUNK, calls=st.integers(-2, 9), failed=st.integers(-2, 9))
@example(answer="[" * 5000, expected="[" * 5000, calls=0, failed=0)
@example(answer="9" * 5000, expected="1" + "0" * 400, calls=0, failed=0)
@example(answer='{"start": 1' + "0" * 400 + "}", expected='{"start": 0, "end": 1' + "0" * 400 + "}", calls=1, failed=9)
@example(answer="\ud800\x00", expected="\ud800", calls=0, failed=0)
def test_garbage_never_raises_and_stays_in_range(name, answer, expected, calls, failed):
    attempt = Attempt(answer=answer, text=answer, num_calls=calls, num_failed_calls=failed)
    value = REWARDS[name](attempt, expected)
    assert value is None or (isinstance(value, float) and 0 <= value <= 1)


@pytest.mark.parametrize("name", [name for name in REWARDS if needs_answer(name)])
@given(expected=JUNK)
def test_the_right_answer_earns_everything_where_it_can_be_read(name, expected):
    if name == "counting" or name == "multiple_choice":
        expected = expected[:40]
    value = REWARDS[name](Attempt(answer=expected), expected)
    assert value in (None, 1.0)


def test_unknown_rewards_and_options_are_named():
    with pytest.raises(UserError, match="there is no reward 'exakt'; did you mean exact?"):
        reward_named("exakt")
    with pytest.raises(UserError, match="reward number has no option 'tolerence'; did you mean tolerance?"):
        check_options("number", {"tolerence": 1})
    with pytest.raises(UserError, match="has no option 'iou'; it has none"):
        check_options("tool_success", {"iou": 1})
    check_options("grounding_f1", {"iou": 0.75, "labels": False})


OWN = """
def half(attempt, expected, *, low=0.5): return low if attempt.answer else None
def raises(attempt, expected): raise KeyError("x")
def large(attempt, expected): return 2
def wrong(attempt): return 1
word = "a"
"""


def test_functions_of_ones_own(tmp_path, monkeypatch, caplog):
    (tmp_path / "own_metrics.py").write_text(OWN)
    (tmp_path / "own_broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_metrics", raising=False)
    assert score("python:own_metrics.half", "x", "y") == 0.5
    assert score("python:own_metrics.half", "x", "y", low=0.25) == 0.25
    assert score("python:own_metrics.half", "", "y") is None
    check_options("python:own_metrics.half", {"low": 1})
    with pytest.raises(UserError, match="has no option 'high'"):
        check_options("python:own_metrics.half", {"high": 1})
    with caplog.at_level(logging.WARNING):
        assert score("python:own_metrics.raises", "x", "y") is None
        assert score("python:own_metrics.large", "x", "y") is None
    assert "raised KeyError" in caplog.text and "returned 2, which is not in [0, 1]" in caplog.text
    for name, why in {
        "python:half": "names no function",
        "python:no_such_module.half": "no_such_module cannot be imported .ModuleNotFoundError.*PYTHONPATH=folder",
        "python:own_broken.half": "cannot be imported .ZeroDivisionError.*Mend it",
        "python:own_metrics.third": "has no third",
        "python:own_metrics.word": "cannot be called as word",
        "python:own_metrics.wrong": r"must take \(attempt, expected, \*\*options\)",
    }.items():
        with pytest.raises(UserError, match=why):
            reward_named(name)


def test_intervals():
    assert interval("from 1.5 to 3") == (1.5, 3)
    assert interval("[true, 2]") is None
