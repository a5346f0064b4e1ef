"""The loop, by hand and by invariance: a step is the step of the whole batch however it is cut up."""

import dataclasses
import math

import pytest
import torch

from data.batch import PackedBatch
from ernie_model.moe import RouterStats
from tests.train import small
from train.config import (
    ObjectiveConfig,
    OptimConfig,
    PeftConfig,
    PeftKind,
    Schedule,
    UserError,
)
from train.loop import Hooks, Interrupted, Plan, TrainState, fit, router_summary, train_step
from train.lora.adapt import adapt
from train.objectives import Objective, sft
from train.objectives.sft import SFT
from train.optim import learning_rate

E = [small.example(seed, length, image=seed % 2 == 0) for seed, length in enumerate((9, 7, 12, 6))]


def gradients(rows: list[PackedBatch], objective: Objective = SFT) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The gradient of one step in float64, caught where the optimizer would use it."""
    policy = small.policy(dtype=torch.float64)
    caught: dict[str, torch.Tensor] = {}

    class Catch(torch.optim.SGD):
        def step(self, closure=None):
            caught.update({name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})

    metrics = train_step(
        small.updates(policy, Catch(policy.parameters(), lr=1.0)),
        objective,
        [small.in_double(row) for row in rows],
        accelerator=small.accelerator(),
        max_grad_norm=1e9,
    )
    return caught, metrics


def test_cutting_a_batch_into_microbatches_changes_nothing():
    whole, whole_metrics = gradients([small.row(*E)])
    parts, parts_metrics = gradients([small.row(E[0]), small.row(E[1], E[2]), small.row(E[3])])
    assert whole.keys() == parts.keys()
    scale = max(value.abs().max().item() for value in whole.values())
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=1e-12 * scale, msg=name)
    for key in ("loss", "accuracy", "tokens", "units", "router_text_imbalance", "router_vision_entropy"):
        assert math.isclose(parts_metrics[key], whole_metrics[key], rel_tol=1e-12), key


def test_loss_is_the_mean_over_target_tokens_of_the_whole_step():
    """Rows with 3 and 1 targets: (3 a + b) / 4, not the mean of two means."""
    policy = small.policy()
    rows = [small.row(E[0]), small.row(small.example(9, 8, learned=1))]
    nll = []
    for row in rows:
        output = policy(row, row.weight_T.nonzero()[:, 0])
        nll.append(-(output.logprob_T * row.weight_T).sum().item())
    metrics = train_step(
        small.updates(policy, small.optimizer(policy)),
        SFT,
        rows,
        accelerator=small.accelerator(),
        max_grad_norm=1.0,
    )
    assert metrics["units"] == 4
    assert math.isclose(metrics["loss"], sum(nll) / 4, rel_tol=1e-6)


def test_token_balanced_gradients_are_divided_by_the_room_of_the_update():
    """6 targets, room for 16 tokens: the gradient is 6/16 = 0.375 of the plain one, the value is the same."""
    rows = [small.row(E[0]), small.row(E[1])]  # 3 targets each, 16 positions
    plain, plain_metrics = gradients(rows)
    objective = sft.build(ObjectiveConfig(token_balanced=True), positions=16)
    found, metrics = gradients(rows, objective)
    scale = max(value.abs().max().item() for value in plain.values())
    for name in plain:
        torch.testing.assert_close(found[name], 0.375 * plain[name], rtol=0, atol=1e-12 * scale, msg=name)
    assert metrics["loss"] == plain_metrics["loss"] and metrics["units"] == 6
    # the same update in one row
    whole, _ = gradients([small.row(E[0], E[1])], objective)
    for name in plain:
        torch.testing.assert_close(whole[name], found[name], rtol=0, atol=1e-12 * scale, msg=name)


def test_a_target_weighs_the_same_whatever_else_is_in_a_token_balanced_update():
    """Gradients of two updates add up to that of both together. Plain means do not: they divide by other counts."""
    objective = sft.build(ObjectiveConfig(token_balanced=True), positions=40)
    few, many = small.row(small.example(9, 8, learned=1)), small.row(small.example(8, 12, learned=9))
    apart = [gradients([row], objective)[0] for row in (few, many)]
    together, _ = gradients([few, many], objective)
    scale = max(value.abs().max().item() for value in together.values())
    for name, value in together.items():
        torch.testing.assert_close(apart[0][name] + apart[1][name], value, rtol=0, atol=1e-12 * scale, msg=name)


def test_policy_scores_only_learned_rows_and_matches_a_full_softmax():
    policy, row = small.policy(dtype=torch.float64), small.in_double(small.row(*E))
    output = policy(row, row.weight_T.nonzero()[:, 0])
    from ernie_model.context import Packed

    hidden_TD = policy.model(
        row.token_T, row.position_3T, Packed(row.lengths), patch_PX=row.patch_PX, grids=row.grids
    ).hidden_TD
    logit_TV = hidden_TD @ policy.model.head_VD.T
    expected_T = logit_TV.log_softmax(-1).gather(1, row.target_T[:, None])[:, 0] * (row.weight_T != 0)
    torch.testing.assert_close(output.logprob_T, expected_T, rtol=0, atol=1e-12)
    correct_T = (logit_TV.argmax(-1) == row.target_T) & (row.weight_T != 0)
    assert output.correct_T.tolist() == correct_T.tolist()


def test_text_and_image_tokens_are_counted_apart():
    _, metrics = gradients([small.row(E[0], E[1])])  # 9 + 7 tokens, one image: 2 visual tokens of 8 patches
    counts = {key: metrics[key] for key in ("tokens", "text_tokens", "image_tokens", "patches")}
    assert counts == {"tokens": 16, "text_tokens": 14, "image_tokens": 2, "patches": 8}


def test_router_summary_by_hand():
    """One layer, E = 4, K = 2. Text: 6 of 8 choices go to expert 0 (mean 2), expert 3 gets none. No vision token.

    Balance: 4 * (1/2 * 6/4 + 1/4 * 1/4 + 1/4 * 1/4) = 3.5; z: 12 / 4.
    """
    chosen = torch.tensor([[[6.0, 1.0, 1.0, 0.0], [0.0] * 4]])
    stats = RouterStats(
        token_2=torch.tensor([[4.0, 0.0]]),
        count_2E=chosen,
        preferred_2E=chosen,
        prob_2E=torch.tensor([[[2.0, 1.0, 1.0, 0.0], [0.0] * 4]]),
        entropy_2=torch.tensor([[2.0, 0.0]]),
        square_2=torch.tensor([[12.0, 0.0]]),
    )
    assert router_summary(stats) == {
        "router_text_imbalance": 3.0,
        "router_text_dead": 1.0,
        "router_text_entropy": 0.5,
        "router_text_balance": 3.5,
        "router_text_z": 3.0,
    }


def poisoned(row: PackedBatch) -> PackedBatch:
    assert row.patch_PX is not None
    return dataclasses.replace(row, patch_PX=row.patch_PX * math.nan)


def test_an_update_that_is_not_finite_is_left_out():
    policy = small.policy()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    optimizer = small.optimizer(policy)
    step = dict(accelerator=small.accelerator(), max_grad_norm=1.0)
    metrics = train_step(small.updates(policy, optimizer), SFT, [small.row(E[1]), poisoned(small.row(E[0]))], **step)
    assert metrics["skipped"] == 1
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert not optimizer.state  # nor did AdamW's moments see it
    assert train_step(small.updates(policy, optimizer), SFT, [small.row(E[0])], **step)["skipped"] == 0
    assert any(not torch.equal(value, before[name]) for name, value in policy.state_dict().items())


class Rows:
    """A source that repeats one step."""

    def __init__(self, *rows: PackedBatch):
        self.rows = list(rows)

    def next_step(self) -> list[PackedBatch]:
        return self.rows

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None: ...


def run(source, *, steps: int, stop=lambda: False, state: TrainState | None = None, evaluate=None, **settings):
    """`fit` on the small model; returns what happened, in order, and the learning rates of the updates."""
    happened: list[str] = []
    rates: list[float] = []
    policy = small.policy()
    plan = Plan(
        **{
            "steps": steps,
            "learning_rate": lambda step: 1e-3 * (step + 1),
            "max_grad_norm": 1.0,
            "max_skipped": 1,
            "save_every": 2,
            "evaluate_every": 3,
            **settings,
        }
    )

    def log(step, metrics):
        rates.append(metrics["lr"])
        happened.append(f"log {step}")

    hooks = Hooks(
        log=log,
        save=lambda state: happened.append(f"save {state.step}"),
        evaluate=evaluate or (lambda state: happened.append(f"evaluate {state.step}")),
        stop=stop,
    )
    finished = fit(
        small.updates(policy, small.optimizer(policy)),
        SFT,
        source,
        state or TrainState(),
        accelerator=small.accelerator(),
        plan=plan,
        hooks=hooks,
    )
    return finished, happened, rates


def test_rows_that_reach_nothing_that_trains_change_nothing():
    policy = small.policy()
    adapt(policy.model, PeftConfig(kind=PeftKind.lora, targets=["vision_experts"], rank=2), seed=0)
    updates = small.updates(policy, small.optimizer(policy))
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}

    def step(*rows: PackedBatch) -> dict[str, torch.Tensor]:
        metrics = train_step(updates, SFT, rows, accelerator=small.accelerator(), max_grad_norm=1.0)
        assert not metrics["skipped"]
        return {name: p.detach().clone() for name, p in trained.items()}

    text, image = small.row(small.example(1, 12)), small.row(small.example(0, 9, image=True))
    before = {name: p.detach().clone() for name, p in trained.items()}
    after = step(text)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    moved = step(text, image)
    assert any(not torch.equal(moved[name], value) for name, value in before.items())


def test_fit_logs_evaluates_and_saves_when_due():
    finished, happened, rates = run(Rows(small.row(E[1])), steps=5)
    assert finished
    assert happened == "log 1,log 2,save 2,log 3,evaluate 3,log 4,save 4,log 5,evaluate 5,save 5".split(",")
    assert rates == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3, 5e-3])


def test_fit_goes_on_from_the_step_it_is_given():
    _, happened, rates = run(Rows(small.row(E[1])), steps=5, state=TrainState(step=4))
    assert happened == ["log 5", "evaluate 5", "save 5"] and rates == pytest.approx([5e-3])


def test_fit_saves_and_leaves_when_it_is_asked_to_stop():
    asked = iter([False, False, True])
    finished, happened, _ = run(Rows(small.row(E[1])), steps=9, stop=lambda: next(asked), save_every=0)
    assert not finished and happened[-1] == "save 3"


class Stopping(Rows):
    """Asked to end while the rows of update `at` (from 1) are on their way."""

    def __init__(self, *rows: PackedBatch, at: int):
        super().__init__(*rows)
        self.left = at

    def next_step(self) -> list[PackedBatch]:
        self.left -= 1
        if not self.left:
            raise Interrupted
        return self.rows


@pytest.mark.parametrize(
    "at, happened",
    [
        (1, []),  # nothing is done: a start would begin where this one did
        (2, ["log 1", "save 1"]),
        (3, ["log 1", "log 2", "save 2"]),  # it was due, and is not done twice
    ],
)
def test_fit_saves_what_is_done_when_what_comes_next_is_dropped(at, happened):
    finished, seen, _ = run(Stopping(small.row(E[1]), at=at), steps=9, evaluate_every=0)
    assert not finished and seen == happened


def test_fit_leaves_an_evaluation_that_is_dropped_to_the_start_that_goes_on():
    def evaluate(state):
        raise Interrupted

    state = TrainState()
    finished, seen, _ = run(Rows(small.row(E[1])), steps=9, save_every=0, state=state, evaluate=evaluate)
    assert not finished and seen[-1] == "save 3" and state.evaluations == []
    _, seen, _ = run(Stopping(small.row(E[1]), at=1), steps=9, save_every=0, state=state)
    assert seen == ["evaluate 3"]


def test_fit_gives_up_when_too_many_updates_are_not_finite():
    state = TrainState()
    with pytest.raises(UserError, match=r"step 2: .* not finite, for the 2\. time; optim\.max_skipped allows 1"):
        run(Rows(poisoned(small.row(E[0]))), steps=9, state=state)
    assert state.step == 2


@pytest.mark.parametrize(
    "schedule, expected",
    [
        # 2 of warm-up: 1/3 and 2/3 of the peak; then from the peak to a tenth of it in 4 steps
        (Schedule.constant, [1 / 3, 2 / 3, 1, 1, 1, 1, 1]),
        (Schedule.linear, [1 / 3, 2 / 3, 1, 0.775, 0.55, 0.325, 0.1]),
        (
            Schedule.cosine,
            [1 / 3, 2 / 3, 1, 0.1 + 0.45 * (1 + math.sqrt(0.5)), 0.55, 0.1 + 0.45 * (1 - math.sqrt(0.5)), 0.1],
        ),
    ],
)
def test_learning_rate_by_hand(schedule, expected):
    config = OptimConfig(lr=1.0, warmup_steps=2, schedule=schedule, min_lr_ratio=0.1)
    assert [learning_rate(step, 7, config) for step in range(7)] == pytest.approx(expected)


def test_only_matrices_decay():
    policy = small.policy()
    groups: dict[float, list[str]] = {}
    for group in small.optimizer(policy, weight_decay=0.1).param_groups:
        groups.setdefault(group["weight_decay"], []).extend(group["names"])
    assert groups.keys() == {0.1, 0.0}
    decays, spared = groups[0.1], groups[0.0]
    assert "layers.1.mlp.text.experts.gate_up_EFD" in decays and "layers.0.self_attn.q_proj.weight" in decays
    assert "embed_tokens.weight" in spared and "norm.weight" in spared and "vision.blocks.0.norm1.bias" in spared
    assert sorted(decays + spared) == sorted(name for name, _ in policy.model.named_parameters())
