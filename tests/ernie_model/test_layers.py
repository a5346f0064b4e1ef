"""Hand-written backward passes against the plain formula and autograd, in float64."""

import pytest
import torch
import torch.nn.functional as F

from ernie_model.layers import Linear, RMSNorm, silu_mul
from ernie_model.moe import Rows, combine
from ernie_model.rope import Rotation, rotate_text
from ernie_model.tiles import tiled_attention
from ernie_model.vision import quick_gelu

EXACT = dict(rtol=1e-12, atol=1e-12)


def gradients(output, inputs):
    torch.manual_seed(1)
    return torch.autograd.grad(output, inputs, torch.randn_like(output))


def test_rms_norm_by_hand():
    norm = RMSNorm(2, eps=0.0)
    norm.weight.data = torch.tensor([1.0, 10.0])
    # mean square of (3, 4) is 12.5, its root 3.5355
    torch.testing.assert_close(norm(torch.tensor([[3.0, 4.0]])), torch.tensor([[0.848528, 11.313708]]))


def rms_plain(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


@pytest.mark.parametrize(
    "ours, plain, shapes",
    [
        (lambda x, w: _with_weight(RMSNorm(6, 1e-5), w)(x), rms_plain, [(5, 6), (6,)]),
        (silu_mul, lambda gate, up: F.silu(gate) * up, [(5, 6), (5, 6)]),
        (quick_gelu, lambda x: x * torch.sigmoid(1.702 * x), [(5, 6)]),
    ],
    ids=["rms_norm", "silu_mul", "quick_gelu"],
)
def test_value_and_gradients_are_those_of_the_formula(ours, plain, shapes):
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    mine, theirs = ours(*inputs), plain(*inputs)
    torch.testing.assert_close(mine, theirs, **EXACT)
    for a, b in zip(gradients(mine, inputs), gradients(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def _with_weight(norm, weight):
    del norm.weight
    norm.weight = weight
    return norm


def test_text_rotation_turns_adjacent_channels():
    """A quarter turn takes (a, b) to (-b, a); the gradient turns back."""
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], requires_grad=True)
    quarter = Rotation(
        torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    )  # first pair a quarter, second not at all
    y = rotate_text(x, quarter)
    assert y.tolist() == [[[-2.0, 1.0, 3.0, 4.0]]]
    y.backward(torch.tensor([[[1.0, 0.0, 0.0, 5.0]]]))
    assert x.grad is not None and x.grad.tolist() == [[[0.0, -1.0, 0.0, 5.0]]]


def test_a_float32_weight_serves_bfloat16_activations():
    layer = Linear(4, 3)
    x = torch.randn(2, 4).bfloat16()
    expected = F.linear(x, layer.weight.bfloat16(), layer.bias.bfloat16())
    assert torch.equal(layer(x), expected)
    layer(x).float().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32


class TestSecondDerivatives:
    """Hand-written backward passes keep numbers, not graphs: a second derivative must be refused, not be wrong."""

    x = torch.randn(5, 2, 4, dtype=torch.float64)
    rows = Rows(torch.arange(5), torch.arange(5)[:, None], torch.tensor([5]), 5)

    @pytest.mark.parametrize(
        "function",
        [
            lambda x: tiled_attention(x[None], x[None], x[None], causal=True),
            lambda x: RMSNorm(4, eps=1e-5).double()(x),
            lambda x: silu_mul(x, x),
            quick_gelu,
            lambda x: combine(x[:, 0], x[:, 1, :1], TestSecondDerivatives.rows),
        ],
        ids=["attention", "RMSNorm", "silu_mul", "quick_gelu", "combine"],
    )
    def test_are_refused(self, function):
        x = self.x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.square().sum().backward()
