"""DPO against TRL's trainer: the same pairs, in its padded copies of each prompt and in our rows that share it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from data.pack import collate
from tests.parity.dpo_peer import pair_example, random_pairs, trainer
from tests.parity.reference import (
    MOE_SHAPE,
    SHAPES,
    TEXT_IDS,
    Result,
    Shape,
    grad_error,
    load_ours,
    make_reference,
    named_like_reference,
)
from train.config import OptimConfig
from train.dpo_config import DPOObjectiveConfig, ReferenceConfig
from train.loop import train_step
from train.objectives.dpo import build
from train.optim import build_optimizer
from train.parallel.layout import Layout
from train.parallel.updates import Plain
from train.policy import Policy, on_device
from train.reference import Copy

# TRL and transformers use names that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

PAIRS = random_pairs([3, 9, 14, 2], [(5, 2), (1, 7), (4, 4), (12, 3)], range(*TEXT_IDS), seed=3)
CPU = torch.device("cpu")


class Sides:
    """A policy and another model as its reference, in both programs."""

    def __init__(self, shape: Shape, folder: Path):
        self.theirs, reference = make_reference(shape), make_reference(shape, seed=1)
        with torch.no_grad():  # near enough for the loss to have a slope
            for other, p in zip(reference.parameters(), self.theirs.parameters(), strict=True):
                other.lerp_(p, 0.9)
        self.model = load_ours(self.theirs, folder / "policy")
        copy = load_ours(reference, folder / "reference").requires_grad_(False)
        self.copy = Copy(Policy(copy), self.model, ReferenceConfig(), {}, CPU, Layout())
        self.their_copy, self.folder = reference, folder / "trl"

    def trainer(self, **settings: Any) -> Any:
        settings = dict(per_device_train_batch_size=4, gradient_checkpointing=False) | settings
        return trainer(self.theirs, PAIRS, self.folder, ref_model=self.their_copy, **settings)

    def rows(self, per_row: int) -> list:
        examples = [pair_example(pair, str(number)) for number, pair in enumerate(PAIRS)]
        return [collate(examples[at : at + per_row]) for at in range(0, len(examples), per_row)]


@pytest.fixture(params=[SHAPES[0], MOE_SHAPE], ids=lambda shape: shape.name)
def sides(request, tmp_path: Path) -> Sides:
    return Sides(request.param, tmp_path)


@pytest.mark.parametrize(
    ("settings", "their_settings"),
    [
        ({}, {}),
        (dict(preference_loss_type="ipo", beta=0.3), dict(loss_type=["ipo"], beta=0.3)),
        (
            dict(pref_loss_ratio=0.8, added_losses={"bco_pair": 0.2}, ld_alpha=0.5),
            dict(loss_type=["sigmoid", "bco_pair"], loss_weights=[0.8, 0.2], ld_alpha=0.5),
        ),
    ],
    ids=["sigmoid", "ipo", "mixed, length desensitised"],
)
def test_loss_and_gradient_of_every_weight(sides: Sides, settings: dict, their_settings: dict):
    parts = sides.trainer(**their_settings)
    (inputs,) = parts.get_train_dataloader()
    loss = parts.compute_loss(parts.model, inputs)
    loss.backward()
    theirs = Result(
        torch.zeros(0), loss.detach(), {n: p.grad for n, p in sides.theirs.named_parameters() if p.grad is not None}
    )

    policy, objective = Policy(sides.model), build(DPOObjectiveConfig(**settings))
    (row,) = sides.copy.streams(sides.rows(per_row=len(PAIRS)))
    batch, row_R = on_device(row, CPU)
    ours = objective.loss(policy(batch, row_R).logprob_T, batch).total / objective.count(batch)
    ours.backward()
    grads = {n: g for n, g in named_like_reference(sides.model).items() if n in theirs.grads}
    mine = Result(torch.zeros(0), ours.detach(), grads)
    assert ours.item() == pytest.approx(loss.item(), rel=2e-6)
    assert grad_error(mine, theirs)[0] < 1e-5


def test_losses_of_updates_with_pairs_in_other_batches(sides: Sides):
    """TRL takes the pairs of an update by two, padded; here three lie in one row and one in another."""
    parts = sides.trainer(
        per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=4, learning_rate=1e-3
    )
    parts.train()
    theirs = [entry["loss"] for entry in parts.state.log_history if "loss" in entry]

    policy = Policy(sides.model).train()
    optimizer = build_optimizer(sides.model, OptimConfig(lr=1e-3, weight_decay=0.0))
    accelerator = Accelerator(cpu=True)
    updates = Plain(policy, optimizer, accelerator)
    ours = [
        train_step(
            updates,
            build(DPOObjectiveConfig()),
            sides.rows(per_row=3),
            accelerator=accelerator,
            max_grad_norm=1.0,
            beside=[sides.copy],
        )["loss"]
        for _ in theirs
    ]
    assert len(ours) == 4 and ours[0] - ours[-1] > 0.05, "nothing was learned"
    assert ours == pytest.approx(theirs, abs=1e-5)
