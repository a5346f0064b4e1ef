"""Answers that are labelled good or bad, without another to compare with, and what answers are measured against.

    wanted      desirable_weight   * (1 - sigmoid(beta (w - KL)))       w, l   log p / p_ref of the answer
    unwanted    undesirable_weight * (1 - sigmoid(beta (KL - l)))
    KL          the larger of 0 and the mean, over the update, of log p / p_ref of other records' answers to these
                prompts; without gradient. apo_zero_unpaired: 0

The mean over all answers of all ranks is minimised. An answer alone says nothing of the divergence, and a few say
little: KL is over the whole update, so that how it is cut into rows, micro-batches and ranks changes nothing. It takes
a forward pass of its own before the first one, of prompts and mismatched answers; those are cut out of the rows that
are then learned from. kto_pair takes means over the update's chosen and rejected answers, from a pass over its rows.

bco_pair's rewards are measured against their moving mean over the updates that were done,

    shift  <-  m shift + (1 - m) * mean over pairs of (reward of chosen + reward of rejected) / 2        m bco_momentum

It starts at 0, where policy and reference agree, is the same on all ranks, and is saved with the run.

Source: KTO, 2402.01306, 7 and 8; APO, 2408.06266, 7; BCO, 2404.04656. Reference 7.1.

Shape letters:  T tokens   S segments   N answers   P patches   X numbers in a patch
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from data.batch import PackedBatch, Role
from data.pack import filler
from ernie_model.moe import RouterStats
from ernie_model.rope import num_media_tokens
from train.dpo_config import DPOObjectiveConfig, PreferenceLoss
from train.loop import Beside, all_sum
from train.objectives import LossSum, Objective
from train.objectives.pairs import segment_sums
from train.parallel.layout import Layout
from train.policy import Policy, on_device

LABELS = (Role.WANTED, Role.UNWANTED)


class Divergence(Beside):
    """KL of the policy from the reference, estimated anew for every update; bco_pair's shift; and what is reported of
    labelled answers.

    Goes after the reference among what is beside the objective. For losses that take none of it it does nothing.
    """

    def __init__(self, config: DPOObjectiveConfig):
        self.config = config
        losses = config.losses()
        self.unpaired = any(loss.unpaired for loss in losses)
        self.roles: tuple[Role, ...] = ()
        if PreferenceLoss.kto in losses:
            self.roles = (Role.MISMATCHED,)
        elif PreferenceLoss.kto_pair in losses:
            self.roles = (Role.CHOSEN, Role.REJECTED)
        self.estimate: dict[Role, Tensor | float] = dict.fromkeys(Role, 0.0)
        """Of the update at work, at least 0; 0 before the first one, where both agree."""
        self.shift = 0.0
        self._shifts = PreferenceLoss.bco_pair in losses and config.bco_momentum is not None
        self._next_shift = 0.0
        self._told: Tensor | None = None  # sums of the update so far, for `report`
        self.at: tuple[Policy, Accelerator, Layout] | None = None

    def attach(self, policy: Policy, accelerator: Accelerator, layout: Layout) -> "Divergence":
        self.at = policy, accelerator, layout
        return self

    def state_dict(self) -> dict[str, float]:
        """For a checkpoint, JSON-able: an evaluation that a stop has left to the next start measures against it."""
        return {role.value: float(self.estimate[role]) for role in self.roles} | {"shift": self.shift}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.estimate |= {role: state[role.value] for role in self.roles}
        self.shift = state["shift"]

    @property
    def of_pairs(self) -> tuple[Tensor | float, Tensor | float, float]:
        """What `dpo.loss_parts` and `dpo.pair_metrics` take last."""
        return self.estimate[Role.CHOSEN], self.estimate[Role.REJECTED], self.shift

    @torch.no_grad()
    def streams(self, microbatches: Sequence[PackedBatch]) -> Sequence[PackedBatch]:
        """Estimate, and take the answers out that are there only for that."""
        if not self.roles:
            return microbatches
        assert self.at is not None
        policy, accelerator, layout = self.at
        media_ids = policy.model.config.placeholder_token_ids
        sums_R2 = torch.zeros(len(self.roles), 2, dtype=torch.float64, device=accelerator.device)
        was_training = policy.training
        policy.eval()
        for batch in microbatches:
            part = with_records_of(batch, self.roles, media_ids)
            if part is None and not layout.joint:
                continue
            moved, row_R = on_device(part or filler(0), accelerator.device, layout.sequence_group)
            logprob_T = policy(moved, row_R, join=layout.joint).logprob_T
            if part is None:
                continue
            ratio_S = log_ratios(logprob_T, moved)
            for index, role in enumerate(self.roles):
                place_N = torch.tensor([at for at, one in enumerate(part.roles) if one is role], device=ratio_S.device)
                sums_R2[index] += torch.stack([ratio_S[place_N].sum(), ratio_S.new_tensor(place_N.numel())])
        policy.train(was_training)
        total_R, count_R = all_sum(accelerator, sums_R2).unbind(1)
        mean_R = (total_R / count_R.clamp(min=1)).clamp(min=0)
        self.estimate |= dict(zip(self.roles, mean_R.unbind(0), strict=True))
        if Role.MISMATCHED in self.roles:
            return [without(batch, Role.MISMATCHED, media_ids) for batch in microbatches]
        return microbatches

    # -------------------------------------------------------------------------------------- means over the whole update

    def tell_labelled(self, answers: "Labelled", metrics: dict[str, Tensor]) -> None:
        """For means over the wanted and over the unwanted answers, whose numbers only the update knows."""
        wanted_N = answers.wanted_N
        ones_N = torch.ones_like(wanted_N)
        columns_NC = torch.stack([ones_N, metrics["reward"], metrics["logprob"], metrics["tokens"]], 1)
        self._tell(torch.stack([wanted_N @ columns_NC, (1 - wanted_N) @ columns_NC]).flatten())

    def tell_pairs(self, metrics: dict[str, Tensor]) -> None:
        if self._shifts:
            reward_N = (metrics["reward_chosen"] + metrics["reward_rejected"]) / 2
            self._tell(torch.stack([torch.ones_like(reward_N).sum(), reward_N.sum()]))

    def _tell(self, sums: Tensor) -> None:
        self._told = sums if self._told is None else self._told + sums

    def sums(self) -> Tensor | None:
        told, self._told = self._told, None
        if told is None or not self.unpaired:
            return told
        assert self.at is not None
        kl = torch.as_tensor(self.estimate[Role.MISMATCHED], dtype=torch.float64, device=told.device)
        return torch.cat([told, kl[None] / self.at[1].num_processes])

    def report(self, sums: Tensor) -> dict[str, float]:
        if self.unpaired:
            return labelled_report(sums, kl=bool(self.roles))
        pairs, rewards = sums.tolist()
        momentum = self.config.bco_momentum
        assert momentum is not None
        if pairs:
            self._next_shift = momentum * self.shift + (1 - momentum) * rewards / pairs
        return {"bco_shift": self.shift}

    def after_update(self, optimizer: torch.optim.Optimizer, router: RouterStats | None) -> None:
        if self._shifts:
            self.shift = self._next_shift


def labelled_report(sums: Tensor, *, kl: bool) -> dict[str, float]:
    wanted_C, unwanted_C = sums[:-1].view(2, -1)
    out = {"share_wanted": float(wanted_C[0] / (wanted_C[0] + unwanted_C[0]).clamp(min=1))}
    for name, column_C in (("wanted", wanted_C), ("unwanted", unwanted_C)):
        if column_C[0]:
            _, reward, logprob, tokens = (column_C / column_C[0]).tolist()
            out |= {f"reward_{name}": reward, f"logprob_{name}": logprob, f"tokens_{name}": tokens}
    if wanted_C[0] and unwanted_C[0]:
        out["reward_margin"] = out["reward_wanted"] - out["reward_unwanted"]
    return out | ({"kl": float(sums[-1])} if kl else {})


class Labelled(NamedTuple):
    """Labelled answers of a row, float64 (N,) each."""

    ratio_N: Tensor
    """log p / p_ref, with gradient."""
    logprob_N: Tensor
    length_N: Tensor
    """Learned targets, times their weight."""
    wanted_N: Tensor
    """1 or 0."""
    segments: tuple[int, ...]
    """In the batch, for `ids` and `datasets`."""


def build_labelled(config: DPOObjectiveConfig, divergence: Divergence) -> Objective:
    def loss(logprob_T: Tensor, batch: PackedBatch) -> LossSum:
        answers = gather_labelled(logprob_T, batch)
        kl = divergence.estimate[Role.MISMATCHED]
        total = labelled_loss(answers, config, kl).sum()
        metrics = labelled_metrics(answers, config, kl)
        divergence.tell_labelled(answers, metrics)
        return LossSum(
            total.to(logprob_T.dtype), {name: metrics[name].sum() for name in ("loss", "reward_accuracy", "nll")}
        )

    return Objective("labelled answer", count_labelled, loss)


def count_labelled(batch: PackedBatch) -> Tensor:
    return torch.tensor(float(sum(role in LABELS for role in batch.roles)))


def gather_labelled(logprob_T: Tensor, batch: PackedBatch) -> Labelled:
    """Args: logprob_T: log p(target_T[t]) of the policy. batch: on the same device, with `ref_logprob_T`."""
    segments = [at for at, role in enumerate(batch.roles) if role in LABELS]
    wanted = [float(batch.roles[at] is Role.WANTED) for at in segments]
    place_N = torch.tensor(segments, dtype=torch.int64, device=logprob_T.device)
    return Labelled(
        ratio_N=log_ratios(logprob_T, batch)[place_N],
        logprob_N=segment_sums(logprob_T * batch.weight_T, batch)[place_N],
        length_N=segment_sums(batch.weight_T, batch)[place_N],
        wanted_N=torch.tensor(wanted, dtype=torch.float64, device=logprob_T.device),
        segments=tuple(segments),
    )


def labelled_loss(answers: Labelled, config: DPOObjectiveConfig, kl: Tensor | float = 0.0) -> Tensor:
    """(N,), with gradient. With `kl` 0 it is apo_zero_unpaired."""
    wanted_N = answers.wanted_N
    sign_N = 2 * wanted_N - 1
    weight_N = config.desirable_weight * wanted_N + config.undesirable_weight * (1 - wanted_N)
    return config.pref_loss_ratio * weight_N * torch.sigmoid(config.beta * sign_N * (kl - answers.ratio_N))


def labelled_metrics(answers: Labelled, config: DPOObjectiveConfig, kl: Tensor | float = 0.0) -> dict[str, Tensor]:
    """float64 (N,) each, detached. reward_accuracy: wanted answers lie above the divergence, unwanted ones below it."""
    answers = answers._replace(ratio_N=answers.ratio_N.detach(), logprob_N=answers.logprob_N.detach())
    above_N = (answers.ratio_N > kl).double()
    return {
        "loss": labelled_loss(answers, config, kl),
        "reward": config.beta * answers.ratio_N,
        "reward_accuracy": answers.wanted_N * above_N + (1 - answers.wanted_N) * (answers.ratio_N < kl).double(),
        "logprob": answers.logprob_N,
        "tokens": answers.length_N,
        "nll": -answers.logprob_N / answers.length_N.clamp(min=1),
    }


# ------------------------------------------------------------------------------------------------------------ pieces


def log_ratios(logprob_T: Tensor, batch: PackedBatch) -> Tensor:
    """float64 (S,): log p / p_ref of every segment's learned targets."""
    ref_T = batch.ref_logprob_T
    if ref_T is None:
        assert not batch.weight_T.any(), "the row has no ref_logprob_T"
        ref_T = torch.zeros_like(logprob_T)
    return segment_sums((logprob_T.double() - ref_T.double()) * batch.weight_T, batch)


def with_records_of(batch: PackedBatch, roles: Sequence[Role], media_ids: Sequence[int]) -> PackedBatch | None:
    """Of the records that have a segment of `roles`, those segments and their prompts; None: there is none."""
    records = {record for record, role in zip(batch.records, batch.roles, strict=True) if role in roles}
    keep = [
        at
        for at, (record, role) in enumerate(zip(batch.records, batch.roles, strict=True))
        if record in records and (role in roles or role is Role.PROMPT)
    ]
    return kept(batch, keep, media_ids) if keep else None


def without(batch: PackedBatch, role: Role, media_ids: Sequence[int]) -> PackedBatch:
    keep = [at for at, one in enumerate(batch.roles) if one is not role]
    return kept(batch, keep, media_ids) if keep else batch


def kept(batch: PackedBatch, segments: Sequence[int], media_ids: Sequence[int]) -> PackedBatch:
    """The row with these segments alone, with their images and videos. A stem of one of them is one of them.

    Args:
        media_ids: the tokens that stand for images and videos.
    """
    if len(segments) == batch.num_segments:
        return batch
    token_S = batch.token_T.split(list(batch.lengths))
    ids = torch.tensor(media_ids, device=batch.token_T.device)
    # Which item lies in which segment: items come in the order of their tokens, and none spans two segments.
    items: list[list[int]] = [[] for _ in token_S]
    item = 0
    for at, token_T in enumerate(token_S):
        room = int(torch.isin(token_T, ids).sum())
        while room:
            items[at].append(item)
            room -= num_media_tokens(batch.grids[item])
            item += 1
    mine = [item for at in segments for item in items[at]]
    new_place = {old: new for new, old in enumerate(segments)}

    def of_segments(stream_T: Tensor) -> Tensor:
        parts = stream_T.split(list(batch.lengths), dim=-1)
        return torch.cat([parts[at] for at in segments], dim=-1)

    patch_PX = batch.patch_PX
    if patch_PX is not None:
        parts = patch_PX.split([frames * rows * columns for frames, rows, columns in batch.grids])
        patch_PX = torch.cat([parts[item] for item in mine]) if mine else None
    per_segment = {
        name: tuple(values[at] for at in segments)
        for name in ("lengths", "ids", "datasets", "roles", "records", "scores")
        if (values := getattr(batch, name))
    }
    return dataclasses.replace(
        batch,
        token_T=of_segments(batch.token_T),
        target_T=of_segments(batch.target_T),
        weight_T=of_segments(batch.weight_T),
        position_3T=of_segments(batch.position_3T),
        ref_logprob_T=None if batch.ref_logprob_T is None else of_segments(batch.ref_logprob_T),
        grids=tuple(batch.grids[item] for item in mine),
        patch_PX=patch_PX,
        stems=tuple(-1 if stem < 0 else new_place[stem] for stem in (batch.stems[at] for at in segments)),
        **per_segment,
    )
