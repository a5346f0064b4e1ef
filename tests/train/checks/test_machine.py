"""Versions, threads, folders and trackers, each made wrong once."""

import os

import numpy as np
import pytest
import torch

from train.checks import trackers
from train.checks.cost import duration, matmul_rate
from train.checks.findings import Level
from train.checks.machine import check_folder, check_threads, check_versions
from train.checks.records import histogram
from train.config import (
    ParallelConfig,
    Precision,
    TrackerConfig,
)


def test_versions_are_compared_with_their_bounds():
    assert [one.level for one in check_versions(["torch>=2.0", "nothing-like-this>=1; extra == 'demo'"])] == [
        Level.OK
    ] * 2
    here, old, absent = check_versions(["torch>=99", "nothing-like-this>=1"])
    assert here.level is Level.OK and old.level is absent.level is Level.PROBLEM
    assert torch.__version__.split("+")[0] in old.text and "pip install 'torch>=99'" in old.text
    assert "not installed" in absent.text


def test_more_threads_than_cores_is_a_warning():
    (found,) = check_threads(ParallelConfig(threads=10_000))
    assert found.level is Level.WARNING and "parallel.threads" in found.text
    assert check_threads(ParallelConfig(threads=1))[0].level is Level.OK


def test_a_folder_that_cannot_be_made_is_found_without_making_it(tmp_path):
    assert check_folder(tmp_path / "a" / "b").level is Level.OK
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    assert check_folder(tmp_path / "file" / "b").level is Level.PROBLEM


def test_trackio_s_folder_and_wandb_s_key(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "file" / "x"))
    assert trackers.check_trackers(TrackerConfig(trackio=True))[0].level is Level.PROBLEM
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "x"))
    assert trackers.check_trackers(TrackerConfig(trackio=True))[0].level is Level.OK
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert trackers.check_wandb().level is Level.WARNING
    monkeypatch.setenv("WANDB_API_KEY", "x")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers there
    assert trackers.check_wandb().level is Level.PROBLEM


def test_a_histogram_by_hand():
    values = np.array([1, 2, 3, 3, 9])
    head, *rows = histogram("tokens", values, width=4)
    assert head == "tokens: median 3, mean 3.6, at most 9"
    assert [row.split() for row in rows] == [
        ["1", "█", "1"],
        ["2", "to", "3", "████", "3"],
        ["4", "to", "7", "0"],
        ["8", "to", "15", "█", "1"],
    ]
    assert sum(int(row.split()[-1]) for row in rows) == len(values)


def test_a_rate_is_positive_and_durations_read_well():
    assert matmul_rate(torch.device("cpu"), Precision.fp32, seconds=0.01) > 1e8
    assert [duration(s) for s in (0.034, 5, 600, 7200, 2e5)] == ["34 ms", "5 s", "10 min", "2 h", "2.31 days"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_a_problem(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    assert check_folder(tmp_path / "closed" / "run").level is Level.PROBLEM
