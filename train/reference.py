"""The policy that another one is compared with: log-probabilities of the same targets, without a gradient.

    kind            what it is                                           memory of its own    work of an update
    copy            a second model: the start weights, or others'        its weights          one forward pass more
    adapters_off    the trained model without the adapter that trains    none                 one forward pass more
    cache           the start weights' numbers, on disk (Cached)         none                 none; all before the first

A reference is exact: no dropout, no noise on embeddings. It runs through the kernels that the policy runs through, on
weights that round to the same numbers, so before the first update a copy (or the model without its new adapter) agrees
with the policy to the last bit, in bfloat16 too, and every log-ratio is 0.

What `streams` returns has `ref_logprob_T`. It runs in whatever grad mode its caller is in, because kernels differ
between the two; nothing of a reference requires a gradient, so no graph is kept in either.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from data.batch import PackedBatch
from ernie_model.model import ErnieModel
from ernie_model.moe import RouterStats
from ernie_model.recompute import keep_activations
from train.build import build_model, human
from train.checkpoint import Resumable, fingerprint
from train.config import ModelConfig, ParallelConfig, PeftConfig, PeftKind, UserError
from train.dpo_config import ReferenceConfig, ReferenceKind, ReferenceUpdate, reference_kind
from train.loop import Beside
from train.parallel.fragments import working
from train.parallel.layout import Layout
from train.parallel.partition import partitioner
from train.policy import Policy, on_device
from train.sources import Data
from train.weights import Weights, trained_weights

PREFIX = "reference."
"""Of the reference's tensors in a checkpoint."""


class Reference(Beside):
    """None: rows pass as they are. The others are below."""

    kind = ReferenceKind.none

    def notes(self) -> list[str]:
        """What the user should know before the first step."""
        return []

    def start(self, optimizer: Any, data: Data) -> None:
        """Whatever must be done once. All ranks call it: after the engine is made, before a checkpoint is loaded.

        Args:
            optimizer: PyTorch's, or the one of DeepSpeed's engine.
        """

    def resumable(self, weights: Resumable) -> Resumable:
        """What a checkpoint holds of the policy's weights, and of the reference's where they change."""
        return weights

    def state(self) -> dict[str, Any]:
        """For a checkpoint, JSON-able. All ranks ask together."""
        return {"kind": self.kind.value}

    def load(self, saved: dict[str, Any]) -> None:
        """Go on from `state()` of an earlier start. After the tensors of the checkpoint are loaded; all ranks together.

        Raises:
            UserError: this is not the reference that the run was begun with.
        """
        if saved["kind"] != self.kind.value:
            raise UserError(
                f"this run was begun with reference.kind={saved['kind']} and goes on with {self.kind.value}. Restore "
                "it, or start anew in another run.folder."
            )


class Forward(Reference):
    """A reference that is computed when it is needed, by a forward pass of `policy`."""

    def __init__(self, policy: Policy, device: torch.device, layout: Layout):
        self.policy, self.device, self.layout = policy, device, layout

    def acting(self) -> AbstractContextManager[None]:
        """Inside, `policy` is the reference."""
        return nullcontext()

    def streams(self, microbatches: Sequence[PackedBatch]) -> Sequence[PackedBatch]:
        was_training = self.policy.training
        self.policy.eval()
        with self.acting():
            rows = [dataclasses.replace(batch, ref_logprob_T=self.logprobs(batch)) for batch in microbatches]
        self.policy.train(was_training)
        return rows

    def logprobs(self, batch: PackedBatch) -> Tensor:
        """(T,) of a row on the host, on the device."""
        if batch.is_filler and not self.layout.joint:
            return torch.zeros(batch.num_tokens, device=self.device)
        batch, row_R = on_device(batch, self.device, self.layout.sequence_group)
        logprob_T = self.policy(batch, row_R, join=self.layout.joint).logprob_T
        assert not logprob_T.requires_grad
        return logprob_T


class AdaptersOff(Forward):
    """The trained model without the adapter that trains. Adapters of `peft.frozen` act on."""

    kind = ReferenceKind.adapters_off

    def __init__(self, policy: Policy, weights: Weights, device: torch.device, layout: Layout):
        super().__init__(policy, device, layout)
        from train.lora.adapt import Adapters  # peft takes seconds to import

        assert isinstance(weights, Adapters)
        self.acting = weights.without_trained


class Copy(Forward):
    """A second model, held in the dtype it is computed in.

    Where it follows the policy (`reference.update`), it is held in float32, or steps much smaller than itself would be
    lost. It follows the weights that the policy's forward pass is made from: with `parallel.held_in=bfloat16` those are
    rounded, and so may be what is mixed in; the sum is not.

    Args:
        policy: of the copy.
        followed: the model that trains.
    """

    kind = ReferenceKind.copy

    def __init__(
        self,
        policy: Policy,
        followed: ErnieModel,
        config: ReferenceConfig,
        engine: dict[str, Any],
        device: torch.device,
        layout: Layout,
    ):
        super().__init__(policy, device, layout)
        self.followed, self.config, self.engine = followed, config, engine
        self.updates = 0
        """Of the policy, those that were left out not counted."""
        self._fingerprint: str | None = None

    @property
    def follows(self) -> bool:
        return self.config.update is not ReferenceUpdate.frozen

    def notes(self) -> list[str]:
        size = sum(working(p)[1].nbytes for p in self.policy.parameters())
        start = self.config.checkpoint or "the weights that training starts from"
        note = (
            f"the reference is a second model, {start}: {human(size, 'B')} on each rank beside what is counted above."
        )
        if self.follows:
            share = "" if self.config.mix is None else f" by {self.config.mix:g}"
            note += f" It follows the policy{share} every {self.config.every} updates."
        return [note]

    def start(self, optimizer: Any, data: Data) -> None:
        self.policy.to(self.device)
        if self.layout.zero == 3:
            from train.parallel.zero import fetch_parts  # DeepSpeed takes seconds to import

            fetch_parts(self.policy, self.layout, self.engine)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers."""
        return self.policy.model.state_dict(keep_vars=True)

    def resumable(self, weights: Resumable) -> Resumable:
        return _Both(weights, self) if self.follows else weights

    def state(self) -> dict[str, Any]:
        if self.follows:
            return super().state() | {"updates": self.updates}
        if self._fingerprint is None:  # every weight is read for it
            self._fingerprint = fingerprint(self.tensors())
        return super().state() | {"weights": self._fingerprint}

    def load(self, saved: dict[str, Any]) -> None:
        super().load(saved)
        if self.follows:
            self.updates = saved["updates"]
        elif saved["weights"] != self.state()["weights"]:
            what = (
                "reference.checkpoint" if self.config.checkpoint else "model.checkpoint (or model.config and run.seed)"
            )
            raise UserError(
                f"the reference is not the one that this run was begun with: {what} has other contents now. Bring them "
                "back, or start anew in another run.folder."
            )

    @torch.no_grad()
    def after_update(self, optimizer: torch.optim.Optimizer, router: RouterStats | None) -> None:
        if not self.follows:
            return
        self.updates += 1
        assert self.config.every is not None
        if self.updates % self.config.every:
            return
        policy = self.followed.state_dict(keep_vars=True)
        for name, mine in self.tensors().items():
            (start, mine_N), (its_start, its_N) = working(mine), working(policy[name])
            assert start == its_start
            if self.config.mix is None:
                mine_N.copy_(its_N)
            else:
                mine_N.lerp_(its_N.to(mine_N.dtype), self.config.mix)


class _Both:
    """The weights of a run, and those of a reference that follows them."""

    def __init__(self, weights: Resumable, copy: Copy):
        self.weights, self.copy = weights, copy

    def tensors(self) -> Mapping[str, Tensor]:
        own = {f"{PREFIX}{name}": tensor for name, tensor in self.copy.tensors().items()}
        return {**self.weights.tensors(), **own}

    def rests_on(self) -> str | None:
        return self.weights.rests_on()


def build_reference(
    config: ReferenceConfig,
    *,
    needed: bool,
    model: ModelConfig,
    peft: PeftConfig,
    parallel: ParallelConfig,
    seed: int,
    policy: Policy,
    weights: Weights,
    accelerator: Accelerator,
    layout: Layout,
    engine: dict[str, Any],
    folder: Path,
) -> Reference:
    """The reference that the settings ask for, on the CPU; `start` does the rest.

    Args:
        needed: the loss compares with one.
        model, peft, parallel, seed: what the policy was built from.
        policy, weights: that trains.
        engine: DeepSpeed's settings (`deepspeed_config`).
        folder: of the run.

    Raises:
        UserError: no such reference can be had under these settings.
    """
    kind, device = reference_kind(config, peft, needed=needed), accelerator.device
    if kind is ReferenceKind.none:
        return Reference()
    if kind is ReferenceKind.adapters_off:
        return AdaptersOff(policy, weights, device, layout)
    assert kind is ReferenceKind.copy
    if layout.zero == 3 and config.update is not ReferenceUpdate.frozen:
        raise UserError(
            f"reference.update={config.update.value} needs the policy's weights as they are, and parallel.zero=3 keeps "
            "them in parts. Use parallel.zero=2, or reference.update=frozen."
        )
    copy = build_copy(config, model=model, peft=peft, parallel=parallel, seed=seed, layout=layout, engine=engine)
    check_same_tokens(copy, policy.model, config)
    group = policy.sequence_group
    return Copy(Policy(copy, sequence_group=group), policy.model, config, engine, device, layout)


def build_copy(
    config: ReferenceConfig,
    *,
    model: ModelConfig,
    peft: PeftConfig,
    parallel: ParallelConfig,
    seed: int,
    layout: Layout,
    engine: dict[str, Any],
) -> ErnieModel:
    """The start weights once more, adapters included, or those of `reference.checkpoint` without any."""
    other = config.checkpoint is not None
    settings = dataclasses.replace(model, checkpoint=config.checkpoint, revision=None) if other else model
    with torch.random.fork_rng(devices=[]):
        copy = build_model(
            settings,
            seed=seed,
            frozen=config.update is not ReferenceUpdate.ema,
            held_in=parallel.held_in,
            layout=layout,
            partition=partitioner(engine) if layout.zero == 3 else None,
        ).model
    if peft.kind is not PeftKind.none and not other:
        trained_weights(copy, peft, seed=seed, base=model.checkpoint)
    copy.requires_grad_(False)
    copy.run_layer = keep_activations
    if copy.vision is not None:
        copy.vision.run_block = keep_activations
    return copy.eval()


def check_same_tokens(copy: ErnieModel, model: ErnieModel, config: ReferenceConfig) -> None:
    """Raises UserError if the reference reads ids, positions or pixels otherwise than the policy."""
    ours, theirs = model.config, copy.config
    for what in ("vocab_size", "vision_pool_token_ids", "placeholder_token_ids", "position_after_video"):
        mine, its = getattr(ours, what), getattr(theirs, what)
        if mine != its:
            raise UserError(
                f"reference.checkpoint={config.checkpoint} has {what} {its}, and the policy {mine}: it would read "
                "other words or pictures. Choose a reference with the policy's tokenizer and vision."
            )
    if config.update is not ReferenceUpdate.frozen and (differing := _differing(copy, model)):
        raise UserError(
            f"reference.update={config.update.value} copies weights, but reference.checkpoint={config.checkpoint} has "
            f"other tensors than the policy, for example {differing}. Choose a reference of the policy's architecture."
        )


def _differing(copy: ErnieModel, model: ErnieModel) -> str | None:
    (a, b) = ({name: tensor.shape for name, tensor in one.state_dict().items()} for one in (copy, model))
    return next((name for name in sorted(a | b) if a.get(name) != b.get(name)), None)
