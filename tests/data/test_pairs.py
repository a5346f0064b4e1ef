"""Records of several answers: one prompt, one row of several segments, and the same numbers as whole conversations."""

import dataclasses
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.batch import Role
from data.conversation import Conversation, Judged, Message, Pair, Part, ToolCall
from data.corrupt import Corrupt, Corruption, corrupted, crop_box
from data.encode import encode, encode_labelled, encode_pair
from data.errors import DataError, TooLongError
from data.media import MediaFolder
from data.pack import collate
from ernie_model.images import image_patches
from tests.tiny import tiny_processor

PROCESSOR = tiny_processor()


def png(seed, width=64, height=48):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


PICTURES = [png(seed, 56 + 28 * seed, 56) for seed in range(3)]


def say(role, *parts, **more):
    made = tuple(Part.of_image(part) if isinstance(part, bytes) else Part.of_text(part) for part in parts)
    return Message(role=role, parts=made, **more)


def pair_of(chosen="yes", rejected="no", question=("?",), **more):
    answers = [
        answer if isinstance(answer, tuple) else (say("assistant", answer),) if answer else ()
        for answer in (chosen, rejected)
    ]
    prompt = Conversation(id="p", messages=(say("user", *question),))
    return Pair(prompt=prompt, chosen=answers[0], rejected=answers[1], **more)


def text_of(processor, example):
    """Each segment, and the weights below it."""
    out, start = [], 0
    for length in example.lengths:
        out.append("".join(map(chr, example.token_T[start : start + length].tolist())))
        out.append("".join(f"{weight:g}" for weight in example.weight_T[start : start + length].tolist()))
        start += length
    return out


def test_a_pair_is_its_prompt_and_two_branches_that_repeat_its_last_token(processor):
    example = encode_pair(pair_of("yes", "no", chosen_score=4.5, rejected_score=2.0), processor)

    assert text_of(processor, example) == ["u?", "00", "ayes$", "11110", "ano$", "1110"]
    assert example.target_T.tolist() == [ord("?"), 0, *map(ord, "yes$"), 0, *map(ord, "no$"), 0]
    assert example.stems == (-1, 0, 0)
    assert example.roles == (Role.PROMPT, Role.CHOSEN, Role.REJECTED)
    assert example.position_3T[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 2, 3, 4, 5]
    assert math.isnan(example.scores[0]) and example.scores[1:] == (4.5, 2.0)


def test_turns_of_the_prompt_and_results_of_tools_are_not_learned_and_messages_are_weighted(processor):
    prompt = (say("user", "?"), say("assistant", "hm", train=True), say("user", "!"))
    chosen = (say("assistant", "call", weight=2.0), say("tool", "7"), say("assistant", "ok"))
    pair = Pair(prompt=Conversation(id="p", messages=prompt), chosen=chosen, rejected=(say("assistant", "no"),))

    assert text_of(processor, encode_pair(pair, processor)) == [
        "u?ahm$u!", "00000000", "acall$t7aok$", "222220001110", "ano$", "1110"
    ]  # fmt: skip


WORDS = st.text("ab <|>\n7", min_size=1, max_size=8)
PICTURE = st.sampled_from(PICTURES)


@st.composite
def answers(draw, thinks):
    """One to three turns; a call's result may be a picture."""
    reasoning = draw(WORDS.filter(lambda text: text.strip("\n"))) if thinks else None
    turns = [say("assistant", draw(WORDS), reasoning=reasoning, weight=draw(st.sampled_from([1.0, 0.5])))]
    if draw(st.booleans()):
        turns[0] = dataclasses.replace(turns[0], tool_calls=(ToolCall("zoom", {"x": 1}),))
        turns.append(say("tool", *draw(st.lists(PICTURE | WORDS, min_size=1, max_size=2))))
        turns.append(say("assistant", draw(WORDS), train=draw(st.sampled_from([None, False]))))
    return tuple(turns)


@st.composite
def pairs(draw):
    thinks = draw(st.booleans())
    messages = [say("system", draw(WORDS))] if draw(st.booleans()) else []
    if draw(st.booleans()):
        messages += [say("user", draw(WORDS)), say("assistant", draw(WORDS))]
    messages.append(say("user", *draw(st.lists(PICTURE | WORDS, min_size=1, max_size=3))))
    prompt = Conversation(id=draw(st.text(max_size=3)), messages=tuple(messages))
    chosen, rejected = draw(answers(thinks)), draw(answers(thinks))
    return Pair(prompt=prompt, chosen=chosen, rejected=rejected)


def whole(conversation, asked):
    """The conversation on its own, the prompt as history: nothing of encode.py but its parts."""
    messages = conversation.to_chat(MediaFolder(None).open)
    encoded = PROCESSOR.encode(messages, written_from=asked)
    weight_T = torch.zeros(len(encoded.token_T))
    for span in encoded.spans:
        if span.generated and span.message >= asked:
            weight_T[span.start : span.stop] = conversation.messages[span.message].trained_weight
    return encoded, weight_T


@given(pairs(), st.booleans())
def test_prompt_and_branch_together_are_the_whole_conversation(pair, corrupt):
    asked = len(pair.prompt.messages)
    try:
        example = encode_pair(pair, PROCESSOR, corruption=Corruption() if corrupt else None)
    except DataError as error:
        assert "are the same" in str(error)
        return
    chosen, rejected = (whole(conversation, asked) for conversation in pair.conversations)
    segments = list(zip(example.roles, zip(*(
        stream.split(example.lengths, dim=-1)
        for stream in (example.token_T, example.target_T, example.weight_T, example.position_3T)
    ), strict=True), strict=True))  # fmt: skip
    (_, (stem_T, stem_target_T, stem_weight_T, stem_3T)), *branches = segments
    assert not stem_weight_T.any()
    assert torch.equal(stem_target_T[:-1], stem_T[1:])
    for role, (token_T, target_T, weight_T, position_3T) in branches:
        encoded, written_T = rejected if role is Role.REJECTED else chosen
        own = torch.cat([stem_T, token_T]) if role is not Role.CORRUPTED else token_T
        assert torch.equal(own, encoded.token_T)
        own_3T = torch.cat([stem_3T, position_3T], 1) if role is not Role.CORRUPTED else position_3T
        assert torch.equal(own_3T, encoded.position_3T)
        assert torch.equal(target_T[:-1], token_T[1:]) and not weight_T[-1]
        assert torch.equal(weight_T[:-1], written_T[-len(token_T) + 1 :])  # what is written here, one place earlier
        assert int((weight_T != 0).sum()) == int((written_T != 0).sum())  # nothing is lost
    shared = sum(part.media is not None for part in pair.prompt.parts)
    assert example.grids[: len(chosen[0].grids)] == chosen[0].grids
    own = rejected[0].grids[shared:]
    assert example.grids[len(chosen[0].grids) :][: len(own)] == own
    corrupted = Role.CORRUPTED in example.roles
    assert corrupted == (corrupt and bool(chosen[0].grids))
    assert len(example.grids) == len(chosen[0].grids) * (1 + corrupted) + len(own)
    if not example.grids:
        assert example.patch_PX is None
        return
    skipped = sum(map(math.prod, rejected[0].grids[:shared]))
    parts = [chosen[0].patch_PX, None if rejected[0].patch_PX is None else rejected[0].patch_PX[skipped:]]
    expected = torch.cat([part for part in parts if part is not None])
    assert torch.equal(example.patch_PX[: len(expected)], expected)
    again = example.patch_PX[len(expected) :]
    assert len(again) == (len(chosen[0].patch_PX) if corrupted else 0)
    if corrupted:
        assert not torch.equal(again, chosen[0].patch_PX)


def test_sizes_are_measured_without_pixels():
    pair = pair_of(question=(PICTURES[0], "what?"))
    for corruption in (None, Corruption()):
        sized = encode_pair(pair, PROCESSOR, pixels=False, corruption=corruption)
        full = encode_pair(pair, PROCESSOR, corruption=corruption)
        assert (sized.lengths, sized.grids, sized.num_patches) == (full.lengths, full.grids, full.num_patches)
        assert torch.equal(sized.token_T, full.token_T) and full.num_patches == len(full.patch_PX)


def test_every_picture_is_opened_once(monkeypatch):
    opened = []
    original = MediaFolder.open_image

    def counting(self, media):
        opened.append(media)
        return original(self, media)

    monkeypatch.setattr(MediaFolder, "open_image", counting)
    result = (say("assistant", "look"), say("tool", PICTURES[2]), say("assistant", "no"))
    encode_pair(pair_of("yes", result, question=(PICTURES[0], PICTURES[1])), PROCESSOR, corruption=Corruption())

    assert opened == PICTURES


@pytest.mark.parametrize("chosen", [True, False])
def test_a_labelled_answer_and_another_records(processor, talk, chosen):
    conversation = dataclasses.replace(talk("a", "?", "yes"), label=chosen)

    alone = encode_labelled(Judged(conversation=conversation), processor)
    assert text_of(processor, alone) == ["u?", "00", "ayes$", "11110"]
    assert alone.roles == (Role.PROMPT, Role.WANTED if chosen else Role.UNWANTED)

    both = encode_labelled(Judged(conversation=conversation, other=(say("assistant", "moo"),)), processor)
    assert text_of(processor, both) == ["u?", "00", "ayes$", "11110", "amoo$", "11110"]
    assert both.roles == (*alone.roles, Role.MISMATCHED) and both.stems == (-1, 0, 0) and not both.scores


def test_packed_the_stems_are_those_of_the_row(processor, talk):
    pair = encode_pair(pair_of(chosen_score=1.0, rejected_score=-1.0), processor)
    batch = collate([pair, encode(talk("c", "hi", "yo"), processor), pair])

    assert batch.stems == (-1, 0, 0, -1, -1, 4, 4)
    assert batch.records == (0, 0, 0, 1, 2, 2, 2)
    assert batch.ids == ("p", "p", "p", "c", "p", "p", "p")
    assert batch.scores[1:3] == (1.0, -1.0) and all(math.isnan(batch.scores[index]) for index in (0, 3, 4))


# -- what cannot be learned from --------------------------------------------------------------------------------------


def test_the_same_answer_twice_is_refused(processor):
    with pytest.raises(DataError, match=r"record 'p': chosen and rejected are the same, token by token"):
        encode_pair(pair_of("yes", "yes"), processor)


def test_the_same_words_after_other_pictures_are_a_pair():
    turns = [(say("assistant", "look"), say("tool", picture), say("assistant", "7")) for picture in PICTURES[:1] * 2]
    with pytest.raises(DataError, match="are the same"):
        encode_pair(pair_of(*turns), PROCESSOR)
    other = png(9, 56, 56)  # of the same size, so the tokens are the same too
    turns[1] = (turns[1][0], say("tool", other), turns[1][2])
    assert encode_pair(pair_of(*turns), PROCESSOR).num_patches == 32


def test_a_thought_on_one_side_makes_two_prompts():
    thought = (say("assistant", "7", reasoning="hm"),)
    with pytest.raises(DataError, match=r"chosen begins with a thought \(reasoning_content\) and rejected does not"):
        encode_pair(pair_of(thought, "7"), PROCESSOR)
    for thinking in (True, False):
        if thinking:
            assert encode_pair(pair_of(thought, "7"), PROCESSOR, thinking=thinking).lengths
        else:  # the thought is left out, and what remains is the same
            with pytest.raises(DataError, match="are the same"):
                encode_pair(pair_of(thought, "7"), PROCESSOR, thinking=thinking)


def test_an_answer_of_which_nothing_is_trained_is_named(processor):
    untrained = (say("assistant", "no", train=False),)
    with pytest.raises(DataError, match=r"record 'p': no token of rejected is trained"):
        encode_pair(pair_of("yes", untrained), processor)


def test_too_long_tells_both_lengths(processor):
    with pytest.raises(
        TooLongError,
        match=r"record 'p': 15 tokens \(3 of the prompt, 4 of chosen, 7 of rejected\), more than a row holds",
    ):
        encode_pair(pair_of("yes", "no, no"), processor, max_tokens=14)


# -- corrupted pictures -----------------------------------------------------------------------------------------------


def corrupted_patches(pair, **options):
    example = encode_pair(pair, PROCESSOR, corruption=Corruption(**options))
    size = math.prod(example.grids[-1])
    return example.patch_PX[:size], example.patch_PX[-size:]


def test_a_crop_is_a_small_part_enlarged_and_the_same_every_time():
    left, right = Image.new("RGB", (560, 280), "red"), Image.new("RGB", (280, 280), "blue")
    left.paste(right, (280, 0))
    file = io.BytesIO()
    left.save(file, format="PNG")
    pair = pair_of(question=(file.getvalue(), "?"))

    original, first = corrupted_patches(pair)
    assert torch.equal(first, corrupted_patches(pair)[1])
    assert first.shape == original.shape
    # A side is at most sqrt(0.2) = 0.45 of the picture's, so the left edge lies evenly in 0..0.55 at least: the crop is
    # red alone up to 0.05 and blue alone from 0.5 on.
    crops = [corrupted_patches(dataclasses.replace(pair, prompt=dataclasses.replace(pair.prompt, id=str(i))))[1]
             for i in range(20)]  # fmt: skip
    assert len({crop.numpy().tobytes() for crop in crops}) > 1
    assert any(crop.std(0).max() < 1e-3 for crop in crops)


def test_frames_are_cropped_alike_and_pictures_each_for_itself():
    pixels = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    patch_PX, (_, rows, columns) = image_patches(Image.fromarray(pixels), PROCESSOR.image)
    four_PX = torch.from_numpy(patch_PX).repeat(4, 1)

    film = corrupted(four_PX, [(4, rows, columns)], PROCESSOR, Corruption(), "a").view(4, rows * columns, -1)
    assert all(torch.equal(film[0], frame) for frame in film) and not torch.equal(film[0], four_PX[: rows * columns])
    photos = corrupted(four_PX, [(1, rows, columns)] * 4, PROCESSOR, Corruption(), "a").view(4, rows * columns, -1)
    assert len({photo.numpy().tobytes() for photo in photos}) == 4


@given(st.integers(28, 300), st.integers(28, 300), st.floats(0, 1), st.integers(0, 9))
def test_a_crop_lies_inside_and_keeps_no_more_than_is_said(width, height, keep, seed):
    left, top, right, bottom = crop_box(width, height, keep, np.random.default_rng(seed))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    side = keep**0.5  # of the picture's, less what is rounded off; one pixel at least
    for length, kept in ((width, right - left), (height, bottom - top)):
        assert max(1, side * length - 1) <= kept + 1e-9 and kept <= max(1, side * length)


@pytest.mark.parametrize("kind", [Corrupt.NOISE, Corrupt.BLANK])
def test_other_corruptions(kind):
    original, other = corrupted_patches(pair_of(question=(PICTURES[0], "?")), kind=kind)
    assert not torch.equal(original, other)
    assert (other.view(len(other), 3, -1).std(-1).max() < 1e-6) == (kind is Corrupt.BLANK)


def test_a_crop_of_everything_is_the_picture():
    original, same = corrupted_patches(pair_of(question=(PICTURES[0], "?")), keep_min=1.0, keep_max=1.0)
    assert torch.equal(original, same)


def test_text_alone_cannot_be_corrupted(processor):
    assert Role.CORRUPTED not in encode_pair(pair_of(), processor, corruption=Corruption()).roles


def test_shares_that_are_none_are_refused():
    with pytest.raises(DataError, match=r"keeps 0.3 to 0.2 of its area"):
        Corruption(keep_min=0.3)
