"""A layout changes where weights lie, and not one of them."""

import pytest
import torch

from tests.distributed.built import CASES, LORA, build, parts, write_checkpoint
from tests.distributed.gloo import launch
from train.parallel.layout import Layout

RANKS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    write_checkpoint(folder)
    launch(RANKS, "-m", "tests.distributed.built", str(folder))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_the_parts_of_all_ranks_are_what_one_process_builds(folder, name):
    case = CASES[name]
    one = parts(build(case, folder, Layout()))
    ranks = [torch.load(folder / f"rank-{rank}.pt", weights_only=True)[name] for rank in range(RANKS)]
    assert all(rank.keys() == one.keys() for rank in ranks)
    for tensor, (shape, _, whole_N) in one.items():
        covered_N = torch.zeros(len(whole_N), dtype=torch.int64)
        for there, start, part_N in (rank[tensor] for rank in ranks):
            assert there == shape and part_N.dtype == whole_N.dtype, tensor
            assert torch.equal(part_N, whole_N[start : start + len(part_N)]), tensor
            covered_N[start : start + len(part_N)] += 1
        of = case.expert if ".experts." in tensor else 1
        if case.zero == 3 and "_bias_" not in tensor and ".lora_" not in tensor:
            of = RANKS  # adapters are cut up when the engine is made
        assert (covered_N == RANKS // of).all(), tensor
    assert any(".lora_" in tensor for tensor in one) == case.lora


def test_adapters_are_drawn_and_not_zero(folder):
    """So that equal ones mean something."""
    case = CASES["experts, adapters on bfloat16"]
    one = parts(build(case, folder, Layout()))
    (a_shape, _, a_N), (_, _, b_N) = (
        one[f"layers.1.mlp.text.experts.lora_down_{which}.{LORA.name}"] for which in ("A_ELF", "B_EDL")
    )
    assert a_shape == [4, 3, 8] and a_N.unique().numel() > 90 and not b_N.any()
