"""How held-out pairs and labelled answers are scored, by hand; what is drawn of a pair."""

import dataclasses

import pytest
import torch

from data.batch import Role
from data.encode import encode, encode_pair
from data.pack import filler
from tests.data.test_pairs import PICTURES, PROCESSOR, pair_of
from tests.train.objectives.rows import PAIR, evenly, row
from train.dpo_config import DPOObjectiveConfig
from train.heldout import prompt_of
from train.heldout_pairs import PairScore, labelled_score, labelled_sums, pair_score, pair_sums, with_chosen
from train.objectives import dpo, kto
from train.objectives.pairs import gather_pairs

CONFIG = DPOObjectiveConfig()


def measured(logprob_T, batch):
    pairs = gather_pairs(logprob_T, batch)
    return dpo.pair_metrics(pairs, CONFIG), pairs.segments


def test_pairs_by_hand():
    """The pair of reference 7.1 (rewards .1 and -.05), and one that is the other way round and equally long."""
    chosen, rejected = PAIR
    other = {Role.CHOSEN: evenly(-6.0, -5.0, 2), Role.REJECTED: evenly(-5.0, -7.0, 2)}  # rewards -.1 and .2
    sums = pair_sums(measured, *row({Role.CHOSEN: chosen, Role.REJECTED: rejected}, other))
    score = pair_score(sums)
    assert (score.ranked, score.likelier, score.total) == (1, 1, 2) and score.accuracy == 0.5
    assert score.margin == pytest.approx((0.15 - 0.3) / 2) and score.chosen == pytest.approx((0.1 - 0.1) / 2)
    z = torch.tensor(0.3, dtype=torch.float64)
    assert score.loss == pytest.approx((0.6209570478 + float(torch.nn.functional.softplus(z))) / 2)
    assert score.line().startswith("held out 1/2 ranked right = 50.0%")
    assert len(score.cells()) == len(score.HEADER) - 1
    assert score == type(score)(**dataclasses.asdict(score))  # as the training state keeps it


def test_a_policy_that_is_its_reference_has_ranked_nothing():
    """Of 4 pairs 0 would be an interval of 0 to 49 %: worse than chance, which nobody has measured."""
    before = PairScore(ranked=0, likelier=3, total=4, loss=0.693, margin=0.0, chosen=0.0)
    assert before.line().startswith("held out 4 pairs, not ranked yet (the policy is the reference), chosen likelier")
    assert before.cells()[:3] == ("not yet", "", "75.0%")
    wrong = dataclasses.replace(before, margin=-0.1, chosen=-0.05)
    assert wrong.line().startswith("held out 0/4 ranked right = 0.0%") and wrong.cells()[0] == "0 of 4"


def test_labelled_answers_by_hand():
    config = DPOObjectiveConfig(preference_loss_type="apo_zero_unpaired")

    def labelled(logprob_T, batch):
        answers = kto.gather_labelled(logprob_T, batch)
        return kto.labelled_metrics(answers, config), answers.segments

    wanted, unwanted = {Role.WANTED: evenly(-2.0, -3.0, 2)}, {Role.UNWANTED: evenly(-4.0, -4.5, 3)}
    score = labelled_score(labelled_sums(labelled, *row(wanted, unwanted, unwanted)))
    assert (score.judged, score.wanted, score.total) == (1, 1, 3)
    assert score.reward_wanted == pytest.approx(0.1) and score.reward_unwanted == pytest.approx(0.05)
    assert len(score.cells()) == len(score.HEADER) - 1
    assert score == type(score)(**dataclasses.asdict(score))


def test_a_row_of_nothing_adds_nothing():
    batch = filler(0)
    assert pair_sums(measured, torch.zeros(2), batch).tolist() == [0.0] * 6


def test_what_is_drawn_of_a_pair_is_the_conversation_with_the_chosen_answer():
    pair = pair_of("yes", "no", question=(PICTURES[1], "?", PICTURES[2]))
    shown, whole = with_chosen(encode_pair(pair, PROCESSOR)), encode(pair.conversations[0], PROCESSOR)
    media_ids = torch.tensor(PROCESSOR.config.placeholder_token_ids)
    assert torch.equal(shown.token_T, whole.token_T) and torch.equal(shown.position_3T, whole.position_3T)
    mine, theirs = (prompt_of(example, media_ids) for example in (shown, whole))
    assert torch.equal(mine.token_T, theirs.token_T) and mine.grids == theirs.grids
    assert torch.equal(mine.patch_PX, theirs.patch_PX)
