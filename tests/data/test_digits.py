"""The digits: real scans, split without leaks, the same from memory and from disk."""

import hashlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from data.conversation import PartKind
from data.dataset import SetSpec, open_set, open_task
from data.encode import encode
from data.encoder import Encoder
from data.fit import Rules
from data.loader import PackedStream, eval_batches
from data.tasks import digits

sklearn_datasets = pytest.importorskip("sklearn.datasets")


@pytest.fixture(scope="module")
def splits():
    return open_task("digits", "digits", seed=0)


def test_a_fifth_of_every_digit_is_held_out(splits):
    train = Counter(conversation.answer for conversation in splits.train)
    heldout = Counter(conversation.answer for conversation in splits.heldout)

    assert len(splits.train) + len(splits.heldout) == 1797
    assert len(splits.heldout) == 359
    for digit in "0123456789":
        assert heldout[digit] == round((train[digit] + heldout[digit]) / 5)


def test_no_held_out_image_is_trained_on(splits):
    """By content, not by name: neither the scans nor the enlarged pictures have a twin on the other side."""

    def pictures(dataset):
        return {hashlib.sha256(part.media).digest() for c in dataset for part in c.messages[0].parts if part.media}

    assert len(pictures(splits.train)) == 1438
    assert not pictures(splits.train) & pictures(splits.heldout)


def test_the_seed_fixes_the_split():
    def ids(seed):
        return [conversation.id for conversation in digits.conversations("heldout", seed)]

    assert ids(0) == ids(0)
    assert len(set(ids(0)) & set(ids(1))) < 120  # of 359; chance is a fifth
    assert open_task("digits", "digits", 0).train.fingerprint == open_task("digits", "digits", 0).train.fingerprint
    assert open_task("digits", "digits", 0).train.fingerprint != open_task("digits", "digits", 1).train.fingerprint


def test_the_answer_is_the_label_of_the_scan(splits):
    labels = sklearn_datasets.load_digits().target
    for conversation in splits.train:
        assert conversation.messages[-1].text == conversation.answer == str(labels[int(conversation.id[-4:])])


def test_the_picture_is_the_scan(splits):
    """Shrunk back to 8 x 8 it is what scikit-learn ships, up to what interpolation rounds off."""
    scans = sklearn_datasets.load_digits().images
    for index in (0, 7, 400):
        conversation = splits.train[index]
        picture = splits.train.media.open_image(conversation.messages[0].parts[0].media)
        assert picture.size == (56, 56)
        small = np.asarray(picture.convert("L").resize((8, 8), Image.Resampling.BOX), dtype=float) / 255 * 16
        scan = scans[int(conversation.id[-4:])]
        assert np.corrcoef(small.ravel(), scan.ravel())[0, 1] > 0.97


def test_every_question_is_asked_of_every_digit(splits):
    asked = Counter((conversation.messages[0].text, conversation.answer) for conversation in splits.train)

    assert len(asked) == len(digits.QUESTIONS) * 10
    assert min(asked.values()) > 15


def test_an_encoded_digit(splits, real_processor):
    example = encode(splits.train[0], real_processor, media=splits.train.media)

    assert (example.num_patches, example.grids) == (16, ((1, 4, 4),))
    learned = example.target_T[example.weight_T != 0]
    assert real_processor.decode(learned) == f"{splits.train[0].answer}<|end_of_sentence|>"
    assert example.num_tokens <= 32
    for index in range(0, len(splits.train), 97):  # the digit is one token in every conversation
        assert (encode(splits.train[index], real_processor).weight_T != 0).sum() == 2


def test_from_disk_they_are_the_same(tmp_path, splits, real_processor):
    paths = digits.write_jsonl(tmp_path, seed=0)
    train, heldout = (open_set(name, SetSpec(path=str(path))).train for name, path in paths.items())

    for here, there in ((splits.train, train), (splits.heldout, heldout)):
        assert len(here) == len(there)
        for index in range(0, len(here), 53):
            mine, theirs = here[index], there[index]
            assert (mine.id, mine.answer, mine.messages[-1]) == (theirs.id, theirs.answer, theirs.messages[-1])
            assert theirs.messages[0].parts[0].kind is PartKind.IMAGE
            a, b = encode(mine, real_processor), encode(theirs, real_processor, media=there.media)
            assert torch.equal(a.token_T, b.token_T) and torch.equal(a.patch_PX, b.patch_PX)


def test_rows_of_digits_are_full_and_none_is_lost(splits, real_processor):
    encoder = Encoder(splits.heldout, real_processor, Rules(max_tokens=1024))
    stream = PackedStream(encoder, seed=0)
    while stream.report.epoch < 1:
        for row in stream.next_step():
            assert row.num_tokens <= 1024
            assert len(row.grids) == row.num_segments == len(row.ids)
            assert row.patch_PX.shape == (16 * row.num_segments, 588)

    assert stream.report.fill > 0.97
    seen = [id for row in eval_batches(encoder) for id in row.ids]
    assert sorted(seen) == sorted(conversation.id for conversation in splits.heldout)
