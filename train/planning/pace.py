"""Seconds of one update, from the rates of the hardware.

    per row      products  operations / (tflops x mfu), and one more forward of what is recomputed; the busiest rank's
                           experts have `imbalance` times the mean
                 sequence  all-to-all of heads, inside a node
                 experts   all-to-all; half of the ways hide behind the shared experts, as far as those take
                 gathers   what ZeRO-3 fetches: a layer's experts are more than DeepSpeed fetches ahead, so all of it
    per update   gradients beyond what hides behind the backward pass (parallel.overlap); those of experts that are
                           shared out hide under ZeRO only
                 update    28 bytes of memory a weight; offloaded: gradients down, weights up, and the host's memory

A model of bandwidths: latencies, kernels that are small for the device, and the loading of data are not in it, and
`mfu` is a guess until a step was measured. Use it to compare layouts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ernie_model.config import ErnieConfig
from ernie_model.flops import SCORES, VISION_SCORES, forward_flops, training_flops
from ernie_model.parts import Part
from train.config import PeftKind, PlanConfig, Precision, Recompute, TrainingConfig, UserError
from train.efficiency import BF16_TFLOPS, measured_flops
from train.footprint import Piece, Room
from train.planning.traffic import Traffic
from train.shares import EXPERTS, Shares

UPDATE_BYTES = 28
"""AdamW reads gradient, weight and both moments, and writes three of them."""
BACKWARD = 2 / 3
"""Share of a step's products that its backward pass takes."""
RECOMPUTED = (Part.ATTENTION, SCORES, Part.DENSE, Part.SHARED, Part.ROUTER, *EXPERTS)
RECOMPUTED_VISION = (Part.VISION, VISION_SCORES)


class Pace(NamedTuple):
    """Seconds of one update, and where they go: what does not hide behind something else."""

    products: float
    experts: float
    sequence: float
    gathers: float
    gradients: float
    update: float
    tokens: int
    """That all ranks together go through in it."""
    flops: float
    """That the architecture asks for, on each rank."""

    @property
    def seconds(self) -> float:
        return self.products + self.experts + self.sequence + self.gathers + self.gradients + self.update

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def peak_tflops(plan: PlanConfig, precision: Precision) -> float:
    """10^12 operations per second of one device.

    Raises:
        UserError: no data sheet has it.
    """
    if plan.tflops is not None:
        return plan.tflops
    if plan.device == "cpu":
        dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
        return measured_flops(torch.device("cpu"), dtype) / 1e12
    if precision is Precision.bf16 and plan.device in BF16_TFLOPS:
        return BF16_TFLOPS[plan.device]
    known = ", ".join(BF16_TFLOPS)
    raise UserError(
        f"plan.device={plan.device} has no known rate in {precision.value}. Give plan.tflops; known for bf16 are "
        f"{known}, and cpu is measured."
    )


class Work(NamedTuple):
    """Operations of one row on one rank."""

    asked: float
    """By the architecture, forward and backward."""
    experts: float
    """Of `asked`, those of routed experts."""
    again: float
    """By recomputation."""
    experts_again: float
    shared: float
    """Of all these, those of the shared experts."""


def work_of(config: TrainingConfig, architecture: ErnieConfig, trained: set[Part]) -> Work:
    """Of this rank's part of a full row: plan.media_share of it images, in conversations of plan.segment_tokens."""
    tokens = config.data.max_tokens
    adapted = config.peft.kind is not PeftKind.none
    segment = min(config.plan.segment_tokens or tokens, tokens)
    count = max(1, tokens // segment)
    media = tokens * config.plan.media_share / count if architecture.vision is not None else 0.0
    side = 2 * round(media**0.5)  # a token stands for 2 x 2 patches
    grids = [(1, side, side)] * count if side else []
    lengths = [tokens // count] * count
    learned = max(1, tokens - round(media * count))
    row = forward_flops(architecture, lengths=lengths, grids=grids, learned=learned)
    forward = {part: count / config.parallel.sequence for part, count in row.items()}

    def total(flops: dict) -> float:
        return training_flops(flops, () if adapted else trained, adapted=trained if adapted else ())

    experts = {part: count for part, count in forward.items() if part in EXPERTS}
    way = config.model.recompute
    again = () if way is Recompute.none else RECOMPUTED
    if way is Recompute.layers_and_vision and Part.VISION in trained:
        again += RECOMPUTED_VISION
    extra = {part: count for part, count in forward.items() if part in again}
    experts_again = sum(count for part, count in extra.items() if part in EXPERTS)
    shared = total({Part.SHARED: forward.get(Part.SHARED, 0.0)}) + extra.get(Part.SHARED, 0.0)
    return Work(total(forward), total(experts), sum(extra.values()), experts_again, shared)


def pace_of(
    config: TrainingConfig,
    pieces: Sequence[Piece],
    work: Work,
    traffic: Traffic,
    room: Room,
    shares: Shares,
    tflops: float,
) -> Pace:
    plan, parallel = config.plan, shares.parallel
    rate = tflops * 1e12 * plan.mfu
    busier = (room.imbalance - 1) * (work.experts + work.experts_again) if parallel.expert > 1 else 0.0
    products = room.accumulation * (work.asked + work.again + busier) / rate
    dense, experts = (
        _rate(plan, members, stride)
        for members, stride in ((shares.ranks, 1), (shares.ranks // parallel.expert, parallel.expert))
    )
    gathers = traffic.dense_weights / dense + traffic.expert_weights / experts
    trained = [w for piece in pieces for w in piece.weights if w.trained]
    own = sum(shares.part(w) if parallel.zero else shares.local(w) for w in trained)
    if parallel.offload_weights:
        held = sum(shares.weights(w) for piece in pieces for w in piece.weights)
        gathers += 2 * room.accumulation * held / (plan.host_gb_s * 1e9)
    gradients, late = traffic.dense_gradients / dense, traffic.expert_gradients / experts
    if parallel.zero:  # without ZeRO the experts' gradients are added up when the backward pass is over
        gradients, late = gradients + late, 0.0
    # Ranks meet in the last row's backward pass, under ZeRO-2 and 3 in every row's.
    rows = room.accumulation if parallel.zero >= 2 else 1
    hidden = BACKWARD * products * rows / room.accumulation if parallel.overlap else 0.0
    update = UPDATE_BYTES * own / (plan.memory_gb_s * 1e9)
    if parallel.offload_optimizer:
        moved = sum(w.size * shares.part(w) for w in trained)
        update = 2 * moved / (plan.host_gb_s * 1e9) + UPDATE_BYTES * own / (plan.host_memory_gb_s * 1e9)
    # Rows travel to their experts, and gradients from them, while the shared experts are computed.
    way = _all_to_all(traffic.experts, plan, parallel.expert) / 2
    meanwhile = room.accumulation * work.shared / rate
    return Pace(
        products=products,
        experts=way + max(0.0, way - meanwhile),
        sequence=_all_to_all(traffic.sequence, plan, parallel.sequence),
        gathers=gathers,
        gradients=max(0.0, gradients - hidden) + late,
        update=update,
        tokens=room.tokens * room.accumulation * shares.ranks,
        flops=room.accumulation * work.asked,
    )


def _rate(plan: PlanConfig, members: int, stride: int) -> float:
    """Bytes per second that each rank of a ring sends, every `stride`-th rank being a member.

    Between nodes a group uses the network port of each of its members there; inside, the links of the node.
    """
    if members * stride <= plan.gpus_per_node:
        return plan.node_gb_s * 1e9
    here = max(1, plan.gpus_per_node // stride)
    return min(plan.node_gb_s, here * plan.network_gb_s) * 1e9


def _all_to_all(sent: float, plan: PlanConfig, members: int) -> float:
    """Seconds. Ranks are consecutive; each sends every other one an equal share, outside the node through its port."""
    if members <= plan.gpus_per_node:
        return sent / (plan.node_gb_s * 1e9)
    outside = (members - plan.gpus_per_node) / (members - 1)
    return sent * outside / (plan.network_gb_s * 1e9) + sent * (1 - outside) / (plan.node_gb_s * 1e9)
