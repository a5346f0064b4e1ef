"""Which command makes the weights that an experiment of the suite starts from: runs/NAME is of experiment=NAME."""

import re
from itertools import takewhile
from pathlib import Path

from train.config import UserError

EXPERIMENTS = Path(__file__).resolve().parent.parent / "configs" / "experiment"
RUNS = "runs"


def entry_of(experiment: str) -> str:
    """The program that a file of configs/experiment is for: the first that the comment at its top names, else sft."""
    lines = (EXPERIMENTS / f"{experiment}.yaml").read_text("utf-8").splitlines()
    about = " ".join(takewhile(lambda line: line.startswith("#"), lines))
    found = re.search(r"\bernie (sft|dpo|rl)\b", about)
    return found[1] if found else "sft"


def check_made(key: str, source: str) -> None:
    """Raises UserError: `source` lies in the folder of an experiment that has not written it yet."""
    parts = Path(source).parts
    if len(parts) < 2 or parts[0] != RUNS or Path(source).exists():
        return
    if (EXPERIMENTS / f"{parts[1]}.yaml").exists():
        raise UserError(
            f"{key}={source} is not there. `ernie {entry_of(parts[1])} experiment={parts[1]}` writes it; start it in "
            f"this folder ({Path.cwd()}) beforehand, or name other weights."
        )
