"""The policy that another one is compared with: log-probabilities of the same targets, without a gradient.

    kind            what it is                                           memory of its own    work of an update
    copy            a second model: the start weights, or others'        its weights          one forward pass more
    adapters_off    the trained model without the adapter that trains    none                 one forward pass more
    cache           the start weights' numbers, on disk                  none                 none; all before the first

A reference is exact: no dropout, no noise on embeddings. It runs through the kernels that the policy runs through, on
weights that round to the same numbers, so before the first update a copy (or the model without its new adapter) agrees
with the policy to the last bit, in bfloat16 too, and every log-ratio is 0. (Unless the policy replays another engine's
experts: a reference is itself, and its routers choose.)

What `streams` returns has `ref_logprob_T`. It runs in whatever grad mode its caller is in, because the model has a way
of its own through either; nothing of a reference requires a gradient, so no graph is kept.
"""

import dataclasses
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor

from data.batch import PackedBatch
from data.encoder import Encoder
from data.loader import eval_batches
from data.pack import filler
from ernie_model.atomic import atomic_write
from ernie_model.checkpoint import CheckpointError
from ernie_model.config import ConfigError
from ernie_model.model import ErnieModel
from ernie_model.moe import RouterStats
from ernie_model.recompute import keep_activations
from train.build import build_model, human
from train.checkpoint import Resumable, all_or_none, everyones, fingerprint, here
from train.config import HeldIn, ModelConfig, ParallelConfig, PeftConfig, PeftKind, Precision, TrainingConfig, UserError
from train.dpo_config import DPOConfig, ReferenceConfig, ReferenceKind, ReferenceUpdate, reference_kind
from train.loop import Beside, any_rank
from train.objectives.dpo import needs_reference
from train.parallel.fragments import working
from train.parallel.layout import Layout
from train.parallel.partition import partitioner, shape_of
from train.parallel.rows import same_batches
from train.policy import Policy, on_device
from train.reference_cache import VERSION, Record, Store, alone, data_key, key_of, records_of
from train.shares import Shares
from train.shares import Weights as Weight
from train.sources import Data
from train.weights import Weights, trained_weights

PREFIX = "reference."
"""Of the reference's tensors in a checkpoint."""
FLUSH_ROWS = 64
"""Rows whose log-probabilities a kill may cost each rank."""
SAY_S = 10.0
"""Seconds between lines of progress."""


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
        batch = dataclasses.replace(batch, expert_TLK=None)
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
        self._kept: list[Any] = []
        """Parameters that ZeRO-3 keeps whole beside their parts."""

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
            often = "after every update" if self.config.every == 1 else f"after every {self.config.every} updates"
            note += f" It follows the policy{share} {often}."
        return [note]

    def start(self, optimizer: Any, data: Data) -> None:
        self.policy.to(self.device)
        if self.layout.zero == 3:
            from train.parallel.zero import fetch_parts  # DeepSpeed takes seconds to import

            self._kept = fetch_parts(self.policy, self.layout, self.engine)

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
            self._forget_whole()
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
        self._forget_whole()

    def _forget_whole(self) -> None:
        """Parts have changed: what ZeRO-3 keeps whole of them is gathered anew when it is needed."""
        if self._kept:
            self._kept[0].partition(self._kept)


class Cached(Forward):
    """The start weights' log-probabilities, from disk. The policy itself has computed them, before its first update.

    With adapters that start anew, those of the model without them, which is the same and does not depend on run.seed.

    Args:
        folder: `reference.cache_folder`.
        anew: name of the adapter that trains, if it starts at zero.
    """

    kind = ReferenceKind.cache

    def __init__(
        self,
        policy: Policy,
        weights: Weights,
        folder: Path,
        accelerator: Accelerator,
        layout: Layout,
        *,
        anew: str | None,
    ):
        super().__init__(policy, accelerator.device, layout)
        self.weights, self.folder, self.accelerator, self.anew = weights, folder, accelerator, anew
        self.console = Console(quiet=layout.rank > 0, highlight=False, soft_wrap=True)
        self.model = ""
        """Key of the model."""
        self.store = Store(folder)
        if anew:
            from train.lora.adapt import Adapters  # peft takes seconds to import

            assert isinstance(weights, Adapters)
            self.acting = weights.without_trained

    def notes(self) -> list[str]:
        return [f"the reference is the start weights' log-probabilities, kept in {self.folder}; no second model."]

    def start(self, optimizer: Any, data: Data) -> None:
        """Compute what is not there, and check a sample of what is.

        Raises:
            UserError: numbers that this model does not give; a folder that ranks do not share.
        """
        encoders = [one for one in (data.encoder, data.heldout_encoder) if one is not None]
        self._open(optimizer)
        was_training = self.policy.training
        self.policy.eval()
        with self.acting(), torch.no_grad():
            for encoder in encoders:
                self._fill(encoder)
        self.policy.train(was_training)

    def _open(self, optimizer: Any) -> None:
        about = self._about(optimizer)
        self.model = xxhash.xxh3_128_hexdigest(json.dumps(about, sort_keys=True).encode())
        folder = self.folder / self.model

        def make() -> None:
            if here()[0] == 0 and not (folder / "model.json").exists():
                if others := sorted(self.folder.glob("*/model.json"), key=lambda path: path.stat().st_mtime):
                    newest = json.loads(others[-1].read_text())
                    differing = [key for key in about if about[key] != newest.get(key)]
                    self.console.print(
                        f"reference {self.folder} holds log-probabilities of other models ({len(others)}), which are "
                        f"not used. The newest of them differs from this one in {', '.join(differing)}."
                    )
                atomic_write(folder / "model.json", json.dumps(about, indent=1) + "\n")

        all_or_none(folder, 0, make)
        self.store = Store(folder)
        self.store.open()

    def _about(self, optimizer: Any) -> dict[str, Any]:
        """What the numbers depend on beside the record."""
        model: ErnieModel = self.policy.model
        own = self.weights.tensors() if self.anew else {}
        tensors = {
            name.replace(".base_layer.", "."): tensor
            for name, tensor in model.state_dict(keep_vars=True).items()
            if name not in own
        }
        scales = {
            f"{name}.{adapter}": scale
            for name, module in model.named_modules()
            for adapter, scale in getattr(module, "scaling", {}).items()
            if adapter != self.anew
        }
        return {
            "version": VERSION,
            "weights": fingerprint(tensors, optimizer),
            "adapters": xxhash.xxh3_128_hexdigest(json.dumps(scales, sort_keys=True).encode()) if scales else None,
            "architecture": model.config.to_json(),
            "dtype": str(model.activation_dtype),
        }

    def _fill(self, encoder: Encoder) -> None:
        data, layout = data_key(encoder), self.layout
        complete = all(everyones(self.store.has_all(data)))
        begun = said = time.monotonic()
        done, computed, total = 0, 0, len(encoder)
        batches = eval_batches(encoder, rank=layout.data_rank, world=layout.data_world)
        for index, batch in enumerate(same_batches(batches, layout, self.device)):
            records = [] if batch is None else records_of(batch, self.policy.model.config)
            keys = [] if batch is None else [key_of(batch, record) for record in records]
            missing = any(key not in self.store for key in keys)
            if index == 0:
                self._verify(batch, records, keys)
                complete = complete and not any_rank(self.accelerator, missing)
                if not complete:
                    self.console.print(
                        f"reference log-probabilities of {total} records of {encoder.dataset.name}, once"
                    )
            if complete:
                break
            wanted = any_rank(self.accelerator, missing) if layout.joint else missing
            if wanted:
                row = batch if missing and batch is not None else filler(0)
                logprob_T = self.logprobs(row).cpu()
                for key, record in zip(keys, records, strict=True):
                    if key not in self.store:
                        self.store.add(key, logprob_T[record.row_R])
                        computed += 1
            done, now = done + len(records), time.monotonic()
            if index % FLUSH_ROWS == FLUSH_ROWS - 1:
                self._write()
            if now - said > SAY_S:
                left = (now - begun) * (total / max(1, done * layout.data_world) - 1)
                self.console.print(f"reference {done * layout.data_world} of {total} records, about {left:.0f} s to go")
                said = now
        if complete:
            self.console.print(
                f"reference log-probabilities of {total} records of {encoder.dataset.name} found in "
                f"{self.store.folder}; a row computed again agrees"
            )
            return
        self._write()
        self.store.open()
        count = sum(everyones(computed)) // layout.sequence
        all_or_none(self.store.folder, 0, lambda: self._note_all(data, encoder, count))
        took = f"{count} records computed in {time.monotonic() - begun:.1f} s"
        self.console.print(f"reference {took}; {len(self.store)} lie in {self.store.folder}")

    def _write(self) -> None:
        mine = self.layout.sequence_rank == 0  # the others have the same
        all_or_none(self.store.folder, self.store.waiting_bytes, lambda: self.store.write() if mine else None)

    def _note_all(self, data: str, encoder: Encoder, computed: int) -> None:
        if here()[0] == 0:
            about = {"data": encoder.dataset.name, "records": len(encoder), "computed": computed}
            self.store.note_all(data, about)

    def _verify(self, batch: PackedBatch | None, records: Sequence[Record], keys: Sequence[bytes]) -> None:
        """Compute one row of every rank again and compare what was found with it.

        In a row of another length the same record may be rounded otherwise; the first one is computed alone too, to see
        how far. On average over the targets of a record, 4 times as far is allowed, and 4 units in the last place of a
        logit, which is about as large as 1 - log p.
        """
        found = [key in self.store for key in keys]
        if not any_rank(self.accelerator, any(found)):
            return
        row = filler(0) if batch is None else batch
        one = filler(0) if batch is None else alone(batch, records[0])
        now_T, alone_T = self.logprobs(row).cpu(), self.logprobs(one).cpu()
        noise = 0.0
        if records and (first := records[0]).row_R.numel():
            noise = (alone_T[first.row_R - first.tokens.start] - now_T[first.row_R]).abs().mean().item()
        unit = torch.finfo(self.policy.model.activation_dtype).eps

        def compare() -> None:
            for record, key, known in zip(records, keys, found, strict=True):
                if not known or not record.row_R.numel():
                    continue
                stored_R, now_R = self.store.read(key), now_T[record.row_R]
                allowed = 4 * (noise + unit * (1 + now_R.abs().mean().item()))
                if not (stored_R - now_R).abs().mean().item() <= allowed:
                    raise UserError(
                        f"{self.store.folder} does not fit this model: the log-probability of {record.id} is "
                        f"{stored_R.sum().item():.6g} there, and the model gives {now_R.sum().item():.6g} (rounding "
                        f"explains {allowed:.2g} per token). Delete that folder; the same command then makes it anew."
                    )

        all_or_none(self.store.folder, 0, compare)

    # ------------------------------------------------------------------------------------------------- while training

    def streams(self, microbatches: Sequence[PackedBatch]) -> Sequence[PackedBatch]:
        return [dataclasses.replace(batch, ref_logprob_T=self._found(batch)) for batch in microbatches]

    def _found(self, batch: PackedBatch) -> Tensor:
        """(T,) on the host."""
        logprob_T = torch.zeros(batch.num_tokens)
        if batch.is_filler:
            return logprob_T
        for record in records_of(batch, self.policy.model.config):
            key = key_of(batch, record)
            if key not in self.store:
                self.store.forget_all()
                raise UserError(
                    f"{record.id} has no log-probability in {self.store.folder}: it is not as it was when they were "
                    "computed. The same command, started again, computes what is missing, with the weights that "
                    "training started from. If records are made anew each time they are read, use reference.kind=copy."
                )
            value_R = self.store.read(key)
            logprob_T = logprob_T.to(value_R.dtype)
            logprob_T[record.row_R] = value_R
        return logprob_T

    def state(self) -> dict[str, Any]:
        return super().state() | {"model": self.model}

    def load(self, saved: dict[str, Any]) -> None:
        super().load(saved)
        if saved["model"] != self.model:
            raise UserError(
                "the weights that training started from are not those that this run was begun with: model.checkpoint "
                "(or model.config and run.seed), or a folder of peft.*, has other contents now. Bring them back, or "
                "start anew in another run.folder."
            )


class _Both:
    """The weights of a run, and those of a reference that follows them."""

    def __init__(self, weights: Resumable, copy: Copy):
        self.weights, self.copy = weights, copy

    def tensors(self) -> Mapping[str, Tensor]:
        own = {f"{PREFIX}{name}": tensor for name, tensor in self.copy.tensors().items()}
        return {**self.weights.tensors(), **own}

    def rests_on(self) -> str | None:
        return self.weights.rests_on()


def reference_bytes(config: TrainingConfig, weights: Iterable[Weight], shares: Shares) -> int:
    """What a second model takes on each rank beside training; 0 where there is none. Routers are not told apart.

    Args:
        weights: of the model that trains.
    """
    if not isinstance(config, DPOConfig):
        return 0
    kind = reference_kind(config.reference, config.peft, needed=needs_reference(config.objective))
    if kind is not ReferenceKind.copy:
        return 0
    rounded = config.model.precision is Precision.bf16 and config.reference.update is not ReferenceUpdate.ema
    size = 2 if rounded or config.parallel.held_in is HeldIn.bfloat16 else 4
    return sum(shares.weights(one._replace(size=size, trained=False)) for one in weights)


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
    if kind is ReferenceKind.cache:
        kept = folder / "reference" if config.cache_folder is None else Path(config.cache_folder)
        anew = peft.name if peft.kind is PeftKind.lora and peft.init_from is None else None
        return Cached(policy, weights, kept, accelerator, layout, anew=anew)
    copy = build_copy(config, model=model, peft=peft, parallel=parallel, seed=seed, layout=layout, engine=engine)
    check_same_tokens(copy, policy.model, config)
    same = Policy(copy, sequence_group=policy.sequence_group, distribution=policy.distribution)
    return Copy(same, policy.model, config, engine, device, layout)


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
        try:
            copy = build_model(
                settings,
                seed=seed,
                frozen=config.update is not ReferenceUpdate.ema,
                held_in=parallel.held_in,
                layout=layout,
                partition=partitioner(engine) if layout.zero == 3 else None,
            ).model
        except (CheckpointError, ConfigError) as error:
            if not other:
                raise
            raise UserError(f"reference.checkpoint={config.checkpoint}: {error}") from error
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
    (a, b) = ({name: shape_of(tensor) for name, tensor in one.state_dict().items()} for one in (copy, model))
    return next((name for name in sorted(a | b) if a.get(name) != b.get(name)), None)
