"""The adapted layers: W + scale * B A by definition in float64, gradients where they belong and nowhere else."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ernie_model.layers import Linear
from ernie_model.moe import Experts
from train.lora.layers import Factors, LoraExperts, LoraLinear, effective_rows

EXPERTS, WIDTH, HIDDEN = 4, 16, 8
COUNTS = (3, 0, 2, 1)  # the second expert has no rows


def experts(rank: int, *, rslora: bool = False, dtype: torch.dtype = torch.float64, alpha: float = 6.0) -> LoraExperts:
    torch.manual_seed(rank)
    base = Experts(EXPERTS, WIDTH, HIDDEN).requires_grad_(False)
    for weight in base.parameters():
        weight.data = torch.randn(weight.shape, dtype=torch.float64).to(dtype)
    layer = LoraExperts(base, "default", LoraConfig(use_rslora=rslora), rank, alpha)
    for name in layer.adapter_layer_names:
        weight = getattr(layer, name)["default"]
        weight.data = torch.randn(weight.shape, dtype=torch.float64).to(weight.dtype)
    return layer


def by_definition(layer: LoraExperts, x_UD: torch.Tensor, scale: float) -> torch.Tensor:
    """One expert after the other, with W + scale * B A built."""
    whole = []
    for tensor, (A, B) in layer.PAIRS.items():
        A_ELI, B_EOL = getattr(layer, A)["default"], getattr(layer, B)["default"]
        whole.append(getattr(layer.base_layer, tensor) + scale * torch.einsum("eol,eli->eoi", B_EOL, A_ELI))
    rows = []
    for expert, x in enumerate(x_UD.split(COUNTS)):
        gate, up = F.linear(x, whole[0][expert]).chunk(2, dim=-1)
        rows.append(F.linear(F.silu(gate) * up, whole[1][expert]))
    return torch.cat(rows)


@pytest.mark.parametrize(("rank", "rslora", "scale"), [(4, False, 1.5), (3, False, 2.0), (4, True, 3.0)])
def test_experts_by_definition_with_every_gradient(rank, rslora, scale):
    layer = experts(rank, rslora=rslora)
    x_UD = torch.randn(sum(COUNTS), WIDTH, dtype=torch.float64, requires_grad=True)
    parameters = [x_UD, *(p for p in layer.parameters() if p.requires_grad)]
    assert len(parameters) == 5
    toward = torch.randn(sum(COUNTS), WIDTH, dtype=torch.float64)
    found = layer(x_UD, torch.tensor(COUNTS))
    expected = by_definition(layer, x_UD, scale)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad((found * toward).sum(), parameters)
    theirs = torch.autograd.grad((expected * toward).sum(), parameters)
    for mine, definition in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, definition, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rank", [3, 4, 8])
def test_an_expert_without_rows_has_zero_gradients_also_with_an_odd_rank(rank):
    """float32, where products are grouped and an odd rank is padded."""
    layer = experts(rank, dtype=torch.float32)
    x_UD = torch.randn(sum(COUNTS), WIDTH)
    found = layer(x_UD, torch.tensor(COUNTS))
    expected = by_definition(layer, x_UD, 6.0 / rank)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found.square().sum().backward()
    for name in layer.adapter_layer_names:
        weight = getattr(layer, name)["default"]
        assert weight.grad.shape == weight.shape
        assert torch.equal(weight.grad[1], torch.zeros_like(weight.grad[1])), name
        assert weight.grad[0].abs().max() > 0


def linear(**settings) -> LoraLinear:
    torch.manual_seed(0)
    base = Linear(12, 20).requires_grad_(False)
    layer = LoraLinear(base, "default", LoraConfig(**settings), r=3, lora_alpha=6)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    return layer


@pytest.mark.parametrize(
    "settings", [{}, dict(use_rslora=True), dict(use_dora=True)], ids=lambda s: "+".join(s) or "plain"
)
def test_a_linear_equals_its_effective_weight(settings):
    layer = linear(**settings).double()
    if settings.get("use_dora"):
        layer.lora_magnitude_vector["default"].weight.data *= 1.5
    x_TI = torch.randn(7, 12, dtype=torch.float64)
    weight_OI = effective_rows(layer.base_layer.weight, list(layer.factors("weight").values()), dtype=torch.float64)
    assert (weight_OI - layer.base_layer.weight).abs().max() > 0.1
    torch.testing.assert_close(layer(x_TI), F.linear(x_TI, weight_OI, layer.base_layer.bias), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dora", [False, True])
def test_bfloat16_activations_meet_float32_masters(dora):
    layer = linear(use_dora=dora)
    x_TI = torch.randn(5, 12, dtype=torch.bfloat16)
    y_TO = layer(x_TI)
    assert y_TO.dtype == torch.bfloat16
    y_TO.float().sum().backward()
    assert layer.lora_A["default"].weight.grad.dtype == torch.float32
    # rounding of inputs, weights and the two sums: a few units of bfloat16's 2^-8
    torch.testing.assert_close(y_TO.float(), layer(x_TI.float()), rtol=0.03, atol=0.03)


def test_rows_of_a_part_of_stacked_factors_by_hand():
    A = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])  # 2 experts, rank 1, 2 inputs
    B = torch.tensor([[[1.0], [2.0]], [[10.0], [20.0]]])
    rows = Factors(A, B, 0.5).rows((1, slice(1, 2)), slice(None), torch.float64)
    assert rows.tolist() == [[30.0, 40.0]]  # 0.5 * 20 * (3, 4)


class Products(TorchDispatchMode):
    """Grouped products, which the counter of operations does not know."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.ops.aten._grouped_mm.default
        return func(*args, **(kwargs or {}))


def cost(counter, layer, *inputs):
    """What a counter finds, forward and backward."""
    with counter() as forward:
        y = layer(*inputs)
    with counter() as backward:
        y.backward(torch.ones_like(y))
    return forward, backward


def operations(layer, *inputs) -> list[int]:
    return [found.get_total_flops() for found in cost(lambda: FlopCounterMode(display=False), layer, *inputs)]


def test_a_frozen_weight_costs_one_product_forward_and_one_backward():
    """Backward: once for the activations through W, and twice what A and B took forward; no gradient of W."""
    rows, rank = sum(COUNTS), 4
    x_UD = torch.randn(rows, WIDTH, requires_grad=True)
    base = 2 * rows * (WIDTH * 2 * HIDDEN + HIDDEN * WIDTH)
    extra = 2 * rows * rank * (WIDTH + 2 * HIDDEN + HIDDEN + WIDTH)
    found = operations(
        experts(rank), torch.randn(rows, WIDTH, dtype=torch.float64, requires_grad=True), torch.tensor(COUNTS)
    )
    assert found == [base + extra, base + 2 * extra]

    x_TI = torch.randn(7, 12, requires_grad=True)
    base, extra = 2 * 7 * 12 * 20, 2 * 7 * 3 * (12 + 20)
    assert operations(linear(), x_TI)[1] == base + 2 * extra  # forward, the counter does not know addmm_

    # Grouped: two products through W and four through A and B; backward two, and two for each of the four.
    forward, backward = cost(Products, experts(rank, dtype=torch.float32), x_UD, torch.tensor(COUNTS))
    assert (forward.calls, backward.calls) == (2 + 4, 2 + 2 * 4)
