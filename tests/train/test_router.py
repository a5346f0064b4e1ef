"""The losses of routers: by hand, by definition in float64, and what must not change them."""

import copy
import dataclasses
import math
import weakref

import pytest
import torch
from torch import nn

from ernie_model.checkpoint import load_model
from ernie_model.model import ErnieModel
from ernie_model.moe import MoE, RouterStats
from ernie_model.recompute import keep_activations
from ernie_model.recompute import recompute as recompute_layer
from tests.train import small
from train import checkpoint, neftune
from train.config import (
    ObjectiveConfig,
    PoolWeights,
    UserError,
)
from train.loop import router_summary, train_step
from train.objectives.sft import SFT
from train.policy import Policy, PolicyOutput
from train.router import RouterLosses, orthogonal
from train.weights import AllWeights

CONFIG = small.CONFIG.replace(num_hidden_layers=3, sparse_layers=(1, 2))
SEGMENTS = [small.example(seed, length, image=seed % 2 == 0) for seed, length in enumerate((9, 7, 12, 6))]
WHOLE = [small.row(*SEGMENTS)]
CUT = [small.row(SEGMENTS[0]), small.row(SEGMENTS[1], SEGMENTS[2]), small.row(SEGMENTS[3])]
EVERYTHING = ObjectiveConfig(
    balance=PoolWeights(0.3, 0.7), z_loss=PoolWeights(0.2, 0.05), orthogonal=PoolWeights(0.11, 0.13)
)


def make_policy(seed: int = 0, *, bias: float = 0.0, recompute: bool = False) -> Policy:
    torch.manual_seed(seed)
    model = ErnieModel(CONFIG).set_dtype(torch.float64)
    for router in routers(model):
        router.correction_bias_E.normal_(std=bias) if bias else None
    model.run_layer = recompute_layer if recompute else keep_activations
    return Policy(model).train()


def routers(model: ErnieModel) -> list:
    moes = [layer.mlp for layer in model.layers if isinstance(layer.mlp, MoE)]
    return [pool.router for moe in moes for pool in (moe.text, moe.vision) if pool is not None]


class Catch(torch.optim.SGD):
    """Keeps the gradients that an update would use."""

    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.caught = [None if p.grad is None else p.grad.clone() for p in parameters]


def step(policy: Policy, rows, config: ObjectiveConfig, optimizer=None):
    """(gradients by name, metrics) of one update."""
    optimizer = optimizer or Catch(policy.parameters(), lr=1.0)
    metrics = train_step(
        small.updates(policy, optimizer),
        SFT,
        [small.in_double(row) for row in rows],
        accelerator=small.accelerator(),
        max_grad_norm=1e9,
        beside=[RouterLosses(policy, config, small.accelerator())],
    )
    names = [name for name, _ in policy.named_parameters()]
    return dict(zip(names, getattr(optimizer, "caught", []), strict=False)), metrics


def assert_same(found: dict, expected: dict):
    scale = max(g.abs().max().item() for g in expected.values() if g is not None)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            # float64 sums of a few hundred terms in another order
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-12 * scale, msg=name)


# ---------------------------------------------------------------------------------------------------------- by hand


def test_two_rows_at_45_degrees_score_a_quarter():
    weight_LED = torch.tensor([[[2.0, 0.0], [3.0, 3.0]], [[0.0, 5.0], [-1.0, 0.0]]])
    torch.testing.assert_close(orthogonal(weight_LED), torch.tensor([0.25, 0.0]))


def test_two_half_dead_pools_do_not_look_balanced():
    """E = 8, K = 2. Text uses experts 0 to 3 only, vision 4 to 7 only; added up, all eight would look even.

    Each pool: 8 * 4 * (1/4 * 2/4) = 4; an even load has 8 * 8 * (1/8 * 2/8) = 2.
    """
    half_2E = torch.tensor([[1.0] * 4 + [0.0] * 4, [0.0] * 4 + [1.0] * 4])
    token_2 = torch.tensor([40.0, 40.0])
    stats = RouterStats(
        token_2=token_2[None],
        count_2E=20 * half_2E[None],
        preferred_2E=20 * half_2E[None],
        prob_2E=10 * half_2E[None],
        entropy_2=torch.zeros(1, 2),
        square_2=torch.zeros(1, 2),
    )
    summary = router_summary(stats)
    assert (summary["router_text_balance"], summary["router_vision_balance"]) == (4.0, 4.0)
    assert (summary["router_text_dead"], summary["router_vision_dead"]) == (4, 4)
    config = ObjectiveConfig(balance=PoolWeights(1.0, 0.5))
    losses = RouterLosses(make_policy(), config, small.accelerator())
    losses.before(WHOLE)
    assert float(losses.terms(WHOLE[0], PolicyOutput(*[torch.empty(0)] * 2, stats))) == 4.0 + 0.5 * 4.0


def test_the_bias_rises_where_the_load_is_below_the_mean():
    policy = make_policy()
    config = ObjectiveConfig(bias_update=0.5)
    losses = RouterLosses(policy, config, small.accelerator())
    count_L2E = torch.tensor([[[4.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 8.0]], [[3.0] * 4, [0.0] * 4]]).double()
    losses.after_update(torch.optim.SGD(policy.parameters()), RouterStats(*[count_L2E] * 6))
    expected = [[-0.5, 0, 0, 0.5], [0.5, 0.5, 0.5, -0.5], [0.0] * 4, [0.0] * 4]
    assert [router.correction_bias_E.tolist() for router in routers(policy.model)] == expected


# ---------------------------------------------------------------------------------------------------- by definition


def by_definition(policy: Policy, row, config: ObjectiveConfig) -> dict:
    """Gradients of cross-entropy + every loss of every layer and pool, each a loop over tokens and experts."""
    model, caught = policy.model, []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda moe, inputs: caught.append((moe, inputs[0])))
        for layer in model.layers
        if isinstance(layer.mlp, MoE)
    ]
    row = small.in_double(row)
    output = policy(row, row.weight_T.nonzero()[:, 0])
    for hook in hooks:
        hook.remove()
    total = -(output.logprob_T * row.weight_T).sum() / row.weight_T.sum()
    vision_T = [id in CONFIG.vision_pool_token_ids for id in row.token_T.tolist()]
    for moe, x_TD in caught:
        for name, pool in (("text", moe.text), ("vision", moe.vision)):
            weight_ED = pool.router.weight_ED
            logits = [weight_ED @ x for x, vision in zip(x_TD, vision_T, strict=True) if vision == (name == "vision")]
            count = [0] * len(weight_ED)
            for logit_E in logits:
                for expert in logit_E.topk(CONFIG.experts_per_token).indices.tolist():
                    count[expert] += 1
            balance = sum(
                sum(logit_E.softmax(0)[expert] for logit_E in logits) / len(logits) * count[expert] / len(logits)
                for expert in range(len(weight_ED))
            )
            z = sum(logit_E.exp().sum().log() ** 2 for logit_E in logits) / len(logits)
            unit = [w / w.norm() for w in weight_ED]
            spread = sum((a @ b - float(i == j)) ** 2 for i, a in enumerate(unit) for j, b in enumerate(unit))
            total = total + getattr(config.balance, name) * len(weight_ED) * balance
            total = total + getattr(config.z_loss, name) * z
            total = total + getattr(config.orthogonal, name) * spread / len(weight_ED) ** 2
    total.backward()
    return {name: p.grad for name, p in policy.named_parameters()}


@pytest.mark.parametrize("bias", [0.0, 0.5], ids=["no bias", "a bias that changes choices"])
@pytest.mark.parametrize("rows", [WHOLE, CUT], ids=["one micro-batch", "three micro-batches"])
def test_gradients_are_those_of_the_definition_on_one_batch(rows, bias):
    found, _ = step(make_policy(bias=bias), rows, EVERYTHING)
    assert_same(found, by_definition(make_policy(bias=bias), WHOLE[0], EVERYTHING))


@pytest.mark.parametrize("name", ["balance", "z_loss", "orthogonal"])
@pytest.mark.parametrize("pool", ["text", "vision"])
def test_each_loss_reaches_the_routers_of_its_pool_once(name, pool):
    """What it adds is not nothing, linear in its weight, in one pool only, and the same for a batch and its parts."""
    plain, _ = step(make_policy(), CUT, ObjectiveConfig())
    differences = []
    for rows, weight in ((CUT, 1.0), (WHOLE, 1.0), (CUT, 3.0)):
        found, _ = step(make_policy(), rows, ObjectiveConfig(**{name: PoolWeights(**{pool: weight})}))
        differences.append({key: (found[key] - plain[key]) / weight for key in plain})
    assert_same(differences[1], differences[0])
    assert_same(differences[2], differences[0])
    last = "model.layers.2.mlp.{}.router.weight_ED"  # no other router lies behind it
    other = {"text": "vision", "vision": "text"}[pool]
    assert differences[0][last.format(pool)].abs().max() > 1e-3
    assert differences[0][last.format(other)].abs().max() < 1e-12
    # what depends on tokens reaches what is before the router, too
    before = differences[0]["model.embed_tokens.weight"].abs().max()
    assert before > 1e-4 if name != "orthogonal" else before < 1e-12


# ----------------------------------------------------------------------------------------------- what must not matter


def test_the_reported_loss_stays_the_cross_entropy():
    _, plain = step(make_policy(), CUT, ObjectiveConfig())
    _, found = step(make_policy(), CUT, EVERYTHING)
    same = plain.keys() - {"grad_norm"}
    assert {key: found[key] for key in same} == {key: plain[key] for key in same}
    assert found.keys() - plain.keys() == {"router_text_orthogonal", "router_vision_orthogonal"}
    assert found["grad_norm"] != plain["grad_norm"]


def test_reported_losses_are_means_over_layers_of_what_is_minimised():
    policy = make_policy()
    _, found = step(policy, CUT, EVERYTHING)
    row = small.in_double(WHOLE[0])
    stats = policy(row, row.weight_T.nonzero()[:, 0]).router.detach()
    for pool, key in enumerate(("text", "vision")):
        only = ObjectiveConfig(balance=PoolWeights(**{key: 1.0}))
        losses = RouterLosses(policy, only, small.accelerator())
        losses.before(WHOLE)
        assert math.isclose(
            found[f"router_{key}_balance"],
            float(losses.terms(WHOLE[0], PolicyOutput(*[torch.empty(0)] * 2, stats))) / 2,
            rel_tol=1e-12,
        )
        z = float((stats.square_2[:, pool] / stats.token_2[:, pool]).mean())
        assert math.isclose(found[f"router_{key}_z"], z, rel_tol=1e-12)


def test_activation_checkpointing_changes_nothing():
    kept, _ = step(make_policy(), CUT, EVERYTHING)
    recomputed, _ = step(make_policy(recompute=True), CUT, EVERYTHING)
    assert_same(recomputed, kept)


def test_a_step_without_images_has_no_vision_losses():
    rows = [small.row(SEGMENTS[1]), small.row(SEGMENTS[3])]
    config = ObjectiveConfig(balance=PoolWeights(0.0, 1.0), z_loss=PoolWeights(0.0, 1.0))
    found, _ = step(make_policy(), rows, config)
    plain, _ = step(make_policy(), rows, ObjectiveConfig())
    assert_same(found, plain)


def test_weights_of_zero_count_nothing_and_cost_no_extra_forward(monkeypatch):
    passes = []
    original = ErnieModel.forward
    monkeypatch.setattr(ErnieModel, "forward", lambda *a, **k: passes.append(1) or original(*a, **k))
    for config, expected in (
        (ObjectiveConfig(), 3),
        (ObjectiveConfig(z_loss=PoolWeights(1.0, 1.0)), 3),
        (ObjectiveConfig(balance=PoolWeights(1.0, 1.0)), 6),
    ):
        passes.clear()
        step(make_policy(), CUT, config)
        assert len(passes) == expected
    passes.clear()
    step(make_policy(), WHOLE, ObjectiveConfig(balance=PoolWeights(1.0, 1.0)))
    assert len(passes) == 1


def test_the_counting_pass_draws_the_random_numbers_of_the_real_one():
    """With dropout in front of the routers, both passes must see the same choices."""

    def noisy() -> tuple[Policy, list]:
        policy, seen = make_policy(), []
        drop = nn.Dropout(0.5)
        policy.model.layers[0].register_forward_hook(lambda module, inputs, out: (drop(out[0]), out[1]))
        original = policy.model.layers[2].mlp.choose

        def choose(x_TD, pools):
            routing, stats = original(x_TD, pools)
            seen.append(stats.preferred_2E)
            return routing, stats

        policy.model.layers[2].mlp.choose = choose
        return policy, seen

    policy, seen = noisy()
    torch.manual_seed(1)
    with_balance, _ = step(policy, CUT, ObjectiveConfig(balance=PoolWeights(1e-300, 0.0)))
    assert len(seen) == 6 and all(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:], strict=True))
    policy, _ = noisy()
    torch.manual_seed(1)
    assert_same(with_balance, step(policy, CUT, ObjectiveConfig())[0])  # and the real one drew what it always does


def test_the_counting_pass_sees_the_noise_of_the_real_one():
    """NEFTune changes embeddings, and with them choices, from outside the model."""
    policy, seen = make_policy(), []
    neftune.install(policy, 50.0, seed=0, step=lambda: 0)
    policy.model.layers[1].register_forward_hook(lambda module, inputs, out: seen.append(out[1].preferred_2E))
    step(policy, CUT, ObjectiveConfig(balance=PoolWeights(1.0, 1.0)))
    assert len(seen) == 6 and all(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:], strict=True))


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_of_a_micro_batch_outlives_its_backward_pass(recompute):
    """Sums with gradient hold on to their graph: the layers' inputs would stay while the next micro-batch runs."""
    policy, alive = make_policy(recompute=recompute), []
    kept: list[weakref.ref] = []

    def look(module, inputs, output):
        if len(kept) == 1:
            alive.append(kept[0]() is not None)
        kept.append(weakref.ref(output[0]))

    policy.model.layers[0].register_forward_hook(look)
    step(policy, CUT, ObjectiveConfig(z_loss=PoolWeights(0.1, 0.0)))
    assert alive == [False]


# ------------------------------------------------------------------------------------------------------- the updates


def test_the_decoupled_step_is_learning_rate_times_weight_times_gradient():
    """By finite differences of the loss, after an optimizer that does nothing, at the router's own learning rate."""
    policy = make_policy()
    before = copy.deepcopy(policy.model.state_dict())
    groups = [
        {"params": [p for n, p in policy.named_parameters() if "router" not in n], "lr": 7.0},
        {"params": [p for n, p in policy.named_parameters() if "router" in n], "lr": 0.01},
    ]
    optimizer = Catch(groups, lr=1.0)
    config = ObjectiveConfig(orthogonal=PoolWeights(0.5, 0.25), orthogonal_decoupled=True)
    plain, _ = step(make_policy(), WHOLE, ObjectiveConfig())
    step(policy, WHOLE, config, optimizer)
    names = sorted((n for n, _ in policy.named_parameters()), key=lambda n: "router" in n)  # as the groups have them
    assert_same(dict(zip(names, optimizer.caught, strict=True)), plain)
    for name, value in policy.model.state_dict().items():
        moved = value - before[name]
        if not name.endswith("router.weight_ED"):
            assert not moved.any(), name
            continue
        weight = 0.5 if ".text." in name else 0.25
        bump = torch.zeros_like(value)
        bump[1, 2] = 1e-6
        slope = (orthogonal((before[name] + bump)[None]) - orthogonal((before[name] - bump)[None])) / 2e-6
        assert math.isclose(moved[1, 2].item(), -0.01 * weight * slope.item(), rel_tol=1e-6)


def test_the_bias_follows_the_whole_update_and_no_gradient():
    policy, config = make_policy(), ObjectiveConfig(bias_update=1e-3)
    row = small.in_double(WHOLE[0])
    count_L2E = policy(row, row.weight_T.nonzero()[:, 0]).router.count_2E
    step(policy, CUT, config)
    for index, router in enumerate(routers(policy.model)):
        count_E = count_L2E[index // 2, index % 2]
        assert router.correction_bias_E.tolist() == (1e-3 * (count_E.mean() - count_E).sign()).tolist()


def test_an_update_that_is_left_out_moves_nothing():
    policy = make_policy()
    before = copy.deepcopy(policy.model.state_dict())
    bad = dataclasses.replace(WHOLE[0], patch_PX=WHOLE[0].patch_PX * math.nan)
    config = ObjectiveConfig(bias_update=1e-3, orthogonal=PoolWeights(1.0, 1.0), orthogonal_decoupled=True)
    _, metrics = step(policy, [bad], config, torch.optim.SGD(policy.parameters(), lr=1.0))
    assert metrics["skipped"] == 1
    assert all(torch.equal(value, before[name]) for name, value in policy.model.state_dict().items())


def test_the_bias_of_a_frozen_router_stays():
    policy = make_policy()
    for router in routers(policy.model)[::2]:
        router.weight_ED.requires_grad_(False)
    step(policy, CUT, ObjectiveConfig(bias_update=1e-3))
    moved = [bool(router.correction_bias_E.any()) for router in routers(policy.model)]
    assert moved == [False, True, False, True]


@pytest.mark.parametrize("decoupled", [False, True])
def test_one_frozen_router_of_a_pool_stays_and_is_not_in_the_norm(decoupled):
    config = ObjectiveConfig(orthogonal=PoolWeights(text=1.0), orthogonal_decoupled=decoupled, bias_update=1e-3)
    policy = make_policy()
    frozen, trained = routers(policy.model)[::2]
    frozen.weight_ED.requires_grad_(False)
    before = frozen.weight_ED.clone()
    optimizer = Catch([p for p in policy.parameters() if p.requires_grad], lr=1.0)
    _, metrics = step(policy, WHOLE, config, optimizer)
    norm = torch.stack([g.square().sum() for g in optimizer.caught if g is not None]).sum().sqrt()
    assert math.isclose(metrics["grad_norm"], norm.item(), rel_tol=1e-12)
    assert frozen.weight_ED.grad is None and torch.equal(frozen.weight_ED, before)
    assert not frozen.correction_bias_E.any() and trained.correction_bias_E.any()


def test_the_bias_is_in_checkpoints_and_exports(tmp_path):
    policy = Policy(ErnieModel(CONFIG)).train()
    optimizer = small.optimizer(policy)
    losses = RouterLosses(policy, ObjectiveConfig(bias_update=1e-3), small.accelerator())
    train_step(
        small.updates(policy, optimizer), SFT, CUT, accelerator=small.accelerator(), max_grad_norm=1.0, beside=[losses]
    )
    expected = [router.correction_bias_E.clone() for router in routers(policy.model)]
    assert any(bias.any() for bias in expected)

    path = checkpoint.save(
        tmp_path,
        1,
        weights=AllWeights(policy.model),
        optimizer=optimizer,
        state={},
        keep=1,
    ).path
    restored = ErnieModel(CONFIG)
    checkpoint.load(path, weights=AllWeights(restored), optimizer=small.optimizer(Policy(restored)))
    from ernie_model.checkpoint import write_model

    (tmp_path / "export").mkdir()
    write_model(policy.model, tmp_path / "export")
    exported = load_model(tmp_path / "export", dtype=torch.float32)
    for model in (restored, exported):
        assert all(torch.equal(a.correction_bias_E, b) for a, b in zip(routers(model), expected, strict=True))


# ---------------------------------------------------------------------------------------------------- said beforehand


@pytest.mark.parametrize(
    "architecture, frozen, config, message",
    [
        (
            CONFIG.replace(sparse_layers=()),
            "",
            ObjectiveConfig(balance=PoolWeights(text=0.01)),
            "objective.balance.text is 0.01, but the model has no text router. Set objective.balance.text=0.",
        ),
        (
            CONFIG,
            "vision.router",
            ObjectiveConfig(z_loss=PoolWeights(vision=1e-4)),
            "objective.z_loss.vision is 0.0001, but the vision routers are frozen.",
        ),
        (
            CONFIG,
            "router",
            ObjectiveConfig(bias_update=1e-3),
            "objective.bias_update is 0.001, but the model has no router that is trained.",
        ),
        (
            CONFIG.replace(sparse_layers=()),
            "",
            ObjectiveConfig(bias_update=1e-3),
            "objective.bias_update is 0.001, but the model has no router.",
        ),
    ],
)
def test_a_weight_without_effect_is_refused(architecture, frozen, config, message):
    model = ErnieModel(architecture)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or frozen not in name)
    with pytest.raises(UserError) as caught:
        RouterLosses(Policy(model), config, small.accelerator())
    assert message in str(caught.value)
