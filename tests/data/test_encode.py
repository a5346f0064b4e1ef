"""Which tokens are learned."""

import av
import pytest

from data.conversation import Conversation, Message, Part, VideoSampling
from data.encode import encode
from data.errors import DataError, TooLongError
from data.media import MediaFolder
from ernie_model.images import MediaError


def drawing(example):
    """Two lines: the tokens, and under each the weight of predicting the next one."""
    return "".join(map(chr, example.token_T.tolist())), "".join(f"{weight:g}" for weight in example.weight_T.tolist())


def test_the_assistants_words_are_targets_and_nothing_else(talk, processor):
    example = encode(talk("a", "hi", "yo", "ok", "bye"), processor)

    assert drawing(example) == (
        "uhiayo$uokabye$",
        "000111000011110",
    )
    #  the weight stands one place before the letter it is for: "a" predicts "y", "y" predicts "o", "o" predicts "$"
    assert example.target_T.tolist() == [*map(ord, "hiayo$uokabye$"), 0]


def test_media_are_not_learned(processor, png):
    conversation = Conversation(
        id="a",
        messages=(
            Message(role="user", parts=(Part.of_image(png), Part.of_text("?"))),
            Message(role="assistant", parts=(Part.of_text("7"),)),
        ),
    )

    example = encode(conversation, processor)

    assert drawing(example) == ("u[**]?a7$", "000000110")
    assert (example.num_tokens, example.num_patches, example.grids) == (9, 16, ((1, 4, 4),))
    assert example.num_bytes == 9 * (8 + 8 + 4 + 3 * 8) + 16 * 3 * 4


def test_a_message_can_be_left_out_or_weighted(processor):
    def said(text, **options):
        return Message(role="assistant", parts=(Part.of_text(text),), **options)

    user = Message(role="user", parts=(Part.of_text("?"),))
    conversation = Conversation(
        id="a", messages=(user, said("no", train=False), user, said("so", weight=2.0), user, said("ok", train=True))
    )

    assert drawing(encode(conversation, processor)) == (
        "u?ano$u?aso$u?aok$",
        "000000002220001110",
    )


@pytest.mark.parametrize("options", [{"train": False}, {"weight": 0.0}])
def test_nothing_to_learn_is_an_error(talk, processor, options):
    with pytest.raises(DataError, match="record 'a': no token is trained"):
        encode(talk("a", "hi", "yo", **options), processor)


def test_no_assistant_message_is_an_error(talk, processor):
    with pytest.raises(DataError, match="record 'a': no token is trained"):
        encode(talk("a", "hi"), processor)


def test_too_long_names_the_record_and_both_lengths(talk, processor):
    encode(talk("a", "hi", "yo"), processor, max_tokens=7)
    with pytest.raises(TooLongError, match=r"record 'a': 7 tokens, more than a row holds \(data.max_tokens=6\)"):
        encode(talk("a", "hi", "yo"), processor, max_tokens=6)


def test_too_many_patches(processor, png):
    messages = (
        Message(role="user", parts=(Part.of_image(png),) * 2),
        Message(role="assistant", parts=(Part.of_text("7"),)),
    )
    with pytest.raises(TooLongError, match="32 image patches.*data.max_patches=31"):
        encode(Conversation(id="a", messages=messages), processor, max_patches=31)


def test_without_every_turn_only_the_last_is_learned(talk, processor):
    conversation = talk("a", "hi", "yo", "ok", "bye")

    assert drawing(encode(conversation, processor, every_turn=False)) == (
        "uhiayo$uokabye$",
        "000000000011110",
    )


def test_asking_for_a_turn_that_is_history_is_an_error(talk, processor):
    with pytest.raises(DataError, match=r"messages\[1\].train is true, but with every_turn=False"):
        encode(talk("a", "hi", "yo", "ok", "bye", train=True), processor, every_turn=False)


def test_a_video_is_sampled_as_its_part_says(real_processor, tmp_path):
    """A record's wish reaches the frames; one that the video cannot grant names the file and the record."""
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        for _ in range(40):
            container.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))
        container.mux(stream.encode())

    def frames(sampling):
        user = Message(role="user", parts=(Part.of_video("a.mp4", sampling),))
        answer = Message(role="assistant", parts=(Part.of_text("yes"),))
        conversation = Conversation(id="door", messages=(user, answer))
        return encode(conversation, real_processor, media=MediaFolder(tmp_path)).grids[0][0]

    assert frames(None) == 16
    assert frames(VideoSampling(fps=2)) == 8
    assert frames(VideoSampling(num_frames=4, start_s=1)) == 4
    assert frames(VideoSampling(fps=2, start_s=2, end_s=3)) == 2
    with pytest.raises(MediaError, match=r"a.mp4.*start_s is 9, but the video is 4.00 s long.*record 'door'"):
        frames(VideoSampling(start_s=9))
