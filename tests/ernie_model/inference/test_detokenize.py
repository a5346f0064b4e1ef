"""Text as the tokens come: equal to decoding all of them, cut before the first stop text, however it was tokenised."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_model.inference.detokenize import Detokenizer
from ernie_model.tokenizer import END_OF_SENTENCE, STOP, load_tiny_tokenizer

TINY = load_tiny_tokenizer()
END = TINY.require(END_OF_SENTENCE)
BYTE = {value: TINY.token_bytes.index(bytes([value])) for value in range(256) if value >= 128 or value == 10}
tokens = st.lists(st.integers(0, TINY.vocab_size - 1), max_size=12)
few_letters = st.text("ab\n€", max_size=8)


def one_by_one(text: str) -> list[int]:
    """Every character by itself, by bytes where there is no token of it."""
    return [i for character in text for i in TINY.encode_plain(character)[0]]


def run(ids, stop=(), terminators=(END,)):
    detokenizer = Detokenizer(TINY, stop, terminators)
    pieces = [detokenizer.push(i) for i in ids]
    pieces.append(detokenizer.finish())
    assert detokenizer.text == "".join(pieces)
    return pieces, detokenizer.stopped


@given(tokens)
def test_pieces_are_the_text(ids):
    assert "".join(run(ids, terminators=())[0]) == TINY.decode(ids)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=12))
def test_a_character_appears_when_it_is_complete(text):
    pieces, _ = run(one_by_one(text))
    assert "".join(pieces) == text and pieces[-1] == ""
    assert all(len(piece) <= 1 and piece != "\N{REPLACEMENT CHARACTER}" for piece in pieces) or "\ufffd" in text


def test_a_wrong_byte_takes_nothing_else_with_it():
    assert run([BYTE[10], BYTE[0xFF], BYTE[10]])[0] == ["\n", "\ufffd", "\n", ""]
    assert run([BYTE[0xE2], BYTE[0x82]])[0] == ["", "", "\ufffd"]
    assert run([BYTE[0xE2], END])[0] == ["", "\ufffd", ""]
    assert TINY.decode([BYTE[10], BYTE[0xFF], BYTE[10]]) == "\n\ufffd\n"


def reference(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """Read by characters; the answer ends when it ends in a stop text, the longest if there are several."""
    for end in range(len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(few_letters, st.lists(st.text("ab\n€", min_size=1, max_size=4), max_size=3).map(tuple), st.data())
def test_stop_texts_by_definition_in_any_tokenisation(text, stop, data):
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=4)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    ids = [i for part in parts for i in TINY.encode_plain(part)[0]]
    pieces, stopped = run(ids, stop)
    assert ("".join(pieces), stopped) == reference(text, stop)


@given(few_letters, st.lists(st.text("ab\n€", min_size=1, max_size=4), max_size=3).map(tuple))
def test_what_is_held_back_is_the_longest_start_of_a_stop_text(text, stop):
    detokenizer = Detokenizer(TINY, stop, ())
    for end, i in enumerate(text, 1):
        for token_id in one_by_one(i):
            detokenizer.push(token_id)
        if detokenizer.stopped is not None:
            break
        starts = [s[:n] for s in stop for n in range(len(s)) if text[:end].endswith(s[:n])]
        held = max(map(len, starts), default=0)
        assert detokenizer.text == text[: end - held]


@pytest.mark.parametrize("string", [END_OF_SENTENCE, STOP])
def test_a_terminator_ends_the_answer_and_gives_back_what_was_held(string):
    end = TINY.require(string)
    ids = one_by_one("x ST")
    detokenizer = Detokenizer(TINY, ("STOP",), (END, TINY.require(STOP)))
    assert "".join(detokenizer.push(i) for i in ids) == "x "
    assert detokenizer.push(end) == "ST"
    assert detokenizer.stopped == end
    assert detokenizer.push(ids[0]) == "" and detokenizer.finish() == "" and detokenizer.text == "x ST"


def test_after_a_stop_text_nothing_more_comes():
    pieces, stopped = run(one_by_one("abSTOPcd"), ("STOP",))
    assert "".join(pieces) == "ab" and stopped == "STOP"
