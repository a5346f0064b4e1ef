"""Training state that one layout wrote goes on in every other one.

    write   each layout trains 5 updates, saves, and trains 5 more          losses of the uninterrupted run
    read    each layout starts from other weights and other correction biases, loads what another wrote, and saves it
            again: the same bits; then it trains 5 updates: the same losses

python -m tests.distributed.reshard                 everything to everything, as a table of the largest differences
python -m tests.distributed.reshard FOLDER TASKS    one rank of it, with RANK, WORLD_SIZE, ... as a launcher sets them
"""

import dataclasses
import itertools
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data.batch import PackedBatch
from data.encode import Example
from ernie_model.expert_parallel import Shard, connect_experts, shard_experts
from ernie_model.model import ErnieModel
from ernie_model.moe import Router
from tests.distributed.gloo import launch
from tests.train import small
from train import checkpoint
from train.config import OptimConfig, ParallelConfig, PeftConfig, PeftKind
from train.loop import train_step
from train.objectives.sft import SFT
from train.optim import build_optimizer
from train.parallel.layout import build_accelerator, build_layout, leave
from train.parallel.updates import Plain, Updates
from train.policy import Policy
from train.trained import freeze
from train.weights import trained_weights

UPDATES, CLIP = 5, 0.5
# AdamW's usual eps would turn differences of the last bit into whole updates.
OPTIM = OptimConfig(lr=3e-3, eps=1e-3, weight_decay=0.1)


def segment(step: int, row: int) -> Example:
    """Some rows have an image; every fourth update has none."""
    return small.example(10 * step + row, 9 + row, image=step % 4 != 2 and (step + row) % 3 > 0)


ROWS = [
    [small.row(segment(step, row), small.example(100 + step, 7)) for row in range(4)] for step in range(2 * UPDATES)
]


class Layout(NamedTuple):
    world: int
    zero: int = 0
    expert: int = 1

    def __str__(self) -> str:
        """ep2 zero1 x4: four ranks, experts on two of them, ZeRO-1."""
        named = [f"ep{self.expert}" * (self.expert > 1), f"zero{self.zero}" * bool(self.zero), f"x{self.world}"]
        return " ".join(filter(None, named))


LAYOUTS = {
    str(layout): layout
    for layout in (
        Layout(1),
        *(Layout(world, zero) for world in (2, 4) for zero in range(4)),
        *(Layout(world, zero, expert) for world, expert in ((2, 2), (4, 2), (4, 4)) for zero in range(4)),
    )
}


class What(NamedTuple):
    """What trains."""

    peft: PeftConfig = PeftConfig()
    freeze: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    """What trained weights are held in between updates."""


WHAT = {
    "all": What(),
    "frozen parts": What(freeze=("vision", "text_experts", "layers.0.*norm*")),
    "adapters": What(PeftConfig(kind=PeftKind.lora, targets=["attention", "dense", "vision"], rank=3)),
    "bfloat16": What(dtype=torch.bfloat16),
}


class Task(NamedTuple):
    what: str
    source: str
    """The layout that wrote."""
    target: str
    """The layout that reads; the same one for `write`."""


class Trained:
    """The small model on a layout."""

    def __init__(self, layout: Layout, what: What, *, seed: int = 0, model: ErnieModel | None = None):
        config = ParallelConfig(cpu=True, zero=layout.zero, expert=layout.expert, bucket_mb=1)
        self.accelerator = build_accelerator(config)
        here = build_layout(config, self.accelerator)
        self.rank, self.world = here.rank, here.world
        # Frozen weights are not in an adapter's checkpoint: they are the same for everybody.
        model = model or small.policy(seed=0 if what.peft.kind is PeftKind.lora else seed).model
        shard_experts(model, Shard(here.expert_rank, here.expert))
        self.weights = trained_weights(model, what.peft, seed=seed, base=None)
        if here.expert_group is not None:
            connect_experts(model, here.expert_group)
        optim = dataclasses.replace(OPTIM, freeze=list(what.freeze))
        freeze(model, optim)
        if what.dtype != torch.float32:
            model.set_dtype(what.dtype)
        self.policy = Policy(model, loss_is_linear=True)
        optimizer = build_optimizer(model, optim)
        if layout.zero:
            from train.parallel.settings import deepspeed_config
            from train.parallel.zero import Zero

            settings = deepspeed_config(config, max_grad_norm=CLIP, gpu=False)
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = 40  # ZeRO 3 keeps some whole, not all
            self.updates: Updates = Zero(self.policy, optimizer, here, settings)
        else:
            self.updates = Plain(self.policy, optimizer, self.accelerator, here)
        self.updates.policy.train()

    def losses(self, updates: Sequence[list[PackedBatch]]) -> list[float]:
        return [
            train_step(
                self.updates, SFT, rows[self.rank :: self.world], accelerator=self.accelerator, max_grad_norm=CLIP
            )["loss"]
            for rows in updates
        ]

    def turn_biases(self, sign: float) -> None:
        """A constructor makes them 0, so only a checkpoint brings them about."""
        for module in self.policy.modules():
            if isinstance(module, Router):
                module.correction_bias_E.copy_(sign * torch.linspace(-0.2, 0.2, module.correction_bias_E.numel()))

    def save(self, root: Path, step: int) -> Path:
        both = dict(weights=self.weights, optimizer=self.updates.optimizer)
        return checkpoint.save(root, step, **both, state={}, keep=1).path

    def load(self, path: Path) -> None:
        checkpoint.load(path, weights=self.weights, optimizer=self.updates.optimizer)


# ------------------------------------------------------------------------------------------------------- the tasks


def place(folder: Path, what: str, layout: str) -> Path:
    return folder / what / layout


def write(folder: Path, what: str, layout: str) -> None:
    run = Trained(LAYOUTS[layout], WHAT[what], seed=0)
    if WHAT[what].peft.kind is PeftKind.none:
        run.turn_biases(1)
    losses = run.losses(ROWS[:UPDATES])
    path = run.save(place(folder, what, layout), UPDATES)
    assert checkpoint.damage(path) is None
    losses += run.losses(ROWS[UPDATES:])
    if run.rank == 0:
        (path.parent / "losses.json").write_text(json.dumps(losses))


def read(folder: Path, task: Task) -> dict[str, float]:
    """The largest difference of a loss from the uninterrupted run's, and of the state that is saved again."""
    source = place(folder, task.what, task.source)
    run = Trained(LAYOUTS[task.target], WHAT[task.what], seed=1)
    if WHAT[task.what].peft.kind is PeftKind.none:
        run.turn_biases(-1)
    run.losses(ROWS[:1])  # moments and gathered weights of its own, which must not stay
    run.load(checkpoint.folder_of(source, UPDATES))
    again = run.save(folder / "again", UPDATES)
    changed = max(difference(checkpoint.folder_of(source, UPDATES), again).values()) if run.rank == 0 else 0.0
    checkpoint.everyones(None)  # nobody deletes what rank 0 still reads
    losses, expected = run.losses(ROWS[UPDATES:]), json.loads((source / "losses.json").read_text())[UPDATES:]
    return {"loss": max(abs(a - b) for a, b in zip(losses, expected, strict=True)), "state": changed}


def difference(one: Path, two: Path) -> dict[str, float]:
    """Of every tensor of the training state; infinite where only one has it."""
    states = whole_state(one), whole_state(two)
    return {
        name: (a.double() - b.double()).abs().max().item()
        if (a := states[0].get(name)) is not None and (b := states[1].get(name)) is not None
        else float("inf")
        for name in states[0] | states[1]
    }


def whole_state(path: Path) -> dict[str, Tensor]:
    pieces, sizes = checkpoint.pieces_of(path), {}
    for name, stored in pieces.stored.items():
        sizes[name] = max(piece.stop for piece in stored)
        assert sum(piece.stop - piece.start for piece in stored) == sizes[name], f"{name} is there more than once"
    return {name: pieces.read(name, 0, size) for name, size in sizes.items()}


def run(folder: Path, tasks: Sequence[Sequence[str]]) -> None:
    """All of them in one start: DeepSpeed takes seconds to import. What is not there yet is written first."""
    build_accelerator(ParallelConfig(cpu=True))  # the ranks meet
    _, world = checkpoint.here()
    result = folder / f"found-{world}.json"
    found = json.loads(result.read_text()) if result.exists() else {}
    checkpoint.everyones(None)
    for task in itertools.starmap(Task, tasks):
        if task.source == task.target:
            write(folder, task.what, task.source)
        found[" -> ".join(task)] = read(folder, task)
    if checkpoint.here()[0] == 0:
        result.write_text(json.dumps(found))


def launched(folder: Path, tasks: Sequence[Task]) -> dict[Task, dict[str, float]]:
    """All tasks, in as few starts as they need: a source that takes more processes is written a round earlier."""
    left, written = list(tasks), set()
    while left:
        for world in (1, 2, 4):
            mine = [task for task in left if LAYOUTS[task.target].world == world]
            written |= {task[:2] for task in mine if task.source == task.target}
            now = sorted((task for task in mine if task[:2] in written), key=lambda task: task.source != task.target)
            if now and world == 1:
                run(folder, now)
            elif now:
                launch(
                    world, "-m", "tests.distributed.reshard", str(folder), json.dumps(now), limit_s=60 + 20 * len(now)
                )
            left = [task for task in left if task not in now]
    found = {}
    for result in folder.glob("found-*.json"):
        found |= json.loads(result.read_text())
    return {task: found[" -> ".join(task)] for task in tasks}


def matrix() -> dict[Task, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        tasks = [Task("all", *pair) for pair in itertools.product(LAYOUTS, LAYOUTS)]
        return launched(Path(folder), tasks)


def table(found: dict[Task, dict[str, float]]) -> str:
    """Rows write, columns read."""
    lines = [f"{'':14}" + "".join(f"{number:>8}" for number in range(len(LAYOUTS)))]
    for number, source in enumerate(LAYOUTS):
        cells = [found[Task("all", source, target)] for target in LAYOUTS]
        lines.append(f"{number:2} {source:11}" + "".join(f"{max(cell.values()):8.0e}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(table(matrix()))
    else:
        torch.set_num_threads(1)
        logging.disable(logging.INFO)
        run(Path(sys.argv[1]), json.loads(sys.argv[2]))
        leave()
