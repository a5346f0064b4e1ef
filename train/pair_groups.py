"""What a preference run shows of parts of its data, and what it warns of.

    reward_accuracy_text  reward_accuracy_image  reward_accuracy_video      by what is in prompt or answers
    reward_margin_image  loss_image  ...                                    (a pair with both counts as video)
    reward_accuracy_set_NAME  ...                                           of each dataset, where there are several

    degenerate                                  share of pairs of which one answer is the beginning of the other: it was
                                                cut off, or they are too alike

Means over the pairs of an update; groups without a pair in it are left out. Labelled answers are counted one by one.

Shape letters:  N pairs or labelled answers   G groups   M metrics
"""

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data.batch import PackedBatch, Role
from ernie_model.config import ErnieConfig
from train.loop import Beside
from train.objectives.pairs import pair_segments
from train.policy import PolicyOutput
from train.telemetry import MODALITIES, plain_names

Measured = Callable[[Tensor, PackedBatch], tuple[dict[str, Tensor], Sequence[int]]]
"""(logprob_T, batch) -> metrics, (N,) each, and of each of the N one of its segments."""


class PairGroups(Beside):
    """Goes last among what adds to the rows or takes from them.

    Args:
        shown: which metrics.
        datasets: every name that `PackedBatch.datasets` may hold; one name alone would repeat the whole.
    """

    def __init__(
        self,
        measured: Measured,
        shown: Sequence[str],
        config: ErnieConfig,
        datasets: Sequence[str],
        device: torch.device,
    ):
        self.measured, self.shown, self.device = measured, shown, device
        self.image_id, self.video_id = config.image_token_id, config.video_token_id
        self.datasets = {name: len(MODALITIES) + i for i, name in enumerate(datasets)} if len(datasets) > 1 else {}
        self.groups = [*MODALITIES, *plain_names(f"set_{name}" for name in self.datasets)]
        self.streams(())

    def streams(self, microbatches: Sequence[PackedBatch]) -> Sequence[PackedBatch]:
        # Not in `before`: what another part takes out of the rows is not here any more.
        self._members = [self.members(batch) for batch in microbatches]
        self._sums_MG = torch.zeros(len(self.shown) + 1, len(self.groups), dtype=torch.float64, device=self.device)
        return microbatches

    def members(self, batch: PackedBatch) -> Tensor:
        """float64 (S, G): 1 where the record that a segment comes from belongs to a group."""
        member_SG = torch.zeros(batch.num_segments, len(self.groups), dtype=torch.float64)
        token_S = batch.token_T.split(batch.lengths)
        for segments in batch.record_segments:
            token_T = torch.cat([token_S[segment] for segment in segments])
            held = [id is not None and bool((token_T == id).any()) for id in (self.image_id, self.video_id)]
            member_SG[list(segments), 2 if held[1] else int(held[0])] = 1
            if self.datasets and (name := batch.datasets[segments[0]]):  # a filler row comes from no dataset
                member_SG[list(segments), self.datasets[name]] = 1
        return member_SG

    @torch.no_grad()
    def terms(self, batch: PackedBatch, output: PolicyOutput) -> float:
        """Adds this micro-batch's sums; there is nothing to minimise."""
        member_SG = self._members.pop(0).to(self.device, non_blocking=True)
        metrics, segments = self.measured(output.logprob_T, batch)
        if segments:
            value_MN = torch.stack([metrics[name] for name in self.shown] + [torch.ones_like(metrics["loss"])])
            self._sums_MG += value_MN.double() @ member_SG[list(segments)]
        return 0.0

    def sums(self) -> Tensor:
        return self._sums_MG

    def report(self, sums: Tensor) -> dict[str, float]:
        *values, counts = sums.tolist()
        return {
            f"{name}_{group}": value / count
            for name, row in zip(self.shown, values, strict=True)
            for group, value, count in zip(self.groups, row, counts, strict=True)
            if count
        }


class Degenerate(Beside):
    """Counts pairs of which one answer is the beginning of the other. (Equal ones were refused: data/encode.py.)

    An answer ends with the end of its turn; what stands before that is compared.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.told = False

    def streams(self, microbatches: Sequence[PackedBatch]) -> Sequence[PackedBatch]:
        counts = [self.count(batch) for batch in microbatches]
        self._sums_2 = torch.tensor([sum(column) for column in zip(*counts, strict=True)] or [0, 0])
        return microbatches

    def count(self, batch: PackedBatch) -> tuple[int, int]:
        """Degenerate pairs of a row on the host, and all."""
        token_S, pairs = batch.token_T.split(batch.lengths), pair_segments(batch)
        found = 0
        for roles in pairs:
            short, long = sorted((token_S[roles[Role.CHOSEN]], token_S[roles[Role.REJECTED]]), key=len)
            # equally long, they differ in their pictures
            found += len(short) < len(long) and torch.equal(short[:-1], long[: len(short) - 1])
        return found, len(pairs)

    def sums(self) -> Tensor:
        return self._sums_2.to(self.device)

    def report(self, sums: Tensor) -> dict[str, float]:
        found, pairs = sums.tolist()
        return {"degenerate": found / pairs} if pairs else {}

    def warnings(self, metrics: dict[str, float]) -> list[str]:
        """Once, when the first is met."""
        if self.told or not metrics.get("degenerate"):
            return []
        self.told = True
        return [
            f"in {metrics['degenerate']:.0%} of this update's pairs one answer is the beginning of the other. Was it "
            "cut off where it was made? Training then teaches when to stop, not what to say. `degenerate` in "
            "metrics.jsonl has the share of every update."
        ]


class Unpictured:
    """Says once that mDPO's loss found no pictures in an update."""

    def __init__(self):
        self.told = False

    def __call__(self, metrics: dict[str, float]) -> list[str]:
        if self.told or metrics.get("corrupted", 1.0):
            return []
        self.told = True
        return [
            "objective.mdpo_conditional has nothing to do: no pair of this update has pictures in its prompt or its "
            "chosen answer. `corrupted` in metrics.jsonl has the share of every update that has."
        ]


WINDOW = 20
"""Updates whose means are compared with those of as many before them."""


class Displacement:
    """Says once when the margin grows while the chosen answers lose probability: the classic failure of DPO, in which
    probability goes to answers that are neither (likelihood displacement, Razin et al. 2024, arXiv 2410.08847)."""

    def __init__(self):
        self.recent: deque[tuple[float, float]] = deque(maxlen=2 * WINDOW)
        self.told = False

    def __call__(self, metrics: dict[str, float]) -> list[str]:
        if "reward_chosen" not in metrics or "reward_margin" not in metrics or self.told:
            return []
        self.recent.append((metrics["reward_chosen"], metrics["reward_margin"]))
        if len(self.recent) < 2 * WINDOW:
            return []
        before, now = list(self.recent)[:WINDOW], list(self.recent)[WINDOW:]
        (chosen_before, margin_before), (chosen, margin) = (
            [sum(column) / WINDOW for column in zip(*part, strict=True)] for part in (before, now)
        )
        if not (chosen < chosen_before and chosen < 0 and margin > margin_before):
            return []
        self.told = True
        return [
            f"the margin grows ({margin_before:.3g} to {margin:.3g}) while the chosen answers become less likely than "
            f"they were to the reference (reward {chosen_before:.3g} to {chosen:.3g}): probability goes to answers "
            "that nobody chose. objective.sft_loss_ratio=0.1, objective.preference_loss_type=dpop or a smaller "
            "optim.lr holds them up."
        ]
