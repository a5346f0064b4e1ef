import math

import pytest
import torch
import torch.nn.functional as F

from train.logprobs import token_logprobs


def test_by_hand():
    """Logits (0, log 3): probabilities 1/4 and 3/4."""
    hidden = torch.tensor([[1.0], [1.0]], dtype=torch.float64)
    head = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
    out = token_logprobs(hidden, head, torch.tensor([0, 1]))
    torch.testing.assert_close(out.logprob_T.exp(), torch.tensor([0.25, 0.75], dtype=torch.float64))
    assert out.correct_T.tolist() == [False, True]


def problem(tokens=37, width=8, vocabulary=50, dtype=torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    head = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    return hidden, head, torch.randint(vocabulary, (tokens,)), torch.randn(tokens, dtype=dtype)


@pytest.mark.parametrize("rows_per_chunk", [16, 17, 1000])
def test_chunks_give_the_definition_and_its_gradients(rows_per_chunk):
    hidden, head, target, upstream = problem()
    expected = -F.cross_entropy(hidden @ head.T, target, reduction="none")
    grads = torch.autograd.grad(expected, (hidden, head), upstream)

    out = token_logprobs(hidden, head, target, chunk_bytes=rows_per_chunk * 50 * 8)
    ours = torch.autograd.grad(out.logprob_T, (hidden, head), upstream)

    torch.testing.assert_close(out.logprob_T, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(ours, grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert torch.equal(out.correct_T, (hidden @ head.T).argmax(-1) == target)


@pytest.mark.parametrize("slope_is_right", [True, False])
def test_a_known_slope_changes_nothing_and_a_wrong_one_is_noticed(slope_is_right):
    hidden, head, target, upstream = problem()
    expected = torch.autograd.grad(
        -F.cross_entropy(hidden @ head.T, target, reduction="none"), (hidden, head), upstream
    )
    slope = -3 * upstream if slope_is_right else upstream.abs()
    out = token_logprobs(hidden, head, target, slope_T=slope, chunk_bytes=17 * 50 * 8)
    for mine, theirs in zip(torch.autograd.grad(out.logprob_T, (hidden, head), upstream), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_a_known_slope_saves_the_second_multiplication(monkeypatch):
    """Counted: with the hint, backward multiplies nothing out."""
    hidden, head, target, upstream = problem()
    out = token_logprobs(hidden, head, target, slope_T=upstream)
    monkeypatch.setattr("train.logprobs._logits", lambda *_: pytest.fail("recomputed"))
    out.logprob_T.backward(upstream)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_frozen_head_saves_it_whatever_the_slope(dtype, monkeypatch):
    hidden, head, target, upstream = problem(dtype=torch.float64)
    low = hidden.detach().to(dtype).requires_grad_()
    expected = -F.cross_entropy((low @ head.detach().to(dtype).T).double(), target, reduction="none")
    (theirs,) = torch.autograd.grad(expected, low, upstream)

    out = token_logprobs(low, head.detach(), target, slope_T=upstream.abs(), chunk_bytes=17 * 50 * 8)
    monkeypatch.setattr("train.logprobs._logits", lambda *_: pytest.fail("recomputed"))
    (ours,) = torch.autograd.grad(out.logprob_T, low, upstream.to(out.logprob_T.dtype))
    # Each of an element's 50 terms is rounded once, and so is the sum.
    tolerance = 51 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


def test_large_logits_do_not_overflow():
    hidden, head, target, _ = problem(dtype=torch.float32)
    out = token_logprobs(hidden * 1000, head, target)
    assert torch.isfinite(out.logprob_T).all()


def test_bfloat16_rounds_logits_but_sums_in_float32():
    """Float32 weights, bfloat16 activations: the same numbers as bfloat16 logits with a float32 softmax."""
    hidden, head, target, upstream = problem(dtype=torch.float32)
    low = hidden.detach().bfloat16().requires_grad_()
    out = token_logprobs(low, head, target)
    expected = -F.cross_entropy((low @ head.bfloat16().T).float(), target, reduction="none")
    torch.testing.assert_close(out.logprob_T, expected, rtol=1e-6, atol=1e-6)
    grad_head = torch.autograd.grad(out.logprob_T, head, upstream)[0]
    assert grad_head.dtype == torch.float32


def test_no_rows():
    hidden, head, target, _ = problem()
    out = token_logprobs(hidden[:0], head, target[:0])
    assert out.logprob_T.shape == (0,)
    out.logprob_T.sum().backward()
    assert head.grad is not None and head.grad.abs().sum() == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_known_slope_costs_nothing_where_no_gradient_is_wanted(mode, monkeypatch):
    """Evaluation runs the training policy: it must not make (and allocate) the gradients of the head."""
    hidden, head, target, upstream = problem()
    expected = token_logprobs(hidden, head, target).logprob_T
    monkeypatch.setattr("train.logprobs._Gradients", lambda *_: pytest.fail("made gradients"))
    with mode():
        out = token_logprobs(hidden, head, target, slope_T=upstream)
    torch.testing.assert_close(out.logprob_T, expected)


def test_a_second_backward_pass_recomputes():
    """The gradients made early are given away on the first pass; the second must not add them again."""
    hidden, head, target, upstream = problem()
    out = token_logprobs(hidden, head, target, slope_T=upstream)
    loss = (out.logprob_T * upstream).sum()
    loss.backward(retain_graph=True)
    once = hidden.grad.clone(), head.grad.clone()
    (0.5 * loss).backward()
    for mine, first in zip((hidden.grad, head.grad), once, strict=True):
        torch.testing.assert_close(mine, 1.5 * first, rtol=1e-12, atol=1e-12)


def test_a_second_backward_pass_recomputes_with_a_frozen_head_too():
    hidden, head, target, upstream = problem()
    loss = (token_logprobs(hidden, head.detach(), target).logprob_T * upstream).sum()
    loss.backward(retain_graph=True)
    once = hidden.grad.clone()
    (0.5 * loss).backward()
    torch.testing.assert_close(hidden.grad, 1.5 * once, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_slope_reaches_the_gradients(bad):
    hidden, head, target, upstream = problem()
    broken = upstream.clone()
    broken[3] = bad
    token_logprobs(hidden, head, target, slope_T=upstream).logprob_T.backward(broken)
    assert not torch.isfinite(head.grad).all()
    assert torch.isfinite(hidden.grad).all(dim=1).tolist() == [row != 3 for row in range(37)]


def test_second_derivatives_are_refused():
    hidden, head, target, _ = problem()
    logprob_T = token_logprobs(hidden, head, target).logprob_T
    (grad,) = torch.autograd.grad(logprob_T.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
