"""Adapters in a model: which parts, what trains, what a checkpoint holds, folders in and out."""

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch

from ernie_model.checkpoint import load_model, save_model
from ernie_model.model import ErnieModel
from tests.train import small
from train import checkpoint
from train.config import (
    TARGETS,
    PeftConfig,
    PeftKind,
    UserError,
)
from train.loop import train_step
from train.lora.adapt import Adapters, adapt
from train.lora.files import shortest
from train.objectives.sft import SFT
from train.reach import Reach, unreached_parts

LORA = PeftConfig(kind=PeftKind.lora, targets=list(TARGETS), rank=4, alpha=8.0)
PROCESSOR = SimpleNamespace(save=lambda folder: None)
ROWS = [[small.row(small.example(10 * step, 9, image=True), small.example(10 * step + 1, 7))] for step in range(6)]


def settings(**changes) -> PeftConfig:
    return dataclasses.replace(LORA, **changes)


def randomise(adapters: Adapters, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def logprobs(policy) -> torch.Tensor:
    batch = ROWS[0][0]
    with torch.no_grad():
        return policy(batch, torch.arange(batch.num_tokens)).logprob_T


def adapted(config: PeftConfig = LORA, seed: int = 0):
    policy = small.policy(seed=0)
    return policy, adapt(policy.model, config, seed=seed)


# ----------------------------------------------------------------------------------------- which parts, what trains


def test_a_new_adapter_changes_nothing_and_every_part_is_covered():
    before = logprobs(small.policy())
    policy, adapters = adapted(settings(ranks={"vision_experts": 2}, alphas={"dense": 3.0}))
    assert torch.equal(logprobs(policy), before)  # B is zero
    table = {row.part.value: row for row in adapters.coverage()}
    assert set(table) == set(TARGETS)
    assert (table["vision_experts"].modules, table["vision_experts"].rank) == (1, 2)
    # gate_up: A 4 x 2 x 16, B 4 x 8 x 2; down: A 4 x 2 x 4, B 4 x 16 x 2
    assert table["vision_experts"].parameters == 128 + 64 + 32 + 128
    assert (table["dense"].modules, table["dense"].alpha) == (3, 3.0)
    assert table["attention"].modules == 8
    assert table["vision"].modules == 5  # patches, qkv, proj, fc1, fc2
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert sum(row.parameters for row in table.values()) == sum(
        p.numel() for p in policy.model.parameters() if p.requires_grad
    )


@pytest.mark.parametrize("kind", ["lora", "none"])
def test_parts_that_no_token_reached_are_told(kind):
    policy = adapted()[0] if kind == "lora" else small.policy()
    updates, device = small.updates(policy, small.optimizer(policy)), small.accelerator().device
    reached: list[str] = []

    def step(row):
        beside = [Reach(updates, reached, device)]
        train_step(updates, SFT, [row], accelerator=small.accelerator(), max_grad_norm=1.0, beside=beside)
        return [part.value for part in unreached_parts(policy.model, reached)]

    assert step(small.row(small.example(0, 9))) == ["vision_experts", "vision", "resampler"]
    # The only sparse layer is the last one: its vision experts learn where the image's own last token has a target.
    assert step(small.row(small.example(1, 9, image=True, learned=6))) == []
    assert step(small.row(small.example(0, 9))) == []  # once is enough


def test_null_targets_are_the_language_model():
    _, adapters = adapted(settings(targets=None))
    parts = [row.part.value for row in adapters.coverage()]
    assert parts == ["attention", "dense", "shared", "text_experts", "vision_experts"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(targets=["vision"]),
            "peft.targets names vision, but this model has no such modules. It has: attention, ",
        ),
        (dict(targets=["attention"], ranks={"dense": 2}), "peft.ranks names dense, which is not among peft.targets"),
        (dict(targets=["text_experts"], dora=True), "peft.dora=True cannot be used on text_experts"),
        (dict(targets=["attention", "text_experts"], dropout=0.1), "peft.dropout=0.1 cannot be used on text_experts"),
        (dict(init_from="/nowhere"), "peft.init_from=/nowhere cannot be read as an adapter"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes, message):
    config = small.CONFIG.replace(vision=None, vision_expert_width=0, mrope_section=None)
    model = ErnieModel(config)
    with pytest.raises(UserError, match=re.escape(message)):
        adapt(model, settings(**dict(targets=["attention"]) | changes), seed=0)


def test_frozen_weights_are_kept_as_they_are_computed_and_give_the_same_numbers():
    before = small.policy()
    before.model.compute_dtype = torch.bfloat16
    expected = logprobs(before)
    policy = small.policy()
    policy.model.compute_dtype = torch.bfloat16
    adapt(policy.model, LORA, seed=0)
    kinds = {(("lora_" in n), ("router" in n), p.dtype) for n, p in policy.model.named_parameters()}
    assert kinds == {(True, False, torch.float32), (False, True, torch.float32), (False, False, torch.bfloat16)}
    assert torch.equal(logprobs(policy), expected)


# --------------------------------------------------------------------------------------------------------- checkpoints


def test_resumed_equals_uninterrupted_bit_for_bit_and_the_checkpoint_holds_the_adapter_alone(tmp_path):
    def steps(policy, optimizer, rows):
        step = dict(accelerator=small.accelerator(), max_grad_norm=1.0)
        return [train_step(small.updates(policy, optimizer), SFT, row, **step)["loss"] for row in rows]

    policy, adapters = adapted(settings(targets=["attention", "dense", "resampler"], dropout=0.2))
    policy.train()
    optimizer = small.optimizer(policy, lr=1e-2)
    losses = steps(policy, optimizer, ROWS[:3])
    path = checkpoint.save(tmp_path, 3, weights=adapters, optimizer=optimizer, state={}, keep=2).path
    losses += steps(policy, optimizer, ROWS[3:])

    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    held = {f"{name}/{kind}" for name in trained for kind in ("weight", "exp_avg", "exp_avg_sq", "step")}
    assert checkpoint.pieces_of(path).stored.keys() == held

    other, others = adapted(settings(targets=["attention", "dense", "resampler"], dropout=0.2), seed=9)
    other.train()
    other_optimizer = small.optimizer(other, lr=1e-2)
    checkpoint.load(path, weights=others, optimizer=other_optimizer)
    checkpoint.load_generators(path, rank=0)
    assert steps(other, other_optimizer, ROWS[3:]) == losses[3:]
    for name, value in policy.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.parametrize("tensor", ["embed_tokens.weight", "layers.1.mlp.vision.experts.base_layer.down_EDF"])
def test_a_checkpoint_knows_its_frozen_weights(tmp_path, tensor):
    policy, adapters = adapted()
    path = checkpoint.save(tmp_path, 1, weights=adapters, optimizer=small.optimizer(policy), state={}, keep=1).path
    policy, adapters = adapted()
    both = dict(weights=adapters, optimizer=small.optimizer(policy))
    checkpoint.load(path, **both)
    policy, adapters = adapted()
    both = dict(weights=adapters, optimizer=small.optimizer(policy))
    with torch.no_grad():
        adapters.model.state_dict()[tensor].view(-1)[5] += 1e-3
    with pytest.raises(UserError, match="frozen weights under this adapter are not those it was trained on"):
        checkpoint.load(path, **both)


def test_the_fingerprint_does_not_depend_on_the_adapter():
    _, one = adapted()
    _, two = adapted(seed=5)
    randomise(two)
    assert one.rests_on() == two.rests_on()


# ------------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("changes", [{}, dict(rslora=True), dict(targets=["attention", "vision"], dora=True)])
def test_merged_and_unmerged_agree_and_an_adapter_goes_on_from_its_folder(tmp_path, changes):
    config = settings(**changes, merge=True)
    policy, adapters = adapted(config)
    randomise(adapters)
    expected = logprobs(policy)
    adapter, merged = adapters.publish(tmp_path, "export", PROCESSOR)
    assert [p.name for p in (adapter, merged)] == ["adapter", "export"]
    assert (expected - logprobs(small.policy())).abs().max() > 0.1

    again, _ = adapted(dataclasses.replace(config, init_from=str(adapter)), seed=7)
    assert torch.equal(logprobs(again), expected)
    whole = small.Policy(load_model(merged))
    torch.testing.assert_close(logprobs(whole), expected, rtol=1e-5, atol=1e-5)


def test_best_and_export_have_their_own_folders(tmp_path):
    _, adapters = adapted()
    names = [path.name for name in ("best", "export") for path in adapters.publish(tmp_path, name, PROCESSOR)]
    assert names == ["best_adapter", "adapter"]


def test_the_same_adapter_on_a_base_with_other_shards(tmp_path):
    policy, adapters = adapted()
    randomise(adapters)
    (folder,) = adapters.publish(tmp_path, "export", PROCESSOR)
    save_model(small.policy().model, tmp_path / "base", max_shard_bytes=4000)
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 3
    model = load_model(tmp_path / "base")
    other = adapt(model, settings(init_from=str(folder)), seed=1)
    assert other.rests_on() == adapters.rests_on()
    assert torch.equal(logprobs(small.Policy(model)), logprobs(policy))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(targets=["attention"]), "Set peft.targets to what the folder has"),
        (dict(rank=2), "has rank 4 at"),
        (dict(alpha=16.0), r"has scale \(alpha, rank, rslora\) 2.0 at"),
        (dict(rslora=True), r"has scale"),
    ],
)
def test_an_adapter_that_does_not_fit_the_settings_is_refused(tmp_path, changes, message):
    _, adapters = adapted()
    (folder,) = adapters.publish(tmp_path, "export", PROCESSOR)
    with pytest.raises(UserError, match=message):
        adapted(settings(init_from=str(folder), **changes))


def test_several_adapters_act_together_and_one_trains(tmp_path):
    first, one = adapted()
    randomise(one)
    (folder,) = one.publish(tmp_path, "export", PROCESSOR)
    effect = logprobs(first)

    config = settings(targets=["attention", "vision_experts"], rank=2, frozen={"style": str(folder)}, merge=True)
    policy, both = adapted(config)
    assert torch.equal(logprobs(policy), effect)  # the new one is still zero
    trained = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert trained and not [name for name in trained if ".style" in name]
    randomise(both, seed=4)
    expected = logprobs(policy)
    adapter, merged = both.publish(tmp_path / "second", "export", PROCESSOR)
    whole = small.Policy(load_model(merged))
    torch.testing.assert_close(logprobs(whole), expected, rtol=1e-5, atol=1e-5)
    again, _ = adapted(dataclasses.replace(config, init_from=str(adapter)))
    assert torch.equal(logprobs(again), expected)


def test_targets_are_named_as_shortly_as_they_are_unambiguous():
    everything = ["m.layers.0.attn.q_proj", "m.layers.0.mlp.up", "m.layers.0.shared.up", "m.res.mlp"]
    assert shortest(["m.layers.0.attn.q_proj"], everything) == ["q_proj"]
    assert shortest(["m.layers.0.mlp.up"], everything) == ["m.layers.0.mlp.up"]
    assert shortest(["m.layers.0.mlp.up", "m.layers.0.shared.up"], everything) == ["up"]
    assert shortest(["m.res.mlp"], everything) == ["m.res.mlp"]  # layers have an `mlp` too
