"""Print the parity table:  python -m tests.parity.table"""

import tempfile
from pathlib import Path

import torch

from tests.parity.measure import bfloat16_errors, float32_errors, float64_errors
from tests.parity.reference import SHAPES

HEADER = "| model | fp32 logits | fp32 loss | fp32 gradients | fp64, worst | bf16, same kernels | bf16, eager |"
NOTES = """
fp32, fp64: max |difference| / max |transformers' value|; for gradients the norms of the worst parameter.
bf16: max |difference| of the logits. Same kernels: SDPA and grouped matmul on both sides. Eager: its eager
attention, with ours replaced by the same. Left as it is, ours differs from eager attention by the number in brackets,
because it does not round attention probabilities to bfloat16."""


def main() -> None:
    torch.set_num_threads(1)
    print(HEADER)
    print("|---" * HEADER.count(" | ") + "|---|")
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as name:
            single, double, half = (f(shape, Path(name)) for f in (float32_errors, float64_errors, bfloat16_errors))
        worst = max(double.logits, double.loss, double.grads)
        print(
            f"| {shape.name} | {single.logits:.1e} | {single.loss:.1e} | {single.grads:.1e} | {worst:.1e} "
            f"| {half.same_kernel} | {half.both_eager} ({half.eager:.2g}) |"
        )
    print(NOTES)


if __name__ == "__main__":
    main()
