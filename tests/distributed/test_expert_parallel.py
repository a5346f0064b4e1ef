"""Experts that lie on 2 or 4 ranks compute what one process with all of them does, whatever rows the ranks have."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch

from ernie_model.expert_parallel import ExpertParallel, regrouping
from tests.distributed.expert_routes import CASES, run, waits
from tests.distributed.gloo import launch

LAYOUTS = [(2, 2), (4, 2), (4, 4)]
"""Ranks, and how many of them share the experts."""
CLOSE = {
    # sums of a few hundred terms in another order, through three layers
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    # products of differently padded rows round differently: a few units of 2^-8
    torch.bfloat16: 2**-5,
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """world -> what each of its ranks has computed."""

    @cache
    def results(world: int) -> list[dict]:
        folder = tmp_path_factory.mktemp(f"world-{world}")
        launch(world, "-m", "tests.distributed.expert_routes", str(folder))
        return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(world)]

    return results


@cache
def alone(name: str) -> dict:
    return run(CASES[name], list(CASES[name].rows), None)


def whole_gradient(found: list[dict], name: str, size: int) -> torch.Tensor:
    """Of several ranks: the sum, or of an expert tensor the parts of one group, summed over groups."""
    gradients = [one["gradients"][name] for one in found]
    if name not in found[0]["shards"]:
        return sum(gradients)
    return torch.cat([sum(gradients[rank::size]) for rank in range(size)])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("world", "size"), LAYOUTS)
def test_ranks_equal_one_process(ranks, world, size, name):
    case, one = CASES[name], alone(name)
    found = [rank[size, name] for rank in ranks(world)]
    close = CLOSE[case.compute_dtype or case.dtype]
    for index, expected in enumerate(one["outputs"]):
        mine = found[index % world]["outputs"][index // world]
        torch.testing.assert_close(mine, expected, rtol=0, atol=close * (1 + expected.abs().max().item()))

    trained = one["gradients"]
    assert all(rank["gradients"].keys() == trained.keys() for rank in found)
    scale = max((g.abs().max().item() for g in trained.values() if g is not None), default=0.0)
    assert (scale > 0) == case.gradients
    for parameter, expected in trained.items() if case.gradients else ():
        if expected is None:  # reached by no row of any rank; with `join` everybody has zeros, without it they may
            for rank in found:
                gradient = rank["gradients"][parameter]
                assert not (case.join if gradient is None else gradient.any()), parameter
        else:
            mine = whole_gradient(found, parameter, size)
            torch.testing.assert_close(mine, expected, rtol=0, atol=close * scale, msg=parameter)

    for key, expected in one["stats"].items():
        mine = sum(rank["stats"][key] for rank in found)
        if key in ("token_2", "count_2E", "preferred_2E"):  # telemetry's counts, and what moves the routers' bias
            assert torch.equal(mine, expected), key
        else:
            torch.testing.assert_close(mine, expected, rtol=close, atol=close)


@pytest.mark.parametrize(("world", "size"), LAYOUTS)
def test_bytes_equal_the_formula_and_the_exchanges(ranks, world, size):
    for rank in ranks(world):
        balanced = rank[size, "balanced"]
        assert balanced["sent"] == balanced["formula"] == sum(balanced["rows"])
        assert balanced["computed"] == 16 * 2  # T * K: as many rows as a rank gave away
        for name in CASES:
            assert rank[size, name]["sent"] == rank[size, name]["calls"]
    assert any(rank[size, "rows of both kinds"]["sent"] for rank in ranks(world))


@pytest.mark.parametrize(("world", "size"), LAYOUTS)
def test_one_exchange_each_way_serves_both_pools_while_the_shared_experts_compute(ranks, world, size):
    for rank in ranks(world):
        balanced = rank[size, "balanced"]
        assert len(balanced["counts"]) == 1 and len(balanced["rows"]) == 4
        forward, backward = balanced["order"][:6], balanced["order"][7:]
        assert forward == ["start", "shared", "finish", "experts", "start", "finish"]
        assert backward == ["start", "finish", "experts", "start", "shared", "finish"]


@pytest.mark.parametrize(("world", "size"), LAYOUTS)
def test_a_layer_waits_for_the_device_once_and_never_where_all_experts_are(ranks, world, size):
    assert waits(None) == []
    assert all(rank[size, "waits"] == ["tolist"] for rank in ranks(world))


def test_slots_by_hand():
    """E = 4 on 2 ranks: rank 0 has text 0 1 and vision 0 1."""
    route = SimpleNamespace(size=2)
    expert_TK = torch.arange(8).view(4, 2)
    slots = ExpertParallel.slots(route, expert_TK, local=2, pools=2)
    assert slots.flatten().tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert ExpertParallel.slots(route, expert_TK[:2], local=2, pools=1).flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("multiple", [1, 4])
def test_rows_that_came_are_laid_out_by_expert_by_hand(multiple):
    """Two ranks sent rows for three experts: a0 a0 a2 | b0 b2 b2, and nobody any for the second."""
    came_NX = torch.tensor([[2, 0, 1], [1, 0, 2]])
    padded_X = (came_NX.sum(0) + multiple - 1) // multiple * multiple
    rows = regrouping(came_NX, padded_X, travelled=6, num_text=int(padded_X[0]), num_rows=int(padded_X.sum()))
    names = ["a0", "a0'", "a2", "b0", "b2", "b2'"]
    laid = [names[row] for row in rows.token_R.tolist()]
    if multiple == 1:
        assert laid == ["a0", "a0'", "b0", "a2", "b2", "b2'"]
    else:
        assert laid == ["a0", "a0'", "b0", "a0", "a2", "b2", "b2'", "a0"]  # the first row stands in for padding
    assert [laid[place] for place in rows.place_TK[:, 0].tolist()] == names
