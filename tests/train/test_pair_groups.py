"""Metrics of pairs by modality and dataset, and the warning of likelihood displacement, by hand."""

import dataclasses

import pytest
import torch

from data.batch import Role
from data.encode import Example
from data.pack import collate, filler
from tests.train import small
from train.pair_groups import WINDOW, Degenerate, Displacement, PairGroups, Unpictured
from train.policy import PolicyOutput

ROLES = (Role.PROMPT, Role.CHOSEN, Role.REJECTED)


def pair(seed: int, dataset: str, *, image: bool = False) -> Example:
    parts = [small.example(seed, 6, image=image, learned=1), small.example(seed + 1, 3), small.example(seed + 2, 4)]
    row = collate(parts)
    return Example(
        id=f"{seed}",
        token_T=row.token_T,
        target_T=row.target_T,
        weight_T=row.weight_T,
        position_3T=row.position_3T,
        grids=row.grids,
        patch_PX=row.patch_PX,
        dataset=dataset,
        lengths=row.lengths,
        stems=(-1, 0, 0),
        roles=ROLES,
    )


def output(batch) -> PolicyOutput:
    zero_T = torch.zeros(batch.num_tokens)
    return PolicyOutput(zero_T, zero_T.bool(), None)


def test_means_by_modality_and_dataset():
    row = collate([pair(1, "a"), pair(4, "b", image=True), pair(7, "b")])
    assert row.stems == (-1, 0, 0, -1, 3, 3, -1, 6, 6) and row.records == (0, 0, 0, 1, 1, 1, 2, 2, 2)
    values = {
        "loss": torch.tensor([1.0, 2.0, 6.0]),
        "reward_accuracy": torch.tensor([1.0, 0.0, 0.0]),
        "reward_margin": torch.tensor([0.5, -1.0, -0.5]),
        "other": torch.zeros(3),
    }
    empty = {name: torch.zeros(0) for name in values}

    def measured(logprob_T, batch):
        return (empty, ()) if batch.is_filler else (values, (1, 4, 7))

    groups = PairGroups(
        measured, ("loss", "reward_accuracy", "reward_margin"), small.CONFIG, ["a", "b"], torch.device("cpu")
    )
    rows = [row, filler(0)]
    assert groups.streams(rows) is rows
    for batch in rows:
        assert groups.terms(batch, output(batch)) == 0.0
    assert groups.report(groups.sums()) == {
        "loss_text": 3.5,
        "loss_image": 2.0,
        "loss_set_a": 1.0,
        "loss_set_b": 4.0,
        "reward_accuracy_text": 0.5,
        "reward_accuracy_image": 0.0,
        "reward_accuracy_set_a": 1.0,
        "reward_accuracy_set_b": 0.0,
        "reward_margin_text": 0.0,
        "reward_margin_image": -1.0,
        "reward_margin_set_a": 0.5,
        "reward_margin_set_b": -0.75,
    }


def test_pictures_of_an_answer_count_too():
    row = collate([pair(1, "a")])
    token_T = row.token_T.clone()
    token_T[-1] = small.CONFIG.video_token_id  # in the rejected answer alone
    groups = PairGroups(lambda logprob_T, batch: ({}, ()), (), small.CONFIG, ["a"], torch.device("cpu"))
    assert groups.groups == ["text", "image", "video"]
    assert groups.members(dataclasses.replace(row, token_T=token_T)).tolist() == [[0, 0, 1]] * 3


def told(chosen: float, margin: float) -> list[str]:
    """After as many updates at 0 as at these values."""
    watch = Displacement()
    said = [watch({"reward_chosen": 0.0, "reward_margin": 0.0}) for _ in range(WINDOW)]
    said += [watch({"reward_chosen": chosen, "reward_margin": margin}) for _ in range(2 * WINDOW)]
    assert watch({"eval_loss": 1.0}) == []
    return [line for lines in said for line in lines]


@pytest.mark.parametrize("chosen, margin", [(0.1, 0.2), (-0.1, -0.2), (0.0, 0.0)])
def test_what_is_as_it_should_be_is_not_warned_of(chosen, margin):
    assert told(chosen, margin) == []


def test_displacement_is_told_once_with_numbers_and_ways_out():
    (line,) = told(-0.5, 1.0)
    assert "the margin grows (0 to 1)" in line and "(reward 0 to -0.5)" in line
    assert "objective.sft_loss_ratio" in line


def answers(chosen: list[int], rejected: list[int], end: int = 2) -> Example:
    """A pair with the prompt (5, 6), of which 6 is repeated."""
    parts = [[5], [6, *chosen, end], [6, *rejected, end]]
    token_T = torch.tensor([token for part in parts for token in part])
    zero_T = torch.zeros(len(token_T))
    return Example(
        id="pair",
        token_T=token_T,
        target_T=token_T,
        weight_T=zero_T,
        position_3T=zero_T.long().expand(3, -1),
        lengths=tuple(map(len, parts)),
        stems=(-1, 0, 0),
        roles=ROLES,
    )


def test_an_answer_that_is_the_beginning_of_the_other_is_counted_and_told_once():
    row = collate([answers([7, 8, 9], [7, 8]), answers([7], [7, 8]), answers([7, 8], [7, 9]), answers([9], [7, 9])])
    degenerate = Degenerate(torch.device("cpu"))
    assert degenerate.count(collate([answers([7], [7])])) == (0, 1)  # they differ in their pictures
    assert degenerate.count(row) == (2, 4) and degenerate.count(filler(0)) == (0, 0)
    degenerate.streams([row, filler(0), collate([answers([3], [4])])])
    metrics = degenerate.report(degenerate.sums())
    assert metrics == {"degenerate": 2 / 5}
    assert degenerate.warnings({"degenerate": 0.0}) == []
    (line,) = degenerate.warnings(metrics)
    assert line.startswith("in 40% of this update's pairs one answer is the beginning of the other")
    assert degenerate.warnings(metrics) == []


def test_mdpo_without_pictures_is_told_once():
    watch = Unpictured()
    assert watch({"loss": 1.0}) == watch({"corrupted": 0.3}) == []
    (line,) = watch({"corrupted": 0.0})
    assert line.startswith("objective.mdpo_conditional has nothing to do: no pair of this update has pictures")
    assert watch({"corrupted": 0.0}) == []
