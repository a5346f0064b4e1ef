"""What training will take: memory, time and disk. Estimates, and they say so.

Memory and disk are arithmetic. Time is the operations of a typical row (ernie_model/flops.py) over the rate at which
this machine multiplies matrices, measured for a moment; real steps reach a part of that rate.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ernie_model.config import ErnieConfig
from ernie_model.counting import count_parameters
from ernie_model.flops import forward_flops, training_flops
from ernie_model.model import ErnieModel
from train.build import WEIGHT_BYTES, arithmetic, human
from train.checks.findings import Finding, ok, problem, warning
from train.checks.machine import available_memory, free_disk
from train.checks.records import Statistics
from train.config import Precision, TrainingConfig
from train.footprint import pieces_of
from train.reference import reference_bytes
from train.shares import Shares
from train.trained import MOMENT_BYTES, PartRow

REACHED = (0.15, 0.6)
"""Share of the measured rate that whole training steps reach: small models the lower one, large ones the higher."""
TIGHT = 0.85
"""Share of what is free from which on a need is called tight."""


class Rows(NamedTuple):
    """How an epoch of the data packs; numbers per row are means."""

    num_rows: int
    records: float
    tokens: float
    trained: float
    patches: float
    most_patches: int
    """In one row."""

    @staticmethod
    def of(found: Statistics, rows: Sequence[Sequence[int]]) -> "Rows":
        """`rows`: indices into the statistics. A mixture draws some records often and others never."""
        drawn = [index for row in rows for index in row]
        return Rows(
            num_rows=len(rows),
            records=len(drawn) / len(rows),
            tokens=float(found.tokens[drawn].sum()) / len(rows),
            trained=float(found.trained[drawn].sum()) / len(rows),
            patches=float(found.patches[drawn].sum()) / len(rows),
            most_patches=max(int(found.patches[list(row)].sum()) for row in rows),
        )


class Plan(NamedTuple):
    """What would train."""

    model: ErnieModel
    """On the meta device, frozen and adapted."""
    parts: Sequence[PartRow]
    adapted: bool
    """Adapters train, beside frozen weights."""

    @property
    def architecture(self) -> ErnieConfig:
        return self.model.config

    @property
    def trained(self) -> int:
        return sum(part.trained for part in self.parts)


def check_memory(config: TrainingConfig, plan: Plan, rows: Rows | None, device: torch.device) -> list[Finding]:
    ranks = config.parallel.processes or math.lcm(config.parallel.expert, config.parallel.sequence)
    weights = [w for piece in pieces_of(plan.model) for w in piece.weights]
    reference = reference_bytes(config, weights, Shares(config.parallel, ranks))
    sums = arithmetic(
        plan.model,
        config.model,
        max_tokens=config.data.max_tokens,
        max_patches=config.data.max_patches if rows is None else rows.most_patches,
        accumulation=config.data.accumulation,
        parallel=config.parallel,
        ranks=ranks,
        device=device,
    )
    needed = sums.memory.process + reference
    text = f"about {human(needed, 'B')} of memory on each process at the highest point of a step, "
    text += f"{human(sums.memory.state, 'B')} of it for weights, gradients and AdamW"
    text += f" and {human(reference, 'B')} for the reference (estimates)" if reference else " (estimates)"
    free = available_memory(device)
    if free is None:
        return [ok(text)]
    where = f"{human(free, 'B')} are free on {device}"
    if needed > free:
        return [
            problem(
                f"{text}, and {where}. Adapters (peft=lora), optim.freeze, model.recompute=layers and a smaller "
                "data.max_tokens need less."
            )
        ]
    if needed > TIGHT * free:
        return [warning(f"{text}, and {where}: tight. model.recompute=layers or a smaller data.max_tokens give room.")]
    return [ok(f"{text}; {where}")]


def count_updates(config: TrainingConfig, rows: Rows) -> int:
    """Of the whole run, on one process."""
    return config.run.steps or math.ceil(config.run.epochs * rows.num_rows / config.data.accumulation)


def check_time(
    config: TrainingConfig, plan: Plan, rows: Rows, device: torch.device
) -> tuple[list[Finding], dict[str, float]]:
    """Seconds per update, from a row made of average records."""
    flops = row_flops(plan, rows)
    rate = matmul_rate(device, config.model.precision)
    least, most = (config.data.accumulation * flops / rate / share for share in reversed(REACHED))
    steps = count_updates(config, rows)
    numbers = {"flops_per_row": flops, "matmul_flops_per_s": rate, "update_s_least": least, "update_s_most": most}
    text = (
        f"{human(flops * config.data.accumulation)} operations per update; {device} multiplies {human(rate)} a second, "
    )
    text += f"so an update takes about {duration(least)} to {duration(most)} and {steps:,} of them "
    text += f"{duration(least * steps)} to {duration(most * steps)} on one process (estimates)"
    return [ok(text)], numbers


def row_flops(plan: Plan, rows: Rows) -> float:
    """Operations of forward and backward for one row of average conversations."""
    per_row = max(1, round(rows.records))
    length = max(1, round(rows.tokens / per_row))
    # Patches as square images, of which the token count follows.
    side = round((rows.patches / per_row) ** 0.5 / 2) * 2
    grids = [(1, side, side)] * per_row if side and plan.architecture.vision is not None else []
    forward = forward_flops(plan.architecture, lengths=[length] * per_row, grids=grids, learned=round(rows.trained))
    learning = [part.part for part in plan.parts if part.trained]
    return training_flops(forward, () if plan.adapted else learning, adapted=learning if plan.adapted else ())


def matmul_rate(device: torch.device, precision: Precision, seconds: float = 0.3) -> float:
    """Operations per second of a square product in the dtype that training multiplies in."""
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)

    def run(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            b = a @ a
        float(b.sum())  # waits for the device
        return time.perf_counter() - began

    run(1)
    once = run(1)
    count = max(1, round(seconds / once))
    return 2 * size**3 * count / run(count)


def check_disk(config: TrainingConfig, plan: Plan) -> list[Finding]:
    """Checkpoints (one more than are kept, while it is written), the best weights and those at the end."""
    total = count_parameters(plan.architecture).total
    published = WEIGHT_BYTES * (plan.trained if plan.adapted else total)
    saved = published + MOMENT_BYTES * plan.trained
    merged = WEIGHT_BYTES * total if plan.adapted and config.peft.merge else 0
    needed = (config.run.keep + 1) * saved + 2 * (published + merged)
    text = (
        f"{human(needed, 'B')} of disk: {config.run.keep} checkpoints and one being written, {human(saved, 'B')} each; "
    )
    text += f"the best and the last weights, {human(published + merged, 'B')} each"
    free = free_disk(Path(config.run.folder))
    where = f"{human(free, 'B')} are free in run.folder={config.run.folder}"
    if needed > free:
        return [problem(f"{text}; {where}. Choose another run.folder, or make room; run.keep=1 needs less.")]
    if needed > TIGHT * free:
        return [warning(f"{text}; {where}: tight.")]
    return [ok(f"{text}; {where}")]


def duration(seconds: float) -> str:
    """0.034 → 34 ms, 95 → 95 s, 5400 → 1.5 h."""
    for size, unit in ((86400, "days"), (3600, "h"), (120, "min")):
        if seconds >= size:
            return f"{seconds / (60 if unit == 'min' else size):.3g} {unit}"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
