"""Filters: what is found, and that nothing of a finding leaves while it is written."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ernie_model.inference.moderation import Blocked, Guard, ListFilter, check


def written(filters, pieces) -> tuple[str, str | None]:
    """What left, and the finding."""
    guard, out = Guard(filters), ""
    try:
        for piece in pieces:
            out += guard.push(piece)
        return out + guard.finish(), None
    except Blocked as finding:
        return out, str(finding)


@pytest.mark.parametrize(
    "text, found",
    [
        ("how to pick a lock", False),
        ("LOCK   \n PICK", True),
        ("padlock pickle", True),  # also inside of words
        ("l\u200bock p\u0301ick", True),
        ("\uff4c\uff4f\uff43\uff4b pick", True),  # full width
        ("lockpick", False),  # the phrase has a space
        ("", False),
    ],
)
def test_the_list_looks_through_case_width_space_and_what_is_not_seen(text, found):
    assert ListFilter(["straße", " Lock\tpick"])(text) == ("the phrase ' Lock\\tpick'" if found else None)


def test_a_character_that_stands_for_two_is_found():
    assert ListFilter(["straße"])("STRASSE") and ListFilter(["strasse"])("Straße") and ListFilter(["fi"])("ﬁ")


def test_nothing_of_a_finding_leaves():
    assert written([ListFilter(["a lockpick"])], ["take a lo", "ckpi", "ck"]) == ("take", "the phrase 'a lockpick'")
    assert written([ListFilter(["a lockpick"])], ["take a lo", "ckpi", "p"]) == ("take a lockpip", None)


def test_a_character_at_a_time_leaves_as_soon_as_it_cannot_be_part_of_a_finding():
    guard = Guard([ListFilter(["abc"])])
    assert [guard.push(character) for character in "xabxab"] == ["", "", "x", "a", "b", "x"]
    assert guard.finish() == "ab"


alphabet = st.text(st.sampled_from("ab \n\u200b\u0301ABｂﬁ"), max_size=25)


@given(
    st.lists(alphabet, max_size=6), st.lists(st.sampled_from(["ab", "a b", "bb a", "fi", "a"]), min_size=1, max_size=3)
)
@example(["a", " ", " b"], ["a b"])
def test_a_stream_finds_what_the_whole_text_holds_and_shows_nothing_of_it(pieces, phrases):
    look, text = ListFilter(phrases), "".join(pieces)
    out, finding = written([look], pieces)
    assert text.startswith(out)
    assert (finding is None) == (look(text) is None)
    if finding is None:
        assert out == text
        return
    stop = next(stop for stop in range(len(text) + 1) if look(text[:stop]))
    start = next(start for start in range(stop, -1, -1) if look(text[start:stop]))
    assert len(out) <= start


def test_a_plain_function_holds_everything_back_until_the_end():
    guard = Guard([lambda text: "too long" if len(text) > 5 else None])
    assert [guard.push("ab"), guard.push("cd")] == ["", ""]
    assert guard.finish() == "abcd"
    assert written([lambda text: "too long" if len(text) > 5 else None, ListFilter(["x"])], ["abc", "def"]) == (
        "",
        "too long",
    )


def test_without_filters_everything_leaves_at_once():
    guard = Guard([])
    assert guard.push("abc") == "abc" and guard.finish() == ""


def test_a_filter_that_raises_lets_nothing_pass():
    def broken(text):
        raise KeyError("list")

    with pytest.raises(Blocked, match="function failed: KeyError"):
        check([broken], "a")


def test_a_phrase_of_nothing_is_refused():
    with pytest.raises(ValueError, match="nothing that can be seen"):
        ListFilter(["a", "\u200b "])
