"""Products of few rows with weights that come from memory:  python -m tests.bench.products [--dtype fp32]

What `ernie_model/inference/kernels.py` chooses among, in microseconds of one thread: the fastest of five passes over
120 MB of matrices, more than any cache keeps between two visits.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ernie_model.inference.kernels import PackedWeight, multiply

BYTES = 120 << 20


def microseconds(product: Callable[[Tensor], object], weights: list) -> float:
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        for weight in weights:
            product(weight)
        best = min(best, time.process_time() - start)
    return best / len(weights) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--shapes", default="384x256,1024x1024,2560x2560", help="outputs x inputs")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[parser.parse_args().dtype]
    shapes = [tuple(map(int, shape.split("x"))) for shape in parser.parse_args().shapes.split(",")]
    torch.set_num_threads(1)
    print("| weight | rows | F.linear | plain weight, as chosen | with the packed copy, as chosen |")
    print("|---|---|---|---|---|")
    with torch.inference_mode():
        for outputs, inputs in shapes:
            count = max(2, BYTES // (outputs * inputs * dtype.itemsize))
            plain = [(torch.randn(outputs, inputs) * 0.02).to(dtype) for _ in range(count)]
            packed = [PackedWeight(weight, dtype) for weight in plain]
            for rows in (1, 2, 4, 8, 16, 32, 64):
                x = torch.randn(rows, inputs).to(dtype)
                found = (
                    microseconds(lambda weight, x=x: F.linear(x, weight), plain),
                    microseconds(lambda weight, x=x: multiply(x, weight), plain),
                    microseconds(lambda weight, x=x: weight(x), packed),
                )
                cells = " | ".join(f"{us:.0f}" for us in found)
                print(f"| {outputs} x {inputs} | {rows} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
