"""Print the parity table:  python -m tests.parity.table"""

import tempfile
from pathlib import Path

import torch

from tests.parity.measure import bfloat16_errors, float32_errors, float64_errors
from tests.parity.reference import SHAPES

COLUMNS = (
    "model",
    "fp32 logits",
    "fp32 loss",
    "fp32 gradients",
    "fp64, worst",
    "bf16, both SDPA",
    "bf16, both eager",
    "bf16, from exact: ours / transformers",
)
NOTES = """
fp32, fp64: max |difference| / max |transformers' value|; for gradients the norms, of the worst parameter.
bf16, both SDPA and both eager: max |difference| of the logits when the two programs share an attention kernel.
bf16, from exact: root mean square distance of the logits from those of float64 arithmetic, ours with its own CPU
attention kernel. Logits are about 3 at the most."""


def main() -> None:
    torch.set_num_threads(1)
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            single, double = float32_errors(shape, folder), float64_errors(shape, folder)
            half = bfloat16_errors(shape, folder)
        worst = max(double.logits, double.loss, double.grads)
        print(
            f"| {shape.name} | {single.logits:.1e} | {single.loss:.1e} | {single.grads:.1e} | {worst:.1e} "
            f"| {half.same_kernel} | {half.both_eager} | {half.ours_from_exact:.4f} / {half.theirs_from_exact:.4f} |"
        )
    print(NOTES)


if __name__ == "__main__":
    main()
