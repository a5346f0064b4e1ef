"""Refused records are written down once, counted, and too many of them end the run."""

import json

import pytest

from data.conversation import Conversation, Message, Part
from data.dataset import ListDataset
from data.encoder import Encoder
from data.errors import DataError, Refusal, Stage
from data.fit import Rules
from data.loader import PackedStream, eval_batches
from data.quarantine import FILE, Quarantine, TooManyBadError


def refusal(number, stage=Stage.MEDIA):
    return Refusal(f"r{number}", "photos", "photos.jsonl", number, stage, f"photos.jsonl:{number}: is broken.")


def lines(folder):
    return [json.loads(line) for line in (folder / FILE).read_text("utf-8").splitlines()]


def test_a_refusal_is_a_line_and_stands_there_once(tmp_path):
    quarantine = Quarantine(tmp_path)
    for _ in range(2):
        quarantine.add(refusal(7))

    assert lines(tmp_path) == [
        {
            "id": "r7",
            "dataset": "photos",
            "file": "photos.jsonl",
            "line": 7,
            "stage": "media",
            "reason": "photos.jsonl:7: is broken.",
        }
    ]


def test_several_processes_share_the_file_and_the_count(tmp_path):
    first, second = Quarantine(tmp_path), Quarantine(tmp_path)
    first.add(refusal(1))
    second.add(refusal(1))
    second.add(refusal(2))
    for number in range(3, 11):
        first.add(refusal(number))

    assert [entry["line"] for entry in lines(tmp_path)] == list(range(1, 11))
    with pytest.raises(TooManyBadError, match="^11 records cannot be trained on"):
        second.add(refusal(11))


@pytest.mark.parametrize(
    ("max_bad", "num_records", "tolerated"), [(0.001, 50, 10), (0.001, 20_000, 20), (0.0, 20_000, 0), (0.5, 100, 50)]
)
def test_how_many_are_tolerated(max_bad, num_records, tolerated):
    quarantine = Quarantine(max_bad=max_bad, num_records=num_records)
    for number in range(tolerated):
        quarantine.add(refusal(number))
    with pytest.raises(TooManyBadError):
        quarantine.add(refusal(tolerated))


def test_the_summary_counts_shows_and_helps(tmp_path):
    quarantine = Quarantine(tmp_path, max_bad=0.01)
    with pytest.raises(TooManyBadError) as caught:
        for number in range(11):
            quarantine.add(refusal(number, Stage.READ if number < 2 else Stage.MEDIA))

    assert str(caught.value).splitlines() == [
        "11 records cannot be trained on; data.max_bad=0.01 tolerates 10.",
        "  9 of photos, at stage media",
        "  2 of photos, at stage read",
        "The first of them:",
        *(f"  photos.jsonl:{number}: is broken." for number in range(5)),
        f"All of them: {tmp_path / FILE}",
        "Mend or remove these records, or raise data.max_bad (the share that may be left out).",
    ]


def test_a_resumed_run_counts_nothing_twice_and_fills_a_new_folder(tmp_path):
    first = Quarantine(tmp_path / "a")
    first.add(refusal(1))
    state = json.loads(json.dumps(first.state_dict()))
    first.add(refusal(2))  # after the checkpoint; the resumed run will meet it again
    with open(tmp_path / "a" / FILE, "a") as file:
        file.write('{"id": "cut off by a ki')

    same, elsewhere = Quarantine(tmp_path / "a"), Quarantine(tmp_path / "b")
    same.load_state_dict(state)
    elsewhere.load_state_dict(state)
    same.add(refusal(2))
    same.add(refusal(3))

    assert [entry["line"] for entry in lines(tmp_path / "a")] == [1, 2, 3]
    assert [entry["line"] for entry in lines(tmp_path / "b")] == [1]
    assert len(same) == 3 and len(elsewhere) == 1


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / FILE).write_text('{"id": 7}\n')
    with pytest.raises(DataError, match="line 1 is damaged"):
        Quarantine(tmp_path).add(refusal(1))


# ---- found while decoding: after the rows were formed


@pytest.fixture
def photos(png):
    """photos("..x."): 9 tokens each (`u[**]?a7$`), with a broken picture where there is an x."""

    def make(plan):
        def conversation(index, kind):
            content = png if kind == "." else png[: len(png) * 2 // 3]  # the header is whole, the pixels are not
            user = Message(role="user", parts=(Part.of_image(content), Part.of_text("?")))
            return Conversation(id=str(index), messages=(user, Message(role="assistant", parts=(Part.of_text("7"),))))

        return ListDataset("photos", [conversation(index, kind) for index, kind in enumerate(plan)])

    return make


def streams(dataset, processor, world, **options):
    for rank in range(world):
        encoder = Encoder(dataset, processor, Rules(max_tokens=18), **options)
        yield PackedStream(encoder, seed=0, rank=rank, world=world, accumulation=2 // world, shuffle=False, lookahead=2)


def ids(steps):
    return [sorted(row.ids for row in rows) for rows in steps]


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_the_same_on_every_rank_and_only_the_record_is_missing(photos, processor, workers):
    plan = "..x..xx."  # two to a row: row 1 loses one, row 2 one, row 3 one, and so on

    (alone,) = streams(photos(plan), processor, 1, workers=workers)
    whole = [alone.next_step() for _ in range(6)]
    ranks = list(streams(photos(plan), processor, 2, workers=workers))
    shared = [[row for rank in ranks for row in rank.next_step()] for _ in range(6)]
    for stream in (alone, *ranks):
        stream.close()

    assert ids(whole) == ids(shared)
    assert ids(whole)[:2] == [[("0", "1"), ("3",)], [("4",), ("7",)]]
    assert {refusal.id for refusal in alone.encoder.quarantine.refusals} == {"2", "5", "6"}
    assert all(refusal.stage is Stage.MEDIA for refusal in alone.encoder.quarantine.refusals)


def test_a_row_of_which_nothing_is_left_becomes_a_row_that_teaches_nothing(photos, processor):
    (stream,) = streams(photos("xx.."), processor, 1)

    empty, row = stream.next_step()

    assert empty.token_T.tolist() == [ord("^")] * 2 and not empty.weight_T.any()
    assert (empty.lengths, empty.ids, empty.grids, empty.patch_PX) == ((2,), ("",), (), None)
    assert row.ids == ("2", "3") and row.datasets == ("photos", "photos")


def test_evaluation_goes_on_without_it(photos, processor):
    encoder = Encoder(photos("xx.x."), processor, Rules(max_tokens=18))

    assert [row and row.ids for row in eval_batches(encoder)] == [None, ("2",), ("4",)]


def test_a_dataset_of_nothing_but_broken_pictures_ends_the_run(photos, processor):
    (stream,) = streams(photos("x" * 12), processor, 1)
    with pytest.raises(TooManyBadError, match="11 of photos, at stage media"):
        for _ in range(6):
            stream.next_step()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_few_records_of_which_none_is_left_end_the_run_too(photos, processor, workers):
    """Fewer than are always tolerated: the rows would be empty from now on."""
    (stream,) = streams(photos("x" * 8), processor, 1, workers=workers)
    with pytest.raises(DataError, match="none of 8 records of photos can be used. The last of them: .*image"):
        for _ in range(6):
            stream.next_step()
    stream.close()
