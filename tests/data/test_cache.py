"""Pixels on disk: the same as decoded, found by content, and mended when damaged."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from data.cache import PixelCache
from data.conversation import Conversation, Message, Part
from data.errors import DataError
from data.fit import Rules, encoded, fit
from data.media import MediaFolder

RULES = Rules(max_tokens=256)


@pytest.fixture
def picture(tmp_path, png):
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.png").write_bytes(png)
    user = Message(role="user", parts=(Part.of_image("a.png"), Part.of_text("?")))
    return Conversation(id="a", messages=(user, Message(role="assistant", parts=(Part.of_text("7"),))))


@pytest.fixture
def got(tmp_path, picture, real_processor):
    """got() -> (the example from the cache, whether it had to be decoded)"""
    media = MediaFolder(tmp_path / "media")

    def get(processor=real_processor, folder=tmp_path / "cache"):
        fitted = fit(picture, processor, media, RULES)
        decoded = []

        def make():
            decoded.append(True)
            return encoded(picture, processor, media, RULES, None, pixels=True)

        return PixelCache(folder, processor).get(fitted, media, make), bool(decoded)

    return get


def files(tmp_path):
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_the_second_time_it_is_read(got, tmp_path):
    (first, decoded), (second, again) = got(), got()

    assert (decoded, again) == (True, False)
    for field in dataclasses.fields(first):
        one, other = getattr(first, field.name), getattr(second, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert len(files(tmp_path)) == 1


def test_other_content_or_settings_are_another_entry(got, tmp_path, real_processor, png):
    got()
    other = dataclasses.replace(real_processor.image, mean=(0.5, 0.5, 0.5))
    changed = type(real_processor)(real_processor.tokenizer, real_processor.config, other)
    assert got(changed)[1]
    (tmp_path / "media" / "a.png").write_bytes(png + b"behind the picture")
    assert got()[1]
    assert len(files(tmp_path)) == 3


@pytest.mark.parametrize("place", [0, 20, 200, -1])
def test_a_flipped_byte_is_found_and_mended(got, tmp_path, place):
    example, _ = got()
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)

    again, decoded = got()

    assert decoded and torch.equal(again.patch_PX, example.patch_PX)
    assert not got()[1]


@pytest.mark.parametrize("length", [0, 10, 500])
def test_a_file_cut_short_is_found_and_mended(got, tmp_path, length):
    got()
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes()[:length])

    assert got()[1] and not got()[1]


def test_many_at_once_leave_one_whole_file(got, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        examples = [future.result()[0] for future in [pool.submit(got) for _ in range(16)]]

    assert all(torch.equal(example.patch_PX, examples[0].patch_PX) for example in examples)
    assert len(files(tmp_path)) == 1 and not got()[1]


def test_a_folder_that_cannot_be_written_is_named(got, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data.cache_folder: .*file.* cannot be (read|written) .*"):
        got(folder=tmp_path / "file")
