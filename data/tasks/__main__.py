"""Write a task as files: train.jsonl, heldout.jsonl, media/, and index/ where the task has one.

python -m data.tasks                       the tasks there are
python -m data.tasks zoom folder           a folder that does not exist yet, or is empty
python -m data.tasks zoom folder --seed 1  other questions
"""

import argparse
import sys
from pathlib import Path

from data.tasks import TASKS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data.tasks", description="Write a task as files.")
    parser.add_argument("task", nargs="?", choices=[*TASKS], metavar="task", help=", ".join(TASKS))
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="what is asked, and what is held out (default: 0)")
    given = parser.parse_args(arguments)
    if given.task is None:
        width = max(map(len, TASKS))
        for task in TASKS.values():
            print(f"{task.name:{width}}  {task.description}")
        return 0
    if given.folder is None:
        parser.error(f"name the folder that {given.task} is written to")
    if given.folder.is_file() or (given.folder.exists() and any(given.folder.iterdir())):
        parser.error(f"{given.folder} is a file or holds some, and nothing is overwritten; name another folder")
    if given.seed < 0:
        parser.error(f"--seed is {given.seed}; it must be 0 or more")
    task = TASKS[given.task]
    for path in task.write_jsonl(given.folder, given.seed).values():
        print(path)
    if task.write_index is not None:
        task.write_index(given.folder / "index", given.seed)
        print(given.folder / "index")
    return 0


if __name__ == "__main__":
    sys.exit(main())
