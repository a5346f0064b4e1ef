"""What a device could reach."""

import re

import pytest
import torch

from ernie_model.flops import forward_flops, training_flops
from ernie_model.parts import Part
from tests.train import small
from train import efficiency
from train.config import OptimConfig
from train.loop import Clock, train_step
from train.objectives.sft import SFT
from train.trained import freeze


@pytest.mark.parametrize(
    "name, tflops",
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA H20", 148)]
    + [("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("NVIDIA GB200", 2500)]
    + [("NVIDIA L40", 181), ("NVIDIA GH200 480GB", 989)],
)
def test_known_devices_by_their_data_sheet(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert efficiency.peak_flops(torch.device("cuda"), torch.bfloat16) == tflops * 1e12


def test_a_device_whose_name_begins_like_another_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA RTX A1000 Laptop GPU")
    monkeypatch.setattr(efficiency, "measured_flops", lambda device, dtype: 1.0)
    assert efficiency.peak_flops(torch.device("cuda"), torch.bfloat16) == 1.0


def test_no_name_of_the_table_hides_a_later_one():
    """The first match counts, so no name may be a word of one that comes after it."""
    names = list(efficiency.BF16_TFLOPS)
    for index, name in enumerate(names):
        assert not [later for later in names[index + 1 :] if re.search(rf"\b{name}\b", later)]


def test_an_update_counts_what_its_rows_ask_for():
    """Frozen vision: forward only there. Two ranks and micro-batches are sums."""
    policy = small.policy()
    freeze(policy.model, OptimConfig(freeze=["vision"]))
    work = efficiency.Work(policy.model, small.CONFIG, torch.device("cpu"))
    rows = [small.row(small.example(0, 9, image=True)), small.row(small.example(1, 7), small.example(2, 5))]
    expected = 0.0
    for lengths, grids, learned in (((9,), (small.IMAGE,), 3), ((7, 5), (), 6)):
        forward = forward_flops(small.CONFIG, lengths=lengths, grids=grids, learned=learned)
        expected += training_flops(forward, set(Part) - {Part.VISION})
    metrics = train_step(
        small.updates(policy, small.optimizer(policy)),
        SFT,
        rows,
        accelerator=small.accelerator(),
        max_grad_norm=1.0,
        beside=[work],
    )
    assert metrics["flops"] == expected


def test_the_share_of_the_peak():
    clock = Clock(0, 10, peak_flops=1e9)
    clock.begin -= 2.0  # the step took two seconds and a little
    metrics = dict.fromkeys(("tokens", "text_tokens", "image_tokens", "patches"), 1.0)
    assert clock.speed(1, {**metrics, "flops": 1e9})["mfu"] == pytest.approx(0.5, rel=1e-2)
    assert "mfu" not in Clock(0, 10).speed(1, {**metrics, "flops": 1e9})


def test_others_are_measured(monkeypatch):
    """A product of 1024 x 1024 in 0.5 s is 4.29 GFLOP/s."""
    ticks = iter(range(100))
    monkeypatch.setattr(efficiency.time, "perf_counter", lambda: next(ticks) / 2)
    assert efficiency.peak_flops(torch.device("cpu"), torch.float32) == 2 * 1024**3 / 0.5
