"""How speed depends on experts, row length and segments:  python -m tests.bench.scaling

Each line compares settings measured in turn, one thread, CPU seconds, the "small" model, float32 training steps.
"""

import argparse
import dataclasses

import torch

from ernie_model.config import ErnieConfig
from ernie_model.model import ErnieModel
from tests.bench.models import SIZES, packed, random_segments, transformers_config
from tests.bench.timing import in_turn, ratio
from train.memory import keep_freed_memory
from train.policy import Policy, on_device


def stepper(size, lengths: list[int]):
    torch.manual_seed(0)
    model = ErnieModel(ErnieConfig.from_json(transformers_config(size).to_dict())).train()
    policy = Policy(model, loss_is_linear=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run(number: int) -> None:
        batch, row_R = on_device(packed(random_segments(size, lengths, seed=number), model.config), torch.device("cpu"))
        loss = -(policy(batch, row_R).logprob_T * batch.weight_T).sum() / batch.weight_T.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def show(title: str, names: list[str], runs, tokens: list[int], rounds: int) -> None:
    timings = in_turn(runs, rounds)
    print(title)
    for name, timing, count in zip(names, timings, tokens, strict=True):
        relative = ratio(timings[0], timing) * count / tokens[0]
        print(f"  {name:28s} {count / timing.median:8,.0f} tokens/s   {relative:.2f} of the first")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    size = SIZES["small"]
    experts = [8, 16, 32, 64]
    runs = [stepper(dataclasses.replace(size, experts=e), [512] * 4) for e in experts]
    show("experts at top-2, 2,048 tokens", [f"{e} + {e} experts" for e in experts], runs, [2048] * 4, args.rounds)
    segments = [1, 2, 4, 8, 16]
    runs = [stepper(size, [256] * n) for n in segments]
    show(
        "row of n segments of 256", [f"{n} segments" for n in segments], runs, [256 * n for n in segments], args.rounds
    )
    lengths = [2048, 512, 128, 32]
    runs = [stepper(size, [n] * (2048 // n)) for n in lengths]
    show("2,048 tokens in equal segments", [f"{2048 // n} x {n}" for n in lengths], runs, [2048] * 4, args.rounds)


if __name__ == "__main__":
    main()
