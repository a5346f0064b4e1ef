"""Every preference loss that TRL has too, against TRL's own code, on pairs of random lengths."""

from typing import Any

import pytest
import torch

from tests.train.objectives import trl_oracle
from tests.train.objectives.rows import Said, pair, row, settings
from train.dpo_config import DPOObjectiveConfig, FDivergence
from train.objectives.dpo import build
from train.objectives.kto import Divergence, Role

SMOOTH = {"label_smoothing": 0.2}
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("sigmoid", {}),
    ("sigmoid", {"beta": 0.7, "sft_loss_ratio": 0.3}),
    ("sigmoid", {"ld_alpha": 0.3}),
    ("sigmoid", {"added_losses": {"bco_pair": 0.2, "sppo_hard": 0.01}, "pref_loss_ratio": 0.8, "sft_loss_ratio": 1.0}),
    ("sigmoid", {"reference_free": True, "sft_loss_ratio": 1.0, **SMOOTH}),
    ("hinge", {"reference_free": True}),
    ("hinge", {"ld_alpha": 0.0}),
    ("ipo", {}),
    ("ipo", {"reference_free": True}),
    ("robust", SMOOTH),
    ("exo_pair", SMOOTH),
    ("nca_pair", {}),
    ("bco_pair", {"ld_alpha": 0.6}),
    ("sppo_hard", {}),
    ("apo_zero", {}),
    ("apo_down", {}),
    ("discopop", {}),
    ("sigmoid_norm", {"beta": 2.0}),
    ("simpo", {"beta": 2.0, "simpo_gamma": 1.0, **SMOOTH}),
    ("orpo", {"beta": 0.4}),
    *[
        (loss, {"f_divergence_type": kind, **keys})
        for kind in FDivergence
        for loss, keys in (("sigmoid", {}), ("hinge", {}), ("robust", SMOOTH), ("exo_pair", SMOOTH), ("discopop", {}))
    ],
]


def said(generator: torch.Generator) -> Said:
    tokens = int(torch.randint(1, 9, (), generator=generator))
    policy_T, reference_T = -2 * torch.rand(
        2, tokens, generator=generator
    )  # float32 holds them, and TRL's alpha needs it
    return Said(policy_T.tolist(), reference_T.tolist())


def pairs(count: int) -> list[tuple[Said, Said]]:
    generator = torch.Generator().manual_seed(1)
    return [(said(generator), said(generator)) for _ in range(count)]


def ours(config: DPOObjectiveConfig, *records: tuple[Said, Said]) -> float:
    logprob_T, batch = row(*(pair(*record) for record in records))
    return build(config).loss(logprob_T, batch).total.item()


@pytest.mark.parametrize("loss, keys", SETTINGS, ids=lambda value: str(value))
def test_the_same_number(loss, keys):
    config = settings(loss, **keys)
    # what TRL does in float32, whatever it is given
    single = config.f_divergence_type is FDivergence.alpha_divergence or loss in ("orpo", "exo_pair")
    records = pairs(6)
    for record in records:
        theirs = trl_oracle.loss_of(config, *record)
        assert theirs is not None
        assert ours(config, record) == pytest.approx(theirs, rel=1e-5 if single else 1e-12, abs=1e-6 if single else 0)
    # and of all of them together, where TRL's likelihood is a mean over tokens
    if not single and not config.sft_loss_ratio and not config.reference_free and loss != "simpo":
        together = trl_oracle.dpo(
            records,
            {name.value: weight for name, weight in config.losses().items()},
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            ld_alpha=config.ld_alpha,
            f_divergence_type=config.f_divergence_type.value,
        )
        assert ours(config, *records) / len(records) == pytest.approx(together, rel=1e-12)


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("kl", [0.7, -0.4])
def test_labelled_answers(loss, kl):
    labelled = [(chosen, index % 3 != 0) for index, (chosen, _) in enumerate(pairs(7))]
    config = settings(loss, desirable_weight=1.5, undesirable_weight=0.5)
    divergence = Divergence(config)
    divergence.estimate[Role.MISMATCHED] = max(kl, 0.0) if loss == "kto" else 0.0
    records = [{Role.WANTED if wanted else Role.UNWANTED: answer} for answer, wanted in labelled]
    total = build(config, divergence).loss(*row(*records)).total.item()
    assert total / 7 == pytest.approx(trl_oracle.kto(labelled, kl, loss, (1.5, 0.5)), rel=1e-12)


def test_what_trl_does_not_do_is_known():
    for loss, keys in (("sigmoid", SMOOTH), ("dpop", {}), ("or", {}), ("sigmoid", {"normalize_logps": True})):
        assert trl_oracle.loss_of(settings(loss, **keys), *pairs(1)[0]) is None
