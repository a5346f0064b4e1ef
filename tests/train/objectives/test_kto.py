"""Labelled answers: the numbers of the reference, and a divergence that does not depend on how an update is cut."""

import dataclasses

import pytest
import torch

import tests.train.small as small
from data.batch import PackedBatch, Role
from data.pack import collate, filler
from tests.train.objectives.rows import evenly, pair, record, row, settings
from train.loop import Beside, train_step
from train.objectives.dpo import build
from train.objectives.kto import Divergence, gather_labelled, kept, labelled_loss, without
from train.parallel.layout import Layout
from train.policy import on_device

MEDIA = small.CONFIG.placeholder_token_ids
ANSWERS = [
    {Role.WANTED: evenly(-10.0, -11.0, 5)},
    {Role.WANTED: evenly(-7.0, -9.0, 4)},
    {Role.UNWANTED: evenly(-12.0, -11.5, 3)},
]
"""Reference 7.1: log-ratios 1 and 2 of wanted answers, -0.5 of an unwanted one."""


@pytest.mark.parametrize(
    "loss, kl, weight, expected",
    [
        ("kto", 0.3, 1.0, 0.4733732871),
        ("kto", 0.3, 2.0, 0.6333768404),
        # (sigmoid(-.1) + sigmoid(-.2) + sigmoid(-.05)) / 3
        ("apo_zero_unpaired", 0.0, 1.0, (0.4750208125 + 0.4501660027 + 0.4875026035) / 3),
    ],
)
def test_the_numbers_of_the_reference(loss, kl, weight, expected):
    config = settings(loss, undesirable_weight=weight)
    divergence = Divergence(config)
    divergence.estimate[Role.MISMATCHED] = kl
    objective = build(config, divergence)
    logprob_T, batch = row(*ANSWERS)
    total, metrics = objective.loss(logprob_T, batch)
    assert objective.unit == "labelled answer" and objective.count(batch) == 3
    assert total.item() / 3 == pytest.approx(expected, rel=1e-9) == metrics["loss"].item() / 3
    assert metrics["reward_accuracy"] == 3
    assert batch.ref_logprob_T is not None
    divergence.estimate[Role.MISMATCHED] = 0.0
    agreed = objective.loss(batch.ref_logprob_T, batch).total.item()
    assert agreed == pytest.approx(0.5 * (2 + weight), rel=1e-12)


def test_slopes():
    logprob_T, batch = row(*ANSWERS)
    config = settings("kto", desirable_weight=1.5)
    assert torch.autograd.gradcheck(
        lambda value_T: labelled_loss(gather_labelled(value_T, batch), config, 0.3).sum(), logprob_T.requires_grad_()
    )


def test_reported_means_are_over_the_wanted_and_over_the_unwanted_answers_of_the_update():
    config = settings("kto")
    divergence = Divergence(config).attach(small.policy(), small.accelerator(), Layout())
    objective = build(config, divergence)
    for part in (ANSWERS[:1], ANSWERS[1:]):  # two micro-batches
        objective.loss(*row(*part))
    sums = divergence.sums()
    assert sums is not None
    report = divergence.report(sums)
    assert report["share_wanted"] == pytest.approx(2 / 3)
    assert report["reward_wanted"] == pytest.approx(0.15) and report["reward_unwanted"] == pytest.approx(-0.05)
    assert report["reward_margin"] == pytest.approx(0.2) and report["kl"] == 0
    assert report["logprob_wanted"] == pytest.approx(-8.5) and report["tokens_wanted"] == pytest.approx(4.5)
    assert divergence.sums() is None  # the next update starts anew
    objective.loss(*row(*ANSWERS[:2]))
    sums = divergence.sums()
    assert sums is not None and "reward_unwanted" not in divergence.report(sums)


# ------------------------------------------------------------------------------------------------ with a model


class MadeReference(Beside):
    """Log-probabilities out of the tokens, the same however rows are cut."""

    def streams(self, microbatches):
        return [
            dataclasses.replace(batch, ref_logprob_T=-batch.weight_T * (5 + batch.token_T % 5 / 4))
            for batch in microbatches
        ]


RECORDS = [
    record(0, Role.WANTED, Role.MISMATCHED, image=True),
    record(1, Role.UNWANTED, Role.MISMATCHED, pictures=(Role.MISMATCHED,)),
    record(2, Role.WANTED, Role.MISMATCHED, image=True, pictures=(Role.WANTED,)),
    record(3, Role.UNWANTED),  # nobody's answer was left for it
    record(4, Role.WANTED, Role.MISMATCHED),
]
PAIRS = [record(seed, Role.CHOSEN, Role.REJECTED, image=seed % 2 == 0) for seed in range(5)]


def stepped(loss: str, rows: list[PackedBatch], beta: float = 1.0):
    policy = small.policy(dtype=torch.float64)
    config = settings(loss, beta=beta)
    divergence = Divergence(config).attach(policy, small.accelerator(), Layout())
    updates = small.updates(policy, small.optimizer(policy))
    metrics = train_step(
        updates,
        build(config, divergence),
        rows,
        accelerator=small.accelerator(),
        max_grad_norm=1e9,
        beside=[MadeReference(), divergence],
    )
    return metrics, {name: value.detach() for name, value in policy.named_parameters()}, divergence


@pytest.mark.parametrize("loss, records", [("kto", RECORDS), ("kto_pair", PAIRS), ("apo_zero_unpaired", RECORDS)])
def test_how_an_update_is_cut_changes_nothing(loss, records):
    whole, weights, divergence = stepped(loss, [small.in_double(collate(records))])
    cut = [small.in_double(collate(part)) for part in (records[:1], records[1:3], records[3:])]
    for rows in (cut, [*cut[::-1], filler(0)]):
        metrics, others, _ = stepped(loss, rows)
        for name in ("loss", "grad_norm", "reward_accuracy", "units"):
            assert metrics[name] == pytest.approx(whole[name], rel=1e-11), name
        for name, value in weights.items():
            torch.testing.assert_close(others[name], value, rtol=0, atol=1e-12)
    assert whole["units"] == 5
    used = [divergence.estimate[role] for role in divergence.roles]
    assert all(value > 1e-3 for value in used)  # or nothing was tested
    alone, _, _ = stepped(loss, cut[:1])
    assert loss == "apo_zero_unpaired" or alone["kl" if loss == "kto" else "loss"] != pytest.approx(
        whole["kl" if loss == "kto" else "loss"]
    )


def test_the_divergence_is_the_mean_over_mismatched_answers():
    rows = [small.in_double(collate(RECORDS[:2])), small.in_double(collate(RECORDS[2:]))]
    _, _, divergence = stepped("kto", rows)
    policy = small.policy(dtype=torch.float64).eval()
    ratios = []
    for batch in MadeReference().streams([small.in_double(collate([one])) for one in RECORDS]):
        with torch.no_grad():
            ratio_T = policy(*on_device(batch, torch.device("cpu"))).logprob_T - batch.ref_logprob_T
        starts = torch.tensor((0, *batch.lengths)).cumsum(0)
        ratios += [
            float(ratio_T[starts[at] : starts[at + 1]].sum())
            for at, role in enumerate(batch.roles)
            if role is Role.MISMATCHED
        ]
    assert len(ratios) == 4
    assert float(divergence.estimate[Role.MISMATCHED]) == pytest.approx(max(sum(ratios) / 4, 0), rel=1e-12)
    assert policy.training is False


def test_a_negative_estimate_counts_as_none():
    class Likely(Beside):
        def streams(self, microbatches):
            return [dataclasses.replace(batch, ref_logprob_T=-0.1 * batch.weight_T) for batch in microbatches]

    divergence = Divergence(settings("kto")).attach(small.policy(), small.accelerator(), Layout())
    divergence.streams(Likely().streams([collate(RECORDS)]))
    assert divergence.estimate[Role.MISMATCHED] == 0


def test_no_gradient_flows_into_the_divergence():
    rows = MadeReference().streams([small.in_double(collate(RECORDS))])
    policy = small.policy(dtype=torch.float64)
    divergence = Divergence(settings("kto")).attach(policy, small.accelerator(), Layout())
    (learned,) = divergence.streams(rows)
    estimate = divergence.estimate[Role.MISMATCHED]
    assert isinstance(estimate, torch.Tensor) and not estimate.requires_grad and policy.training
    assert Role.MISMATCHED not in learned.roles and learned.roles.count(Role.PROMPT) == 5


# ------------------------------------------------------------------------------------------------ cutting segments out


def test_a_row_without_its_mismatched_answers_is_the_row_that_never_had_them():
    never = []
    for one in RECORDS:
        (batch,) = [collate([one])]
        roles = [role for role in batch.roles if role is not Role.MISMATCHED]
        keep = [at for at, role in enumerate(batch.roles) if role is not Role.MISMATCHED]
        assert len(roles) == len(keep)
        never.append((batch, keep))
    packed = without(collate(RECORDS), Role.MISMATCHED, MEDIA)
    assert packed.lengths == tuple(batch.lengths[at] for batch, keep in never for at in keep)
    assert packed.roles == (Role.PROMPT, Role.WANTED, Role.PROMPT, Role.UNWANTED) * 2 + (Role.PROMPT, Role.WANTED)
    assert packed.stems == (-1, 0, -1, 2, -1, 4, -1, 6, -1, 8)
    assert packed.records == (0, 0, 1, 1, 2, 2, 3, 3, 4, 4)
    assert packed.ids[::2] == tuple(f"record {seed}" for seed in range(5))
    # of the images, the one in the mismatched answer of record 1 went
    assert len(packed.grids) == 3 and packed.patch_PX is not None
    first, third = RECORDS[0].patch_PX, RECORDS[2].patch_PX
    assert first is not None and third is not None
    torch.testing.assert_close(packed.patch_PX, torch.cat([first, third]))
    tokens = [batch.token_T.split(list(batch.lengths))[at] for batch, keep in never for at in keep]
    assert torch.equal(packed.token_T, torch.cat(tokens))
    places = [batch.position_3T.split(list(batch.lengths), dim=1)[at] for batch, keep in never for at in keep]
    assert torch.equal(packed.position_3T, torch.cat(places, dim=1))


def test_nothing_to_cut_and_nothing_left():
    batch = collate(RECORDS)
    assert kept(batch, range(batch.num_segments), MEDIA) is batch
    words = kept(batch, [3, 4], MEDIA)  # prompt and answer of the record whose images lie elsewhere
    assert words.grids == () and words.patch_PX is None and words.stems == (-1, 0)
    assert without(filler(0), Role.MISMATCHED, MEDIA).num_tokens == 2


def test_pairs_and_losses_without_a_divergence_are_left_alone():
    rows = [collate(PAIRS)]
    divergence = Divergence(settings())
    assert divergence.streams(rows) is rows and divergence.sums() is None
    logprob_T, batch = row(pair(evenly(-10.0, -11.0, 5), evenly(-12.0, -11.5, 4)))
    build(settings(), divergence).loss(logprob_T, batch)
    assert divergence.sums() is None
