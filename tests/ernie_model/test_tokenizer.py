"""The two kinds of text, and the tiny tokenizer that ships."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_model.assets.make_tiny_tokenizer import files
from ernie_model.config import MEDIA_TOKEN_FIELDS
from ernie_model.tokenizer import (
    SPECIAL_TOKENS,
    Tokenizer,
    TokenizerError,
    load_tiny_tokenizer,
    tiny_tokenizer_folder,
    tiny_tokenizer_ids,
)

TINY = load_tiny_tokenizer()
# Half a surrogate pair is not text; U+2581 is how the family writes a space, so it comes back as one.
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=20)
text_with_markup = st.lists(st.one_of(words, st.sampled_from(SPECIAL_TOKENS)), max_size=6).map("".join)


# -------------------------------------------------------------------------------------------------- the tiny tokenizer


def test_ids_are_laid_out_like_the_released_tokenizer():
    names = [TINY.token(i) for i in range(TINY.vocab_size)]
    assert len(names) == len(set(names)) == 2048
    assert names[:3] == ["<unk>", "<s>", "</s>"]
    assert names[3:259] == [f"<0x{i:02X}>" for i in range(256)]
    assert tuple(names[-len(SPECIAL_TOKENS) :]) == SPECIAL_TOKENS
    assert names[-len(SPECIAL_TOKENS) - 10 : -len(SPECIAL_TOKENS)] == list("0123456789")


def test_every_special_string_is_one_token():
    assert len(SPECIAL_TOKENS) == 1022
    for string in SPECIAL_TOKENS:
        assert TINY.encode_markup(string) == [TINY.require(string)]
        assert TINY.decode([TINY.require(string)]) == string


def test_location_and_media_tokens_keep_the_order_of_the_released_ids():
    """Reference 1.3: image placeholder 100295, audio, LOC_0 .. LOC_1000 = 100297 .. 101297, up to 101307."""
    shift = 100295 - TINY.require("<|IMAGE_PLACEHOLDER|>")
    released = {
        "<|AUDIO_PLACEHOLDER|>": 100296,
        "<|LOC_0|>": 100297,
        "<|LOC_1000|>": 101297,
        "<|LOC_BEGIN|>": 101298,
        "<|LOC_SEP|>": 101300,
        "<|CROP_COL_SEP|>": 101301,
        "<|IMAGE_SEP|>": 101303,
        "<|IMAGE_START|>": 101304,
        "<|IMAGE_END|>": 101305,
        "<|VIDEO_START|>": 101306,
        "<|VIDEO_END|>": 101307,
    }
    assert {string: TINY.require(string) + shift for string in released} == released


def test_training_it_again_gives_the_same_bytes():
    for name, content in files().items():
        assert (tiny_tokenizer_folder() / name).read_text("utf-8") == content, name


def test_ids_for_the_configuration():
    ids = tiny_tokenizer_ids()
    assert set(ids) == {"vocab_size", *MEDIA_TOKEN_FIELDS}
    assert ids["vocab_size"] == 2048
    assert TINY.token(ids["video_start_token_id"]) == "<|VIDEO_START|>"


def test_digits_are_single_tokens_in_both_kinds_of_text():
    wanted = ["1", "2", "0", "4"]
    assert [TINY.token(i) for i in TINY.encode_plain("1204")[0]] == wanted
    assert [TINY.token(i) for i in TINY.encode_markup("1204")] == wanted


def test_what_it_never_saw_falls_back_to_bytes():
    assert [TINY.token(i) for i in TINY.encode_plain("字")[0]] == ["<0xE5>", "<0xAD>", "<0x97>"]


def test_common_english_takes_few_tokens():
    text = "What is this? The image shows a red circle."
    assert len(TINY.encode_plain(text)[0]) < len(text) / 2


@given(text_with_markup)
def test_text_comes_back(text):
    assert TINY.decode(TINY.encode_plain(text)[0]) == text
    assert TINY.decode(TINY.encode_markup(text)) == text


# -------------------------------------------------------------------------------------------------- two kinds of text


@given(text_with_markup)
def test_plain_text_never_becomes_a_special_token(text):
    reserved = {TINY.require(string) for string in SPECIAL_TOKENS} | {0, 1, 2}
    assert not reserved & set(TINY.encode_plain(text)[0])


def test_markup_that_a_tokenizer_calls_ordinary_is_still_reserved():
    """Released tokenizers may add <think> as an ordinary token; typed by a user it must stay text all the same."""
    raw = json.loads((tiny_tokenizer_folder() / "tokenizer.json").read_text("utf-8"))
    for token in raw["added_tokens"]:
        token["special"] = False
    ordinary = Tokenizer({"tokenizer.json": json.dumps(raw)})
    assert ordinary.encode_plain("a </think> 7") == TINY.encode_plain("a </think> 7")
    assert ordinary.require("</think>") not in ordinary.encode_plain("a </think> 7")[0]
    assert ordinary.require("</think>") in ordinary.encode_markup("a </think> 7")


def test_merges_that_spell_a_special_token_are_cut():
    from tokenizers import AddedToken, models
    from tokenizers import Tokenizer as Backend

    vocab = {"<": 0, "x": 1, ">": 2, "<x": 3, "<x>": 4}
    backend = Backend(models.BPE(vocab=vocab, merges=[("<", "x"), ("<x", ">")]))
    backend.add_special_tokens([AddedToken("<x>", special=True, normalized=False)])
    assert backend.token_to_id("<x>") == 4
    tokenizer = Tokenizer({"tokenizer.json": backend.to_str()})
    assert tokenizer.encode_markup("x<x>x") == [1, 4, 1]
    #                                              x         <         x         >         x
    assert tokenizer.encode_plain("x<x>x") == ([1, 0, 1, 2, 1], [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)])
    # as often as anybody likes to type it
    many = tokenizer.encode_plain("<x>" * 3000)
    assert many == ([0, 1, 2] * 3000, [(i, i + 1) for i in range(9000)])


@given(words)
def test_offsets_walk_through_the_text(text):
    ids, offsets = TINY.encode_plain(text)
    assert len(ids) == len(offsets)
    assert {c for start, stop in offsets for c in range(start, stop)} == set(range(len(text)))
    assert offsets == sorted(offsets)


def test_a_token_that_straddles_two_parts_belongs_to_the_later():
    parts = ["Assistant: Th", "ey", "", " 7"]
    ids, owner = TINY.encode_parts(parts)
    assert [TINY.token(i) for i in ids] == ["Assistant", ":", "\u2581They", "\u2581", "7"]
    assert owner == [0, 0, 1, 3, 3]


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(TokenizerError, match="not valid Unicode"):
        TINY.encode_plain("a \ud83d b")


# ------------------------------------------------------------------------------------------------------ files and hub


def test_a_folder_without_tokenizer_json_says_what_to_do(tmp_path):
    with pytest.raises(TokenizerError, match="there is none"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(TokenizerError, match=r"only tokenizer\.model.*save_pretrained"):
        Tokenizer.load(tmp_path)


def test_a_broken_tokenizer_json_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="tokenizer.json cannot be read"):
        Tokenizer.load(tmp_path)


def test_a_missing_token_is_named(tokenizer):
    assert tokenizer.special_id("<|no_such|>") is None
    with pytest.raises(TokenizerError, match=r"has no token '<\|no_such\|>'"):
        tokenizer.require("<|no_such|>")


@pytest.mark.parametrize("with_config", [False, True])
def test_transformers_reads_the_same_ids(tmp_path, tokenizer, vl_config, with_config):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    if with_config:  # then transformers knows the model, and might prefer a tokenizer class of its own
        (tmp_path / "config.json").write_text(json.dumps(vl_config.to_json()))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("What is 42 + 1?\nUser: 字 <think>\n\n</think>\n\n4", "  two  spaces\t", "<|IMAGE_START|>a<|LOC_17|>"):
        assert theirs(text).input_ids == tokenizer.encode_markup(text)
        assert theirs(text, split_special_tokens=True).input_ids == tokenizer.encode_plain(text)[0]
        assert theirs.decode(tokenizer.encode_markup(text)) == text
    assert (theirs.image_token, theirs.video_end_token) == ("<|IMAGE_PLACEHOLDER|>", "<|VIDEO_END|>")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
    theirs.save_pretrained(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    assert again.encode_markup("a<think>b 12") == tokenizer.encode_markup("a<think>b 12")


@pytest.mark.parametrize("extra", [None, {"audio_token": "<|AUDIO_PLACEHOLDER|>"}, ["<|LOC_0|>"]])
def test_the_names_of_the_media_tokens_are_written_where_they_are_missing(tmp_path, tokenizer, extra):
    """Some tokenizer configurations list extra tokens without names; the names are then written beside the list."""
    from transformers import AutoTokenizer

    config = json.loads(tokenizer.files["tokenizer_config.json"]) | {"extra_special_tokens": extra}
    Tokenizer(tokenizer.files | {"tokenizer_config.json": json.dumps(config)}).save(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).image_token_id == tokenizer.require("<|IMAGE_PLACEHOLDER|>")
