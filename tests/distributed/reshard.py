"""Training state that one layout wrote goes on in every other one.

    write   each layout trains 5 updates, saves, and trains 5 more          losses of the uninterrupted run
    read    each layout starts from other weights and other correction biases, loads what another wrote, and saves it
            again: the same bits; then it trains 5 updates: the same losses

python -m tests.distributed.reshard                 everything to everything, as a table of the largest differences
python -m tests.distributed.reshard FOLDER TASKS    one rank of it, with RANK, WORLD_SIZE, ... as a launcher sets them
"""

import itertools
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ernie_model.expert_parallel import WHOLE, Shard, connect_experts, shard_experts, shard_of
from ernie_model.moe import Router
from tests.distributed.test_ranks import launch
from tests.train import small
from train import checkpoint
from train.config import OptimConfig, PeftConfig, PeftKind
from train.objectives.sft import SFT
from train.optim import parameter_groups
from train.policy import Policy, on_device
from train.trained import freeze
from train.weights import trained_weights

UPDATES = 5
ROWS = [
    [
        small.row(small.example(20 * step + 2 * row, 9, image=True), small.example(20 * step + 2 * row + 1, 7))
        for row in range(4)
    ]
    for step in range(2 * UPDATES)
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

    def __init__(self, layout: Layout, what: What, *, seed: int = 0, policy: Policy | None = None):
        self.layout = layout
        self.rank, self.world = checkpoint.here()
        # AdamW's usual eps would turn differences of the last bit into whole updates.
        optim = OptimConfig(lr=3e-3, eps=1e-3, freeze=list(what.freeze))
        # Frozen weights are not in an adapter's checkpoint: they are the same for everybody.
        self.policy = policy or small.policy(seed=0 if what.peft.kind is PeftKind.lora else seed)
        model = self.policy.model
        self.weights = trained_weights(model, what.peft, seed=seed, base=None)
        freeze(model, optim)
        if what.dtype != torch.float32:
            model.set_dtype(what.dtype)
        if layout.expert > 1:
            from train.parallel.groups import announce, expert_groups, tag_experts

            groups = expert_groups(layout.expert)
            self.expert, self.expert_data = groups
            shard_experts(model, Shard(self.rank % layout.expert, layout.expert))
            connect_experts(model, groups.expert)
            tag_experts(model)
            announce(self.policy, layout.zero)
        self.engine: Any = None
        groups = _apart(parameter_groups(model, optim))
        settings = dict(lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
        self.optimizer: Any = torch.optim.AdamW(groups, **settings)
        if layout.zero:
            import deepspeed

            if layout.zero == 3:
                deepspeed.zero.register_external_parameter(self.policy, model.head_VD)
            config = {
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": 0.5,
                "zero_optimization": {
                    "stage": layout.zero,
                    "overlap_comm": False,
                    "stage3_param_persistence_threshold": 40,
                },
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
            }
            self.engine, self.optimizer, *_ = deepspeed.initialize(
                model=self.policy, optimizer=self.optimizer, config=config
            )

    def losses(self, rows) -> list[float]:
        return [self.update(step) for step in rows]

    def update(self, rows) -> float:
        each = len(rows) // self.world
        count = sum(SFT.count(row).item() for row in rows)
        policy, total = self.engine or self.policy, 0.0
        losses = []
        for row in rows[self.rank * each : (self.rank + 1) * each]:
            batch, row_R = on_device(row, torch.device("cpu"))
            losses.append(SFT.loss(policy(batch, row_R).logprob_T, batch).total / count)
        loss = torch.stack(losses).sum()
        if self.engine is not None:
            self.engine.backward(loss * self.world)
            self.engine.step()
        else:
            loss.backward()
            self._plain_step()
        total = loss.detach().clone()
        if self.world > 1:
            dist.all_reduce(total)
        return total.item()

    def _plain_step(self) -> None:
        squares = torch.zeros(2)  # of what everybody has, of what only this rank's expert group has
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        for p in parameters:
            assert p.grad is not None
            sharded = shard_of(p) != WHOLE
            if self.world > 1:
                dist.all_reduce(p.grad, group=self.expert_data if sharded else None)
            squares[int(sharded)] += p.grad.square().sum()
        if self.layout.expert > 1:
            experts = squares[1:].clone()
            dist.all_reduce(experts, group=self.expert)
            squares[1:] = experts
        norm = squares.sum().sqrt()
        for p in parameters:
            p.grad *= (0.5 / (norm + 1e-6)).clamp(max=1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def turn_biases(self, sign: float) -> None:
        """A constructor makes them 0, so only a checkpoint brings them about."""
        for module in self.policy.modules():
            if isinstance(module, Router):
                module.correction_bias_E.copy_(sign * torch.linspace(-0.2, 0.2, module.correction_bias_E.numel()))

    def save(self, root: Path, step: int) -> Path:
        return checkpoint.save(root, step, weights=self.weights, optimizer=self.optimizer, state={}, keep=1).path

    def load(self, path: Path) -> None:
        checkpoint.load(path, weights=self.weights, optimizer=self.optimizer)


def _apart(groups: list[dict]) -> list[dict]:
    """Experts, and what has another dtype, in groups of their own, which DeepSpeed finds by their `moe` and `name`."""
    out = []
    for group in groups:
        kinds = [(shard_of(p) != WHOLE, str(p.dtype)) for p in group["params"]]
        for kind in sorted(set(kinds)):
            chosen = [index for index, other in enumerate(kinds) if other == kind]
            parts = {key: [group[key][index] for index in chosen] for key in ("params", "names")}
            expert, _ = kind
            marks = {"moe": True, "name": parts["params"][0].group_name} if expert else {"name": f"dense {len(out)}"}
            out.append(group | parts | marks)
    return out


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


def start() -> None:
    """Meet the other ranks, without compiling anything."""
    torch.set_num_threads(1)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)


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
                launch(world, "-m", "tests.distributed.reshard", str(folder), json.dumps(now))
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
        start()
        run(Path(sys.argv[1]), json.loads(sys.argv[2]))
        if dist.is_initialized():
            dist.destroy_process_group()
