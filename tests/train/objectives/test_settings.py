"""Settings of the objective that contradict each other, or would do nothing, are told in one sentence that helps."""

import re

import pytest

from tests.train.objectives.rows import settings
from train.compose import from_plain, plain
from train.config import UserError
from train.dpo_config import READS, DPOObjectiveConfig, FDivergence, PreferenceLoss
from train.objectives.dpo import is_unpaired, needs_corrupted, needs_mismatched, needs_reference


@pytest.mark.parametrize(
    "loss, keys, told",
    [
        ("sigmiod", {}, "objective.preference_loss_type: there is no loss sigmiod; did you mean sigmoid?"),
        ("sigmoid", {"added_losses": {"bco": 0.2}}, "objective.added_losses.bco: there is no loss bco; did you mean"),
        ("sigmoid", {"added_losses": {"sigmoid": 0.2}}, "sigmoid is objective.preference_loss_type already"),
        ("sigmoid", {"added_losses": {"bco_pair": 0.0}}, "added_losses.bco_pair is 0.0; it must be a positive number"),
        ("sigmoid", {"added_losses": {"kto": 0.2}}, "sigmoid, kto cannot be added up"),
        ("sigmoid", {"beta": 0.0}, "objective.beta is 0.0; it must be a positive number"),
        ("sigmoid", {"beta": float("nan")}, "objective.beta is nan"),
        ("sigmoid", {"sft_loss_ratio": -1.0}, "objective.sft_loss_ratio is -1.0; it must be 0 or a positive number"),
        ("sigmoid", {"label_smoothing": 0.5}, "objective.label_smoothing is 0.5; it must lie in 0..0.5, 0.5 excluded"),
        ("bco_pair", {"bco_momentum": 1.0}, "objective.bco_momentum is 1.0; it must lie in 0..1, 1 excluded"),
        ("nca_pair", {"bco_momentum": 0.9}, "objective.bco_momentum is 0.9, but nca_pair does not use it"),
        ("sigmoid", {"ld_alpha": 1.5}, "objective.ld_alpha is 1.5; it must lie in 0..1"),
        ("hinge", {"label_smoothing": 0.1}, "objective.label_smoothing is 0.1, but hinge does not use it"),
        ("exo_pair", {}, "objective.label_smoothing is 0, but exo_pair takes its logarithm"),
        ("ipo", {"normalize_logps": True}, "objective.normalize_logps is True, but ipo does not use it"),
        ("simpo", {"ld_alpha": 0.5}, "objective.ld_alpha is 0.5, but simpo does not use it"),
        ("sigmoid", {"simpo_gamma": 1.0}, "objective.simpo_gamma is 1.0, but sigmoid does not use it"),
        ("dpop", {"f_divergence_type": FDivergence.forward_kl}, "objective.f_divergence_type is forward_kl, but dpop"),
        ("bco_pair", {"reference_free": True}, "objective.reference_free is True, but bco_pair"),
        (
            "sigmoid",
            {"added_losses": {"bco_pair": 1.0}, "reference_free": True},
            "objective.reference_free is true, but bco_pair looks at what one answer gained",
        ),
        ("sigmoid", {"reference_free": True, "mdpo_anchor": 1.0}, "objective.mdpo_anchor is 1.0, but it compares"),
        (
            "sigmoid",
            {"reference_free": True, "f_divergence_type": FDivergence.js_divergence},
            "objective.f_divergence_type is js_divergence, a divergence from a reference",
        ),
        ("sigmoid", {"ld_alpha": 0.5, "normalize_logps": True}, "both correct for length"),
        ("sigmoid", {"ld_policy_only": True}, "objective.ld_policy_only is True, but it does nothing without"),
        ("sigmoid", {"mdpo_delta": 0.1}, "objective.mdpo_delta is 0.1, but it does nothing without"),
        ("sigmoid", {"f_alpha_divergence_coef": 0.1}, "objective.f_alpha_divergence_coef is 0.1, but it does nothing"),
        ("sigmoid", {"desirable_weight": 2.0}, "objective.desirable_weight is 2.0, but sigmoid does not use it"),
        ("kto", {"sft_loss_ratio": 1.0}, "objective.sft_loss_ratio is 1.0, but kto has no pairs"),
        ("kto", {"label_smoothing": 0.1}, "objective.label_smoothing is 0.1, but kto does not use it"),
    ],
)
def test_mistakes(loss, keys, told):
    with pytest.raises(UserError, match=re.escape(told)):
        settings(loss, **keys)


def test_a_mixture_may_use_what_any_of_its_losses_reads():
    config = settings("hinge", added_losses={"sigmoid": 0.5}, label_smoothing=0.1)
    assert config.losses() == {PreferenceLoss.hinge: 1.0, PreferenceLoss.sigmoid: 0.5}


def test_what_data_and_reference_must_bring():
    for loss in PreferenceLoss:
        config = settings(loss.value, label_smoothing=0.1 * (loss is PreferenceLoss.exo_pair))
        assert needs_reference(config) == (loss.value not in ("simpo", "or", "orpo"))
        assert is_unpaired(config) == (loss.value in ("kto", "apo_zero_unpaired"))
        assert needs_mismatched(config) == (loss.value == "kto")
        assert not needs_corrupted(config)
    assert not needs_reference(settings(reference_free=True))
    assert needs_reference(settings("simpo", added_losses={"sigmoid": 1.0}))
    assert needs_reference(settings("simpo", mdpo_anchor=1.0))
    assert not needs_reference(settings(reference_free=True, mdpo_conditional=1.0))
    assert needs_corrupted(settings(mdpo_conditional=1.0))


def test_every_loss_says_what_it_reads_and_every_key_exists():
    assert set(READS) == set(PreferenceLoss)
    assert {key for keys in READS.values() for key in keys} <= vars(DPOObjectiveConfig()).keys()


def test_settings_survive_a_checkpoint():
    config = settings("sigmoid", added_losses={"bco_pair": 0.2}, ld_alpha=0.5, sft_loss_ratio=1.0)
    assert from_plain(plain(config), DPOObjectiveConfig) == config
