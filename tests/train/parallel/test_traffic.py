"""Bytes and rows of several ranks, by hand."""

from types import SimpleNamespace

import torch

from tests.train import small
from train.parallel.layout import Layout
from train.parallel.traffic import Traffic


def rank(index: int, sent: list[int], rows: list[int]) -> Traffic:
    traffic = Traffic(small.policy().model, Layout(rank=index, world=2, expert=2), torch.device("cpu"))
    assert not traffic.routes and traffic.sums() is None  # experts in one place send nothing
    traffic.routes = [SimpleNamespace(sent_bytes=s, computed_rows=r) for s, r in zip(sent, rows, strict=True)]
    return traffic


def test_bytes_are_means_and_the_busiest_rank_counts_layer_by_layer():
    first, second = rank(0, [1_000_000, 3_000_000], [10, 90]), rank(1, [2_000_000, 2_000_000], [30, 10])
    assert first.report(first.sums() + second.sums()) == {
        "expert_mb_per_layer": 2.0,  # 8 MB by 2 ranks in 2 layers
        "expert_rank_imbalance": (30 / 20 + 90 / 50) / 2,  # in all 100 and 40 rows: the layers do not make up for it
    }
    first.before([])
    assert not first.sums().any()
