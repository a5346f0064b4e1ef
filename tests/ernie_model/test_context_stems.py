"""Branches that share a stem: the drawing, the definition, and the kernel of a GPU by its definition on the CPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_model import context
from ernie_model.context import CALL, Packed, _plan_buckets
from ernie_model.tiles import tiled_attention
from tests.ernie_model.test_context import EXACT, qkv

ROWS = {
    "the drawing": ([2, 2, 2], [-1, 0, 0]),
    "a pair of answers of one token": ([1, 1, 1], [-1, 0, 0]),
    "pairs beside whole conversations": ([9, 5, 3, 14, 20, 7, 7, 11], [-1, 0, 0, -1, -1, 4, 4, -1]),
    "one answer, and four": ([6, 4, 12, 3, 5, 8, 2], [-1, 0, -1, 2, 2, 2, 2]),
    "stems first, branches in another order": ([5, 8, 3, 4, 6, 2], [-1, -1, 1, 0, 1, 0]),
    "of very different lengths": ([70, 2, 33, 3, 41, 2], [-1, 0, 0, -1, 3, 3]),
}


def by_definition(q, k, v, lengths, stems):
    """One query at a time, in float64."""
    starts = [sum(lengths[:segment]) for segment in range(len(lengths))]
    out, share = [], q.shape[1] // k.shape[1]
    for start, length, stem in zip(starts, lengths, stems, strict=True):
        before = [] if stem < 0 else list(range(starts[stem], starts[stem] + lengths[stem]))
        for t in range(start, start + length):
            seen = [*before, *range(start, t + 1)]
            keys, values = (x[seen].repeat_interleave(share, dim=1) for x in (k, v))
            prob = torch.einsum("snh,nh->sn", keys, q[t] * q.shape[-1] ** -0.5).softmax(0)
            out.append(torch.einsum("sn,snh->nh", prob, values))
    return torch.stack(out)


def assert_equal(mine, theirs, inputs):
    torch.testing.assert_close(mine, theirs, **EXACT)
    upstream = torch.randn_like(mine)
    pairs = (torch.autograd.grad(y, inputs, upstream, retain_graph=True) for y in (mine, theirs))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_the_drawing():
    """With one-hot values, the output shows which rows were seen."""
    q, k = torch.zeros(6, 1, 6), torch.zeros(6, 1, 6)
    seen = Packed([2, 2, 2], stems=[-1, 0, 0]).attend(q, k, torch.eye(6)[:, None]) > 0
    assert seen[:, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("call", [0, CALL], ids=["a bucket for every size", "few buckets"])
@pytest.mark.parametrize("kept", [0, 512], ids=["probabilities made again", "probabilities kept"])
@pytest.mark.parametrize("row", ROWS)
def test_value_and_gradients_equal_the_definition(row, kept, call, monkeypatch):
    monkeypatch.setattr("ernie_model.tiles.LONGEST_KEPT", kept)
    monkeypatch.setattr(context, "CALL", call)
    lengths, stems = ROWS[row]
    inputs = qkv(sum(lengths))
    assert_equal(Packed(lengths, stems=stems).attend(*inputs), by_definition(*inputs, lengths, stems), inputs)


def test_tiles_do_not_show(monkeypatch):
    """Tiles of 16 queries, one segment and key head at a time."""
    monkeypatch.setattr("ernie_model.tiles.TILE_ROWS", 16)
    monkeypatch.setattr("ernie_model.tiles.TILE_BYTES", 200)
    lengths, stems = [30, 40, 35, 20, 37], [-1, 0, 0, -1, 3]
    inputs = qkv(sum(lengths))
    assert_equal(Packed(lengths, stems=stems).attend(*inputs), by_definition(*inputs, lengths, stems), inputs)


def test_segments_beyond_the_longest_that_are_tiled(monkeypatch):
    """Torch's kernel has the stem and the conversation, tiles have the branches."""
    monkeypatch.setattr(context, "LONGEST_TILED", 0)
    lengths, stems = ROWS["pairs beside whole conversations"]
    inputs = qkv(sum(lengths))
    assert_equal(Packed(lengths, stems=stems).attend(*inputs), by_definition(*inputs, lengths, stems), inputs)


def test_finite_differences():
    lengths, stems = [3, 2, 4, 2], [-1, 0, 0, -1]
    packed = Packed(lengths, stems=stems)
    assert torch.autograd.gradcheck(packed.attend, qkv(11, heads=2, groups=1, width=3))


def test_no_stem_is_the_row_as_ever():
    inputs = qkv(20)
    assert Packed([12, 8], stems=[-1, -1]).stems == ()
    assert torch.equal(Packed([12, 8], stems=[-1, -1]).attend(*inputs), Packed([12, 8]).attend(*inputs))


@st.composite
def rows(draw):
    lengths, stems = [], []
    for _ in range(draw(st.integers(1, 6))):
        stem = len(lengths)
        branches = draw(st.integers(0, 4))
        lengths += draw(st.lists(st.integers(1, 300), min_size=1 + branches, max_size=1 + branches))
        stems += [-1] + [stem] * branches
    return lengths, stems


@given(rows())
@settings(max_examples=25, deadline=None)
def test_padding_of_branches_stays_small_and_every_key_has_its_places(row):
    lengths, stems = row
    plan = _plan_buckets(lengths, stems, round_up=True)
    if plan.queries is None:
        return
    assert plan.queries.row_P[plan.queries.place_T].tolist() == list(range(sum(lengths)))
    assert plan.keys is not None and plan.keys.row_P[plan.keys.place_T].tolist() == list(range(sum(lengths)))
    for row_R, place_R in plan.keys.more:
        assert torch.equal(plan.keys.row_P[place_R], row_R) and len(row_R.unique()) == len(row_R)
    branches = [bucket for bucket in plan.buckets if bucket.keys > bucket.queries]
    exact = sum(n * (lengths[s] + n) for n, s in zip(lengths, stems, strict=True) if s >= 0)
    padded = sum(bucket.segments * bucket.queries * bucket.keys for bucket in branches)
    assert padded <= exact * 9 / 8 + len(branches) * CALL
    assert sum(bucket.segments for bucket in branches) == sum(stem >= 0 for stem in stems)


def test_gradients_of_a_stem_add_up_in_the_wide_dtype():
    """300 branches of one token, each a gradient of 1 to the values of the stem: bfloat16 sums stop at 256."""
    v = torch.zeros(301, 1, 8, dtype=torch.bfloat16, requires_grad=True)
    q, k = torch.zeros(301, 1, 8, dtype=torch.bfloat16), torch.zeros(301, 1, 8, dtype=torch.bfloat16)
    y = Packed([1] + [1] * 300, stems=[-1] + [0] * 300).attend(q, k, v)
    (grad,) = torch.autograd.grad(2 * y[1:].sum(), v)
    assert grad[0].unique().tolist() == [300] and grad[1:].unique().tolist() == [1]


def test_what_a_padded_stem_hides_is_hidden_from_all_heads():
    """Two segments of one bucket, of which the second has 3 keys less: as if alone."""
    q, k, v = (x.detach() for x in qkv(24))
    y = tiled_attention(
        q.unflatten(0, (2, 12))[:, :4], k.unflatten(0, (2, 12)), v.unflatten(0, (2, 12)), causal=True,
        padding_B=torch.tensor([0, 3]),
    )  # fmt: skip
    alone = tiled_attention(q[None, 12:16], k[None, 15:], v[None, 15:], causal=True)
    torch.testing.assert_close(y[1:], alone, **EXACT)


@pytest.mark.parametrize(
    "lengths, stems, message",
    [
        ([3, 2], [-1], r"2 segments need as many stems, or none; got \[-1\]"),
        ([3, 2], [-1, 1], r"stems\[1\] is 1; it must be -1, or an earlier segment"),
        ([3, 2], [1, -1], r"stems\[0\] is 1"),
        ([3, 2], [-1, -2], r"stems\[1\] is -2"),
        ([3, 2, 4], [-1, 0, 1], r"stems\[2\] is 1.*that has no stem itself"),
    ],
)
def test_wrong_stems_are_refused_by_name(lengths, stems, message):
    with pytest.raises(ValueError, match=message):
        Packed(lengths, stems=stems)


def test_stems_are_causal():
    with pytest.raises(ValueError, match="stems are for causal attention"):
        Packed([3, 2], causal=False, stems=[-1, 0])


# ------------------------------------------------------------------------------------------------------- on a GPU


def varlen_by_definition(q, k, v, query_offsets, key_offsets, longest_q, longest_k, *, window_size, enable_gqa=False):
    """Flash attention's rule: a segment's last query sees its last key, the query before it all but that, ..."""
    assert window_size == (-1, 0) and enable_gqa == (q.shape[1] != k.shape[1])
    assert query_offsets.dtype == key_offsets.dtype == torch.int32
    bounds = [list(zip(o.tolist()[:-1], o.tolist()[1:], strict=True)) for o in (query_offsets, key_offsets)]
    assert longest_q == max(b - a for a, b in bounds[0]) and longest_k == max(b - a for a, b in bounds[1])
    out = []
    for (a, b), (c, d) in zip(*bounds, strict=True):
        keys, values = (x[c:d].repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        score = torch.einsum("qnh,snh->nqs", q[a:b], keys) * q.shape[-1] ** -0.5
        future = torch.ones(b - a, d - c, dtype=torch.bool).triu(1 + (d - c) - (b - a))
        out.append(torch.einsum("nqs,snh->qnh", score.masked_fill(future, -torch.inf).softmax(-1), values))
    return torch.cat(out)


@pytest.mark.parametrize("row", ROWS)
def test_what_the_gpu_kernel_is_given(row, monkeypatch):
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", varlen_by_definition)
    lengths, stems = ROWS[row]
    inputs = qkv(sum(lengths))
    mine = Packed(lengths, stems=stems)._attend_varlen(*inputs)
    assert_equal(mine, by_definition(*inputs, lengths, stems), inputs)


def test_the_gpu_kernel_takes_the_arguments():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(14, 4, 64, dtype=torch.bfloat16, device="cuda")
        k = torch.empty(14, 2, 64, dtype=torch.bfloat16, device="cuda")
        assert Packed([6, 4, 4], stems=[-1, 0, 0]).attend(q, k, k).shape == (14, 4, 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("row", ROWS)
def test_the_gpu_kernel_agrees_with_the_definition(row):
    """Values as in test_context.py; gradients, sums of up to 12 such terms beside, twice that."""
    lengths, stems = ROWS[row]
    inputs = [x.detach().bfloat16().double().requires_grad_() for x in qkv(sum(lengths), width=64)]
    low = [x.detach().bfloat16().cuda().requires_grad_() for x in inputs]
    mine, exact = Packed(lengths, stems=stems).attend(*low), by_definition(*inputs, lengths, stems)
    assert (mine.cpu().double() - exact).abs().max() <= 2**-8 * exact.abs().max() * 2
    upstream = torch.randn_like(exact).bfloat16()
    found = torch.autograd.grad(mine, low, upstream.cuda())
    for a, b in zip(found, torch.autograd.grad(exact, inputs, upstream.double()), strict=True):
        assert (a.cpu().double() - b).abs().max() <= 2**-8 * b.abs().max() * 4
