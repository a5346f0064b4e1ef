"""Losses by what was learned, and what routers do: by hand and against a loop; what is measured changes nothing."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from data.pack import filler
from ernie_model.model import ErnieModel
from ernie_model.moe import RouterStats
from tests.train import small
from train.loop import train_step
from train.objectives.sft import SFT
from train.policy import Policy
from train.telemetry import Layers, Probe, RoutingRecord, SegmentLosses, choices, plain_names

CPU = torch.device("cpu")


def video(seed: int) -> SimpleNamespace:
    """A segment whose image is declared a video by its tokens, which is all that counts here."""
    segment = small.example(seed, 9, image=True)
    return dataclasses.replace(segment, token_T=torch.where(segment.token_T == 40, 43, segment.token_T))


TEXT, IMAGE, VIDEO = small.example(1, 7), small.example(2, 9, image=True, learned=2), video(4)


def named(dataset: str, segment):
    return dataclasses.replace(segment, dataset=dataset)


def step(policy: Policy, rows, beside) -> dict[str, float]:
    rows = [small.in_double(row) for row in rows]
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    return train_step(
        small.updates(policy, optimizer), SFT, rows, accelerator=small.accelerator(), max_grad_norm=1.0, beside=beside
    )


# ------------------------------------------------------------------------------------------ losses by what is learned


def test_losses_by_modality_and_dataset_against_a_loop():
    rows = [
        small.row(named("b/c", TEXT), named("a", IMAGE)),
        small.row(named("a", VIDEO), named("a", small.example(5, 8, learned=5))),
    ]
    policy = small.policy(dtype=torch.float64)
    expected: dict[str, list[float]] = {}
    for row in rows:
        row = small.in_double(row)
        logprob_T = policy(row, row.weight_T.nonzero()[:, 0]).logprob_T.detach()
        modalities = ("text", "image") if row.datasets[0] == "b/c" else ("video", "text")
        parts = zip(logprob_T.split(row.lengths), row.weight_T.split(row.lengths), strict=True)
        for (logprob, weight), name, modality in zip(parts, row.datasets, modalities, strict=True):
            for key in (f"loss_{modality}", f"loss_set_{name.replace('/', '_')}"):
                expected.setdefault(key, []).extend((-logprob[weight > 0]).tolist())
    metrics = step(policy, rows, [SegmentLosses(small.CONFIG, ("a", "b/c"), CPU)])
    found = {key: value for key, value in metrics.items() if key.startswith("loss_")}
    assert found == pytest.approx({key: sum(values) / len(values) for key, values in expected.items()}, rel=1e-12)
    assert len(found) == 5


def test_a_single_dataset_is_not_repeated_and_empty_groups_are_left_out():
    metrics = step(small.policy(dtype=torch.float64), [small.row(TEXT)], [SegmentLosses(small.CONFIG, ("a",), CPU)])
    assert math.isclose(metrics["loss_text"], metrics["loss"], rel_tol=1e-12)
    assert [key for key in metrics if key.startswith("loss_")] == ["loss_text"]


def test_a_text_model_has_text_losses_only():
    """It has no ids of images and videos; comparing tokens with None once ended every run of a text model."""
    ids = {name: None for name in vars(small.CONFIG) if name.startswith(("image_", "video_"))}
    config = small.CONFIG.replace(vision=None, vision_expert_width=0, mrope_section=None, **ids)
    metrics = step(small.policy(dtype=torch.float64), [small.row(TEXT)], [SegmentLosses(config, ("a",), CPU)])
    assert metrics["loss_text"] == pytest.approx(metrics["loss"], rel=1e-12) and "loss_image" not in metrics


def test_a_filler_row_belongs_to_no_dataset():
    rows = [small.row(named("a", TEXT)), filler(3)]
    metrics = step(small.policy(dtype=torch.float64), rows, [SegmentLosses(small.CONFIG, ("a", "b"), CPU)])
    for key in ("loss_text", "loss_set_a"):
        assert math.isclose(metrics[key], metrics["loss"], rel_tol=1e-12)
    assert "loss_set_b" not in metrics


def test_each_update_is_reported_alone():
    policy, losses = small.policy(dtype=torch.float64), SegmentLosses(small.CONFIG, (), CPU)
    for row in (small.row(TEXT), small.row(small.example(6, 9))):
        metrics = step(policy, [row], [losses])
        assert math.isclose(metrics["loss_text"], metrics["loss"], rel_tol=1e-12)


def test_names_fit_in_a_key_and_stay_apart():
    assert plain_names(["a/b c", "a_b_c", "über", "x.y-2"]) == ["a_b_c", "a_b_c_2", "_ber", "x.y-2"]


# ------------------------------------------------------------------------------------------------- what the routers do

STATS = RouterStats(
    token_2=torch.tensor([[4.0, 0.0]]),
    count_2E=torch.tensor([[[6.0, 1.0, 1.0, 0.0], [0.0] * 4]]),
    preferred_2E=torch.zeros(1, 2, 4),
    prob_2E=torch.zeros(1, 2, 4),
    entropy_2=torch.tensor([[2 * math.log(4), 0.0]]),
    square_2=torch.zeros(1, 2),
)


def test_numbers_of_a_layer_by_hand():
    """6 of 8 choices on one of 4 experts: 3 times the mean of 2. Entropy: half of the largest. No vision token."""
    layers = Layers.of((7,), STATS, 0, torch.tensor([0.25]))
    assert layers is not None and layers.share_LE.tolist() == [[3.0, 0.5, 0.5, 0.0]]
    assert layers.metrics("text") == pytest.approx(
        {
            "router_text_drift": 0.25,
            "layer_text_imbalance_07": 3.0,
            "layer_text_dead_07": 1.0,
            "layer_text_entropy_share_07": 0.5,
            "layer_text_drift_07": 0.25,
        }
    )
    assert Layers.of((7,), STATS, 1, None) is None


def test_drift_is_the_share_of_choices_that_changed():
    """Text 4 tokens x K 2: one choice replaced, one token's order swapped: 1/8. The vision tokens change both: 1."""
    policy = small.policy()
    row = small.row(IMAGE)  # 4 vision tokens, 5 text tokens
    now_LTK = choices(policy.model, row)
    assert now_LTK.shape == (1, 9, 2) and (now_LTK[0, :4] >= 4).all() and (now_LTK[0, 4:] < 4).all()
    then_LTK = now_LTK.clone()
    then_LTK[0, 4] = now_LTK[0, 4].flip(0)
    then_LTK[0, 5, 0] = next(e for e in range(4) if e not in now_LTK[0, 5])
    then_LTK[0, :4] = -1
    drift_2L = Probe(row, then_LTK).drift(policy.model)
    torch.testing.assert_close(drift_2L, torch.tensor([[1 / 10], [1.0]], dtype=torch.float64))


def test_drift_of_a_pool_without_tokens_is_unknown():
    policy, row = small.policy(), small.row(TEXT)
    drift_2L = Probe(row, choices(policy.model, row)).drift(policy.model)
    assert drift_2L[0].tolist() == [0.0] and drift_2L[1].isnan().all()


def test_a_probe_comes_back_from_its_file(tmp_path):
    policy = small.policy()
    row = small.row(IMAGE, TEXT)
    probe = Probe(row, choices(policy.model, row))
    probe.save(tmp_path / "probe.safetensors")
    restored = Probe.load(tmp_path / "probe.safetensors")
    assert torch.equal(restored.choice_LTK, probe.choice_LTK)
    assert restored.batch.grids == probe.batch.grids and restored.batch.lengths == probe.batch.lengths
    assert restored.drift(policy.model).tolist() == [[0.0], [0.0]]


def test_choices_leave_the_model_as_it_was():
    policy = small.policy().train()
    moe = policy.model.layers[1].mlp
    policy.model.layers[0].register_forward_hook(lambda m, i, o: (nn.functional.dropout(o[0], 0.5, m.training), o[1]))
    route, state = moe.route, torch.get_rng_state()
    first = choices(policy.model, small.row(IMAGE))
    assert torch.equal(first, choices(policy.model, small.row(IMAGE)))  # without dropout
    assert moe.route is route and policy.model.training and torch.equal(torch.get_rng_state(), state)


class Tracker:
    def __init__(self):
        self.metrics, self.images = {}, []

    def log(self, metrics, step):
        self.metrics[step] = metrics

    def log_image(self, name, path, step):
        self.images.append((name, path.name, step))


def test_pictures_and_numbers_are_of_the_last_update(tmp_path):
    policy, tracker = small.policy(dtype=torch.float64), Tracker()
    record = RoutingRecord(policy.model, tmp_path, every=(2, 0, 5), last=7)
    assert [at for at in range(1, 10) if record.due(at)] == [2, 4, 5, 6, 7, 8]
    for at in (1, 2, 3):
        step(policy, [small.row(TEXT, IMAGE)], [record])
        assert record.stats is not None and record.stats.token_2.tolist() == [[12.0, 4.0]]
        if at > 1:
            record.publish(at, [tracker])
    record.publish(3, [tracker])  # an evaluation at the same step
    assert tracker.images == [
        (f"routing_{pool}", f"routing_{pool}_00000{at}.png", at) for at in (2, 3) for pool in ("text", "vision")
    ]
    assert all((tmp_path / "routing" / name).is_file() for _, name, _ in tracker.images)
    assert record.probe is not None
    now = record.probe.drift(policy.model)[0].mean().item()
    assert tracker.metrics[3]["router_text_drift"] == now and tracker.metrics.keys() == {2, 3}


def test_an_update_that_is_left_out_draws_nothing(tmp_path):
    policy, tracker = small.policy(dtype=torch.float64), Tracker()
    record, row = RoutingRecord(policy.model, tmp_path), small.row(IMAGE)
    step(policy, [row], [record])
    step(policy, [dataclasses.replace(row, patch_PX=row.patch_PX * math.nan)], [record])
    record.publish(2, [tracker])
    assert not tracker.images and not tracker.metrics


def test_the_probe_is_that_of_the_first_start(tmp_path):
    """A resumed run compares with the choices before training; a run begun anew in the folder does not."""
    policy, other = small.policy(seed=0), small.policy(seed=1)
    rows = [small.row(TEXT)]
    RoutingRecord(policy.model, tmp_path).before(rows)
    resumed, anew = RoutingRecord(other.model, tmp_path, step=5), RoutingRecord(other.model, tmp_path)
    resumed.before([small.row(IMAGE)])
    assert resumed.probe is not None and torch.equal(resumed.probe.choice_LTK, choices(policy.model, rows[0]))
    anew.before(rows)
    assert anew.probe is not None and torch.equal(anew.probe.choice_LTK, choices(other.model, rows[0]))


def test_a_dense_model_and_other_ranks_write_nothing(tmp_path):
    dense = ErnieModel(small.CONFIG.replace(sparse_layers=()))
    for record in (RoutingRecord(dense, tmp_path), RoutingRecord(small.policy().model, None)):
        record.before([small.row(TEXT)])
        record.after_update(torch.optim.SGD(dense.parameters()), STATS)
        record.publish(1, [Tracker()])
    assert not any(tmp_path.iterdir())


def test_watching_changes_no_number(tmp_path):
    results = []
    for watched in (False, True):
        policy = small.policy(dtype=torch.float64)
        beside = [SegmentLosses(small.CONFIG, (), CPU), RoutingRecord(policy.model, tmp_path)] if watched else []
        metrics = step(policy, [small.row(TEXT), small.row(IMAGE)], beside)
        results.append((metrics, policy.state_dict()))
    (plain, before), (found, after) = results
    assert {key: found[key] for key in plain} == plain
    assert all(torch.equal(before[name], after[name]) for name in before)
