"""Preference alignment: of two answers to one prompt, one becomes likelier than the other. The run: train/training.py.

ernie dpo model.checkpoint=runs/sft/export data.path=pairs.jsonl     all weights, against a frozen copy
ernie dpo ... peft=lora                                              adapters, against the model without them
ernie dpo ... reference.kind=cache                                   log-probabilities computed beforehand
ernie dpo ... objective.preference_loss_type=simpo                   other losses: docs/dpo.md
accelerate launch -m train.dpo ...                                   the same program on several devices
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor

from data.batch import PackedBatch, Role
from train.checkpoint import Resumable
from train.compose import to_typed
from train.dpo_config import DPOConfig
from train.heldout_pairs import (
    LabelledScore,
    PairScore,
    labelled_score,
    labelled_sums,
    pair_score,
    pair_sums,
    sum_heldout,
    with_chosen,
)
from train.loop import Beside
from train.objectives import Objective, dpo, kto
from train.objectives.pairs import gather_pairs
from train.pair_groups import Degenerate, Displacement, PairGroups, Unpictured
from train.reference import Reference, build_reference
from train.run import program
from train.score import Score
from train.tracking import Tracker
from train.training import Algorithm, Setup, run, show_answers


@program("dpo")
def main(cfg: DictConfig) -> None:
    run(DPO(to_typed(cfg, DPOConfig)))


class DPO(Algorithm[DPOConfig]):
    """With kto and apo_zero_unpaired, of labelled answers in place of pairs."""

    reference: Reference
    degenerate: Degenerate

    def __init__(self, config: DPOConfig):
        super().__init__(config)
        self.unpaired = dpo.is_unpaired(config.objective)
        self.score = LabelledScore if self.unpaired else PairScore
        self.divergence = kto.Divergence(config.objective)
        self.displacement, self.unpictured = Displacement(), Unpictured()

    def objective(self, rows_per_update: int) -> Objective:
        return dpo.build(self.config.objective, self.divergence)

    def measured(self, logprob_T: Tensor, batch: PackedBatch) -> tuple[dict[str, Tensor], Sequence[int]]:
        """See `pair_groups.Measured`."""
        logprob_T, config = logprob_T.detach(), self.config.objective
        if self.unpaired:
            answers = kto.gather_labelled(logprob_T, batch)
            kl = self.divergence.estimate[Role.MISMATCHED]
            return kto.labelled_metrics(answers, config, kl), answers.segments
        pairs = gather_pairs(logprob_T, batch)
        return dpo.pair_metrics(pairs, config, *self.divergence.of_pairs), pairs.segments

    def begin(self, setup: Setup) -> Sequence[Beside]:
        config, accelerator = self.config, setup.accelerator
        self.reference = build_reference(
            config.reference,
            needed=dpo.needs_reference(config.objective),
            model=config.model,
            peft=config.peft,
            parallel=config.parallel,
            seed=config.run.seed,
            policy=setup.policy,
            weights=setup.weights,
            accelerator=accelerator,
            layout=setup.layout,
            engine=setup.engine,
            folder=setup.folder,
        )
        setup.notes.extend(self.reference.notes())
        self.degenerate = Degenerate(accelerator.device)
        shown = ("loss", "reward_accuracy") if self.unpaired else ("loss", "reward_accuracy", "reward_margin")
        return [
            self.reference,
            self.divergence.attach(setup.policy, accelerator, setup.layout),
            self.degenerate,
            PairGroups(self.measured, shown, setup.model.config, setup.data.names, accelerator.device),
        ]

    def start(self, setup: Setup, optimizer: Any) -> None:
        self.reference.start(optimizer, setup.data)

    def resumable(self, weights: Resumable) -> Resumable:
        return self.reference.resumable(weights)

    def state_dict(self) -> dict[str, Any]:
        return {"reference": self.reference.state(), "divergence": self.divergence.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reference.load(state["reference"])
        self.divergence.load_state_dict(state["divergence"])

    def measure(self, setup: Setup) -> Score:
        heldout = setup.data.heldout_encoder
        assert heldout is not None
        sums = sum_heldout(
            setup.policy,
            heldout,
            setup.accelerator,
            setup.layout,
            sums_of=partial(labelled_sums if self.unpaired else pair_sums, self.measured),
            streams=self.reference.streams,
        )
        return labelled_score(sums) if self.unpaired else pair_score(sums)

    def finish(self, setup: Setup, console: Console, trackers: Sequence[Tracker]) -> None:
        if not self.unpaired:
            show_answers(self.config, setup, console, trackers, with_chosen)

    def warnings(self, step: int, metrics: dict[str, float]) -> Sequence[str]:
        return [*self.displacement(metrics), *self.unpictured(metrics), *self.degenerate.warnings(metrics)]


if __name__ == "__main__":
    main()
