"""How a policy ranks held-out pairs, or judges labelled answers, against its reference and by itself.

ranked      the chosen answer's reward, beta log p / p_ref, is the higher one: what training asks for. Before the first
            update policy and reference are one and no answer has a reward.
judged      a wanted answer's reward is above what any answer gains (objectives/kto.py), an unwanted one's below.
likelier    the chosen answer has the higher log-probability per token: what the policy itself would rather write.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor

from data.batch import PackedBatch, Role
from data.encode import Example
from data.encoder import Encoder
from data.errors import DataError
from data.loader import eval_batches
from data.pack import filler
from train import score
from train.loop import all_sum
from train.objectives.pairs import gather_pairs
from train.pair_groups import Measured
from train.parallel.layout import Layout
from train.parallel.rows import same_batches
from train.policy import Policy, on_device


@dataclass(frozen=True)
class PairScore(score.Score):
    ranked: int
    likelier: int
    total: int
    loss: float
    margin: float
    """Mean difference of the rewards."""
    chosen: float
    """Mean reward of the chosen answers."""

    HEADER: ClassVar[tuple[str, ...]] = (
        "held-out pairs",
        "ranked right",
        "95 % interval",
        "chosen likelier",
        "margin",
        "reward of chosen",
        "loss",
    )

    @property
    def right(self) -> int:
        return self.ranked

    def metrics(self) -> dict[str, float]:
        return self.accuracy_metrics() | {
            "eval_likelier": self.likelier / self.total,
            "eval_margin": self.margin,
            "eval_reward_chosen": self.chosen,
            "eval_loss": self.loss,
        }

    @property
    def agrees(self) -> bool:
        """Policy and reference are one: there is nothing to rank by, and 0 ranked right would read as a bad ranking."""
        return self.ranked == 0 and self.margin == 0 and self.chosen == 0

    def line(self) -> str:
        ranked = f"{self.ranked}/{self.total} ranked right = {self.accuracy:.1%} (95 % interval {self.interval_text})"
        if self.agrees:
            ranked = f"{self.total} pairs, not ranked yet (the policy is the reference)"
        return (
            f"held out {ranked}, chosen likelier in {self.likelier / self.total:.1%}, margin {self.margin:.3f}, "
            f"loss {self.loss:.3f}"
        )

    def cells(self) -> tuple[str, ...]:
        return (
            "not yet" if self.agrees else f"{self.ranked} of {self.total}",
            "" if self.agrees else self.interval_text,
            f"{self.likelier / self.total:.1%}",
            f"{self.margin:.3f}",
            f"{self.chosen:.3f}",
            f"{self.loss:.3f}",
        )


@dataclass(frozen=True)
class LabelledScore(score.Score):
    judged: int
    """Judged right."""
    wanted: int
    total: int
    loss: float
    reward_wanted: float
    reward_unwanted: float

    HEADER: ClassVar[tuple[str, ...]] = (
        "held-out answers",
        "judged right",
        "95 % interval",
        "reward of wanted",
        "of unwanted",
        "loss",
    )

    @property
    def right(self) -> int:
        return self.judged

    def metrics(self) -> dict[str, float]:
        return self.accuracy_metrics() | {
            "eval_reward_wanted": self.reward_wanted,
            "eval_reward_unwanted": self.reward_unwanted,
            "eval_loss": self.loss,
        }

    def line(self) -> str:
        return (
            f"held out {self.judged}/{self.total} judged right = {self.accuracy:.1%} (95 % interval "
            f"{self.interval_text}), reward of wanted answers {self.reward_wanted:.3f}, of unwanted "
            f"{self.reward_unwanted:.3f}, loss {self.loss:.3f}"
        )

    def cells(self) -> tuple[str, ...]:
        return (
            f"{self.judged} of {self.total}",
            self.interval_text,
            f"{self.reward_wanted:.3f}",
            f"{self.reward_unwanted:.3f}",
            f"{self.loss:.3f}",
        )


def pair_sums(measured: Measured, logprob_T: Tensor, batch: PackedBatch) -> Tensor:
    """float64 (6,): of a row, in the order of `PairScore`."""
    metrics, _ = measured(logprob_T, batch)
    pairs = gather_pairs(logprob_T, batch)
    chosen_N, rejected_N = (side.logprob_N / side.length_N for side in (pairs.chosen, pairs.rejected))
    likelier_N = chosen_N > rejected_N
    values = (
        metrics["reward_accuracy"],
        likelier_N,
        torch.ones_like(likelier_N),
        metrics["loss"],
        metrics["reward_margin"],
        metrics["reward_chosen"],
    )
    return torch.stack([value_N.double().sum() for value_N in values])


def pair_score(sums: Tensor) -> PairScore:
    ranked, likelier, total, *means = sums.tolist()
    return PairScore(int(ranked), int(likelier), int(total), *(value / max(total, 1) for value in means))


def labelled_sums(measured: Measured, logprob_T: Tensor, batch: PackedBatch) -> Tensor:
    """float64 (6,): of a row, in the order of `LabelledScore`."""
    metrics, segments = measured(logprob_T, batch)
    wanted_N = torch.tensor([float(batch.roles[at] is Role.WANTED) for at in segments], device=logprob_T.device)
    values = (
        metrics["reward_accuracy"],
        wanted_N,
        torch.ones_like(wanted_N),
        metrics["loss"],
        metrics["reward"] * wanted_N,
        metrics["reward"] * (1 - wanted_N),
    )
    return torch.stack([value_N.double().sum() for value_N in values])


def labelled_score(sums: Tensor) -> LabelledScore:
    right, wanted, total, loss, good, bad = sums.tolist()
    return LabelledScore(
        int(right), int(wanted), int(total), loss / max(total, 1), good / max(wanted, 1), bad / max(total - wanted, 1)
    )


@torch.no_grad()
def sum_heldout(
    policy: Policy,
    heldout: Encoder,
    accelerator: Accelerator,
    layout: Layout,
    *,
    sums_of: Callable[[Tensor, PackedBatch], Tensor],
    streams: Callable[[Sequence[PackedBatch]], Sequence[PackedBatch]],
) -> Tensor:
    """`sums_of(logprob_T, row)`, whose third number counts, over all held-out records, once. On the host.

    All ranks share the work and get the same.

    Args:
        policy: the bare one, not the wrapped one: ranks may have different numbers of rows.
        streams: adds the reference's log-probabilities (`Reference.streams`).

    Raises:
        DataError: no record can be used.
    """
    was_training = policy.training
    policy.eval()
    sums = torch.zeros(6, dtype=torch.float64, device=accelerator.device)
    batches = eval_batches(heldout, rank=layout.data_rank, world=layout.data_world)
    for batch in same_batches(batches, layout, accelerator.device):
        if batch is None and not layout.joint:  # other ranks have one more row than this one
            continue
        (batch,) = streams([batch or filler(0)])
        batch, row_R = on_device(batch, accelerator.device, layout.sequence_group)
        output = policy(batch, row_R, join=layout.joint)
        if not batch.is_filler:
            sums += sums_of(output.logprob_T, batch)
    policy.train(was_training)
    sums = all_sum(accelerator, sums) / layout.sequence
    if not sums[2]:
        raise DataError(
            f"none of the {len(heldout)} held-out records can be used (data.max_tokens={heldout.max_tokens}, "
            f"data.max_patches={heldout.max_patches}).\n{heldout.quarantine.summary()}"
        )
    return sums.cpu()


def with_chosen(example: Example) -> Example:
    """Prompt and chosen answer of a pair as one conversation, for people to look at (`draw_answers`).

    They lie beside each other, and the answer's segment begins with the prompt's last token. `grids` and `patch_PX` go
    on with those of the other segments.
    """
    assert example.roles[:2] == (Role.PROMPT, Role.CHOSEN)
    tokens = sum(example.lengths[:2])
    return dataclasses.replace(
        example,
        token_T=example.token_T[:tokens],
        target_T=example.target_T[:tokens],
        weight_T=example.weight_T[:tokens],
        position_3T=example.position_3T[:, :tokens],
        lengths=(),
        stems=(),
        roles=(),
        scores=(),
    )
