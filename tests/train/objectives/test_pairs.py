"""From a packed row to numbers per pair."""

import dataclasses
import math

import pytest
import torch

import tests.train.small as small
from data.batch import Role
from data.pack import collate, filler
from tests.train.objectives.rows import PAIR, Said, evenly, pair, record, row, settings
from train.loop import Beside, train_step
from train.objectives.dpo import build, pair_metrics
from train.objectives.kto import Divergence
from train.objectives.pairs import count_pairs, gather_pairs
from train.parallel.layout import Layout


def test_sums_lengths_and_scores_of_every_pair():
    chosen, rejected = Said([-1.0, -2, -4], [-1.5, -2, -3], 0.9), Said([-8.0], [-7.0], 0.2)
    longer = Said([-1.0, -2, -3, -5], [-1.0, -1, -1, -1])
    logprob_T, batch = row(pair(chosen, rejected), pair(rejected, longer, chosen))
    pairs = gather_pairs(logprob_T, batch)
    assert pairs.chosen.logprob_N.tolist() == [-7, -8] and pairs.rejected.logprob_N.tolist() == [-8, -11]
    assert pairs.chosen.shared_N.tolist() == [-1, -8] and pairs.rejected.shared_N.tolist() == [-8, -1]
    assert pairs.chosen.length_N.tolist() == [3, 1] and pairs.rejected.length_N.tolist() == [1, 4]
    assert pairs.chosen.ref_logprob_N is not None and pairs.chosen.ref_logprob_N.tolist() == [-6.5, -7]
    assert pairs.rejected.ref_shared_N is not None and pairs.rejected.ref_shared_N.tolist() == [-7, -1]
    assert pairs.corrupted_N.tolist() == [0, 1] and pairs.corrupted is not None
    assert pairs.corrupted.logprob_N.tolist() == [-7, -7]  # the first pair's is its chosen answer
    assert pairs.score_gap_N[0] == pytest.approx(0.7) and math.isnan(pairs.score_gap_N[1])
    assert [batch.ids[at] for at in pairs.segments] == ["record 0", "record 1"]
    assert count_pairs(batch) == 2 and count_pairs(filler(0)) == 0


def test_weights_of_targets_count_in_sums_and_lengths():
    logprob_T, batch = row(pair(Said([-1.0, -2, -4], [-1.0, -1, -1]), Said([-8.0], [-7.0])))
    weight_T = batch.weight_T.clone()
    weight_T[3] = 0.0  # a word that a tool wrote, in the middle of the chosen answer
    pairs = gather_pairs(logprob_T, dataclasses.replace(batch, weight_T=weight_T))
    assert pairs.chosen.logprob_N.item() == -5 and pairs.chosen.length_N.item() == 2
    assert pairs.chosen.shared_N.item() == -1


def test_metrics_of_a_pair():
    logprob_T, batch = row(pair(*PAIR))
    metrics = {name: value.item() for name, value in pair_metrics(gather_pairs(logprob_T, batch), settings()).items()}
    assert metrics == pytest.approx(
        {
            "loss": 0.6209570478,
            "reward_chosen": 0.1,
            "reward_rejected": -0.05,
            "reward_margin": 0.15,
            "reward_accuracy": 1,
            "logprob_chosen": -10,
            "logprob_rejected": -12,
            "tokens_chosen": 5,
            "tokens_rejected": 4,
            "tokens_gap": 1,
            "nll_chosen": 2,
            "kl_chosen": 1,
            "kl_chosen_k3": 5 * (math.exp(-0.2) - 1 + 0.2),  # each token gained 0.2
        }
    )


def test_rewards_without_a_reference():
    pairs = gather_pairs(*row(pair(evenly(-10.0, None, 5), evenly(-12.0, None, 4))))
    free, average = pair_metrics(pairs, settings(reference_free=True)), pair_metrics(pairs, settings("simpo"))
    assert free["reward_margin"].item() == pytest.approx(0.2) and average["reward_margin"].item() == pytest.approx(0.1)
    assert "kl_chosen" not in free and "kl_chosen" not in average


def test_a_row_without_its_reference_is_refused():
    with pytest.raises(AssertionError, match="no ref_logprob_T"):
        build(settings()).loss(*row(pair(evenly(-10.0, None, 5), evenly(-12.0, None, 4))))


# -------------------------------------------------------------------------------------------------- with a model


class MadeReference(Beside):
    def streams(self, microbatches):
        return [
            dataclasses.replace(batch, ref_logprob_T=-batch.weight_T * (3 + batch.token_T % 5 / 4))
            for batch in microbatches
        ]


RECORDS = [
    record(seed, Role.CHOSEN, Role.REJECTED, *[Role.CORRUPTED] * (seed % 2 == 0), image=seed % 2 == 0)
    for seed in range(5)
]
MIXTURE = settings(
    pref_loss_ratio=0.8,
    added_losses={"bco_pair": 0.2, "simpo": 0.1},
    sft_loss_ratio=0.5,
    ld_alpha=0.3,
    mdpo_conditional=1.0,
    mdpo_anchor=0.7,
    beta=1.0,
)


def stepped(rows):
    policy = small.policy(dtype=torch.float64)
    metrics = train_step(
        small.updates(policy, small.optimizer(policy)),
        build(MIXTURE),
        rows,
        accelerator=small.accelerator(),
        max_grad_norm=1e9,
        beside=[MadeReference()],
    )
    return metrics, {name: value.detach() for name, value in policy.named_parameters()}


def test_how_an_update_is_cut_changes_nothing():
    whole, weights = stepped([small.in_double(collate(RECORDS))])
    cut = [small.in_double(collate(part)) for part in (RECORDS[3:], RECORDS[:1], RECORDS[1:3])]
    metrics, others = stepped([*cut, filler(0)])
    assert whole["units"] == 5 == metrics["units"] and whole["skipped"] == 0
    assert {"loss_bco_pair", "loss_simpo", "loss_sft", "loss_conditional", "loss_anchor"} <= whole.keys()
    for name in whole.keys() - {"tokens", "text_tokens"}:
        assert metrics[name] == pytest.approx(whole[name], rel=1e-10, abs=1e-12), name
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=0, atol=1e-12)


def test_the_moving_mean_of_rewards_follows_the_updates_that_were_done():
    config = settings("bco_pair", bco_momentum=0.75, beta=0.5)
    policy = small.policy(dtype=torch.float64)
    divergence = Divergence(config).attach(policy, small.accelerator(), Layout())
    updates, expected, seen = small.updates(policy, small.optimizer(policy, lr=1e-2)), 0.0, []
    rows = [small.in_double(collate(part)) for part in (RECORDS[:2], RECORDS[2:])]

    def step(rows):
        metrics = train_step(
            updates,
            build(config, divergence),
            rows,
            accelerator=small.accelerator(),
            max_grad_norm=1e9,
            beside=[MadeReference(), divergence],
        )
        seen.append(metrics.get("bco_shift"))
        return metrics

    for _ in range(3):
        assert divergence.shift == pytest.approx(expected, rel=1e-12)
        metrics = step(rows)
        expected = 0.75 * expected + 0.25 * (metrics["reward_chosen"] + metrics["reward_rejected"]) / 2
    assert seen[0] == 0 and abs(seen[1]) > 0.1 and seen[1] != seen[2]
    before = divergence.shift
    nothing = step([filler(0)])
    broken = dataclasses.replace(rows[0], weight_T=rows[0].weight_T * math.nan)
    assert nothing["skipped"] and step([broken])["skipped"]
    assert divergence.shift == before == pytest.approx(expected, rel=1e-12)
    other = Divergence(config)
    other.load_state_dict(divergence.state_dict())
    assert other.of_pairs == (0.0, 0.0, before)


def test_rewards_are_measured_against_it():
    pairs = gather_pairs(*row(pair(*PAIR)))
    loss = pair_metrics(pairs, settings("bco_pair", bco_momentum=0.9), shift=0.3)["loss"].item()
    # rewards 0.1 and -0.05
    assert loss == pytest.approx(math.log1p(math.exp(0.3 - 0.1)) + math.log1p(math.exp(-0.05 - 0.3)), rel=1e-12)
    assert Divergence(settings("bco_pair")).sums() is None
