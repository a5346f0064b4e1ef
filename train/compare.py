"""`ernie compare`: two evaluations of the same questions, with a paired test for each task.

ernie compare runs=[evaluations/before,evaluations/after]

What is computed: train/evaluation/statistics.py, `paired`.
"""

import json
from pathlib import Path

from omegaconf import DictConfig

from ernie_model.atomic import atomic_write
from train.compose import to_typed
from train.evaluation.comparing import compare
from train.evaluation.terminal import comparison_table, make_console
from train.inference_config import CompareConfig
from train.run import program


@program("compare")
def main(cfg: DictConfig) -> None:
    config = to_typed(cfg, CompareConfig)
    before, after = map(Path, config.runs)
    comparison = compare(before, after, config.seed)
    console = make_console()
    console.print(f"before   {before}\nafter    {after}", markup=False)
    console.print(comparison_table(comparison))
    if config.output is not None:
        atomic_write(Path(config.output), json.dumps(comparison, indent=1, ensure_ascii=False) + "\n")
        console.print(f"written   {config.output}", markup=False)


if __name__ == "__main__":
    main()
