"""Tar shards: which files are one record, and what of them becomes its media."""

import io
import json
import tarfile

import pytest

from data.errors import DataError
from data.records import Broken, open_records, open_stream


def shard(path, files: dict[str, bytes | str | dict]):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            content = json.dumps(content) if isinstance(content, dict) else content
            raw = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return path


def of_image(name: str) -> dict:
    return {"messages": [{"role": "user", "content": [{"type": "image", "image": name}]}]}


def test_a_sample_is_the_files_that_share_a_name(tmp_path, png):
    path = shard(
        tmp_path / "a.tar",
        {
            "x/0001.jpg": png,
            "x/0001.json": of_image("0001.jpg"),
            "x/0002.json": {**of_image("x/0002.left.png"), "id": "mine"},
            "x/0002.left.png": b"left",
            "x/0002.meta.bin": b"\0",
            "x/0003.txt": "A cat.",
            "x/0003.1.png": b"one",
            "x/0003.0.png": b"two",
            "x/0003.mp4": b"film",
        },
    )
    records = open_records(path)

    assert [record.value for record in records] == [
        {**of_image(png), "id": "0001"},
        {**of_image(b"left"), "id": "mine", "meta.bin": b"\0"},
        {"id": "0003", "txt": "A cat.", "images": [b"one", b"two"], "videos": [b"film"]},
    ]
    assert str(records[1].source).endswith("a.tar:2")
    for start in range(5):
        assert list(open_stream(path).read_from(start)) == list(records)[start:]


def test_a_text_that_is_not_a_name_stays_a_text(tmp_path):
    path = shard(tmp_path / "a.tar", {"1.json": {"a": "1.jpg is fine", "b": "2.jpg", "c": "jpg"}, "1.jpg": b"pixels"})

    assert open_records(path)[0].value == {
        "a": "1.jpg is fine",
        "b": "2.jpg",
        "c": "jpg",
        "images": [b"pixels"],
        "id": "1",
    }


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the library leaves its files open
def test_shards_that_webdataset_writes_and_reads(tmp_path):
    """Long names take further headers (PAX); the samples are those that the library finds."""
    webdataset = pytest.importorskip("webdataset")
    written = [
        {"__key__": "k" * (20 + 90 * (n % 2)) + f"/{n:03d}", "json": {"n": n}, "bin": bytes([n]) * 700 * n}
        for n in range(6)
    ]
    for number in (0, 1):
        with webdataset.TarWriter(str(tmp_path / f"s-{number}.tar")) as writer:
            for sample in written[number * 3 : number * 3 + 3]:
                writer.write(sample)

    records = open_records(tmp_path / "s-{0..1}.tar")
    theirs = webdataset.WebDataset([str(tmp_path / f"s-{n}.tar") for n in (0, 1)], shardshuffle=False)

    for ours, sample in zip(records, theirs, strict=True):
        assert ours.value["bin"] == sample["bin"] and ours.value["n"] == json.loads(sample["json"])["n"]
    assert [record.value["n"] for record in records] == list(range(6))


def test_a_broken_sample_is_one_broken_record(tmp_path):
    path = shard(
        tmp_path / "a.tar",
        {
            "1.json": {"n": 1},
            "2.json": '{"n": 2',
            "3.json": {"n": 3, "images": ["elsewhere.jpg"]},
            "3.jpg": b"",
            "4.json": {"n": 4},
            "4.txt": b"\xe4",
            "5.json": {"n": 5},
        },
    )
    records = open_records(path)

    for index, message in {
        1: "a.tar:2: not readable as JSON",
        2: "a.tar:3: the sample's 3.jpg is not named anywhere in its .json, which has 'images' already",
        3: "a.tar:4: the sample's 4.txt is not UTF-8",
    }.items():
        with pytest.raises(DataError, match=message):
            records[index]
    assert [records[index].value["n"] for index in (0, 4)] == [1, 5]
    assert [isinstance(item, Broken) for item in open_stream(path).read_from()] == [False, True, True, True, False]


def test_an_archive_that_was_cut_short(tmp_path):
    whole = shard(tmp_path / "a.tar", {f"{n}.json": {"n": n} for n in range(3)}).read_bytes()
    for size in (2 * 1024, 2 * 1024 + 100, 2 * 1024 + 600):  # at a header, in a header, in a content
        (tmp_path / "a.tar").write_bytes(whole[:size])
        with pytest.raises(DataError, match="a.tar: (the archive is cut short|cannot be read as a tar archive)"):
            open_records(tmp_path / "a.tar")
        with pytest.raises(DataError, match="a.tar: (the archive is cut short|cannot be read as a tar archive)"):
            list(open_stream(tmp_path / "a.tar").read_from())


@pytest.mark.parametrize("content", [b"", b"no archive at all" * 100])
def test_no_archive(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match="a.tar: cannot be read as a tar archive"):
        open_records(tmp_path / "a.tar")
