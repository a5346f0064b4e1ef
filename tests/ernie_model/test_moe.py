"""Two pools of experts: the layout by hand, the layer by definition, statistics, and what must not matter."""

import math

import pytest
import torch
import torch.nn.functional as F

from ernie_model.config import ErnieConfig
from ernie_model.moe import MoE, Pools, Routing, combine, dispatch, grouped_linear, sort_by_expert

EXACT = dict(rtol=1e-11, atol=1e-11)
NO_WEIGHT = torch.zeros(3, 2)


def make_moe(*, vision_width=3, experts=4, top_k=2, shared=1, seed=0) -> MoE:
    torch.manual_seed(seed)
    config = ErnieConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=8,
        intermediate_size=8, num_experts=experts, experts_per_token=top_k, text_expert_width=5,
        vision_expert_width=vision_width, num_shared_experts=shared, sparse_layers=(0,),
    )  # fmt: skip
    moe = MoE(config)
    for tensor in moe.state_dict().values():
        torch.nn.init.normal_(tensor, std=0.5)
    return moe.double()


def pools(*vision: int) -> Pools:
    return Pools(torch.tensor(vision).bool(), sum(vision))


def test_rows_are_grouped_by_expert_and_keep_token_order():
    expert_TK = torch.tensor([[2, 0], [1, 2], [0, 2]])
    rows = sort_by_expert(Routing(expert_TK, NO_WEIGHT, 0), num_experts=4)
    #                 expert:        0  0   1   2  2  2
    assert rows.token_R.tolist() == [0, 2, 1, 0, 1, 2]
    assert rows.place_TK.tolist() == [[3, 0], [2, 4], [1, 5]]
    assert rows.count_X.tolist() == [2, 1, 3, 0]  # an expert may get nothing
    assert rows.num_text == 6


def test_vision_rows_come_last():
    """The docstring's picture: tokens a, b, [img], c with K = 2 and E = 4."""
    expert_TK = torch.tensor([[2, 0], [3, 1], [6, 5], [3, 1]])
    rows = sort_by_expert(Routing(expert_TK, torch.zeros(4, 2), 1), num_experts=8)
    #        expert:                 0  1  1  2  3  3  5  6
    assert rows.token_R.tolist() == [0, 1, 3, 0, 1, 3, 2, 2]
    assert rows.num_text == 6


def test_padding_fills_each_expert_to_a_multiple():
    expert_TK = torch.tensor([[2, 0], [1, 2], [0, 2]])
    rows = sort_by_expert(Routing(expert_TK, NO_WEIGHT, 0), num_experts=4, multiple=4)
    #                 expert:        0  0  .  .  1  .  .  .  2  2  2  .
    assert rows.token_R.tolist() == [0, 2, 0, 0, 1, 0, 0, 0, 0, 1, 2, 0]
    assert rows.count_X.tolist() == [4, 4, 4, 0]
    assert rows.place_TK.tolist() == [[8, 0], [4, 9], [1, 10]]


@pytest.mark.parametrize("multiple", [1, 4])
def test_dispatch_then_combine_is_the_weighted_sum_and_padding_has_no_gradient(multiple):
    expert_TK = torch.tensor([[2, 0], [1, 2], [0, 2]])
    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    rows = sort_by_expert(Routing(expert_TK, weight, 0), num_experts=4, multiple=multiple)
    mine = combine(dispatch(x, rows), weight, rows)
    plain = x * weight.sum(1, keepdim=True)
    torch.testing.assert_close(mine, plain, **EXACT)
    upstream = torch.randn_like(plain)
    for a, b in zip(
        torch.autograd.grad(mine, (x, weight), upstream), torch.autograd.grad(plain, (x, weight), upstream), strict=True
    ):
        torch.testing.assert_close(a, b, **EXACT)


def by_definition(moe: MoE, x_TD, vision_T):
    """Token by token, as slowly and plainly as possible."""
    out = []
    for x, vision in zip(x_TD, vision_T, strict=True):
        pool = moe.vision if vision else moe.text
        prob = (pool.router.weight_ED @ x).softmax(0)
        chosen = (prob + pool.router.correction_bias_E).topk(moe.experts_per_token).indices
        y = moe.shared_experts(x[None])[0] if moe.shared_experts is not None else torch.zeros_like(x)
        for e in chosen:
            gate, up = (pool.experts.gate_up_EFD[e] @ x).chunk(2)
            y = y + prob[e] / prob[chosen].sum() * (pool.experts.down_EDF[e] @ (F.silu(gate) * up))
        out.append(y)
    return torch.stack(out)


@pytest.mark.parametrize("vision", [(0, 0, 0, 0, 0), (1, 1, 1, 1, 1), (0, 1, 1, 0, 1)], ids=["text", "vision", "both"])
@pytest.mark.parametrize("shared, top_k", [(1, 2), (0, 3)])
def test_the_layer_equals_the_formula_token_by_token(vision, shared, top_k):
    moe, x = make_moe(shared=shared, top_k=top_k), torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    mine, stats = moe(x, pools(*vision))
    theirs = by_definition(moe, x, vision)
    torch.testing.assert_close(mine, theirs, **EXACT)
    assert stats.token_2.tolist() == [vision.count(0), vision.count(1)]
    assert stats.count_2E.sum(1).tolist() == [vision.count(0) * top_k, vision.count(1) * top_k]

    params = [x, *moe.parameters()]
    upstream = torch.randn_like(mine)
    pairs = zip(
        torch.autograd.grad(mine, params, upstream, allow_unused=True),
        torch.autograd.grad(theirs, params, upstream, allow_unused=True),
        strict=True,
    )
    for a, b in pairs:
        nothing = torch.zeros(())
        torch.testing.assert_close(
            nothing if a is None else a.sum(), nothing if b is None else b.sum(), check_dtype=False
        )
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, **EXACT)


def test_order_of_tokens_does_not_matter():
    moe, x = make_moe(), torch.randn(6, 8, dtype=torch.float64)
    vision = torch.tensor([0, 1, 1, 0, 0, 1])
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    y, _ = moe(x, Pools(vision.bool(), 3))
    shuffled, _ = moe(x[order], Pools(vision[order].bool(), 3))
    torch.testing.assert_close(y[order], shuffled, **EXACT)


def test_the_bias_decides_who_is_chosen_but_not_how_much_it_counts():
    moe, x = make_moe(top_k=1, shared=0), torch.randn(1, 8, dtype=torch.float64)
    moe.text.router.correction_bias_E.copy_(torch.tensor([0.0, 0.0, 0.0, 10.0]))
    routing, _ = moe.choose(x, pools(0))
    assert routing.expert_TK.tolist() == [[3]] and routing.weight_TK.tolist() == [[1.0]]


def test_statistics_by_hand():
    """Logits (log 3, 0): probabilities 3/4, 1/4; entropy log 4 - 3/4 log 3; logsumexp log 4."""
    moe = make_moe(experts=2, top_k=1)
    for pool in (moe.text, moe.vision):
        assert pool is not None
        pool.router.weight_ED.data.zero_()
        pool.router.correction_bias_E.zero_()
    moe.text.router.weight_ED.data[0, 0] = torch.tensor(3.0).log()
    x = torch.zeros(3, 8, dtype=torch.float64)
    x[:, 0] = 1
    _, stats = moe.choose(x, pools(0, 0, 1))
    log = math.log

    def equal(found, expected):
        # the logarithm of 3 was rounded to float32
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)

    equal(stats.prob_2E, [[1.5, 0.5], [0.5, 0.5]])
    equal(stats.entropy_2, [2 * (log(4) - 0.75 * log(3)), log(2)])
    equal(stats.square_2, [2 * log(4) ** 2, log(2) ** 2])
    assert stats.token_2.tolist() == [2, 1]
    assert stats.count_2E[0].tolist() == [2, 0]


def test_the_bias_moves_choices_but_not_preferences():
    moe, x = make_moe(top_k=1, shared=0), torch.randn(5, 8, dtype=torch.float64)
    moe.text.router.correction_bias_E.copy_(torch.tensor([0.0, 0.0, 0.0, 10.0]))
    _, stats = moe.choose(x, pools(0, 0, 0, 0, 0))
    best_T = (x @ moe.text.router.weight_ED.T).argmax(1)
    assert stats.count_2E[0].tolist() == [0, 0, 0, 5]
    assert stats.preferred_2E[0].tolist() == torch.bincount(best_T, minlength=4).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_product_equals_one_product_per_expert(dtype):
    """Expert 1 gets no rows; widths of 16 bytes go through grouped_mm, others through the loop."""
    torch.manual_seed(0)
    count = torch.tensor([3, 0, 5])
    for width in (8, 7):
        x = torch.randn(8, width, dtype=dtype, requires_grad=True)
        weight = torch.randn(3, 16, width, dtype=dtype, requires_grad=True)
        mine = grouped_linear(x, weight, count)
        plain = torch.cat([x[:3] @ weight[0].T, x[3:] @ weight[2].T])
        # sums of 8 products: a few roundings of the dtype
        close = dict(rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
        torch.testing.assert_close(mine, plain, **close)
        upstream = torch.randn_like(plain)
        for a, b in zip(
            torch.autograd.grad(mine, (x, weight), upstream, retain_graph=True),
            torch.autograd.grad(plain, (x, weight), upstream),
            strict=True,
        ):
            torch.testing.assert_close(a, b, **close)
        assert torch.autograd.grad(mine, weight, upstream)[0][1].abs().sum() == 0


def test_low_precision_pads_rows_and_padding_reaches_no_gradient(monkeypatch):
    """bfloat16 on the CPU: rows padded to multiples of 32 against no padding, output and every gradient.

    Sums of up to 50 products in another order: a few roundings of 2^-8 of the largest term.
    """
    moe, x = make_moe().float(), torch.randn(50, 8)
    vision = pools(*([0] * 30 + [1] * 20))
    results = []
    for multiple in (32, 1):
        monkeypatch.setattr("ernie_model.moe.CPU_ROWS", multiple)
        moe.zero_grad()
        y, _ = moe(x.bfloat16(), vision)
        y.float().square().sum().backward()
        results.append([y, *(p.grad for p in moe.parameters())])
    for padded, plain in zip(*results, strict=True):
        assert (padded - plain).abs().max() <= 2**-6 * plain.abs().max()
