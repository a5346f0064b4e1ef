"""What trains and at what rate: keys to parameters by hand, and that what is frozen costs nothing and does not move."""

import io

import pytest
import torch
from rich.console import Console

from ernie_model.config import ErnieConfig
from ernie_model.model import ErnieModel
from ernie_model.parts import Part, part_of
from tests.train import small
from train.config import OptimConfig, UserError
from train.loop import Hooks, Plan, TrainState, fit, train_step
from train.objectives.sft import SFT
from train.optim import build_optimizer, parameter_groups
from train.report import parts_table
from train.trained import freeze, lr_scales, trained_parts


def deep_tower() -> ErnieModel:
    """Three vision blocks, two layers."""
    vision = small.CONFIG.vision
    assert vision is not None
    with torch.device("meta"):
        return ErnieModel(small.CONFIG.replace(vision=type(vision)(**{**vars(vision), "depth": 3})))


def text_only() -> ErnieModel:
    with torch.device("meta"):
        return ErnieModel(
            ErnieConfig(
                vocab_size=50,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                intermediate_size=24,
            )
        )


def test_a_part_and_its_neighbours():
    scale = lr_scales(deep_tower(), OptimConfig(lr_scale={"router": 0.01, "vision": 0.5}))
    expected = {Part.ROUTER: 0.01, Part.VISION: 0.5}
    assert all(value == expected.get(part_of(name), 1.0) for name, value in scale.items())
    assert sorted(set(scale.values())) == [0.01, 0.5, 1.0]


@pytest.mark.parametrize(
    "keys, expected",
    [
        # a glob wins over a part, wherever it stands
        ({"layers.1.*": 0.5, "router": 0.01}, {"layers.1.mlp.text.router.weight_ED": 0.5}),
        # and a later glob over an earlier one
        ({"layers.*": 0.5, "layers.?.mlp.*": 0.25}, {"layers.1.mlp.text.router.weight_ED": 0.25}),
        ({"layers.?.mlp.*": 0.25, "layers.*": 0.5}, {"layers.1.mlp.text.router.weight_ED": 0.5}),
        ({"layers.*": 0.5, "layers.?.mlp.*": 0.25}, {"layers.0.self_attn.q_proj.weight": 0.5, "norm.weight": 1.0}),
    ],
)
def test_the_most_specific_key_wins(keys, expected):
    scale = lr_scales(deep_tower(), OptimConfig(lr_scale=keys))
    assert {name: scale[name] for name in expected} == expected


def test_vision_layers_decay_towards_the_pixels_by_hand():
    scale = lr_scales(deep_tower(), OptimConfig(lr_scale={"vision": 0.8}, vision_layer_decay=0.5))
    assert scale["vision.ln.weight"] == 0.8
    assert scale["vision.blocks.2.mlp.fc1.bias"] == 0.8
    assert scale["vision.blocks.1.attn.qkv.weight"] == 0.4
    assert scale["vision.blocks.0.norm1.weight"] == 0.2
    assert scale["vision.patch_embed.weight"] == 0.1
    assert scale["resampler.mlp.weight"] == scale["embed_tokens.weight"] == 1.0


def test_groups_hold_every_trained_parameter_once_with_its_rate_and_decay():
    model = small.policy().model
    config = OptimConfig(lr=2.0, lr_scale={"router": 0.01}, freeze=["embeddings"], weight_decay=0.1)
    freeze(model, config)
    groups = parameter_groups(model, config)
    assert {(g["lr_scale"], g["weight_decay"]): g["lr"] for g in groups} == {(1, 0.1): 2, (1, 0): 2, (0.01, 0.1): 0.02}
    named = dict(model.named_parameters())
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(set(named) - {"embed_tokens.weight"})
    for group in groups:
        assert all(named[name] is p for name, p in zip(group["names"], group["params"], strict=True))
    routers = {group["media"]: group["names"] for group in groups if group["lr_scale"] == 0.01}
    assert routers == {False: ["layers.1.mlp.text.router.weight_ED"], True: ["layers.1.mlp.vision.router.weight_ED"]}
    text = {name for group in groups if not group["media"] for name in group["names"]}
    assert {part_of(name) for name in text} == set(Part) - {
        Part.EMBEDDINGS,
        Part.VISION,
        Part.RESAMPLER,
        Part.VISION_EXPERTS,
    }


@pytest.mark.parametrize(
    "settings, told",
    [
        (dict(freeze=["visionn"]), "optim.freeze has the key visionn, which matches no parameter; did you mean vision"),
        (dict(freeze=["layers.7.*"]), r"optim.freeze has the key layers.7.\*, which matches no parameter"),
        (dict(lr_scale={"routers": 0.1}), "optim.lr_scale has the key routers, .* did you mean router"),
        (dict(lr_scale={"embed_token.weight": 0.1}), "did you mean embed_tokens.weight"),
        (dict(freeze=["*"]), "leaves nothing to train"),
    ],
)
def test_a_key_that_does_nothing_is_an_error(settings, told):
    with pytest.raises(UserError, match=told):
        freeze(deep_tower(), OptimConfig(**settings))


def test_a_recipe_of_the_family_fits_its_text_models_and_says_what_is_missing():
    notes = freeze(text_only(), OptimConfig(freeze=["vision"], lr_scale={"router": 0.01, "vision": 0.9, "norms": 2.0}))
    assert notes == [
        "optim.freeze names vision, which this model does not have.",
        "optim.lr_scale names router, vision, which this model does not have.",
    ]


def test_an_adapter_that_would_be_frozen_is_an_error():
    model = small.policy().model
    model.layers[0].self_attn.q_proj.register_parameter("lora_A", torch.nn.Parameter(torch.ones(2, 16)))
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj\.lora_A.*or from peft\.targets"):
        freeze(model, OptimConfig(freeze=["attention"]))


def test_adapters_count_with_the_part_they_adapt():
    model = small.policy().model.requires_grad_(False)
    model.layers[0].self_attn.q_proj.register_parameter("lora_A", torch.nn.Parameter(torch.ones(2, 16)))
    rows = {row.part: row for row in trained_parts(model, OptimConfig(lr=1e-3, lr_scale={"attention": 2.0}))}
    assert (rows[Part.ATTENTION].trained, rows[Part.ATTENTION].lr) == (32, (2e-3, 2e-3))
    assert sum(row.trained for row in rows.values()) == 32 and rows[Part.VISION].lr is None


def test_the_table_adds_up_to_what_the_optimizer_will_hold():
    policy = small.policy()
    config = OptimConfig(freeze=["vision"], lr_scale={"router": 0.5})
    freeze(policy.model, config)
    rows = trained_parts(policy.model, config)
    optimizer = build_optimizer(policy.model, config)
    step(policy, optimizer)
    moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert sum(row.optimizer_bytes for row in rows) == sum(value.nbytes for value in moments)
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in policy.model.parameters())
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(parts_table(rows, config.weight_decay))
    lines = console.export_text().splitlines()
    assert lines[0].split() == ["part", "parameters", "trained", "peak", "lr", "decay", "0.1", "optimizer"]
    told = {line.split()[0]: line.split()[1:] for line in lines}
    assert told["router"] == "128 all 5e-06 all 1.02 kB".split() and told["norms"] == "80 all 1e-05 no 640 B".split()
    assert told["vision"][-1] == "no"


def step(policy, optimizer) -> dict[str, float]:
    row = small.row(small.example(0, 9, image=True), small.example(1, 7))
    return train_step(small.updates(policy, optimizer), SFT, [row], accelerator=small.accelerator(), max_grad_norm=1.0)


def test_frozen_parts_stay_and_leave_nothing_in_the_optimizer():
    policy = small.policy()
    config = OptimConfig(lr=0.1, freeze=["vision", "layers.0.*"])
    freeze(policy.model, config)
    optimizer = build_optimizer(policy.model, config)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    step(policy, optimizer)
    for name, parameter in policy.model.named_parameters():
        frozen = name.startswith(("vision.", "layers.0."))
        assert torch.equal(parameter, before[name]) == frozen, name
        assert (parameter in optimizer.state) != frozen, name


def test_a_frozen_tower_keeps_no_activations():
    """Counted: every tensor the tower's forward saves for the backward pass."""
    policy = small.policy().train()
    model = policy.model
    assert model.vision is not None
    saved = []
    inside = torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda kept: kept)
    model.vision.register_forward_pre_hook(lambda *_: inside.__enter__())
    model.vision.register_forward_hook(lambda *_: inside.__exit__())
    row = small.row(small.example(0, 9, image=True))
    policy(row, row.weight_T.nonzero()[:, 0])
    assert len(saved) > 10
    saved.clear()
    freeze(model, OptimConfig(freeze=["vision"]))
    output = policy(row, row.weight_T.nonzero()[:, 0])
    assert not saved
    output.logprob_T.sum().backward()
    assert model.resampler is not None and model.resampler.mlp.weight.grad is not None


def test_the_loop_sets_each_group_to_its_own_rate():
    policy = small.policy()
    config = OptimConfig(lr_scale={"router": 0.01})
    optimizer = build_optimizer(policy.model, config)
    row = small.row(small.example(1, 7))

    class Rows:
        def next_step(self):
            return [row]

        def state_dict(self) -> dict:
            return {}

        def load_state_dict(self, state: dict) -> None: ...

    hooks = Hooks(log=lambda *_: None, save=lambda _: None, evaluate=lambda _: None)
    plan = Plan(steps=1, learning_rate=lambda _: 3.0, max_grad_norm=1.0, max_skipped=0)
    fit(
        small.updates(policy, optimizer),
        SFT,
        Rows(),
        TrainState(),
        accelerator=small.accelerator(),
        plan=plan,
        hooks=hooks,
    )
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert rates["layers.1.mlp.text.router.weight_ED"] == 0.03 and rates["norm.weight"] == 3.0


def test_random_weights_that_stay_random_are_told():
    with torch.device("meta"):
        model = ErnieModel(small.CONFIG)
    tower = sum(p.numel() for name, p in model.named_parameters() if part_of(name) is Part.VISION)
    (note,) = freeze(model, OptimConfig(freeze=["vision"]), random=True)
    assert f"optim.freeze=['vision'] keeps {tower:,} of them random (vision)" in note and "optim=adamw" in note
    assert freeze(deep_tower(), OptimConfig(freeze=["vision"])) == []  # a checkpoint's weights
    assert freeze(deep_tower(), OptimConfig(freeze=[]), random=True) == []  # nothing stays
    (note,) = freeze(text_only(), OptimConfig(freeze=["vision"]), random=True)
    assert "does not have" in note  # and nothing random is frozen


def test_what_zero_3_has_cut_up_counts_and_decays_as_what_it_was():
    """It leaves an empty tensor of one dimension in its place, and the shape beside it."""
    model = small.policy().model
    rows, groups = trained_parts(model, OptimConfig()), parameter_groups(model, OptimConfig())
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape  # pyright: ignore[reportAttributeAccessIssue]
        parameter.data = torch.empty(0)
    assert trained_parts(model, OptimConfig()) == rows
    cut = parameter_groups(model, OptimConfig())
    assert [(one["names"], one["weight_decay"]) for one in cut] == [
        (one["names"], one["weight_decay"]) for one in groups
    ]
