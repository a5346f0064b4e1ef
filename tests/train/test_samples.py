"""Samples say what the batch says: checked against the conversation they were made from."""

import io

import pytest
from PIL import Image

from data.conversation import Conversation, Message, Part
from data.encode import encode
from data.pack import collate
from ernie_model.processor import Processor
from ernie_model.tokenizer import load_tiny_tokenizer, tiny_tokenizer_ids
from tests.train import small
from train.samples import Segment, Witness, samples_of, segments_of, token_texts


def picture(width: int, height: int) -> Image.Image:
    """No two columns alike, no two rows either."""
    image = Image.new("RGB", (width, height))
    image.putdata([(x % 256, y % 256, (x * y) % 256) for y in range(height) for x in range(width)])
    return image


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def witness() -> Witness:
    return Witness(Processor(load_tiny_tokenizer(), small.CONFIG.replace(**tiny_tokenizer_ids())))


def talk(id: str, *media: bytes, **of_answer) -> Conversation:
    asked = Message(role="user", parts=(*map(Part.of_image, media), Part.of_text("Which?")))
    answered = Message(role="assistant", parts=(Part.of_text("This one."),), **of_answer)
    return Conversation(id=id, messages=(asked, answered))


@pytest.fixture(scope="module")
def row(witness):
    small, wide = png(picture(56, 56)), png(picture(112, 56))
    talks = [talk("a", small), talk("b", reasoning="Hm."), talk("c", wide, small, weight=0.5)]
    return collate([encode(one, witness) for one in talks])


def test_what_is_trained_is_what_the_assistant_wrote(witness, row):
    a, b, c = samples_of(row, witness, row=7)
    assert [sample.id for sample in (a, b, c)] == ["a", "b", "c"] and (b.row, b.segment) == (7, 1)
    for sample, weight in ((a, 1), (b, 1), (c, 0.5)):
        trained = "".join(t for t, w in zip(sample.texts, sample.weights, strict=True) if w)
        thought = "\nHm.\n</think>\n" if sample is b else ""
        assert trained == f"{thought}This one.<|end_of_sentence|>"
        assert set(sample.weights) == {0, weight} and sample.num_trained == sum(w != 0 for w in sample.weights)
    # ... which is also who the spans say wrote it
    for span in b.authors.spans:
        assert span.generated == bool(b.weights[span.start])
    assert b.authors.roles == ("user", "assistant")


def test_positions_and_pools_are_those_of_the_batch(witness, row):
    a, _, c = samples_of(row, witness, row=0)
    assert [list(axis) for axis in zip(*a.positions, strict=True)] == row.position_3T[:, : len(a.ids)].tolist()
    assert [list(axis) for axis in zip(*c.positions, strict=True)] == row.position_3T[:, -len(c.ids) :].tolist()
    start = a.media[0].start
    assert a.texts[start] == "<|IMAGE_PLACEHOLDER|>" and a.texts[start - 1] == "<|IMAGE_START|>"
    # 2 x 2 placeholders between their start and end tokens
    assert [index for index, vision in enumerate(a.in_vision_pool) if vision] == list(range(start - 1, start + 5))


def test_pictures_come_back_pixel_by_pixel(witness, row):
    a, _, c = samples_of(row, witness, row=0)
    assert [m.grid for m in c.media] == [(1, 4, 8), (1, 4, 4)] and [m.num_tokens for m in c.media] == [8, 4]
    for medium, (width, height) in zip((*a.media, *c.media), ((56, 56), (112, 56), (56, 56)), strict=True):
        (frame,) = medium.frames  # these sizes are multiples of 28, so nothing was resized
        assert frame.size == (width, height) and frame.tobytes() == picture(width, height).tobytes()


def test_segments_share_out_the_row(witness, row):
    a, b, c = segments_of(row, witness, {2: 5})
    lengths = row.lengths
    assert a == Segment("a", lengths[0], trained=a.trained, media_tokens=4, patches=16)
    assert b.media_tokens == b.patches == 0
    assert (c.media_tokens, c.patches, c.sample) == (12, 48, 5)
    assert a.trained + b.trained + c.trained == int((row.weight_T != 0).sum())


def test_a_letter_of_several_tokens_is_written_by_the_last(witness):
    ids, _ = witness.tokenizer.encode_plain("a 图\n")
    assert token_texts(ids, witness.tokenizer) == ["a", " ", "·", "·", "图", "\n"]
    half = [token for token in ids if (witness.tokenizer.token(token) or "").startswith("<0xE5")]
    assert token_texts(half * 6, witness.tokenizer) == ["·"] * 6  # bytes that never become a letter
