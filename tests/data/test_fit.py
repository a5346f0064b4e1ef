"""Conversations that are longer than a row."""

import io

import pytest
from PIL import Image

from data.conversation import Conversation, Message, Part, ToolCall
from data.errors import DataError, TooLongError
from data.fit import Rules, TooLong, encoded, fit, shorter_ones, split_turns
from data.media import MediaFolder

NOWHERE = MediaFolder(None)


def said(role, text, **options):
    return Message(role=role, parts=(Part.of_text(text),), **options)


def texts(conversation):
    return " ".join(message.text for message in conversation.messages)


def dialogue(*messages):
    return Conversation(id="a", messages=messages)


S, U1, A1, U2, A2, U3, A3 = (
    said(role, text)
    for role, text in [
        ("system", "S"),
        ("user", "u1"),
        ("assistant", "a1"),
        ("user", "u2"),
        ("assistant", "a2"),
        ("user", "u3"),
        ("assistant", "a3"),
    ]
)


def test_turns_go_from_the_oldest_and_the_system_message_stays():
    shorter = [texts(one) for one in shorter_ones(dialogue(S, U1, A1, U2, A2, U3, A3))]

    assert shorter == ["S u2 a2 u3 a3", "S u3 a3"]


def test_a_call_and_its_result_are_never_parted():
    call = Message(role="assistant", tool_calls=(ToolCall("look", {}, id="c1"),))
    result = said("tool", "r1", tool_call_id="c1")

    # in one turn: they go together
    assert [texts(one) for one in shorter_ones(dialogue(S, U1, call, result, A1, U2, A2))] == ["S u2 a2"]
    # the result comes two turns later: all of that goes at once
    late = dialogue(S, U1, call, U2, A2, U3, result, A3, said("user", "u4"), said("assistant", "a4"))
    assert [texts(one) for one in shorter_ones(late)] == ["S u4 a4"]
    system, turns = split_turns(late.messages)
    assert (len(system), [len(turn) for turn in turns]) == (1, [7, 2])


def test_a_conversation_that_fits_is_left_alone(talk, processor):
    conversation = talk("a", "hi", "yo")
    for policy in TooLong:
        fitted = fit(conversation, processor, NOWHERE, Rules(max_tokens=7, too_long=policy))
        assert fitted.item is conversation and not fitted.is_changed and fitted.is_whole


def test_as_few_turns_as_possible_are_dropped(talk, processor):
    conversation = talk("a", "aaaa", "bbbb", "cc", "dd", "ee", "ff")  # 11 + 7 + 7 tokens

    def kept(max_tokens):
        return texts(
            fit(conversation, processor, NOWHERE, Rules(max_tokens=max_tokens, too_long=TooLong.DROP_TURNS)).item
        )

    assert kept(24) == kept(14) == "cc dd ee ff"
    assert kept(13) == kept(7) == "ee ff"
    with pytest.raises(TooLongError, match=r"25 tokens.*data.max_tokens=6.*Its last turn alone is too long"):
        kept(6)


def test_dropping_what_was_trained_is_no_way_out(processor):
    conversation = dialogue(U1, A1, U2, said("assistant", "a2", train=False))
    with pytest.raises(TooLongError, match=r"What fits after dropping turns: record 'a': no token is trained"):
        fit(conversation, processor, NOWHERE, Rules(max_tokens=7, too_long=TooLong.DROP_TURNS))


@pytest.mark.parametrize("policy", [TooLong.QUARANTINE, TooLong.SHRINK_IMAGES])
def test_text_is_never_shortened(talk, processor, policy):
    with pytest.raises(TooLongError, match="7 tokens, more than a row holds"):
        fit(talk("a", "hi", "yo"), processor, NOWHERE, Rules(max_tokens=6, too_long=policy))


# ---- pictures, with the real processor


@pytest.fixture(scope="module")
def photos():
    def picture(width, height):
        file = io.BytesIO()
        Image.new("RGB", (width, height), "teal").save(file, format="JPEG")
        return Part.of_image(file.getvalue())

    user = Message(role="user", parts=(picture(560, 840), picture(280, 280), Part.of_text("Alike?")))
    return dialogue(user, said("assistant", "No."))


def test_sizes_from_headers_are_those_of_the_pixels(photos, real_processor):
    rules = Rules(max_tokens=4096)

    fitted = fit(photos, real_processor, NOWHERE, rules)
    example = encoded(photos, real_processor, NOWHERE, rules, None, pixels=True)

    assert fitted.example.grids == example.grids == ((1, 60, 40), (1, 20, 20))
    assert fitted.example.token_T.equal(example.token_T) and fitted.example.position_3T.equal(example.position_3T)
    assert fitted.example.num_patches == example.num_patches == len(example.patch_PX) == 2800
    assert not fitted.is_whole and len(fitted.example.patch_PX) == 0


def test_pictures_shrink_no_further_than_they_must(photos, real_processor):
    whole = fit(photos, real_processor, NOWHERE, Rules(max_tokens=4096)).example.num_tokens
    limit = whole - 250  # of 600 + 100 image tokens

    fitted = fit(photos, real_processor, NOWHERE, Rules(max_tokens=limit, too_long=TooLong.SHRINK_IMAGES))

    example = encoded(photos, real_processor, NOWHERE, Rules(max_tokens=limit), fitted.max_image_pixels, pixels=True)
    assert fitted.is_changed and example.grids == fitted.example.grids
    assert limit - 40 < example.num_tokens <= limit  # a row or column of the larger picture is 18 to 28 tokens
    assert example.grids[1] == (1, 20, 20)  # the smaller one was small enough
    with pytest.raises(TooLongError):
        encoded(
            photos, real_processor, NOWHERE, Rules(max_tokens=limit), fitted.max_image_pixels + 784 * 30, pixels=True
        )


def test_a_floor_is_kept(photos, real_processor):
    rules = Rules(max_tokens=100, too_long=TooLong.SHRINK_IMAGES, min_image_pixels=100 * 784)
    with pytest.raises(TooLongError, match=r"With its pictures shrunk to data.min_image_pixels=78400: .* tokens"):
        fit(photos, real_processor, NOWHERE, rules)


def test_a_picture_that_is_refused_by_its_header_is_named(tmp_path, real_processor):
    Image.new("RGB", (8, 2000)).save(tmp_path / "thin.png")
    conversation = dialogue(Message(role="user", parts=(Part.of_image("thin.png"),)), A1)
    with pytest.raises(Exception, match="thin.png: the picture has 8 x 2000 pixels"):
        fit(conversation, real_processor, MediaFolder(tmp_path), Rules(max_tokens=100))


def test_sizes_need_no_pixels(tmp_path, png, processor):
    (tmp_path / "half.png").write_bytes(png[: len(png) * 2 // 3])
    conversation = dialogue(Message(role="user", parts=(Part.of_image("half.png"),)), A1)
    media = MediaFolder(tmp_path)

    fitted = fit(conversation, processor, media, Rules(max_tokens=100))

    assert fitted.example.num_patches == 16
    with pytest.raises((DataError, Exception), match="half.png"):
        encoded(conversation, processor, media, Rules(max_tokens=100), None, pixels=True)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tiff"])
def test_a_picture_lying_on_its_side_is_measured_upright(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(tmp_path / f"a.{ending}", exif=exif)
    media = MediaFolder(tmp_path)

    assert media.image_size(f"a.{ending}") == media.open_image(f"a.{ending}").size
