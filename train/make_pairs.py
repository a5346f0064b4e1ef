"""`ernie pairs`: asks a model questions, and makes preference records of its right and wrong answers.

ernie pairs checkpoint=runs/digits tasks=[digits] output=pairs/digits
ernie pairs checkpoint=/models/ERNIE-4.5-VL-28B-A3B-PT tasks=[questions.jsonl] reward=anls attempts=16
ernie pairs checkpoint=runs/digits tasks=[digits] output=pairs/digits form=labelled          wanted or not, for KTO

Settings: PairsConfig in train/inference_config.py. What is written where, and which answers are chosen:
train/evaluation/mistakes.py. What was broken off goes on when the same command, with the same output=, is given again.
"""

import asyncio

from omegaconf import DictConfig

from ernie_model.inference.async_engine import AsyncEngine
from train.compose import plain, to_typed
from train.evaluation.evaluation import agents_of
from train.evaluation.mistakes import make_pairs, refuse_tools
from train.evaluation.questions import check_fits, open_tasks
from train.evaluation.terminal import make_console
from train.inference_config import PairsConfig
from train.run import program
from train.served import open_engine, open_model


@program("pairs")
def main(cfg: DictConfig) -> None:
    config = to_typed(cfg, PairsConfig)
    console = make_console()
    tasks = open_tasks(config)
    refuse_tools(tasks)
    served = open_model(config)
    check_fits(tasks, text_model=served.processor.config.vision is None)
    engine = AsyncEngine(open_engine(config, served))
    try:
        make_pairs(config, plain(config), tasks, served, agents_of(config, tasks, served, engine), console)
    finally:
        asyncio.run(engine.close(drain=False))


if __name__ == "__main__":
    main()
