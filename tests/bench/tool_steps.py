"""What a rollout gains when its engine goes on while attempts are in a tool:  python -m tests.bench.tool_steps

64 attempts of a small random model, of three turns of different lengths, with a tool between them that only waits. Rows
are how long it waits, columns `rollout.tool_steps`; 0 has everybody wait for every tool. A cell is the time of the
rollout, and how often it is that of the first column.
"""

import argparse
import asyncio
import sys
import time

import torch

from ernie_model.inference.engine import EngineSettings
from ernie_model.inference.request import Prompt, SamplingParams
from ernie_model.model import ErnieModel
from tests.tiny import SPARSE, tiny_processor
from train.reinforcement.engines import LocalEngine

ATTEMPTS, TURNS = 64, 3
SETTINGS = EngineSettings(cache_gib=0.1, max_running=ATTEMPTS)


def rollout(model: ErnieModel, away: int, tool_s: float) -> tuple[float, float]:
    """Seconds of a rollout, and of a step of it."""
    engine = LocalEngine(model, tiny_processor().tokenizer, SETTINGS, away=away)
    engine.begin(0)
    turns = engine.generates
    steps = 0
    stock = turns.engine.step

    def step():
        nonlocal steps
        steps += 1
        return stock()

    turns.engine.step = step

    async def attempt(number: int) -> None:
        prompt = Prompt(tuple(range(10, 40)))
        for turn in range(TURNS):
            seed = number * TURNS + turn
            params = SamplingParams(max_new_tokens=10 + (7 * seed) % 31, seed=seed, ignore_end=True)
            done = await turns.generate(prompt, params)
            prompt = prompt.extended(done.token_ids)
            await asyncio.sleep(tool_s)

    begin = time.perf_counter()
    asyncio.run(engine.together([attempt(number) for number in range(ATTEMPTS)]))
    took = time.perf_counter() - begin
    step_s = turns.busy_s / steps
    engine.end()
    return took, step_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool-s", default="0,0.02,0.1,0.5")
    parser.add_argument("--steps", default="0,1,4,16")
    options = parser.parse_args()
    torch.manual_seed(1)
    torch.set_num_threads(1)
    model = ErnieModel(SPARSE).requires_grad_(False)
    columns = [int(one) for one in options.steps.split(",")]
    step_s = rollout(model, 0, 0.0)[1]  # warm
    print(f"a step takes about {1000 * step_s:.0f} ms\n")
    print("| seconds in the tool | " + " | ".join(map(str, columns)) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for tool_s in map(float, options.tool_s.split(",")):
        times = [rollout(model, away, tool_s)[0] for away in columns]
        cells = [f"{times[0]:.2f} s"] + [f"{one:.2f} s, {times[0] / one:.2f}x" for one in times[1:]]
        print(f"| {tool_s:g} | " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
