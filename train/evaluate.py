"""`ernie evaluate`: asks a model the questions of tasks, and says what the answers are worth.

ernie evaluate checkpoint=runs/digits tasks=[digits,counting]
ernie evaluate checkpoint=/models/ERNIE-4.5-VL-28B-A3B-PT tasks=[mine.jsonl] reward=anls
ernie evaluate checkpoint=runs/zoom tasks=[zoom] attempts=8 sampling.temperature=0.8       pass@8

Settings: EvaluationConfig in train/inference_config.py. What is written where: train/evaluation/evaluation.py. An
evaluation that was broken off goes on when the same command, with the same output=, is given again.
"""

import asyncio

from omegaconf import DictConfig

from ernie_model.inference.async_engine import AsyncEngine
from train.compose import plain, to_typed
from train.evaluation.evaluation import agents_of, evaluate
from train.evaluation.questions import check_fits, open_tasks
from train.evaluation.terminal import make_console
from train.inference_config import EvaluationConfig
from train.run import git_state, program, versions
from train.served import open_engine, open_model


@program("evaluate")
def main(cfg: DictConfig) -> None:
    config = to_typed(cfg, EvaluationConfig)
    console = make_console()
    tasks = open_tasks(config)
    served = open_model(config)
    check_fits(tasks, text_model=served.processor.config.vision is None)
    engine = AsyncEngine(open_engine(config, served))
    try:
        agents = agents_of(config, tasks, served, engine)
        about = {"versions": versions(), "git": git_state()}
        evaluate(config, plain(config), tasks, served, agents, console, about)
    finally:
        asyncio.run(engine.close(drain=False))


if __name__ == "__main__":
    main()
