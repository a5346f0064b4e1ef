"""Forward and backward passes of a small model whose experts lie on several ranks.

test_expert_parallel.py runs every case in one process, which holds all experts and takes all four rows, and as two and
four ranks, which share out both.

python -m tests.distributed.expert_routes FOLDER      with RANK, WORLD_SIZE, MASTER_ADDR, ... as a launcher sets them
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from data.pack import filler
from ernie_model.expert_parallel import Shard, Trip, connect_experts, shard_experts, shard_of
from ernie_model.model import ErnieModel
from ernie_model.moe import MoE, Pools, Routing
from ernie_model.recompute import recompute
from tests.train import small
from train.config import PeftConfig, PeftKind
from train.lora.adapt import adapt
from train.parallel.layout import leave
from train.policy import Policy, on_device

CONFIG = small.CONFIG.replace(num_experts=8)
ROWS = {
    "image": small.row(small.example(0, 9, image=True)),
    "both": small.row(small.example(1, 12, learned=5), small.example(2, 7, image=True)),
    "text": small.row(small.example(3, 6, learned=1)),
    "long": small.row(small.example(4, 17), small.example(5, 8)),
    "only an image": small.row(small.example(6, 4, image=True, learned=1)),
    "nothing": filler(7),
}


class Case(NamedTuple):
    rows: tuple[str, str, str, str]
    """Four ranks have one each; of two, the first has the first and the third."""
    prepare: Callable[[Policy], None] = lambda _: None
    dtype: torch.dtype = torch.float64
    compute_dtype: torch.dtype | None = None
    gradients: bool = True
    replays: bool = False
    """Tokens are told which experts to visit, most of them."""

    @property
    def join(self) -> bool:
        return any(ROWS[name].grids for name in self.rows)


def biased(bias_E: list[float]) -> Callable[[Policy], None]:
    """Move the choices of both pools' routers."""

    def prepare(policy: Policy) -> None:
        for name, buffer in policy.named_buffers():
            if name.endswith("correction_bias_E"):
                buffer.copy_(torch.tensor(bias_E))

    return prepare


def recomputed(policy: Policy) -> None:
    policy.model.run_layer = recompute


def adapted(targets: list[str] | None) -> Callable[[Policy], None]:
    def prepare(policy: Policy) -> None:
        adapt(policy.model, PeftConfig(kind=PeftKind.lora, targets=targets, rank=4), seed=3)
        for index, (name, parameter) in enumerate(policy.named_parameters()):
            if "_B" in name and parameter.requires_grad:  # B begins at zero, and A would have no gradient
                shard, generator = shard_of(parameter), torch.Generator().manual_seed(index)
                count, *rest = parameter.shape
                whole = torch.randn(count * shard.of, *rest, generator=generator)
                parameter.data.copy_(whole[shard.part_of(len(whole))])

    return prepare


def frozen(policy: Policy) -> None:
    """Nothing before the first layer trains, nor its experts: rows travel back only for the attention's sake."""
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_("self_attn" in name)


MIXED = ("image", "both", "text", "long")
CASES = {
    "rows of both kinds": Case(MIXED),
    "no image on three ranks": Case(("text", "both", "long", "text")),
    "nobody has an image": Case(("text", "long", "long", "text")),
    "nothing but an image on one rank": Case(("only an image", "long", "text", "both")),
    "no row for the text experts": Case(("only an image",) * 4),
    "filler on one rank": Case(("nothing", "image", "long", "both")),
    "filler on all but one": Case(("nothing", "nothing", "image", "nothing")),
    "experts that nobody chose": Case(MIXED, biased([0, -9, -9, 0, -9, 0, 0, -9])),
    "all rows to the first rank": Case(MIXED, biased([9, 9, 0, 0, 0, 0, 0, 0])),
    "all rows to the last rank, of one kind": Case(("text", "long", "text", "text"), biased([0] * 6 + [9, 9])),
    "recomputed": Case(("text", "both", "long", "image"), recomputed),
    "adapters on everything": Case(MIXED, adapted(None)),
    "adapters on attention": Case(MIXED, adapted(["attention"])),
    "adapters on vision experts": Case(("long", "both", "text", "text"), adapted(["vision_experts"])),
    "only attention trains": Case(MIXED, frozen),
    "experts replayed, recomputed": Case(MIXED, recomputed, replays=True),
    "experts replayed, no image on three ranks": Case(("text", "both", "nothing", "text"), replays=True),
    "without gradients": Case(MIXED, gradients=False),
    "float32": Case(MIXED, dtype=torch.float32),
    "bfloat16 activations": Case(MIXED, dtype=torch.float32, compute_dtype=torch.bfloat16),
    "bfloat16, no image on three ranks": Case(
        ("text", "both", "long", "text"), dtype=torch.float32, compute_dtype=torch.bfloat16
    ),
}


def small_policy(dtype: torch.dtype, compute_dtype: torch.dtype | None = None) -> Policy:
    torch.manual_seed(0)
    return Policy(ErnieModel(CONFIG, compute_dtype=compute_dtype).set_dtype(dtype))


def run(case: Case, names: list[str], group: dist.ProcessGroup | None) -> dict:
    policy = small_policy(case.dtype, case.compute_dtype)
    routes = []
    if group is not None:
        shard_experts(policy, Shard(dist.get_rank(group), dist.get_world_size(group)))
        routes = connect_experts(policy, group)
    case.prepare(policy)
    outputs, stats = [], None
    with torch.set_grad_enabled(case.gradients):
        for name in names:
            row = small.in_double(ROWS[name]) if case.dtype == torch.float64 else ROWS[name]
            if case.replays and not row.is_filler:
                row = small.replaying(row, CONFIG, unknown=0.2)
            row, row_R = on_device(row, torch.device("cpu"))
            output = policy(row, row_R, join=group is not None and case.join)
            stats = output.router if stats is None else stats.plus(output.router)
            loss = -(output.logprob_T * row.weight_T).sum() + 0.1 * output.router.square_2.sum()
            if loss.requires_grad:  # adapters of vision experts are not reached by text; with `join` they are
                loss.backward()
            outputs.append(output.logprob_T.detach())
    return {
        "outputs": outputs,
        "stats": stats.detach()._asdict(),
        "gradients": {name: p.grad for name, p in policy.named_parameters() if p.requires_grad},
        "shards": [name for name, p in policy.named_parameters() if shard_of(p).of > 1],
        "sent": sum(route.sent_bytes for route in routes),
    }


# ---------------------------------------------------------------------------------------------------- what is exchanged


class Calls:
    """Every exchange, counted where it happens: bytes to other ranks of rows and of counts."""

    def __init__(self, group: dist.ProcessGroup):
        self.rows: list[int] = []
        self.counts: list[int] = []
        self.original, self.rank, self.size = dist.all_to_all_single, dist.get_rank(group), dist.get_world_size(group)

    def __call__(self, output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False):
        splits = input_split_sizes or [len(input) // self.size] * self.size
        away = (len(input) - splits[self.rank]) * input[:1].nbytes if len(input) else 0
        (self.rows if input.is_floating_point() else self.counts).append(away)
        return self.original(output, input, output_split_sizes, input_split_sizes, group=group, async_op=async_op)


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: values that become Python's, and sizes that depend on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "bincount", "unique", "masked_select", "repeat_interleave")

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, known = func._schema.name.removeprefix("aten::"), (kwargs or {}).get("output_size")
        if any(name.startswith(one) for one in self.NAMES) and known is None:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def waits(group: dist.ProcessGroup | None) -> list[str]:
    """Of one sparse layer with rows of both pools, forwards and backwards."""
    moe = MoE(CONFIG)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    if group is not None:
        shard_experts(moe, Shard(dist.get_rank(group), dist.get_world_size(group)))
        connect_experts(moe, group)
    x_TD = torch.randn(16, CONFIG.hidden_size, requires_grad=True)
    pools = Pools(torch.arange(16) < 5, 5, join=group is not None)
    tolist = torch.Tensor.tolist

    def noted(tensor: torch.Tensor) -> list:
        mode.seen.append("tolist")  # nothing that a dispatch mode sees
        return tolist(tensor)

    with Waits() as mode, patch.object(torch.Tensor, "tolist", noted):
        y_TD, _ = moe(x_TD, pools)
        y_TD.sum().backward()
    return mode.seen


def balanced(group: dist.ProcessGroup) -> dict:
    """One layer whose choices are dealt out evenly, and what happens in which order."""
    tokens, choices, size = 16, CONFIG.experts_per_token, dist.get_world_size(group)
    torch.manual_seed(0)
    moe = MoE(CONFIG)
    shard_experts(moe, Shard(dist.get_rank(group), size))
    (route,) = connect_experts(moe, group)
    expert_TK = torch.arange(tokens * choices).view(tokens, choices) % CONFIG.num_experts
    routing = Routing(expert_TK, torch.full((tokens, choices), 0.5), 0)
    x_TD = torch.randn(tokens, CONFIG.hidden_size, requires_grad=True)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    order: list[str] = []

    def noted(name: str, method: Callable) -> Callable:
        def call(*arguments, **options):
            order.append(name)
            return method(*arguments, **options)

        return call

    shared, text, vision = moe.shared_experts, moe.text.experts, moe.vision.experts
    shared.register_forward_hook(lambda *_: order.append("shared"))
    shared.down_proj.weight.register_hook(lambda _: order.append("shared"))
    text.register_forward_hook(lambda *_: order.append("experts"))
    text.gate_up_EFD.register_hook(lambda _: order.append("experts"))
    with (
        patch.object(dist, "all_to_all_single", calls := Calls(group)),
        patch.object(Trip, "start", noted("start", Trip.start)),
        patch.object(Trip, "finish", noted("finish", Trip.finish)),
    ):
        y_TD = route(x_TD, routing, text, vision, shared)
        order.append("backward")
        y_TD.sum().backward()
    return {
        "order": order,
        "sent": route.sent_bytes,
        "rows": calls.rows,
        "counts": calls.counts,
        "computed": route.computed_rows,
        "formula": 4 * tokens * choices * CONFIG.hidden_size * x_TD.element_size() * (size - 1) / size,
    }


def groups_of(size: int) -> dist.ProcessGroup:
    """Of neighbours. All ranks make all groups."""
    world, rank = dist.get_world_size(), dist.get_rank()
    made = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
    return made[rank // size]


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    results: dict = {}
    for size in (2, 4)[: world // 2]:
        group = groups_of(size)
        for name, case in CASES.items():
            print(f"{size}: {name}", flush=True)  # a test that fails shows where the ranks stood
            with patch.object(dist, "all_to_all_single", calls := Calls(group)):
                results[size, name] = run(case, list(case.rows[rank::world]), group)
            results[size, name]["calls"] = sum(calls.rows)
        results[size, "balanced"] = balanced(group)
        results[size, "waits"] = waits(group)
    torch.save(results, folder / f"rank-{rank}.pt")
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
