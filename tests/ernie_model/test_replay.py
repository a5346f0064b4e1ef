"""Router replay: tokens visit the experts they are told to, with weights and gradients of the routers that train."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.batch import PackedBatch
from ernie_model.config import ErnieConfig
from ernie_model.context import Packed
from ernie_model.model import ErnieModel, ModelOutput
from ernie_model.moe import MoE, Pools
from ernie_model.recompute import Runner, keep_activations, recompute, recompute_offload
from tests.ernie_model.test_moe import make_moe
from tests.train import small

CONFIG = small.CONFIG.replace(num_experts=6, num_hidden_layers=3, sparse_layers=(0, 2))
TALK, PICTURE = small.example(1, 8), small.example(0, 9, image=True)
ROW = small.row(PICTURE, TALK)
BRANCHES = small.row(
    small.branches(PICTURE, dataclasses.replace(PICTURE, token_T=PICTURE.token_T.roll(0)), prompt=6, items=1), TALK
)


def choose(moe: MoE, x_TD: Tensor, vision: tuple[int, ...], replay: list[list[int]] | None):
    given = None if replay is None else torch.tensor(replay, dtype=torch.int16)
    return moe.choose(x_TD, Pools(torch.tensor(vision).bool(), sum(vision), replay_TK=given))


def test_weights_and_gradient_by_hand():
    """Logits 2, 1, .9, -1 and a bias that makes {0, 2} of {0, 1}; {0, 3} are replayed."""
    moe, x = make_moe(vision_width=0), torch.zeros(1, 8, dtype=torch.float64)
    x[0, 0] = 1
    with torch.no_grad():
        moe.text.router.weight_ED[:, 0] = torch.tensor([2, 1, 0.9, -1], dtype=torch.float64)
        moe.text.router.correction_bias_E.copy_(torch.tensor([0, -0.2, 0, 0]))
    free, _ = choose(moe, x, (0,), None)
    assert free.expert_TK.tolist() == [[0, 2]]
    torch.testing.assert_close(free.weight_TK[0].tolist(), [0.7502601056, 0.2497398944], rtol=0, atol=1e-10)
    replayed, stats = choose(moe, x, (0,), [[0, 3]])
    assert replayed.expert_TK.tolist() == [[0, 3]]
    torch.testing.assert_close(replayed.weight_TK[0].tolist(), [0.9525741268, 0.0474258732], rtol=0, atol=1e-10)
    (grad,) = torch.autograd.grad(replayed.weight_TK[0, 0], moe.text.router.weight_ED)
    torch.testing.assert_close(grad[:, 0].tolist(), [0.0451766598, 0.0, 0.0, -0.0451766598], rtol=0, atol=1e-10)
    assert stats is not None and stats.count_2E[0].tolist() == [1, 0, 0, 1]
    assert stats.preferred_2E[0].tolist() == [1, 1, 0, 0]


def test_the_layer_by_definition():
    """Both pools, one token that nothing is known of: values, and gradients of everything, routers included."""
    moe, x = make_moe(), torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    vision, replay = (0, 1, 0, 1), [[3, 1], [4, 7], [-1, -1], [6, 5]]
    own = moe.text.router(x[2]).softmax(-1) + moe.text.router.correction_bias_E
    told = [[3, 1], [0, 3], own.topk(2).indices.tolist(), [2, 1]]
    pools = Pools(torch.tensor(vision).bool(), 2, replay_TK=torch.tensor(replay, dtype=torch.int16))
    mine, _ = moe(x, pools)

    assert moe.vision is not None and moe.shared_experts is not None
    rows = []
    for row, is_vision, experts in zip(x, vision, told, strict=True):
        pool = moe.vision if is_vision else moe.text
        gate = (pool.router.weight_ED @ row)[experts].softmax(0)
        y = moe.shared_experts(row[None])[0]
        for weight, e in zip(gate, experts, strict=True):
            gated, up = (pool.experts.gate_up_EFD[e] @ row).chunk(2)
            y = y + weight * (pool.experts.down_EDF[e] @ (F.silu(gated) * up))
        rows.append(y)
    theirs = torch.stack(rows)
    torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)
    learned, upstream = [x, *moe.parameters()], torch.randn_like(mine)
    for a, b in zip(
        torch.autograd.grad(mine, learned, upstream), torch.autograd.grad(theirs, learned, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


# ----------------------------------------------------------------------------------------------------- the whole model


def build(run: Runner = keep_activations, *, compute_dtype: torch.dtype | None = None) -> ErnieModel:
    torch.manual_seed(0)
    model = ErnieModel(CONFIG, compute_dtype=compute_dtype)
    model.run_layer = run
    return model


def forward(model: ErnieModel, row: PackedBatch, **options: Any) -> ModelOutput:
    context = Packed(row.lengths, stems=row.stems)
    return model(
        row.token_T, row.position_3T, context, patch_PX=row.patch_PX, grids=row.grids, experts=True,
        replay_TLK=row.expert_TLK, **options,
    )  # fmt: skip


def results(model: ErnieModel, row: PackedBatch) -> dict[str, Tensor]:
    """Everything that one forward and backward pass says."""
    out = forward(model, row)
    (out.hidden_TD.float() @ model.head_VD.T).logsumexp(-1).sum().backward()
    assert out.expert_LTK is not None and out.router is not None
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"hidden": out.hidden_TD, "experts": out.expert_LTK, **out.router._asdict(), **grads}


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("row", [ROW, BRANCHES], ids=["packed", "branches"])
def test_replaying_its_own_experts_changes_no_bit(row, compute_dtype):
    free = results(build(compute_dtype=compute_dtype), row)
    own = dataclasses.replace(row, expert_TLK=free["experts"].transpose(0, 1).to(torch.int16))
    again = results(build(compute_dtype=compute_dtype), own)
    assert free.keys() == again.keys() and all(torch.equal(free[name], again[name]) for name in free)


@pytest.mark.parametrize("unknown", [0.0, 0.4])
def test_tokens_go_where_they_are_told(unknown):
    row = small.replaying(ROW, CONFIG, unknown=unknown)
    assert row.expert_TLK is not None
    told_LTK = row.expert_TLK.transpose(0, 1).long()
    out, free = forward(build(), row), forward(build(), ROW)
    assert out.expert_LTK is not None and out.chosen_LTK is not None and out.router is not None
    assert free.chosen_LTK is None and free.expert_LTK is not None
    known = told_LTK >= 0
    assert torch.equal(out.expert_LTK, torch.where(known, told_LTK, out.chosen_LTK))
    assert bool((~known).any()) == bool(unknown)
    # The first sparse layer has the same input in both, so its routers choose alike.
    assert torch.equal(out.chosen_LTK[0], free.expert_LTK[0]) and not torch.equal(out.expert_LTK[0], free.expert_LTK[0])
    count_LX = torch.stack([one.flatten().bincount(minlength=12) for one in out.expert_LTK])
    assert torch.equal(out.router.count_2E.flatten(1).long(), count_LX)


def test_a_packed_row_is_its_segments():
    row = small.replaying(ROW, CONFIG, unknown=0.2)
    assert row.expert_TLK is not None
    whole = forward(build(), row).hidden_TD
    for segment, experts, hidden in zip(
        (PICTURE, TALK), row.expert_TLK.split(row.lengths), whole.split(row.lengths), strict=True
    ):
        alone = dataclasses.replace(small.row(segment), expert_TLK=experts)
        torch.testing.assert_close(forward(build(), alone).hidden_TD, hidden, rtol=0, atol=1e-5)


def test_branches_are_whole_conversations():
    """The stem's experts are those of the prompt in each; the prompt's last token is told again in every branch."""
    wholes = small.example(3, 12), small.example(3, 12)
    wholes[1].token_T[8:] = wholes[1].token_T[8:].flip(0)
    experts = [small.some_experts(whole.token_T, CONFIG, seed) for seed, whole in enumerate(wholes)]
    experts[1][:8] = experts[0][:8]
    row = small.row(small.branches(*wholes, prompt=8))
    told = torch.cat([experts[0][:7], experts[0][7:], experts[1][7:]])
    hidden = forward(build(), dataclasses.replace(row, expert_TLK=told)).hidden_TD.split(row.lengths)
    for branch, (whole, own) in enumerate(zip(wholes, experts, strict=True)):
        alone = forward(build(), dataclasses.replace(small.row(whole), expert_TLK=own)).hidden_TD
        torch.testing.assert_close(alone, torch.cat([hidden[0], hidden[1 + branch]]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("run", [recompute, recompute_offload])
@pytest.mark.parametrize("replayed", [False, True])
def test_what_is_computed_again_visits_the_same_experts(run, replayed):
    row = small.replaying(ROW, CONFIG, unknown=0.3) if replayed else ROW
    kept, again = results(build(), row), results(build(run), row)
    assert kept.keys() == again.keys() and all(torch.equal(kept[name], again[name]) for name in kept)


# ------------------------------------------------------------------------------------------------------ what cannot be


def told(**changes: int) -> Tensor:
    """The row's first token is the start of an image, its last a text token."""
    experts = small.some_experts(ROW.token_T, CONFIG)
    for place, expert in changes.items():
        token, layer, choice = {"first": (0, 0, 0), "last": (16, 1, 1), "last_too": (16, 1, 0)}[place]
        experts[token, layer, choice] = expert
    return experts


@pytest.mark.parametrize(
    "experts, says",
    [
        (
            told(first=2),
            r"token 0, of the vision pool, is to visit experts \[2, \d+\] in sparse layer 0; .* from 6 to 11",
        ),
        (told(last=6), r"token 16, of the text pool, is to visit experts \[\d, 6\] in sparse layer 1; .* from 0 to 5"),
        (told(first=12), "token 0, of the vision pool"),
        (told(last=-1), "token 16, of the text pool"),
        (told(last=-2, last_too=-2), "token 16, of the text pool"),
        (told(last=3, last_too=3), r"experts \[3, 3\] in sparse layer 1; they must be 2 different ones"),
        (told()[:-1], r"experts to replay come as \(16, 2, 2\); this row has \(T, L, K\) = \(17, 2, 2\)"),
        (told()[:, :1], r"\(17, 1, 2\)"),
    ],
)
def test_experts_that_cannot_be_visited_are_named(experts, says):
    with pytest.raises(ValueError, match=says):
        forward(build(), dataclasses.replace(ROW, expert_TLK=experts))


def test_a_model_without_experts_has_none_to_replay():
    dense = ErnieConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=24,
    )  # fmt: skip
    row, model = small.row(TALK), ErnieModel(dense)
    empty = dataclasses.replace(row, expert_TLK=torch.empty(row.num_tokens, 0, 0, dtype=torch.int16))
    assert torch.equal(forward(model, empty).hidden_TD, forward(model, row).hidden_TD)
    with pytest.raises(ValueError, match=r"\(T, L, K\) = \(8, 0, 0\)"):
        forward(model, dataclasses.replace(row, expert_TLK=small.some_experts(row.token_T, CONFIG)))
