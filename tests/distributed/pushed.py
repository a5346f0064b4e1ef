"""Every layout pushes its weights to a server and asks it; test_pushed.py runs the server.

python -m tests.distributed.pushed FOLDER URL      with RANK, WORLD_SIZE, ... as a launcher sets them
"""

import asyncio
import json
import sys
from pathlib import Path

import torch

from ernie_model.inference.request import Prompt, SamplingParams
from ernie_model.model import ErnieModel
from tests.distributed.reshard import LAYOUTS, Trained, What
from tests.tiny import SPARSE, tiny_processor
from train.checkpoint import everyones
from train.config import PeftConfig, PeftKind, UserError
from train.parallel.layout import leave
from train.reinforcement.vllm_engine import VLLMEngine
from train.rl_config import VLLMConfig

CASES = [("all", "ep2 x2"), ("all", "ep2 zero3 x2"), ("adapters", "ep2 x2"), ("adapters", "zero3 x2")]
LORA = PeftConfig(kind=PeftKind.lora, rank=3)
WHAT = {"all": What(), "adapters": What(LORA)}
PARAMS = SamplingParams(max_new_tokens=8, seed=4)


def start_model() -> ErnieModel:
    torch.manual_seed(0)
    return ErnieModel(SPARSE.replace(initializer_range=0.2))


def prompt(number: int) -> Prompt:
    return Prompt(tuple(range(300 + number, 310 + number)))


def push(what: str, layout: str, folder: Path, url: str) -> None:
    run = Trained(LAYOUTS[layout], WHAT[what], model=start_model())
    config = VLLMConfig(urls=[url], retries=0)
    joint = LAYOUTS[layout].zero == 3 or LAYOUTS[layout].expert > 1
    engine = VLLMEngine(
        config,
        run.policy.model,
        tiny_processor(SPARSE),
        run.weights,
        folder=folder / what / layout,
        max_tokens=64,
        optimizer=run.updates.optimizer,
        joint=joint,
    )
    engine.begin(6)  # with the parity check
    (answer,) = asyncio.run(engine.together([engine.generate(prompt(run.rank), PARAMS)]))
    told = everyones((answer.token_ids, answer.versions, engine.metrics()))
    engine.end()
    everyones(None)
    engine.close()
    if run.rank == 0:
        (folder / f"{what} {layout}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, url = Path(sys.argv[1]), sys.argv[2]
    for what, layout in CASES:
        push(what, layout, folder, url)
    # What rank 0 is refused, every rank hears of.
    try:
        push("all", "x2", folder / "nowhere", "http://127.0.0.1:9")
    except UserError as error:
        told = everyones(str(error))
        if told[0] == told[1]:
            (folder / "refused.txt").write_text(told[0])
    leave()
