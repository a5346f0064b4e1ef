"""How much of what the devices could do a run gets out of them: model FLOP/s utilisation (MFU).

    mfu = operations that the architecture asks for (ernie_model/flops.py) / (seconds of the step * peak * devices)

Counted are the experts that tokens visit, not all of them, and the vision tower; what is frozen costs no gradient of
its weights. Seconds are those of the whole step, waiting for data included.
"""

import re
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from data.batch import PackedBatch
from ernie_model.config import ErnieConfig
from ernie_model.flops import forward_flops, training_flops
from ernie_model.parts import part_of
from train.loop import Beside
from train.trained import ADAPTER

# Dense bfloat16 TFLOP/s from the vendors' data sheets, without sparsity, by what torch calls the device.
# A name counts where it stands alone: an RTX A1000 is no A100, and an L40 no L4.
BF16_TFLOPS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "GH200": 989,
    "H800": 989,
    "H20": 148,
    "GB200": 2500,
    "B200": 2250,
    "A100": 312,
    "A800": 312,
    "L40": 181,
    "L40S": 362,
    "L4": 121,
    "A10G": 70,
    "A10": 125,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "MI300X": 1307,
    "MI250": 362,
}


class Work(Beside):
    """Counts the operations of every update: metrics["flops"], over all ranks.

    Args:
        model: as it will be trained.
        sequence: ranks that share the work of each row.
    """

    def __init__(self, model: nn.Module, config: ErnieConfig, device: torch.device, *, sequence: int = 1):
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.config, self.device, self.sequence = config, device, sequence
        self.adapted = {part_of(name) for name in names if ADAPTER in name}
        self.trained = {part_of(name) for name in names if ADAPTER not in name}
        self.flops = 0.0

    def before(self, microbatches: Sequence[PackedBatch]) -> None:
        self.flops = sum(self.of(batch) for batch in microbatches if not batch.is_filler) / self.sequence

    def of(self, batch: PackedBatch) -> float:
        learned = int(batch.weight_T.count_nonzero())
        forward = forward_flops(
            self.config, lengths=batch.lengths, stems=batch.stems, grids=batch.grids, learned=learned
        )
        return training_flops(forward, self.trained, adapted=self.adapted)

    def sums(self) -> Tensor:
        return torch.tensor([self.flops], dtype=torch.float64, device=self.device)

    def report(self, sums: Tensor) -> dict[str, float]:
        return {"flops": float(sums)}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of matrix products on `device` in `dtype`.

    From the data sheet where the device is in the table and the dtype is bfloat16; else measured, which takes a
    fraction of a second. A measured peak is what this machine's own library reaches on one large product, with the
    threads that PyTorch uses: on a CPU that others share, it is as noisy as they are.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        known = [tflops for part, tflops in BF16_TFLOPS.items() if re.search(rf"\b{part}\b", name)]
        if known:
            return known[0] * 1e12
    return measured_flops(device, dtype)


def measured_flops(device: torch.device, dtype: torch.dtype, *, repeats: int = 5) -> float:
    """The fastest of `repeats` square products."""
    width = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(width, width, device=device, dtype=dtype) for _ in range(2))
    fastest = float("inf")
    for _ in range(repeats + 1):  # the first one warms up, and is never the fastest
        _wait(device)
        start = time.perf_counter()
        _ = a @ b
        _wait(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * width**3 / fastest


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
