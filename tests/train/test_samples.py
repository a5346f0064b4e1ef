"""Samples say what the batch says: checked against the conversation they were made from."""

import io

import pytest
from PIL import Image

from data.batch import Role
from data.conversation import Conversation, Judged, Message, Pair, Part
from data.corrupt import Corruption
from data.encode import encode, encode_labelled, encode_pair
from data.media import media_name
from data.pack import collate
from ernie_model.processor import Processor
from ernie_model.tokenizer import load_tiny_tokenizer, tiny_tokenizer_ids
from tests.train import small
from train.samples import Stretch, Witness, samples_of, stretches_of, token_texts


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
    assert [sample.id for sample in (a, b, c)] == ["a", "b", "c"] and (b.row, b.record) == (7, 1)
    for sample, weight in ((a, 1), (b, 1), (c, 0.5)):
        trained = "".join(t for t, w in zip(sample.texts, sample.weights, strict=True) if w)
        thought = "\nHm.\n</think>\n" if sample is b else ""
        assert trained == f"{thought}This one.<|end_of_sentence|>"
        assert set(sample.weights) == {0, weight} and sample.num_trained == sum(w != 0 for w in sample.weights)
    # ... which is also who the spans say wrote it
    for span in b.spans:
        assert span.generated == bool(b.weights[span.start])
    assert b.sections[0].roles == ("user", "assistant")


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


def test_stretches_share_out_the_row(witness, row):
    a, b, c = stretches_of(row, witness, {2: 5})
    lengths = row.lengths
    assert a == Stretch("a", lengths[0], trained=a.trained, media_tokens=4, patches=16)
    assert b.media_tokens == b.patches == 0
    assert (c.media_tokens, c.patches, c.sample) == (12, 48, 5)
    assert a.trained + b.trained + c.trained == int((row.weight_T != 0).sum())


def test_a_letter_of_several_tokens_is_written_by_the_last(witness):
    ids, _ = witness.tokenizer.encode_plain("a 图\n")
    assert token_texts(ids, witness.tokenizer) == ["a", " ", "·", "·", "图", "\n"]
    half = [token for token in ids if (witness.tokenizer.token(token) or "").startswith("<0xE5")]
    assert token_texts(half * 6, witness.tokenizer) == ["·"] * 6  # bytes that never become a letter


def assistant(text: str, **more) -> Message:
    return Message(role="assistant", parts=(Part.of_text(text),), **more)


@pytest.fixture(scope="module")
def pair() -> Pair:
    """A picture in the question, another one in the chosen answer."""
    asked = Message(role="user", parts=(Part.of_image(png(picture(56, 56))), Part.of_text("Which?")))
    seen = Message(role="tool", parts=(Part.of_image(png(picture(112, 56))),))
    return Pair(
        prompt=Conversation(id="p", messages=(asked,)),
        chosen=(assistant("Look."), seen, assistant("This one.")),
        rejected=(assistant("That one.", weight=0.5),),
        chosen_score=3.0,
        rejected_score=1.5,
    )


def written(sample, section) -> str:
    places = range(section.start, section.stop)
    return "".join(sample.texts[place] for place in places if sample.weights[place])


def test_a_pair_is_one_sample_of_a_prompt_and_two_answers(witness, pair):
    batch = collate(
        [encode(talk("a"), witness), encode_pair(pair, witness), encode(talk("c", png(picture(56, 56))), witness)]
    )
    _, sample, last = samples_of(batch, witness, row=0)
    prompt, chosen, rejected = sample.sections

    assert [section.role for section in sample.sections] == [Role.PROMPT, Role.CHOSEN, Role.REJECTED]
    assert (prompt.score, chosen.score, rejected.score) == (None, 3.0, 1.5)
    assert [section.stop for section in sample.sections[:2]] == [chosen.start, rejected.start]
    assert rejected.stop == len(sample.ids) == len(sample.weights) == len(sample.texts)
    said = "Look.<|end_of_sentence|>This one.<|end_of_sentence|>"
    assert [written(sample, one) for one in sample.sections] == ["", said, "That one.<|end_of_sentence|>"]
    assert set(sample.weights[rejected.start :]) == {0, 0.5}
    for section in sample.sections:  # spans cover the section, and what is trained is what an assistant wrote
        assert [span.start for span in section.spans] == [section.start, *(span.stop for span in section.spans[:-1])]
        assert section.spans[-1].stop == section.stop
        for span in section.spans:
            assert bool(sample.weights[span.start]) == (span.generated and section.role is not Role.PROMPT)
    assert chosen.roles == ("user", "assistant", "tool", "assistant") and rejected.roles == ("user", "assistant")
    assert [medium.grid for medium in sample.media] == [(1, 4, 4), (1, 4, 8)]
    files = [part.media for part in pair.parts if part.media]
    assert [medium.name for medium in sample.media] == [media_name(file) for file in files] and len(set(files)) == 2
    for medium, size in zip(sample.media, ((56, 56), (112, 56)), strict=True):
        assert medium.frames[0].tobytes() == picture(*size).tobytes()
        assert sample.texts[medium.start - 1] == "<|IMAGE_START|>"
        assert sample.texts[medium.start + medium.num_tokens] == "<|IMAGE_END|>"
    assert last.media[0].frames[0].tobytes() == picture(56, 56).tobytes()  # nobody took another's picture


def test_corrupted_pictures_are_seen(witness, pair):
    (sample,) = samples_of(collate([encode_pair(pair, witness, corruption=Corruption())]), witness, row=0)

    assert sample.sections[-1].role is Role.CORRUPTED
    assert written(sample, sample.sections[-1]) == written(sample, sample.sections[1])
    grids = [medium.grid for medium in sample.media]
    assert grids == [(1, 4, 4), (1, 4, 8)] * 2
    first, _, corrupted, _ = sample.media
    assert first.frames[0].size == corrupted.frames[0].size
    assert first.frames[0].tobytes() != corrupted.frames[0].tobytes()


def test_a_labelled_answer_and_another_records(witness, pair):
    conversation = Conversation(id="k", messages=(*pair.prompt.messages, *pair.rejected), label=False)
    judged = Judged(conversation=conversation, other=(assistant("Seven."),))
    (sample,) = samples_of(collate([encode_labelled(judged, witness)]), witness, row=0)

    assert [section.role for section in sample.sections] == [Role.PROMPT, Role.UNWANTED, Role.MISMATCHED]
    assert written(sample, sample.sections[2]) == "Seven.<|end_of_sentence|>"


def test_a_pair_is_one_stretch_of_its_row(witness, pair):
    batch = collate([encode(talk("a"), witness), encode_pair(pair, witness)])
    a, p = stretches_of(batch, witness, {1: 0})

    assert (a.id, p.id, a.sample, p.sample) == ("a", "p", None, 0)
    assert a.tokens + p.tokens == batch.num_tokens and p.tokens == sum(batch.lengths[1:])
    assert p.patches == 16 + 32 and p.media_tokens == 4 + 8
    assert a.trained + p.trained == int((batch.weight_T != 0).sum())
