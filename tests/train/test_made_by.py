"""Who starts from what an experiment writes is told which command writes it."""

import pytest

from tests.test_configs import CONFIGS, ON_TASKS, load
from train.build import read_config
from train.checks.weights import check_weights
from train.compose import ENTRIES
from train.config import ModelConfig, UserError
from train.made_by import check_made, entry_of
from train.served import weights_folder

EXPERIMENTS = sorted(file.stem for file in (CONFIGS / "experiment").glob("*.yaml"))
STARTS = {"zoom_rl": "zoom_cold", "locate_rl": "locate", "digits_dpo": "digits_weak", "zoom_cold": "digits"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_composed_by_its_command(name):
    """The comment at the top of the file is what says so."""
    entry = entry_of(name)
    needed = [] if f"experiment={name}" in ON_TASKS or name == "digits_dpo" else ["data.path=a.jsonl"]
    needed = ["data.task=counting"] if name == "task" else needed
    try:
        config = load(f"experiment={name}", *needed, entry=entry)
    except Exception:  # data of its own, so there is no path to give
        config = load(f"experiment={name}", entry=entry)
    assert isinstance(config, ENTRIES[entry]) and config.objective.kind.value == entry


@pytest.mark.parametrize("name, before", STARTS.items())
def test_the_way_out_is_named(name, before, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load(f"experiment={name}", entry=entry_of(name)).model
    said = (
        rf"model\.checkpoint=runs/{before}/export is not there\. `ernie sft experiment={before}` writes it; start it in"
    )
    for look in (read_config, check_weights):
        with pytest.raises(UserError, match=said):
            look(config)
    with pytest.raises(UserError, match=rf"checkpoint=runs/{before} is not there\. `ernie sft experiment={before}`"):
        weights_folder(f"runs/{before}")


def test_of_other_names_nothing_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/digits/export").mkdir(parents=True)
    for source in ("runs/digits/export", "runs/mine/export", "elsewhere/digits/export", "baidu/digits", "digits"):
        check_made("model.checkpoint", source)


def test_doctor_is_told_of_what_can_be_no_hub_id_either():
    with pytest.raises(Exception, match="'a/b/c' is neither an existing folder nor a hub id"):
        check_weights(ModelConfig(checkpoint="a/b/c"))
