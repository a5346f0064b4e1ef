"""Who may look at whom: the drawing, the definition, and independence of the layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_model import context
from ernie_model.context import Packed, _plan_buckets
from ernie_model.tiles import tiled_attention

EXACT = dict(rtol=1e-11, atol=1e-11)


def by_definition(q, k, v, lengths, causal):
    """One query at a time, in float64."""
    out = torch.zeros_like(q)
    start, share = 0, q.shape[1] // k.shape[1]
    for length in lengths:
        for t in range(start, start + length):
            seen = slice(start, t + 1 if causal else start + length)
            for head in range(q.shape[1]):
                score = k[seen, head // share] @ q[t, head] * q.shape[-1] ** -0.5
                out[t, head] = score.softmax(0) @ v[seen, head // share]
        start += length
    return out


def qkv(tokens, heads=4, groups=2, width=6, seed=0):
    torch.manual_seed(seed)
    shapes = ((tokens, heads, width), (tokens, groups, width), (tokens, groups, width))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_the_drawing():
    """The docstring's 5 x 5 picture: with one-hot values, the output shows which rows were seen."""
    q, k = torch.zeros(5, 1, 5), torch.zeros(5, 1, 5)
    seen = Packed([3, 2]).attend(q, k, torch.eye(5)[:, None]) > 0
    assert seen[:, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("longest_tiled", [0, 2048], ids=["sdpa", "tiled"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(7,), (5, 5, 5), (3, 9, 3, 1), (17, 18, 40, 19, 2)])
def test_value_and_gradients_equal_the_definition(lengths, causal, longest_tiled, monkeypatch):
    monkeypatch.setattr(context, "LONGEST_TILED", longest_tiled)
    inputs = qkv(sum(lengths))
    mine, theirs = Packed(lengths, causal=causal).attend(*inputs), by_definition(*inputs, lengths, causal)
    torch.testing.assert_close(mine, theirs, **EXACT)
    upstream = torch.randn_like(mine)
    for a, b in zip(
        torch.autograd.grad(mine, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("rows, size", [(4, 200), (16, 10**9)], ids=["many small tiles", "few large ones"])
def test_tiles_do_not_show(rows, size, monkeypatch):
    """150 keys in tiles of 16 queries, split over heads and segments or not."""
    monkeypatch.setattr("ernie_model.tiles.TILE_ROWS", rows)
    monkeypatch.setattr("ernie_model.tiles.TILE_BYTES", size)
    inputs = qkv(150)
    mine = tiled_attention(*(x[None] for x in inputs), causal=True)[0]
    theirs = by_definition(*inputs, (150,), True)
    torch.testing.assert_close(mine, theirs, **EXACT)
    for a, b in zip(
        torch.autograd.grad(mine.square().sum(), inputs),
        torch.autograd.grad(theirs.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **EXACT)


@given(st.lists(st.integers(1, 70), min_size=1, max_size=12))
@settings(max_examples=25, deadline=None)
def test_every_row_has_one_place_and_padding_stays_small(lengths):
    plan = _plan_buckets(lengths, round_up=True)
    places = sum(bucket.segments * bucket.queries for bucket in plan.buckets)
    assert plan.keys is plan.queries
    if plan.queries is None:
        assert places == sum(lengths)
        return
    row_P, place_T, more = plan.queries
    assert row_P.shape == (places,) and not more
    assert row_P[place_T].tolist() == list(range(sum(lengths)))  # there and back
    assert places <= sum(-(-n // 8) * 8 for n in lengths) * 9 / 8 + 8


def test_bfloat16_stays_close_to_the_definition():
    """Products round to 2^-8; a weighted mean of values of size 1 keeps that: a few parts in a hundred at most."""
    inputs = [x.detach() for x in qkv(64)]
    mine = Packed([40, 24]).attend(*(x.bfloat16() for x in inputs))
    exact = by_definition(*(x.bfloat16().double() for x in inputs), (40, 24), True)
    assert mine.dtype == torch.bfloat16
    assert (mine.double() - exact).abs().max() <= 2**-8 * exact.abs().max() * 2


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_empty_segments_are_refused(lengths):
    with pytest.raises(ValueError, match="positive"):
        Packed(lengths)


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="the segments hold 4 tokens, the row 5"):
        Packed([4]).attend(*qkv(5))


@pytest.mark.parametrize("gqa_known", [True, False], ids=["torch 2.12", "torch 2.11"])
def test_the_gpu_kernel_is_called_with_arguments_it_takes(gqa_known, monkeypatch):
    """Without a GPU: fake CUDA tensors go through torch's own shape functions. Numbers are the gpu test's business."""
    from torch._subclasses import FakeTensorMode
    from torch.nn.attention import varlen

    if not gqa_known:
        real = varlen.varlen_attn
        monkeypatch.setattr(varlen, "varlen_attn", lambda q, k, v, a, b, m, n, *, window_size: real(
            q, k, v, a, b, m, n, window_size=window_size))  # fmt: skip
    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(10, 4, 64, dtype=torch.bfloat16, device="cuda")
        k = torch.empty(10, 2, 64, dtype=torch.bfloat16, device="cuda")
        assert Packed([6, 4]).attend(q, k, k).shape == (10, 4, 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("causal", [True, False])
def test_the_gpu_kernel_agrees_with_the_definition(causal):
    """bfloat16 rounds to 2^-8; see the CPU's test."""
    lengths, inputs = (40, 24, 7), [x.detach() for x in qkv(71, width=64)]
    mine = Packed(lengths, causal=causal).attend(*(x.bfloat16().cuda() for x in inputs)).double().cpu()
    exact = by_definition(*(x.bfloat16().double() for x in inputs), lengths, causal)
    assert (mine - exact).abs().max() <= 2**-8 * exact.abs().max() * 2
