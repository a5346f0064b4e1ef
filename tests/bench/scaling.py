"""How speed depends on experts, row length, segments and ranks:

python -m tests.bench.scaling [--only model|ranks|curve]

model   each line compares settings measured in turn, one thread, CPU seconds, the "small" model, float32 training steps
ranks   the same model on 1, 2 and 4 gloo processes of one thread, seconds of the clock. Weak: each rank has a row of
        2,048 tokens; strong: all ranks together have four. `waits` is the share of a step in which a rank's own thread
        does not compute: it sends, receives or waits for others. With more ranks than cores it says little.
curve   what `ernie plan` expects of the 28B model on 8 to 1,024 H100s, weak: not measured
"""

import argparse
import dataclasses
import json
from dataclasses import asdict

import torch

from ernie_model.config import ErnieConfig
from ernie_model.model import ErnieModel
from tests.bench.models import SIZES, packed, random_segments, transformers_config
from tests.bench.scaling_rank import Case
from tests.bench.timing import in_turn, ratio
from tests.distributed.gloo import launch
from tests.test_configs import load
from train.memory import keep_freed_memory
from train.outline import architecture_of, outline
from train.planning.estimate import Estimate, Subject, estimate
from train.planning.pace import peak_tflops
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


LAYOUTS = {"ddp": {}, "zero1": {"zero": 1}, "zero2": {"zero": 2}, "zero3": {"zero": 3}}
STRONG_ROWS = 4


def measured(world: int, cases: list[Case]) -> list[dict]:
    """What rank 0 measured, the longest step of all ranks and the mean of what they computed."""
    words = [json.dumps(asdict(case)) for case in cases]
    said = launch(world, "-m", "tests.bench.scaling_rank", *words, limit_s=1800, fresh=True)
    by_rank = [[json.loads(line) for line in text.splitlines() if line.startswith('{"case"')] for text in said]
    return [
        {"step_s": max(r["step_s"] for r in ranks), "computed_s": sum(r["computed_s"] for r in ranks) / world}
        for ranks in zip(*by_rank, strict=True)
    ]


def layouts(world: int) -> dict[str, dict]:
    if world == 1:
        return {"ddp": {}}
    expert = {f"ep{world}": {"expert": world}, f"ep{world}_zero1": {"expert": world, "zero": 1}}
    return LAYOUTS | expert


def ranks(worlds: list[int], rounds: int) -> None:
    for title, rows_of in (
        ("weak scaling, a row of 2,048 tokens on each rank", lambda world: 1),
        ("strong scaling, four rows of 2,048 tokens on all ranks together", lambda world: STRONG_ROWS // world),
    ):
        print(title)
        alone = None
        for world in worlds:
            named = layouts(world)
            cases = [Case(rows=rows_of(world), rounds=rounds, **fields) for fields in named.values()]
            for name, found in zip(named, measured(world, cases), strict=True):
                rate = 2048 * rows_of(world) * world / found["step_s"]
                alone = alone or rate
                waits = 1 - found["computed_s"] / found["step_s"]
                print(
                    f"  {world} x {name:12s} {rate:8,.0f} tokens/s   {rate / alone / world:.2f} of {world} alone   "
                    f"waits {waits:.0%}"
                )
    print("cost of a token and number of experts, 2 ranks that share them, top-2")
    experts = [8, 16, 32, 64]
    cases = [Case(expert=2, experts=count, rounds=rounds) for count in experts]
    found = measured(2, cases)
    for count, one in zip(experts, found, strict=True):
        print(f"  {count} + {count} experts   {one['step_s'] / found[0]['step_s']:.2f} of the first")


def planned(gpus: int) -> Estimate:
    settings = ("experiment=full_vl_28b", "data.path=-", "plan=h100", "parallel=ep8_zero2", "parallel.held_in=bfloat16")
    config = load(*settings, f"plan.gpus={gpus}", "data.max_tokens=8192", "data.accumulation=1")
    model = outline(config, architecture_of(config.model))[0]
    return estimate(config, Subject.of(model), peak_tflops(config.plan, config.model.precision))


def curve() -> None:
    """The cost model on its own: weak scaling of full training of the 28B model, experts within a node."""
    print("plan: 28B, all weights, ep8 + zero2, rows of 8,192 tokens, H100s in nodes of 8 (a model, not a measurement)")
    first = None
    for gpus in (8, 16, 32, 64, 128, 256, 512, 1024):
        one = planned(gpus)
        pace = one.pace
        rate = pace.tokens_per_s / gpus
        first = first or rate
        between = pace.experts + pace.gathers + pace.gradients
        print(
            f"  {gpus:5d} GPUs   {rate:8,.0f} tokens/s each   {rate / first:.2f} of 8   "
            f"exchanges {between / pace.seconds:.0%}{'' if not one.obstacle else '   ' + one.obstacle}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("model", "ranks", "curve"))
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    if args.only in (None, "model"):
        inside(args.rounds)
    if args.only in (None, "ranks"):
        ranks(args.worlds, args.rounds)
    if args.only in (None, "curve"):
        curve()


def inside(rounds: int) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    size = SIZES["small"]
    experts = [8, 16, 32, 64]
    runs = [stepper(dataclasses.replace(size, experts=e), [512] * 4) for e in experts]
    show("experts at top-2, 2,048 tokens", [f"{e} + {e} experts" for e in experts], runs, [2048] * 4, rounds)
    segments = [1, 2, 4, 8, 16]
    runs = [stepper(size, [256] * n) for n in segments]
    show("row of n segments of 256", [f"{n} segments" for n in segments], runs, [256 * n for n in segments], rounds)
    lengths = [2048, 512, 128, 32]
    runs = [stepper(size, [n] * (2048 // n)) for n in lengths]
    show("2,048 tokens in equal segments", [f"{2048 // n} x {n}" for n in lengths], runs, [2048] * 4, rounds)


if __name__ == "__main__":
    main()
