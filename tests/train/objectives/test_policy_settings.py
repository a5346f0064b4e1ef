"""Settings of a policy loss that contradict each other, or would do nothing, are told in one sentence that helps."""

import math
import re

import pytest

from tests.train.objectives.attempts import settings
from train.compose import from_plain, plain
from train.config import UserError
from train.objectives.policy_gradient import needs_reference
from train.rl_config import (
    READS,
    AdvantageKind,
    Aggregate,
    Correction,
    KLEstimator,
    MismatchConfig,
    PolicyLoss,
    Ratio,
    RLObjectiveConfig,
)


def test_every_loss_says_which_settings_it_reads():
    assert set(READS) == set(PolicyLoss)


@pytest.mark.parametrize(
    "keys, told",
    [
        ({"clip_low": 1.0}, "objective.clip_low is 1.0; it must be at least 0 and less than 1"),
        ({"clip_high": math.inf}, "objective.clip_high is inf; it must be 0 or more, and finite"),
        ({"clip_low": math.nan}, "objective.clip_low is nan"),
        ({"dual_clip": 1.0}, "objective.dual_clip is 1.0; it must be finite and more than 1 + objective.clip_high"),
        (
            {"loss": PolicyLoss.cispo, "clip_high": 0.2},
            "objective.clip_high is 0.2, but cispo does not use it. Leave it",
        ),
        ({"loss": PolicyLoss.sapo, "dual_clip": 3.0}, "objective.dual_clip is 3.0, but sapo does not use it"),
        ({"cispo_cap": 2.0}, "but clip does not use it. Leave it out, or choose objective.loss from cispo"),
        ({"loss": PolicyLoss.gmpo, "ratio": Ratio.token}, "objective.ratio is token, but gmpo does not use it"),
        ({"loss": PolicyLoss.gmpo, "gmpo_clip": 0.0}, "objective.gmpo_clip is 0.0; it must be a positive number"),
        ({"loss": PolicyLoss.sapo, "sapo_positive": -1.0}, "objective.sapo_positive is -1.0; it must be a positive"),
        ({"aggregate": Aggregate.token}, "neither GSPO nor DAPO. Use objective.aggregate=sequence (GSPO)"),
        (
            {"aggregate": Aggregate.length, "max_length": 9},
            "objective.aggregate=length weighs an attempt by its length",
        ),
        ({"loss": PolicyLoss.gmpo, "aggregate": Aggregate.token}, "the ratio of gmpo is one for all of it"),
        ({"ratio": Ratio.token, "aggregate": Aggregate.length}, "objective.max_length null: say what divides the sum"),
        ({"max_length": 9}, "objective.max_length 9, which only aggregate=length reads"),
        (
            {"ratio": Ratio.token, "aggregate": Aggregate.length, "max_length": 0},
            "max_length is 0; it must be at least",
        ),
        ({"band": [0.5]}, "objective.band is [0.5]; it must be two numbers"),
        ({"band": [5.0, 0.5]}, "objective.band is [5.0, 0.5]; it must be two numbers"),
        ({"band": [0.5, math.nan]}, "objective.band is [0.5, nan]"),
        ({"band": [1.5, 2.0]}, "with 1 between them"),
        ({"correction": Correction.tis, "band": [0.5, 2.0]}, "tis has no lower bound. Use [0, 2]"),
        ({"correction": Correction.mis_product, "band": [0.5, 2.0]}, "mis_product has no lower bound. Use [0, 2]"),
        ({"correction": Correction.none, "band": [0.5, 2.0]}, "objective.correction=none has no use for it"),
        (
            {"advantage": AdvantageKind.rloo, "advantage_eps": 0.1},
            "objective.advantage=rloo divides by no deviation. Leave it out",
        ),
        ({"opsm_delta": -0.1}, "objective.opsm_delta is -0.1; it must be 0 or more"),
        ({"kl": -1.0}, "objective.kl is -1.0; it must be 0 or a positive number"),
        ({"entropy": math.inf}, "objective.entropy is inf; it must be 0 or a positive number"),
        ({"kl_unbiased": True}, "objective.kl_unbiased is True, but objective.kl is 0. Give objective.kl a weight"),
        ({"kl": 0.1, "kl_estimator": KLEstimator.k1}, "k1, whose gradient is 0 on average when it is a loss"),
    ],
)
def test_mistakes(keys, told):
    with pytest.raises(UserError, match=re.escape(told)):
        settings(**keys)


@pytest.mark.parametrize(
    "keys, told",
    [
        ({"warn": {"kl": 1.0}}, "mismatch.warn.kl: there is no such number. There are mean, max"),
        ({"stop": {"mean": -1.0}}, "mismatch.stop.mean is -1.0; it must be 0 or more"),
        ({"warn": {"mean": 2.0}}, "mismatch.warn.mean is 2.0 and mismatch.stop.mean 1.0; the run would end before"),
        ({"patience": 0}, "mismatch.patience is 0"),
        ({"rise": 1.0}, "mismatch.rise is 1.0; it must be more than 1"),
    ],
)
def test_mistakes_about_the_mismatch(keys, told):
    with pytest.raises(UserError, match=re.escape(told)):
        MismatchConfig(**keys)


def test_what_null_stands_for():
    assert settings().clip == (3e-4, 4e-4) and settings().bounds == (0.5, 5.0)
    assert settings(ratio=Ratio.token).clip == (0.2, 0.2)
    assert settings(clip_low=0.1).clip == (0.1, 4e-4)
    assert settings(correction=Correction.tis).bounds == (0.0, 2.0)
    assert settings(correction=Correction.tis, band=[0, math.inf]).bounds == (0.0, math.inf)


def test_every_loss_says_what_it_reads_and_every_key_exists():
    assert set(READS) == set(PolicyLoss)
    assert {key for keys in READS.values() for key in keys} <= vars(RLObjectiveConfig()).keys()


def test_only_a_divergence_needs_a_reference():
    assert needs_reference(settings(kl=0.1)) and not needs_reference(settings(entropy=0.1))


def test_settings_survive_a_checkpoint():
    config = settings(ratio=Ratio.token, correction=Correction.mis, band=[0.0, 3.0], kl=0.1, kl_unbiased=True)
    assert from_plain(plain(config), RLObjectiveConfig) == config
