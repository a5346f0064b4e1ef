"""Parquet files and datasets of the Hugging Face library: rows by number, pictures as files, nothing decoded."""

import datetime
import inspect
import pickle
import threading

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.errors import DataError
from data.records import open_records, open_stream, tables

TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


@pytest.fixture
def rows(png):
    """Nine rows: with bytes, with a path, without a picture."""
    pictures = [[{"bytes": png, "path": None}], [{"bytes": None, "path": "a.png"}], []]
    return [{"n": n, "messages": TALK, "images": pictures[n % 3]} for n in range(9)]


@pytest.fixture
def values(rows, png):
    pictures = [[png], ["a.png"], []]
    return [{**row, "images": pictures[row["n"] % 3]} for row in rows]


@pytest.fixture
def parquet(tmp_path, rows):
    """Row groups of 4, 4 and 1."""
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=4)
    return tmp_path / "a.parquet"


@pytest.fixture
def saved(tmp_path, rows, png, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(png)  # the library puts its content into the table
    features = datasets.Features(
        {
            "n": datasets.Value("int64"),
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
            "images": datasets.List(datasets.Image()),
        }
    )
    dataset = datasets.Dataset.from_list(rows, features=features)
    dataset.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    return tmp_path / "saved"


@pytest.mark.parametrize("source", ["parquet", "saved"])
def test_rows_in_any_order_with_pictures_as_files(request, source, values, png):
    path = request.getfixturevalue(source)
    if source == "saved":
        values = [{**value, "images": [png] if value["images"] == ["a.png"] else value["images"]} for value in values]
    records = open_records(path)

    assert len(records) == 9
    for index in (8, 0, 4, 3, 1, 5):
        assert records[index].value == values[index]
        assert records[index].source.line == index + 1 and str(path) in records[index].source.file
    with pytest.raises(IndexError):
        records[9]
    for start in range(11):
        assert list(open_stream(path).read_from(start)) == list(records)[start:]
    assert pickle.loads(pickle.dumps(records))[7].value == values[7]
    assert list(pickle.loads(pickle.dumps(open_stream(path))).read_from(8)) == [records[8]]


def test_a_folder_of_parquet_files(tmp_path, rows, values):
    for number in range(3):
        pq.write_table(pa.Table.from_pylist(rows[number * 3 : number * 3 + 3]), tmp_path / f"train-{number}.parquet")

    assert [record.value for record in open_records(tmp_path)] == values
    assert [record.value for record in open_stream(tmp_path).read_from(4)] == values[4:]


def test_row_groups_are_let_go_and_large_ones_lie_on_disk(parquet, values, monkeypatch):
    with pq.ParquetFile(parquet) as file:
        sizes = [file.metadata.row_group(group).total_byte_size for group in range(3)]
    for limit, kept in ((max(sizes), 1), (sum(sizes), 3), (1, 1)):  # 1: every group is too large to be held
        monkeypatch.setattr(tables, "KEPT_BYTES", limit)
        records = open_records(parquet)
        assert [records[index].value for index in (8, 0, 4, 7, 3)] == [values[index] for index in (8, 0, 4, 7, 3)]
        assert len(records._kept) <= kept


def test_threads_may_share_a_parquet_file(parquet, values, monkeypatch):
    monkeypatch.setattr(tables, "KEPT_BYTES", 1)
    records, wrong = open_records(parquet), []

    def read(seed):
        for index in np.random.default_rng(seed).permutation(9).tolist():
            if records[index].value != values[index]:
                wrong.append(index)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_fingerprints_are_those_of_the_content(tmp_path, rows):
    def prints(count):
        pq.write_table(pa.Table.from_pylist(rows[:count]), tmp_path / "b.parquet")
        datasets.Dataset.from_list(rows[:count]).save_to_disk(str(tmp_path / "again"))
        paths = (tmp_path / "b.parquet", tmp_path / "again")
        return [source(path).fingerprint for path in paths for source in (open_records, open_stream)]

    first = prints(9)
    assert prints(9) == first
    assert all(one != other for one, other in zip(prints(8), first, strict=True))


def test_values_that_json_does_not_have_become_text(tmp_path):
    table = pa.table({"day": [datetime.date(2024, 2, 29)], "raw": [b"\0"], "f": [0.5], "none": [None]})
    pq.write_table(table, tmp_path / "a.parquet")

    assert open_records(tmp_path / "a.parquet")[0].value == {"day": "2024-02-29", "raw": b"\0", "f": 0.5, "none": None}


def test_text_that_is_not_utf_8_is_one_broken_row(tmp_path):
    strings = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    pq.write_table(pa.table({"t": strings}), tmp_path / "a.parquet")
    records = open_records(tmp_path / "a.parquet")

    with pytest.raises(DataError, match="a.parquet:2: the row cannot be read"):
        records[1]
    assert (records[0].value, records[2].value) == ({"t": "a"}, {"t": "c"})
    assert "a.parquet:2" in str(list(open_stream(tmp_path / "a.parquet").read_from())[1].error)


def test_files_that_are_no_parquet(parquet):
    whole = parquet.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2]):
        parquet.write_bytes(content)
        with pytest.raises(DataError, match="a.parquet cannot be read as parquet"):
            open_records(parquet)
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), parquet)
    with pytest.raises(DataError, match="holds no record"):
        open_records(parquet)


# --------------------------------------------------------------------------------------------------------- Hugging Face


@pytest.fixture
def splits(tmp_path, rows):
    parts = {"test": rows[:2], "validation": rows[2:]}
    datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in parts.items()}).save_to_disk(
        str(tmp_path / "splits")
    )
    return tmp_path / "splits"


def test_a_split_is_chosen_by_name(splits):
    for source in (open_records, open_stream):
        with pytest.raises(DataError, match="data.split is not set; .* has test, validation. Name one of"):
            source(splits)
        with pytest.raises(DataError, match="data.split is 'train'; .* has test, validation"):
            source(splits, split="train")
        with pytest.raises(DataError, match="data.subset is 'en', but .* saved dataset, which has no subset"):
            source(splits, subset="en")
    records = open_records(splits, split="test")
    assert len(records) == 2 and str(records[1].source) == f"{splits} [test]:2"
    assert len(list(open_stream(splits, split="validation").read_from(3))) == 4
    assert open_records(splits, split="validation").fingerprint != records.fingerprint


def test_a_saved_dataset_without_splits(saved):
    with pytest.raises(DataError, match="data.split is 'train', but .* has no splits"):
        open_records(saved, split="train")


def test_a_name_on_the_hub(tmp_path, parquet, values, monkeypatch):
    """The hub is stood in for by files here; the arguments must be such as the library takes."""
    asked = []

    def local(function):
        def call(*args, **options):
            bound = inspect.signature(function).bind(*args, **options).arguments
            asked.append((bound["path"], bound["name"], bound["revision"]))
            options = {"keep_in_memory": False} if function.__name__ == "load_dataset" else {}
            return function("parquet", data_files={"train": str(parquet)}, cache_dir=str(tmp_path / "c"), **options)

        return call

    monkeypatch.setattr(datasets, "load_dataset", local(datasets.load_dataset))
    monkeypatch.setattr(datasets, "load_dataset_builder", local(datasets.load_dataset_builder))
    records = open_records("org/name", subset="en", revision="v1")
    stream = open_stream("org/name", subset="en", revision="v1", split="train")

    assert asked == [("org/name", "en", "v1")] * 2
    assert [record.value for record in records] == values
    assert str(records[4].source) == "org/name [en, train]:5"
    for start in (0, 5, 9):
        assert list(stream.read_from(start)) == list(records)[start:]
    assert records.fingerprint == open_records("org/name", subset="en", revision="v1").fingerprint
    assert stream.fingerprint == open_stream("org/name", subset="en").fingerprint


def test_a_name_that_is_neither_here_nor_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in (open_records, open_stream):
        with pytest.raises(DataError, match=r"data.path \(data/trian\) is no file or folder here .* hub failed: "):
            source("data/trian")
