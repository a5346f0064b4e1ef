"""From settings to datasets: what is read how, what is held out, and what errors call the settings."""

import json

import pytest

from data.dataset import ListDataset
from data.errors import DataError
from data.mixture import Mix, Mixture, MixtureSet
from data.order import Key
from data.tasks import digits
from tests.test_configs import load
from train.sources import SomeOf, open_parts

QUESTION = {"role": "user", "content": "Which digit?"}
ANSWER = {"role": "assistant", "content": "7"}


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ("path: gone.jsonl", r"data\.sets\.a\.path \(gone.jsonl\) does not exist"),
        ("path: gone.jsonl, streaming: true", r"data\.sets\.a\.path \(gone.jsonl\) does not exist"),
        ("path: FILE, split: train", r"data\.sets\.a\.split is 'train', .* Remove data\.sets\.a\.split"),
        ("path: FILE, format: letters", r"data\.sets\.a\.format is 'letters'"),
        ("path: FILE, columns: {messages: m}", r"data\.sets\.a\.columns says that messages is 'm'"),
        ("path: FILE, media_root: /gone", r"data\.sets\.a\.media_root \(/gone\) is not a folder"),
    ],
)
def test_errors_of_a_set_name_its_own_keys(tmp_path, settings, key):
    path = tmp_path / "few.jsonl"
    path.write_text(json.dumps({"messages": [QUESTION, ANSWER]}))
    config = load("data=files", f"data.sets={{a: {{{settings.replace('FILE', str(path))}}}}}")
    with pytest.raises(DataError, match=key):
        open_parts(config.data)


def test_the_media_root_of_all_sets_keeps_its_name(tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text(json.dumps({"messages": [QUESTION, ANSWER]}))
    config = load("data=files", f"data.sets={{a: {{path: {path}}}}}", "data.media_root=/gone")
    with pytest.raises(DataError, match=r"data\.media_root \(/gone\) is not a folder"):
        open_parts(config.data)


def test_held_out_records_are_read_like_those_of_the_set(tmp_path):
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"dialogue": [QUESTION, ANSWER]}))
    paths = [f"data.path={tmp_path / 'train.jsonl'}", f"data.eval_path={tmp_path / 'eval.jsonl'}"]
    parts = open_parts(load("data=files", *paths, "data.columns={messages: dialogue}").data)
    assert parts.heldout is not None
    assert [len(parts.heldout[key].messages) for key in parts.heldout.keys()] == [2]


def test_some_of_a_mixture_are_some_of_every_set():
    """6 of 9 + 3 records: every second one, so that the small set is not left out."""
    all_of_them = digits.conversations("heldout")
    sets = [MixtureSet("a", ListDataset("a", all_of_them[:9])), MixtureSet("b", ListDataset("b", all_of_them[9:12]))]
    some = SomeOf(Mixture(sets, mix=Mix.CONCAT), 6)
    assert list(some.keys()) == [Key(0, 0), Key(0, 2), Key(0, 4), Key(0, 6), Key(0, 8), Key(1, 1)]
    assert len(some) == 6
    whole = SomeOf(Mixture(sets, mix=Mix.CONCAT), 100)
    assert list(whole.keys()) == list(Mixture(sets).keys()) and len(whole) == 12
