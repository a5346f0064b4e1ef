"""What train/parallel/groups.py relies on in DeepSpeed, by use: the groups, the tags, and a model that is announced.

Untagged, or not announced, expert shards would be overwritten with another rank's, or summed with other experts: one
step of SGD over two times two ranks then differs from one process.
"""

import pytest
import torch

from tests.distributed.expert_engine import CASES, alone
from tests.distributed.gloo import launch


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("engine")
    launch(4, "-m", "tests.distributed.expert_engine", str(folder))
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(4)]


def test_experts_are_shared_by_neighbours(four_ranks):
    assert [rank["expert"] for rank in four_ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [rank["expert_data"] for rank in four_ranks] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert all(rank["again"] for rank in four_ranks)


@pytest.mark.parametrize("name", CASES)
def test_a_step_of_the_engine_equals_one_process(four_ranks, name):
    found, expected = [rank[name]["weights"] for rank in four_ranks], alone(CASES[name])
    shards = four_ranks[0][name]["shards"]
    assert shards and expected.keys() == found[0].keys()
    for parameter, whole in expected.items():
        # one update from gradients that are float32 sums in another order
        close = dict(rtol=0, atol=1e-6 * max(1.0, whole.abs().max().item()))
        for first in (0, 2):
            pair = found[first][parameter], found[first + 1][parameter]
            for mine in [torch.cat(pair)] if parameter in shards else pair:
                torch.testing.assert_close(mine, whole, **close, msg=parameter)
    experts_train = "adapters on attention" not in name
    for rank in four_ranks:
        # ZeRO-1 and 2 refuse an announced model without trained experts
        assert rank[name]["announced"] == (experts_train or CASES[name].zero == 3)
