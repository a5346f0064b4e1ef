"""Two evaluations of the same questions, question by question.

    {"version": 1, "before": "evaluations/a", "after": "evaluations/b",
     "tasks": {"digits": {"questions": 360, "before": 0.90, "after": 0.97,
                          "difference": 0.07, "low": 0.04, "high": 0.10,
                          "better": 31, "worse": 6, "p_value": 0.00004, "test": "mcnemar",
                          "better_ids": [...], "worse_ids": [...]}}}

The questions must be the same: equal ids, pictures, right answers and rewards (`fingerprint`). How they were asked may
differ, that is what one compares. With several tasks, some p-value is small by chance: at 20 tasks, one below 0.05.
"""

import json
from pathlib import Path
from typing import Any

from train.config import UserError
from train.evaluation.asking import ANSWERS, read_answers
from train.evaluation.results import RESULTS, question_scores
from train.evaluation.statistics import paired


def compare(before: Path, after: Path, seed: int) -> dict[str, Any]:
    """Raises UserError: a folder without results, or questions that are not the same."""
    results = [_read(folder) for folder in (before, after)]
    a, b = (one["tasks"] for one in results)
    if a.keys() != b.keys():
        raise UserError(
            f"{before} asked {', '.join(a)}, and {after} asked {', '.join(b)}; only the same questions can be compared."
        )
    for task in a:
        if a[task]["fingerprint"] != b[task]["fingerprint"]:
            why = "their number" if a[task]["questions"] != b[task]["questions"] else "a question, picture or reward"
            raise UserError(
                f"the questions of {task} in {before} and {after} are not the same: {why} differs "
                f"({a[task]['questions']} and {b[task]['questions']} questions, rewards "
                f"{', '.join(a[task]['rewards'])} and {', '.join(b[task]['rewards'])}). Ask both with the same tasks, "
                "task_seed, limit and rewards."
            )
    answers = [read_answers(folder / ANSWERS) for folder in (before, after)]
    tasks = {}
    for task in a:
        scores_a, scores_b = (question_scores([one for one in part if one.task == task]) for part in answers)
        both = [id for id in scores_a if id in scores_b]
        if not both:
            raise UserError(f"no question of {task} has a score in both {before} and {after}.")
        found = paired([scores_a[id] for id in both], [scores_b[id] for id in both], seed)
        tasks[task] = {
            "questions": found.num_questions,
            "before": found.mean_a,
            "after": found.mean_b,
            "difference": found.difference,
            "low": found.interval.low,
            "high": found.interval.high,
            "better": found.b_better,
            "worse": found.a_better,
            "p_value": found.p_value,
            "test": found.test,
            "better_ids": [id for id in both if scores_b[id] > scores_a[id]],
            "worse_ids": [id for id in both if scores_b[id] < scores_a[id]],
        }
    return {"version": 1, "before": str(before), "after": str(after), "seed": seed, "tasks": tasks}


def _read(folder: Path) -> dict[str, Any]:
    path = folder / RESULTS
    if not path.exists():
        unfinished = (folder / ANSWERS).exists()
        why = "it was broken off; give its command again to finish it" if unfinished else "it holds no evaluation"
        raise UserError(f"{folder} has no {RESULTS}: {why}.")
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}).") from error
