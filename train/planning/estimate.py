"""One layout: does it fit, what does it send, how long does an update take?"""

import dataclasses
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from ernie_model.config import ErnieConfig
from ernie_model.model import ErnieModel
from ernie_model.parts import Part, part_of
from ernie_model.sequence_parallel import check_heads
from train.build import WEIGHT_BYTES, human
from train.compose import plain
from train.config import PeftKind, Precision, TrainingConfig, UserError
from train.footprint import Footprint, Piece, Room, footprint_of, pieces_of
from train.planning.pace import Pace, pace_of, work_of
from train.planning.traffic import Traffic, traffic_of
from train.reference import reference_bytes
from train.shares import Shares
from train.trained import MOMENT_BYTES

MEMORY = ("weights", "gradients", "optimizer", "activations", "buckets", "gathered")
HOST_SHARE = 0.9
"""Of a node's memory that training may take."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """What all layouts of a search have in common, looked at once."""

    architecture: ErnieConfig
    pieces: Sequence[Piece]
    trained: set[Part]

    @classmethod
    def of(cls, model: ErnieModel) -> "Subject":
        trained = {part_of(name) for name, p in model.named_parameters() if p.requires_grad}
        return cls(model.config, pieces_of(model), trained)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one layout. Bytes are those of one rank, unless they are said to be of all."""

    config: TrainingConfig
    memory: Footprint
    traffic: Traffic
    pace: Pace
    reference: int
    """A second model that the policy is compared with."""
    cache: int
    """Keys and values of `plan.answers` conversations."""
    checkpoint: int
    """Of all ranks."""

    @property
    def needed(self) -> int:
        """On the device: training's highest point, or writing answers beside what stays, whichever is more."""
        memory = self.memory
        return self.reference + max(memory.peak, memory.weights + memory.optimizer + memory.gathered + self.cache)

    @property
    def room(self) -> int:
        return round(self.config.plan.gpu_gb * 1e9 * (1 - self.config.plan.reserve))

    @property
    def host_of_node(self) -> int:
        return self.memory.host * min(self.config.plan.gpus, self.config.plan.gpus_per_node)

    @cached_property
    def obstacle(self) -> str:
        """Why it does not fit; nothing where it does."""
        plan, memory = self.config.plan, self.memory
        if self.needed > self.room:
            items = memory._asdict() | {"KV cache": self.cache, "reference": self.reference}
            names = (*MEMORY, "KV cache", "reference")
            largest = sorted(((items[name], name) for name in names), reverse=True)[:2]
            parts = " and ".join(f"{human(size, 'B')} of {name}" for size, name in largest)
            return f"needs {human(self.needed, 'B')} of {human(self.room, 'B')} on each GPU, {parts} among them"
        if self.host_of_node > HOST_SHARE * plan.host_gb * 1e9:
            return f"needs {human(self.host_of_node, 'B')} of host memory on a node that has {plan.host_gb:g} GB"
        return ""

    @property
    def excess(self) -> float:
        """How much of what it needs is missing, as a share of what there is."""
        host = self.host_of_node / (HOST_SHARE * self.config.plan.host_gb * 1e9)
        return max(self.needed / self.room, host) - 1

    def numbers(self) -> dict[str, Any]:
        """For plan.json."""
        return {
            "parallel": plain(self.config.parallel),
            "recompute": self.config.model.recompute.value,
            "max_tokens": self.config.data.max_tokens,
            "accumulation": self.config.data.accumulation,
            "fits": not self.obstacle,
            "obstacle": self.obstacle,
            "memory": {**self.memory._asdict(), "reference": self.reference, "cache": self.cache},
            "sent_per_update": self.traffic._asdict(),
            "seconds_per_update": {**self.pace._asdict(), "all": self.pace.seconds},
            "tokens_per_second": self.pace.tokens_per_s,
            "checkpoint": self.checkpoint,
        }


def estimate(config: TrainingConfig, subject: Subject, tflops: float) -> Estimate:
    parallel, pieces, architecture = config.parallel, subject.pieces, subject.architecture
    shares = Shares(parallel, config.plan.gpus)
    tokens, limit = config.data.max_tokens, config.data.max_patches
    patches = 4 * tokens if limit is None else min(limit, 4 * tokens)
    room = Room(
        tokens=math.ceil(tokens / parallel.sequence),
        patches=math.ceil(patches / parallel.sequence) if architecture.vision is not None else 0,
        accumulation=config.data.accumulation,
        imbalance=config.plan.imbalance,
    )
    device = torch.device("cpu" if config.plan.device == "cpu" else "cuda")
    traffic = traffic_of(pieces, architecture, config.model, room, shares)
    work = work_of(config, architecture, subject.trained)
    return Estimate(
        config=config,
        memory=footprint_of(pieces, architecture, config.model, room, shares, device),
        traffic=traffic,
        pace=pace_of(config, pieces, work, traffic, room, shares, tflops),
        reference=reference_bytes(config, [w for piece in pieces for w in piece.weights], shares),
        cache=config.plan.answers * config.plan.answer_tokens * cache_bytes(config, architecture),
        checkpoint=checkpoint_bytes(config, pieces),
    )


def cache_bytes(config: TrainingConfig, c: ErnieConfig) -> int:
    """Keys and values of one token in all layers."""
    size = 2 if config.model.precision is Precision.bf16 else 4
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * size


def checkpoint_bytes(config: TrainingConfig, pieces: Sequence[Piece]) -> int:
    """Weights and AdamW's moments in float32; beside adapters, no frozen weights."""
    weights = [w for piece in pieces for w in piece.weights]
    frozen = 0 if config.peft.kind is not PeftKind.none else sum(w.size * w.count for w in weights if not w.trained)
    return frozen + (WEIGHT_BYTES + MOMENT_BYTES) * sum(w.count for w in weights if w.trained)


def check_layout(config: TrainingConfig, architecture: ErnieConfig) -> None:
    """Refuses what no number of bytes could save.

    Raises:
        UserError: the ranks cannot be divided like this.
    """
    plan, parallel = config.plan, config.parallel
    if parallel.processes not in (None, plan.gpus):
        raise UserError(f"plan.gpus is {plan.gpus} and parallel.processes {parallel.processes}; they must be the same.")
    for key in ("expert", "sequence"):
        size = getattr(parallel, key)
        if plan.gpus % size:
            raise UserError(f"parallel.{key}={size} does not divide plan.gpus={plan.gpus}. Choose a divisor.")
    try:
        check_heads(architecture.num_attention_heads, architecture.num_key_value_heads, parallel.sequence)
    except ValueError as error:
        raise UserError(f"parallel.sequence={parallel.sequence}: {error}") from error
    if parallel.expert > 1 and (not architecture.sparse_layers or architecture.num_experts % parallel.expert):
        raise UserError(
            f"parallel.expert={parallel.expert} does not divide the {architecture.num_experts} experts of a pool. "
            "Choose a divisor, or parallel.expert=1."
        )
