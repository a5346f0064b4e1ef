"""Parts that shape a reward: the published numbers, TRL, and against garbage."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl.rewards import (
    get_cosine_scaled_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    think_format_reward,
)

from train.config import UserError
from train.rewards.base import Attempt
from train.rewards.registry import check_part, part_named
from train.rewards.shaping import (
    COMPARISONS,
    PARTS,
    cosine,
    curiosity,
    overlong,
    repetition,
    shorter,
    tool_bonus,
    tool_errors,
)
from train.rewards.shaping import format as form


def written(text: str, answer: str = "7", **others) -> Attempt:
    return Attempt(**({"answer": answer, "text": text, "turns": (text,)} | others))


# -------------------------------------------------------------------------------------------------------------- format

CALL = '<tool_call>\n{"name": "look", "arguments": {"bbox_2d": [0, 0, 9, 9]}}\n</tool_call>'


@pytest.mark.parametrize(
    "text, thinking, value",
    [
        ("7", False, 0),
        ("\nhm\n</think>\n7", True, 0),
        ("<think>\nhm\n</think>\n7", False, 0),  # it opened its own
        ("\nhm\n</think>\n<response>\n7\n</response>\n", True, 0),
        (f"hm</think>{CALL}", True, 0),
        (f"hm</think>{CALL}\n{CALL}", True, 0),
        ("7", True, -1),  # the thought has no end
        ("7</think>7</think>7", True, -1),
        ("<think>hm</think>7", True, -1),  # two begin
        ("7<think>hm</think>7", False, -1),
        ("<think>7", False, -1),
        ("7</think>", False, -1),
        ("</think>7<think>", False, -1),
        ("hm</think><response>7", True, -1),
        ("hm</think><response>7</response><response>8</response>", True, -1),
        ("hm</think><tool_call>{}", True, -1),
        ("hm</think><tool_call>{look}</tool_call>", True, -1),
        ("hm</think><tool_call>look</tool_call>", True, -1),
        (f"hm</think>{CALL}<tool_call>" + '{"name"}</tool_call>', True, -1),
        ("hm</think></tool_call>7<tool_call>", True, -1),
    ],
)
def test_format(text, thinking, value):
    assert form(written(text, thinking=thinking), 1.0) == value


def test_every_turn_has_a_form():
    first, second = f"look</think>{CALL}", "\nseen</think>7"
    assert form(Attempt(answer="7", turns=(first, second), thinking=True), 1.0) == 0
    assert form(Attempt(answer="7", turns=(first, "7"), thinking=True), 1.0) == -1
    assert form(Attempt(answer="7", turns=(CALL, second), thinking=True), 1.0) == -1


def test_an_answer_is_something_and_ends():
    for bad in ({"answer": " \n"}, {"finished": False}, {"answer": "7" * 11, "max_chars": 10}):
        assert form(written("7", **bad), 1.0) == -1
    assert form(written("7" * 10, answer="7" * 10, max_chars=10), 1.0) == 0


@given(st.lists(st.sampled_from(["<think>", "</think>", "7", "\n", "<response>", "</response>"]), max_size=6))
def test_what_is_well_formed_is_so_to_trl(pieces):
    text = "".join(pieces)
    (theirs,) = think_format_reward([[{"content": f"<think>{text}"}]])
    ours = form(written(text, thinking=True), 1.0)
    assert ours == -1 or theirs == 1
    if "</think>" not in text or "<think>" in text:
        assert theirs == 0 and ours == -1
    elif text.count("</think>") == 1 and "response" not in text:
        assert theirs == 1 and ours == 0


# -------------------------------------------------------------------------------------------------- length, repetition


def test_overlong_by_the_published_numbers_and_trl():
    said = [overlong(written("", num_tokens=n), None, length=100, cache=20) for n in (80, 90, 100, 101)]
    assert said == pytest.approx([0, -0.5, -1, -1])
    for length, cache in ((100, 20), (20480, 4096), (7, 7), (5, 0)):
        trls = get_soft_overlong_punishment(length, cache)
        for n in (0, 1, length - cache, length - cache + 1, length - 1, length, length + 1, 10 * length):
            ours = overlong(written("", num_tokens=n), 0.3, length=length, cache=cache)
            assert [ours] == pytest.approx(trls([[1] * n])), (length, cache, n)


def test_repetition_by_the_published_number_and_trl():
    assert repetition(written("", token_ids=(5,) * 5), None, size=2) == -0.75
    draw = random.Random(0)
    for size in (1, 2, 3, 5):
        trls = get_repetition_penalty_reward(size)
        for n in (0, 1, 2, 5, 40):
            ids = tuple(draw.randrange(3) for _ in range(n))
            assert [repetition(written("", token_ids=ids), 1.0, size=size)] == pytest.approx(trls([list(ids)]))


def test_cosine_by_the_published_numbers_and_trl():
    values = [cosine(written("", num_tokens=n), right, length=100) for right in (1.0, 0.0) for n in (0, 50, 100)]
    assert values == pytest.approx([1, 0.75, 0.5, -1, -0.75, -0.5])
    trls = get_cosine_scaled_reward(max_len=100)
    for n in (0, 1, 33, 99, 100, 101, 250):
        theirs = trls([[{"content": "\\boxed{7}"}], [{"content": "\\boxed{8}"}]], ["7", "7"], [[1] * n] * 2)
        assert [cosine(written("", num_tokens=n), right, length=100) for right in (1.0, 0.0)] == pytest.approx(theirs)
    assert cosine(written(""), None, length=100) is None


# ------------------------------------------------------------------------------------------------------------- tools


def call(box=None, *, images=1, failed=False, name="image_zoom_in_tool", **arguments):
    if box is not None:
        arguments["bbox_2d"] = box
    return {"name": name, "arguments": json.dumps(arguments), "failed": failed, "images": images}


def looked(*calls) -> Attempt:
    failed = sum(one["failed"] for one in calls)
    return Attempt(answer="7", calls=calls, num_calls=len(calls), num_failed_calls=failed, text="7")


GOOD = call([100, 100, 300, 300])


def test_deep_eyes():
    """0.8 accuracy + 0.2 format + 1.2 bonus: 2.0, 0.8, 0 and -0.2 (reference 4.3)."""

    def worth(attempt, accuracy):
        return 0.8 * accuracy + 0.2 * form(attempt, accuracy) + 1.2 * tool_bonus(attempt, accuracy)

    bad = written("<tool_call>")
    assert [worth(looked(GOOD), 1.0), worth(looked(), 1.0), worth(looked(GOOD), 0.0), worth(bad, 0.0)] == pytest.approx(
        [2.0, 0.8, 0.0, -0.2]
    )


@pytest.mark.parametrize(
    "calls, value",
    [
        ([GOOD], 1),
        ([call(query="cat", name="image_search", images=3)], 1),
        ([], 0),
        ([call([100, 100, 300, 300], images=0)], 0),  # no picture
        ([call([100, 100, 300, 300], failed=True)], 0),
        ([call([0, 0, 1000, 1000])], 0),
        ([call([0, 0, 950, 950])], 0),  # 90.25 %
        ([call([0, 0, 948, 948])], 1),  # 89.9 %
        ([call([-500, -500, 1500, 1500])], 0),  # as it is cut
        ([call([100, 100, 100, 300])], 0),  # no area
        ([call([300, 300, 100, 100])], 0),
        ([call([float("nan")] * 4)], 0),
        ([call([1, 2, 3])], 0),
        ([call("box")], 0),
    ],
)
def test_what_is_a_look(calls, value):
    attempt = looked(*calls)
    assert tool_bonus(attempt, 1.0) == value
    for accuracy in (0.0, 0.5, None):
        assert tool_bonus(attempt, accuracy) == 0


@pytest.mark.parametrize(
    "calls, value",
    [
        ([GOOD, GOOD], 0),
        ([GOOD, call([101, 100, 300, 300])], 0),  # IoU 0.995
        ([GOOD, call([400, 100, 600, 300])], 1),
        ([call(query="a", name="image_search"), call(query="a", name="image_search")], 0),
        ([call(query="a", name="image_search"), call(query="b", name="image_search")], 1),
    ],
)
def test_a_look_again_is_none(calls, value):
    assert tool_bonus(looked(*calls), 1.0) == 1 and tool_bonus(looked(*calls), 1.0, least=2) == value


def test_tool_errors():
    bad = call(failed=True, images=0)
    assert [tool_errors(looked(*[bad] * n, GOOD), None) for n in (0, 1, 2)] == [0, -1, -1]
    assert [tool_errors(looked(*[bad] * n), None, most=4) for n in (0, 1, 2, 9)] == [0, -0.25, -0.5, -1]


# ---------------------------------------------------------------------------------------------------------- compared


def test_kimi_by_the_published_numbers():
    """Reference 10, "Rewards"."""
    attempts = [written("", num_tokens=n) for n in (100, 200, 300, 300)]
    assert shorter(attempts, [1.0, 1.0, 1.0, 0.0]) == [0.5, 0, -0.5, -0.5]
    assert shorter(attempts, [0.0, 0.5, None, 0.0]) == [0, 0, None, -0.5]
    assert shorter(attempts[2:], [1.0, 0.0]) == [0, 0]
    assert shorter(attempts, [None] * 4) == [None] * 4 and shorter([], []) == []


def test_pixel_reasoner_by_the_published_numbers():
    """Reference 4.3: alpha 0.5, beta 0.05, H 0.3, N 1; one attempt in ten looks."""
    boxes = ([0, 0, 90, 90], [100, 0, 190, 90], [200, 0, 290, 90], [300, 0, 390, 90])
    blind = [looked()] * 9
    assert curiosity([looked(GOOD), *blind], [1.0] * 10) == pytest.approx([0.1] + [0] * 9)
    assert curiosity([looked(*map(call, boxes)), *blind], [1.0] * 10)[0] == pytest.approx(0.1 - 0.15)
    # a third of them look
    assert curiosity([looked(GOOD)] * 5 + blind, [1.0] * 14) == [0] * 14
    # a call that fails is none, and what has no score is not counted
    assert curiosity([looked(call(failed=True)), *blind], [1.0] * 10) == [0] * 10
    assert curiosity([looked(GOOD), looked(GOOD), *blind], [1.0, None, *[1.0] * 9])[:2] == [pytest.approx(0.1), None]


# ------------------------------------------------------------------------------------------------------------- garbage

JUNK = st.one_of(
    st.none(),
    st.text(max_size=40),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["bbox_2d", "a"]), inner),
        max_leaves=8,
    ),
)
TEXTS = st.lists(
    st.sampled_from(
        ["<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>", "{", "}", '"', "\ud800"]
    )
    | st.text(max_size=9),
    max_size=12,
).map("".join)
CALLS = st.fixed_dictionaries(
    {},
    optional={
        "name": JUNK,
        "arguments": JUNK | JUNK.map(json.dumps),
        "failed": st.booleans() | st.none(),
        "images": st.integers(-1, 3) | st.none(),
    },
)
OPTIONS = {"overlong": {"length": 20, "cache": 5}, "cosine": {"length": 20}}


@pytest.mark.parametrize("name", [*PARTS, *COMPARISONS])
@given(
    answer=st.text(),
    turns=st.lists(TEXTS, max_size=3),
    calls=st.lists(CALLS, max_size=4),
    numbers=st.tuples(*[st.integers(-3, 10**9)] * 3),
    ids=st.lists(st.integers(0, 3), max_size=20),
    flags=st.tuples(st.booleans(), st.booleans()),
    accuracy=st.none() | st.floats(0, 1),
)
def test_garbage_never_raises_and_stays_in_range(name, answer, turns, calls, numbers, ids, flags, accuracy):
    attempt = Attempt(
        answer=answer,
        text="".join(turns),
        turns=tuple(turns),
        calls=tuple(calls),
        num_calls=numbers[0],
        num_failed_calls=numbers[1],
        num_tokens=numbers[2],
        token_ids=tuple(ids),
        finished=flags[0],
        thinking=flags[1],
        max_chars=20,
    )
    if name in PARTS:
        values = [PARTS[name](attempt, accuracy, **OPTIONS.get(name, {}))]
    else:
        values = COMPARISONS[name]([attempt, written("", num_tokens=7), attempt], [accuracy, 1.0, None])
    assert all(value is None or (isinstance(value, float) and -1 <= value <= 1) for value in values)


@pytest.mark.parametrize("depth", [10, 100_000])
def test_deep_and_long_texts(depth):
    deep = "[" * depth
    attempt = looked(*({"name": "a", "arguments": text, "failed": False, "images": 1} for text in (deep, "9" * depth)))
    assert tool_bonus(attempt, 1.0) == 1.0
    assert form(written(f"<tool_call>{{{deep}}}</tool_call>" * 3), 1.0) == -1


# --------------------------------------------------------------------------------------------------------------- names


def test_unknown_parts_and_options_are_named():
    with pytest.raises(UserError, match="there is no part 'overlng' of a reward; did you mean overlong?"):
        part_named("overlng")
    with pytest.raises(UserError, match="rewards.options.tool_bonus is .*least is 0; it must be at least 1"):
        check_part("tool_bonus", {"least": 0})
    for name, options in {
        "repetition": {"size": 0},
        "cosine": {"length": 0},
        "tool_errors": {"most": 0},
        "tool_bonus": {"whole": 2},
    }.items():
        with pytest.raises(UserError, match=f"rewards.options.{name} is"):
            check_part(name, options)
