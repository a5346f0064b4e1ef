"""Other ways to multiply give the same products; the model that trains is left alone."""

import pytest
import torch
import torch.nn.functional as F

from ernie_model.attention import Attention
from ernie_model.config import ErnieConfig
from ernie_model.context import Packed
from ernie_model.inference import kernels
from ernie_model.layers import Linear, RMSNorm
from ernie_model.model import ErnieModel
from ernie_model.moe import Experts, Routing, route_local
from tests.ernie_model.inference.test_runner import build


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("outputs, inputs", [(6, 10), (7, 10), (1, 4), (10, 600)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 9])
def test_products(rows, outputs, inputs, dtype, tolerance):
    """Every branch, also odd widths, against the definition; whatever the strides of the rows."""
    torch.manual_seed(0)
    weight_OI, x_TI = torch.randn(outputs, inputs, dtype=dtype), torch.randn(rows, inputs, dtype=dtype)
    expected = x_TI.double() @ weight_OI.double().t()
    spread = torch.randn(rows, 3, inputs, dtype=dtype)
    spread[:, 1] = x_TI
    of_columns = torch.cat((x_TI, x_TI)).t().contiguous().t()[:rows]
    for x in (x_TI, spread[:, 1], of_columns):
        for y in (kernels.multiply(x, weight_OI), kernels.PackedWeight(weight_OI, dtype)(x)):
            torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance * inputs**0.5)


@pytest.mark.parametrize("tokens", [1, 2, 5, 11])
def test_experts_one_by_one(tokens):
    """`route_few` is `route_local`: rows of both pools, experts without rows, experts with several."""
    torch.manual_seed(tokens)
    text, vision = Experts(8, 12, 4).double(), Experts(8, 12, 2).double()
    for parameter in (*text.parameters(), *vision.parameters()):
        torch.nn.init.normal_(parameter)
    is_vision = torch.arange(tokens) % 3 == 1
    expert_TK = torch.stack([torch.randperm(8)[:3] for _ in range(tokens)]) + 8 * is_vision[:, None]
    weight_TK = torch.rand(tokens, 3, dtype=torch.float64)
    routing, x_TD = Routing(expert_TK, weight_TK, int(is_vision.sum())), torch.randn(tokens, 12, dtype=torch.float64)
    with torch.no_grad():
        few, local = (route(x_TD, routing, text, vision, None) for route in (kernels.route_few, route_local))
    torch.testing.assert_close(few, local, rtol=0, atol=1e-12)


def test_norm():
    torch.manual_seed(0)
    norm = RMSNorm(24, 1e-5).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 24, dtype=torch.float64) * torch.tensor([1e-4, 1e-2, 1, 1e3, 0]).double()[:, None]
    torch.testing.assert_close(kernels.FastNorm(norm)(x), norm(x), rtol=1e-12, atol=1e-12)


def test_the_model_that_trains_is_left_alone():
    """Same parameters, other modules: `answering` adds nothing to the model, and its gradients are what they were."""
    model = build(torch.float32)
    before = {name: type(module) for name, module in model.named_modules()}
    answering = kernels.answering(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(layer.mlp.route is route_local for layer in model.layers if hasattr(layer.mlp, "route"))
    assert answering.layers[1].mlp.text.experts.gate_up_EFD is model.layers[1].mlp.text.experts.gate_up_EFD
    assert answering.layers[1].mlp.route is kernels.route_few
    token_T = torch.arange(20, 30)
    out = model(token_T, torch.arange(10).expand(3, -1), Packed([10]))
    out.hidden_TD.sum().backward()
    assert model.layers[0].self_attn.q_proj.weight.grad is not None
    assert model.layers[1].mlp.text.experts.gate_up_EFD.grad is not None


def test_modules_of_others_stay_what_they_are():
    """Adapters, quantised weights, another route: whatever is not the plain class is used as it is."""

    class Adapted(Linear):
        def forward(self, input):
            return super().forward(input) + 1

    model = build(torch.float64)
    attention, moe = model.layers[0].self_attn, model.layers[1].mlp
    attention.q_proj.__class__ = Adapted
    moe.route = lambda *arguments: route_local(*arguments) * 2
    answering = kernels.answering(model)
    assert type(answering.layers[0].self_attn) is Attention and answering.layers[1].mlp.route is moe.route
    token_T, position_3T = torch.arange(20, 30), torch.arange(10).expand(3, -1)
    with torch.no_grad():
        ours, theirs = (m(token_T, position_3T, Packed([10])).hidden_TD for m in (answering, model))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_without_onednn(monkeypatch):
    monkeypatch.setattr(kernels, "can_pack", lambda: False)
    weight, x = torch.randn(6, 10), torch.randn(5, 10)
    product = kernels.PackedWeight(weight, torch.float32)
    assert product.packed is None
    torch.testing.assert_close(product(x), F.linear(x, weight))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("can_pack", [True, False])
def test_memory_of_the_copies(tied, can_pack, monkeypatch):
    """Dense weights once in oneDNN's layout, of which an embedding is none; queries, keys and values once more."""
    monkeypatch.setattr(kernels, "can_pack", lambda: can_pack)
    config = ErnieConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=24, tie_word_embeddings=tied,
    )  # fmt: skip
    model = ErnieModel(config)
    dense = 40 * 16 + 16 * 16 + 3 * 16 * 24  # head, attention's output, MLP
    qkv = (16 + 8 + 8) * 16
    assert kernels.copied_bytes(model) == 4 * ((dense + qkv) * can_pack + qkv)
    if kernels.PackedWeight(torch.ones(2, 2), torch.float32).packed is not None:
        products = [m.product for m in kernels.answering(model).modules() if hasattr(m, "product")]
        assert sum(product.weight_OI.numel() for product in products if product.packed is not None) == dense + qkv


def test_a_model_with_a_head_of_its_own():
    model = build(torch.float64, tie_word_embeddings=False)
    token_T, position_3T = torch.arange(20, 30), torch.arange(10).expand(3, -1)
    with torch.no_grad():
        ours, theirs = (
            m.logits(m(token_T, position_3T, Packed([10])).hidden_TD) for m in (kernels.answering(model), model)
        )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
