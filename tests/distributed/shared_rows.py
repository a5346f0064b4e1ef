"""Rows that ranks share, alone and in the training loop; test_sequence.py runs them in one process and in several.

python -m tests.distributed.shared_rows OUT      with RANK, WORLD_SIZE, MASTER_ADDR, ... as a launcher sets them
"""

import dataclasses
import sys
from typing import NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator

from data.batch import PackedBatch
from data.encode import Example
from data.errors import DataError
from ernie_model.config import ErnieConfig
from ernie_model.distribution import Distribution
from ernie_model.model import ErnieModel
from ernie_model.recompute import recompute
from ernie_model.rope import Grid, num_media_tokens, position_ids
from tests.distributed.one_step import Catch
from tests.train import small
from train.config import ObjectiveConfig, ParallelConfig, PoolWeights
from train.efficiency import Work
from train.loop import train_step
from train.neftune import install
from train.objectives.sft import SFT
from train.parallel.layout import Layout, build_accelerator, leave, with_sequence_groups
from train.parallel.rows import SharedSource
from train.parallel.updates import Plain
from train.policy import Policy, on_device
from train.router import RouterLosses
from train.telemetry import SegmentLosses

CONFIG = small.CONFIG.replace(num_attention_heads=4, num_key_value_heads=2)
ONE_KEY = small.CONFIG.replace(num_attention_heads=4, num_key_value_heads=1)
DENSE = CONFIG.replace(
    num_experts=0, experts_per_token=0, text_expert_width=0, vision_expert_width=0, num_shared_experts=0,
    sparse_layers=(), vision=None, mrope_section=None, image_token_id=None, image_start_token_id=None,
    image_end_token_id=None, video_token_id=None, video_start_token_id=None, video_end_token_id=None,
)  # fmt: skip
IMAGE, WIDE, VIDEO = (1, 2, 4), (1, 4, 8), (6, 2, 4)  # 2, 8 and 6 tokens


def segment(seed: int, before: int, grid: Grid | None = None, after: int = 6, config: ErnieConfig = CONFIG) -> Example:
    """`before` text tokens, an image or video, `after` text tokens of which all but the first are learned."""
    generator = torch.Generator().manual_seed(seed)
    text_T = torch.randint(3, 40, (before + after,), generator=generator)
    media = [] if grid is None else [43] * num_media_tokens(grid) if grid[0] > 1 else [40] * num_media_tokens(grid)
    ends = [] if grid is None else [44, 45] if grid[0] > 1 else [41, 42]
    media_T = torch.tensor([*ends[:1], *media, *ends[1:]], dtype=torch.int64)
    token_T = torch.cat([text_T[:before], media_T, text_T[before:]])
    weight_T = torch.zeros(len(token_T))
    weight_T[len(token_T) - after : -1] = torch.rand(after - 1, generator=generator) + 0.5
    grids = () if grid is None else (grid,)
    return Example(
        id=f"{seed}",
        token_T=token_T,
        target_T=torch.cat([token_T[1:], token_T.new_zeros(1)]),
        weight_T=weight_T,
        position_3T=position_ids(token_T, grids, config),
        grids=grids,
        patch_PX=None if grid is None else torch.randn(grid[0] * grid[1] * grid[2], 588, generator=generator),
    )


def answers(seed: int, before: int, grid: Grid | None = None) -> Example:
    """`segment`, and once more with other last words; what they have in common is there once."""
    one = segment(seed, before, grid, 8)
    token_T = torch.cat([one.token_T[:-5], one.token_T[-5:].flip(0)])
    other = dataclasses.replace(one, token_T=token_T, target_T=torch.cat([token_T[1:], token_T.new_zeros(1)]))
    weight_T = one.weight_T.where(torch.arange(len(token_T)) >= len(token_T) - 6, 0.0)
    pair = (dataclasses.replace(x, weight_T=weight_T) for x in (one, other))
    return small.branches(*pair, prompt=len(token_T) - 5, items=len(one.grids))


class Case(NamedTuple):
    segments: list[Example]
    config: ErnieConfig = CONFIG
    recompute: bool = False
    noise: float = 0.0
    linear: bool = True
    distribution: Distribution | None = None
    """Of the targets; then the loss holds their entropies, too."""
    replays: bool = False
    """Tokens are told which experts to visit, most of them."""


CASES = {
    "a segment over the cut": Case([segment(0, 3), segment(1, 12), segment(2, 2)]),
    "an image over the cut": Case([segment(0, 5, WIDE)]),
    "a video over the cut, dealt by pairs of frames": Case([segment(0, 1), segment(1, 3, VIDEO), segment(2, 1)]),
    "images and a video": Case([segment(0, 2, IMAGE), segment(1, 1, WIDE), segment(2, 7, VIDEO, 3), segment(3, 4)]),
    "all images at the end": Case([segment(0, 20, None, 9), segment(1, 0, IMAGE, 4), segment(2, 0, IMAGE, 4)]),
    "one image at the beginning": Case([segment(0, 1, IMAGE, 3), segment(1, 25)]),
    "fewer tokens than ranks": Case([segment(0, 1, None, 2)]),
    "one key head": Case([segment(0, 2, WIDE), segment(1, 9)], config=ONE_KEY),
    "no experts and no images": Case([segment(0, 8, config=DENSE), segment(1, 11, config=DENSE)], config=DENSE),
    "recomputed": Case([segment(0, 2, WIDE), segment(1, 3, VIDEO), segment(2, 4)], recompute=True),
    "noise on embeddings": Case([segment(0, 2, WIDE), segment(1, 9), segment(2, 5)], noise=5.0),
    "a loss whose slope is not known": Case([segment(0, 2, WIDE), segment(1, 9)], linear=False),
    "answers that share a prompt over the cut": Case([answers(0, 2, WIDE)], linear=False),
    "pairs beside a conversation, recomputed": Case(
        [answers(0, 9), segment(1, 3, IMAGE), answers(2, 1, VIDEO)], linear=False, recompute=True
    ),
    "sampled, with entropies": Case(
        [answers(0, 2, WIDE), segment(1, 9)], linear=False,
        distribution=Distribution(temperature=0.7, top_p=0.9, banned_ids=(40, 41, 42)),
    ),
    "experts replayed, recomputed": Case(
        [answers(0, 2, WIDE), segment(1, 9)], linear=False, recompute=True, replays=True
    ),
}  # fmt: skip


def one_row(case: Case, group: dist.ProcessGroup | None = None) -> dict:
    """Gradients and sums are those of this rank."""
    torch.manual_seed(0)
    policy = Policy(
        ErnieModel(case.config).set_dtype(torch.float64),
        loss_is_linear=case.linear,
        sequence_group=group,
        distribution=case.distribution,
        wants_entropy=case.distribution is not None,
        wants_experts=True,
    ).train()
    if case.recompute:
        policy.model.run_layer = recompute
        assert policy.model.vision is not None
        policy.model.vision.run_block = recompute
    if case.noise:
        install(policy, case.noise, seed=3, step=lambda: 7)
    batch = small.in_double(small.row(*case.segments))
    if case.replays:
        batch = small.replaying(batch, case.config, unknown=0.2)
    batch, row_R = on_device(batch, torch.device("cpu"), group)
    output = policy(batch, row_R)
    total = -(output.logprob_T * batch.weight_T).sum() if case.linear else pairs(output.logprob_T, batch)
    if output.entropy_T is not None:
        total = total + (output.entropy_T * batch.weight_T).sum()
    if output.router is not None:
        total = total + output.router.square_2.sum()  # losses of routers are sums over this rank's tokens
    total.backward()
    return {
        "gradients": {name: None if p.grad is None else p.grad for name, p in policy.named_parameters()},
        "logprob_T": output.logprob_T.detach(),
        "correct_T": output.correct_T,
        "entropy_T": None if output.entropy_T is None else output.entropy_T.detach(),
        "router": None if output.router is None else list(output.router.detach()),
        "chosen_LTK": output.chosen_LTK,
        "patches": 0 if batch.patch_PX is None else batch.patch_PX.shape[0],
    }


def pairs(logprob_T: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """A loss of neighbouring segments: no sum over tokens, so every rank needs the log-probabilities of all of them."""
    sum_S = logprob_T.new_zeros(batch.num_segments).index_add(0, batch.segment_T, logprob_T * batch.weight_T)
    return torch.sigmoid(sum_S[1:] - sum_S[:-1]).sum()


# ------------------------------------------------------------------------------------------------------- in the loop

ROUTERS = ObjectiveConfig(
    balance=PoolWeights(0.3, 0.7), z_loss=PoolWeights(0.2, 0.05), orthogonal=PoolWeights(0.11, 0.13), bias_update=1e-3
)
Z_LOSS = ObjectiveConfig(z_loss=PoolWeights(0.2, 0.05))
ROWS = {
    "wide": small.row(segment(0, 5, WIDE), segment(1, 4)),
    "text": small.row(segment(2, 11), segment(3, 2)),
    "video": small.row(segment(4, 1), segment(5, 3, VIDEO), segment(6, 1)),
    "image": small.row(segment(7, 9, None, 9), segment(8, 0, IMAGE, 4)),
}


class Step(NamedTuple):
    rows: list[str]
    """Micro-batches of one process; those of two groups of ranks are every other one."""
    objective: ObjectiveConfig = ObjectiveConfig()
    recompute: bool = False


STEPS = {
    "two rows": Step(["wide", "text"]),
    "four rows, recomputed": Step(["wide", "video", "text", "image"], recompute=True),
    "nobody has an image": Step(["text", "text"]),
    "router losses, counted beforehand": Step(["wide", "text", "video", "image"], ROUTERS),
    "z loss": Step(["video", "text"], Z_LOSS),
}


def one_step(accelerator: Accelerator, layout: Layout, step: Step) -> dict:
    """An update, whose gradients and numbers are those of all ranks."""
    torch.manual_seed(0)
    policy = Policy(
        ErnieModel(CONFIG).set_dtype(torch.float64), loss_is_linear=True, sequence_group=layout.sequence_group
    )
    if step.recompute:
        policy.model.run_layer = recompute
    optimizer = Catch(policy.parameters(), lr=1.0)
    updates = Plain(policy, optimizer, accelerator, layout)
    updates.policy.train()
    mine = [small.in_double(ROWS[name]) for name in step.rows[layout.data_rank :: layout.data_world]]
    source = SharedSource(Once(mine if layout.sequence_rank == 0 else None), layout, accelerator.device)
    beside = [
        RouterLosses(policy, step.objective, accelerator, layout),
        Work(policy.model, CONFIG, accelerator.device, sequence=layout.sequence),
        SegmentLosses(CONFIG, [], accelerator.device),
    ]
    metrics = train_step(updates, SFT, source.next_step(), accelerator=accelerator, max_grad_norm=1e9, beside=beside)
    return {
        "gradients": {name: g for (name, _), g in zip(policy.named_parameters(), optimizer.caught, strict=True)},
        "metrics": metrics,
        "biases": {name: b.clone() for name, b in policy.named_buffers() if "correction_bias" in name},
    }


class Once:
    """A source of one update, or one that must not be asked."""

    def __init__(self, rows: list[PackedBatch] | None):
        self.rows = rows

    def next_step(self) -> list[PackedBatch]:
        assert self.rows is not None, "only the first rank of a group reads"
        return self.rows

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None: ...


class Broken(Once):
    def next_step(self) -> list[PackedBatch]:
        raise DataError("too many bad records")


def what_a_broken_source_says(layout: Layout) -> str:
    try:
        SharedSource(Broken(None), layout, torch.device("cpu")).next_step()
    except DataError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    accelerator = build_accelerator(ParallelConfig(cpu=True))
    world = accelerator.num_processes
    everyone = with_sequence_groups(Layout(rank=accelerator.process_index, world=world), world)
    pairs_of_ranks = with_sequence_groups(Layout(rank=accelerator.process_index, world=world), 2)
    assert everyone.sequence_group is not None
    results = {name: one_row(case, everyone.sequence_group) for name, case in CASES.items()}
    results |= {name: one_step(accelerator, pairs_of_ranks, step) for name, step in STEPS.items()}
    results["error"] = what_a_broken_source_says(pairs_of_ranks)
    torch.save(results, f"{sys.argv[1]}.{accelerator.process_index}")
    leave()
