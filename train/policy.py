"""The model being trained, as the loop sees it: a packed batch in, log-probabilities of its targets out.

    PackedBatch ──► ErnieModel ──► hidden_TD ──► the rows that are learned ──► log p(target), in chunks ──► logprob_T

The language-model head is inside, so that this one module is all that DDP or DeepSpeed has to wrap, and so that logits
of shape (T, V) never exist.

Where ranks share a row (`parallel.sequence`), each gets the whole batch and returns log-probabilities of the whole row;
in between it computes its own tokens (ernie_model/sequence_parallel.py). Losses need not know.

Shape letters:  T tokens   D model width   V vocabulary   R rows whose target is learned
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, get_rank, get_world_size

from data.batch import PackedBatch
from ernie_model.context import Packed
from ernie_model.distribution import Distribution
from ernie_model.model import ErnieModel, ModelOutput
from ernie_model.moe import RouterStats
from ernie_model.sequence_parallel import SharedRow, pixels_of, whole
from train.logprobs import token_logprobs


class PolicyOutput(NamedTuple):
    logprob_T: Tensor
    """float32, log p(target_T[t] | its stem, its segment up to t); 0 where weight_T is 0."""
    correct_T: Tensor
    """bool, the target is the most likely token; False where weight_T is 0."""
    router: RouterStats | None
    """Of the tokens that this rank computed."""
    penalty: Tensor | None = None
    """`Policy.penalty()`, if there is one."""
    entropy_T: Tensor | None = None
    """float32, of what target_T[t] is drawn from, in nats, with gradient; 0 where weight_T is 0. None if not wanted."""
    chosen_LTK: Tensor | None = None
    """int64, what the routers choose for the tokens that this rank computed, whatever experts were replayed; vision
    experts come after the text experts. Of rows with `expert_TLK`, if wanted."""


class Policy(nn.Module):
    """
    Args:
        loss_is_linear: the loss is -sum(weight_T * logprob_T) up to a factor (`Objective.linear`), so that the head's
            gradients can be made while its logits exist; see `token_logprobs`.
        sequence_group: the ranks that share each row with this one; None is none.
        distribution: what targets were drawn from; log-probabilities and entropies are under it. None: softmax of the
            logits.
        wants_entropy: compute entropies, too.
        replays: tokens visit the experts of `PackedBatch.expert_TLK`, where rows have it. False leaves them to the
            routers.
        wants_experts: tell what routers choose, where rows have `expert_TLK` to compare it with.
    """

    def __init__(
        self,
        model: ErnieModel,
        *,
        loss_is_linear: bool = False,
        sequence_group: ProcessGroup | None = None,
        distribution: Distribution | None = None,
        wants_entropy: bool = False,
        replays: bool = True,
        wants_experts: bool = False,
    ):
        super().__init__()
        self.model = model
        self.loss_is_linear = loss_is_linear
        self.sequence_group = sequence_group
        self.distribution = distribution
        self.wants_entropy = wants_entropy
        self.replays = replays
        self.wants_experts = wants_experts
        self.penalty: Callable[[], Tensor] | None = None
        """A function of the weights alone, to be minimised too. Computed in the forward pass, because DDP must be shown
        there which weights will get a gradient."""

    def context(self, batch: PackedBatch) -> Packed | SharedRow:
        group = self.sequence_group
        if group is None:
            return Packed(batch.lengths, stems=batch.stems)
        return SharedRow(batch.lengths, group, stems=batch.stems)

    def first_token(self, batch: PackedBatch) -> int:
        """Of those of the row that this rank computes."""
        context = self.context(batch)
        return context.cuts[context.part]

    def forward(self, batch: PackedBatch, row_R: Tensor, *, join: bool = False) -> PolicyOutput:
        """`row_R`: the rows whose weight is not 0; see `on_device`. `join`: see `ErnieModel.forward`."""
        group, context = self.sequence_group, self.context(batch)
        first = context.cuts[context.part]
        if group is not None:
            ends = torch.tensor([first, context.cuts[context.part + 1]], device=row_R.device)
            row_R = row_R[slice(*torch.searchsorted(row_R, ends).tolist())]
        output: ModelOutput = self.model(
            batch.token_T,
            batch.position_3T,
            context,
            patch_PX=batch.patch_PX,
            grids=batch.grids,
            join=join,
            experts=self.wants_experts and batch.expert_TLK is not None,
            replay_TLK=batch.expert_TLK if self.replays else None,
        )
        logprob_R, correct_R, entropy_R = token_logprobs(
            output.hidden_TD[row_R - first],
            self.model.head_VD,
            batch.target_T[row_R],
            distribution=self.distribution,
            entropy=self.wants_entropy,
            slope_T=batch.weight_T[row_R] if self.loss_is_linear else None,
            exact=self.model.exact,
        )

        def spread(value_R: Tensor) -> Tensor:
            value_T = value_R.new_zeros(batch.num_tokens).index_copy(0, row_R, value_R)
            return value_T if group is None else whole(value_T, group)

        logprob_T = spread(logprob_R)
        correct_T = spread(correct_R) if group is None else spread(correct_R.to(logprob_T.dtype)) > 0
        entropy_T = None if entropy_R is None else spread(entropy_R)
        router = output.router
        if router is not None and batch.is_filler:  # its tokens are nobody's; the graph stays whole
            router = RouterStats(*(0 * value for value in router))
        penalty = self.penalty() if self.penalty is not None and torch.is_grad_enabled() else None
        chosen_LTK = output.expert_LTK if output.chosen_LTK is None else output.chosen_LTK
        return PolicyOutput(logprob_T, correct_T, router, penalty, entropy_T, chosen_LTK)


def on_device(
    batch: PackedBatch, device: torch.device, sequence_group: ProcessGroup | None = None
) -> tuple[PackedBatch, Tensor]:
    """The batch and its learned rows, moved. The rows are found on the host, where counting them waits for nobody.

    Of a row that ranks share, only the pixels of the images that this rank computes are moved.
    """
    row_R = batch.weight_T.nonzero()[:, 0]
    if sequence_group is not None and batch.patch_PX is not None:
        mine = pixels_of(batch.grids, get_world_size(sequence_group), get_rank(sequence_group))
        batch = dataclasses.replace(batch, patch_PX=batch.patch_PX[mine])
    return batch.to(device), row_R.to(device, non_blocking=True)
