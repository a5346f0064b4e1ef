"""Which records an update saw, and which of them made it fail."""

import dataclasses
import json
import math

import pytest
import torch

from data.batch import PackedBatch
from tests.train import small
from train.ledger import Evidence, Ledger, bare, drop_after, is_spike, names, nonfinite_entry, spike_entry
from train.loop import Hooks, Plan, TrainState, fit, train_step
from train.objectives.sft import SFT

TEXT, IMAGE, LONG = small.example(1, 7), small.example(0, 9, image=True), small.example(3, 12, learned=5)


def poisoned(row: PackedBatch) -> PackedBatch:
    assert row.patch_PX is not None
    return dataclasses.replace(row, patch_PX=row.patch_PX * math.nan)


def step(rows, policy=None) -> tuple[dict[str, float], Evidence]:
    policy = policy or small.policy()
    evidence = Evidence()
    metrics = train_step(
        small.updates(policy, small.optimizer(policy)),
        SFT,
        rows,
        accelerator=small.accelerator(),
        max_grad_norm=1.0,
        evidence=evidence,
    )
    return metrics, evidence


def test_the_one_record_whose_pixels_are_nan_is_named_among_its_neighbours():
    metrics, evidence = step([small.row(LONG), poisoned(small.row(TEXT, IMAGE))])
    assert metrics["skipped"] == 1
    entry = nonfinite_entry(7, metrics, evidence, evidence.segments())
    assert entry["step"] == 7 and entry["records"] == ["0"] and "suspects" not in entry
    assert entry["loss"] == "nan" and entry["gradients"]["vision"][0] > 0
    json.loads(json.dumps(entry, allow_nan=False))


def test_a_gradient_that_breaks_on_its_way_back_names_the_part_and_all_suspects():
    policy = small.policy()
    policy.model.layers[0].self_attn.q_proj.weight.register_hook(lambda gradient: gradient * math.inf)
    metrics, evidence = step([small.row(LONG, TEXT)], policy)
    assert metrics["skipped"] == 1 and math.isfinite(metrics["loss"])
    entry = nonfinite_entry(2, metrics, evidence, evidence.segments())
    assert entry["records"] == [] and entry["suspects"] == ["3", "1"]
    # the norm of all gradients is not finite; scaling by it first would have spoilt every part
    assert list(entry["gradients"]) == ["attention"] and entry["gradients"]["attention"][0] == 1


def test_losses_of_segments_by_hand():
    """Two segments of 3 and 2 tokens: (1 + 3) / 2 targets and 5 / 1; a row that is not learned may hold anything."""
    batch = PackedBatch(
        token_T=torch.zeros(5, dtype=torch.int64),
        target_T=torch.zeros(5, dtype=torch.int64),
        weight_T=torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0]),
        position_3T=torch.zeros(3, 5, dtype=torch.int64),
        lengths=(3, 2),
        ids=("a", "b"),
        datasets=("charts", "charts"),
    )
    evidence = Evidence()
    evidence.add(batch, torch.tensor([-1.0, -3.0, math.nan, -5.0, math.nan]))
    assert evidence.segments() == [("charts/a", 2.0), ("charts/b", 5.0)]
    assert names(dataclasses.replace(batch, datasets=())) == ["a", "b"]


def test_a_pair_is_named_once_with_all_its_answers():
    """Segments of 2, 2 and 3 tokens are one record, (1 + 2 + 6) / 3 targets; then one of its own, 4 / 1."""
    weight_T = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    batch = PackedBatch(
        token_T=torch.zeros(9, dtype=torch.int64),
        target_T=torch.zeros(9, dtype=torch.int64),
        weight_T=weight_T,
        position_3T=torch.zeros(3, 9, dtype=torch.int64),
        lengths=(2, 2, 3, 2),
        ids=("a", "a", "a", "b"),
        records=(0, 0, 0, 1),
    )
    evidence = Evidence()
    evidence.add(batch, -torch.tensor([9.0, 9.0, 1.0, 9.0, 2.0, 6.0, 9.0, 4.0, 9.0]))
    assert evidence.segments() == [("a", 3.0), ("b", 4.0)]
    assert names(batch) == ["a", "b"]


def test_a_name_without_its_wrappers():
    assert bare("module.model.norm.weight") == bare("model.norm.weight") == bare("norm.weight") == "norm.weight"


def test_spikes_by_hand():
    """median 3, distances 2 1 0 1 6 → MAD 1: with a factor of 2 the border is 5."""
    recent = [1.0, 2.0, 3.0, 4.0, 9.0] * 4
    assert not is_spike(5.0, recent, 2) and is_spike(5.01, recent, 2)
    assert not is_spike(100.0, recent[:15], 2)  # too few to know what is usual
    entry = spike_entry(4, 9.0, 1.0, evidence_of(("a", 1.0), ("b", 17.0), ("c", 9.0)), most=2)
    assert entry == {"step": 4, "loss": 9.0, "usual": 1.0, "records": [["b", 17.0], ["c", 9.0]]}


def evidence_of(*pairs):
    from train.ledger import Segment

    return [Segment(*pair) for pair in pairs]


def test_lines_beyond_the_checkpoint_and_torn_ones_are_dropped(tmp_path):
    ledger = Ledger(tmp_path, step=0)
    for number in range(1, 5):
        ledger.saw(number, [small.row(TEXT, IMAGE), small.row(LONG)])
    ledger.write("nonfinite.jsonl", {"step": 2})
    ledger.write("nonfinite.jsonl", {"step": 4})
    ledger.close()
    with (tmp_path / "data" / "rank-0.jsonl").open("a") as file:
        file.write('{"step": 5, "ro')
    (tmp_path / "data" / "rank-1.jsonl").write_text('{"step": 4, "rows": []}\n')  # of a start on two ranks
    Ledger(tmp_path, step=3).close()
    lines = [json.loads(line) for line in (tmp_path / "data" / "rank-0.jsonl").read_text().splitlines()]
    assert lines == [{"step": number, "rows": [["1", "0"], ["3"]]} for number in (1, 2, 3)]
    assert (tmp_path / "nonfinite.jsonl").read_text() == '{"step": 2}\n'
    assert (tmp_path / "data" / "rank-1.jsonl").read_text() == ""
    drop_after(tmp_path / "absent.jsonl", 3)
    assert not (tmp_path / "absent.jsonl").exists()


class Rows:
    def __init__(self, steps):
        self.steps = iter(steps)

    def next_step(self):
        return next(self.steps)

    def state_dict(self):
        return {}

    def load_state_dict(self, state): ...


def fitted(steps, **plan):
    told, rates = [], []
    state = TrainState()
    policy = small.policy()
    optimizer = small.optimizer(policy)
    hooks = Hooks(
        log=lambda step, metrics: rates.append(optimizer.param_groups[0]["lr"]),
        save=lambda state: None,
        evaluate=lambda state: None,
        saw=lambda step, rows: told.append(f"saw {step} {' '.join(names(rows[0]))}"),
        nonfinite=lambda step, metrics, evidence: told.append(f"nonfinite {step}"),
        spiked=lambda step, loss, usual, evidence: told.append(f"spike {step} {evidence.segments()[0].record}"),
    )
    fit(
        small.updates(policy, optimizer),
        SFT,
        Rows(steps),
        state,
        accelerator=small.accelerator(),
        plan=Plan(
            **{"steps": len(steps), "learning_rate": lambda s: 1e-6 * (s + 1), "max_grad_norm": 1.0, "max_skipped": 9}
            | plan
        ),
        hooks=hooks,
    )
    return state, told, rates


def test_a_skipped_update_moves_the_schedule_and_nothing_else():
    state, told, rates = fitted([[small.row(TEXT)], [poisoned(small.row(IMAGE))], [small.row(LONG)]])
    assert told == ["saw 1 1", "saw 2 0", "nonfinite 2", "saw 3 3"]
    assert state.skipped == 1 and state.step == 3 and len(state.recent) == 2  # a nan is no usual loss
    assert rates == pytest.approx([1e-6, 2e-6, 3e-6])


def test_an_update_with_nothing_to_learn_is_not_called_broken():
    nothing = small.row(dataclasses.replace(TEXT, weight_T=torch.zeros(7)))
    state, told, _ = fitted([[nothing], [small.row(LONG)]], max_skipped=0)
    assert state.skipped == 0 and not [line for line in told if "nonfinite" in line]


def test_a_loss_far_above_the_last_ones_is_told_and_the_window_is_kept():
    rows = [[small.row(small.example(50 + n, 9))] for n in range(21)]
    rows.sort(key=lambda row: step(row)[0]["loss"])  # the largest comes last
    state, told, _ = fitted(rows, spike=1e-3)
    assert told[-1] == f"spike 21 {rows[-1][0].ids[0]}"
    assert len(state.recent) == 21
    assert not [line for line in fitted(rows)[1] if "spike" in line]  # off by default
