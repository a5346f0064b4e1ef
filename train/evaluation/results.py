"""Attempts to results.json.

    {"version": 1,
     "checkpoint": "runs/digits/export", "weights": "9f2c...",          what was evaluated; a hash of all tensors
     "tasks": {"digits": {
        "questions": 360, "attempts": 1, "rewards": ["exact"], "fingerprint": "51ab...",
        "score":    {"mean": 0.972, "low": 0.953, "high": 0.989},        over questions, each the mean of its attempts
        "accuracy": {...},                                               attempts with score >= right_at
        "pass_at":  {"1": {...}, "8": {...}},
        "unscored": 0, "failed": 0,                                      attempts without a score; of them not asked
        "tokens": 2.0, "truncated": 0.0, "endings": {"answered": 360},   per attempt
        "tool_use": 0.0, "calls": 0.0, "tool_success": null,             share with a call; calls; share without error
        "likelihood": {"perplexity": 1.05, "logprob": -0.1, "exact": 0.972, "questions": 360} or null,
        "domains": {"...": {questions, score, accuracy, pass_at}}}},
     "overall": {"score": {...}, "accuracy": {...}},                     mean of the tasks' means
     "settings": {...},                                                  all of them, resolved
     "run": {"versions": {...}, "git": {...}, "started": "...", "seconds": 9.1}}

`perplexity` is exp(-log p / tokens) over all tokens of all right answers, `logprob` the mean over answers of log p. All
but `run` is the same when the same is asked of the same weights again.
"""

import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor

from ernie_model.inference.agent import Status
from train.evaluation.asking import Answer
from train.evaluation.likelihood import Likelihood
from train.evaluation.questions import AskedTask
from train.evaluation.statistics import interval, macro_interval, pass_at_k

VERSION = 1
RESULTS = "results.json"


def task_results(
    task: AskedTask,
    answers: Sequence[Answer],
    likelihoods: Sequence[Likelihood | None] | None,
    *,
    attempts: int,
    pass_at: Sequence[int],
    right_at: float,
    seed: int,
) -> dict[str, Any]:
    """Of one task; `answers` are its attempts, question by question."""
    calls = sum(len(one.calls) for one in answers)
    asked = [one for one in answers if not one.failed]
    return {
        "questions": len(task.questions),
        "attempts": attempts,
        "rewards": list(task.rewards),
        "fingerprint": task.fingerprint,
        **_worth(answers, attempts, pass_at, right_at, _seed(seed, task.name)),
        "unscored": sum(one.score is None for one in answers),
        "failed": sum(one.failed for one in answers),
        "tokens": _mean([one.tokens for one in asked]),
        "truncated": _mean([one.status == Status.TRUNCATED.value for one in asked]),
        "endings": dict(sorted(Counter(one.status for one in answers).items())),
        "tool_use": _mean([bool(one.calls) for one in asked]),
        "calls": _mean([len(one.calls) for one in asked]),
        "tool_success": 1 - sum(call["failed"] for one in answers for call in one.calls) / calls if calls else None,
        "likelihood": _likelihood(likelihoods),
        "domains": {
            name: {
                "questions": len({one.id for one in part}),
                **_worth(part, attempts, pass_at, right_at, _seed(seed, f"{task.name}/{name}")),
            }
            for name, part in _by_domain(answers).items()
        },
    }


def overall(tasks: Mapping[str, Sequence[Answer]], *, right_at: float, seed: int) -> dict[str, Any] | None:
    """Every task counts the same. None where a task has no score at all."""
    scores = [list(question_scores(answers).values()) for answers in tasks.values()]
    if not scores or not all(scores):
        return None
    right = [list(question_scores(answers, right_at).values()) for answers in tasks.values()]
    return {"score": _macro(scores, seed), "accuracy": _macro(right, seed)}


def question_scores(answers: Sequence[Answer], right_at: float | None = None) -> dict[str, float]:
    """{id of the question: mean over its attempts that have a score}; with `right_at`, of right (1) and wrong (0)."""
    by_question: dict[str, list[float]] = defaultdict(list)
    for one in answers:
        if one.score is not None:
            by_question[one.id].append(one.score if right_at is None else float(is_right(one.score, right_at)))
    return {id: sum(scores) / len(scores) for id, scores in by_question.items()}


def is_right(score: float, right_at: float) -> bool:
    return score >= right_at - 1e-9  # F1 of 2/3 + 1/3 boxes may miss 1 by a rounding


def _worth(
    answers: Sequence[Answer], attempts: int, pass_at: Sequence[int], right_at: float, seed: int
) -> dict[str, Any]:
    right: dict[str, list[bool]] = defaultdict(list)
    for one in answers:
        if one.score is not None:
            right[one.id].append(is_right(one.score, right_at))
    return {
        "score": _of(list(question_scores(answers).values()), seed),
        "accuracy": _of(list(question_scores(answers, right_at).values()), seed),
        "pass_at": {
            str(k): _of([pass_at_k(len(ones), sum(ones), k) for ones in right.values() if len(ones) >= k], seed)
            for k in pass_at or sorted({1, attempts})
        },
    }


def _of(values: Sequence[float], seed: int) -> dict[str, float] | None:
    if not values:
        return None
    low, high = interval(values, seed)
    return {"mean": math.fsum(values) / len(values), "low": low, "high": high}


def _macro(groups: Sequence[Sequence[float]], seed: int) -> dict[str, float]:
    low, high = macro_interval(groups, seed)
    return {"mean": sum(math.fsum(values) / len(values) for values in groups) / len(groups), "low": low, "high": high}


def _likelihood(likelihoods: Sequence[Likelihood | None] | None) -> dict[str, Any] | None:
    measured = [one for one in likelihoods or () if one is not None]
    if not measured:
        return None
    logprob = math.fsum(one.logprob for one in measured)
    mean = logprob / sum(one.num_tokens for one in measured)
    return {
        "perplexity": math.exp(min(-mean, 700.0)),
        "logprob": logprob / len(measured),
        "exact": _mean([one.exact for one in measured]),
        "questions": len(measured),
    }


def _by_domain(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    """Empty when there is only one."""
    parts: dict[str, list[Answer]] = defaultdict(list)
    for one in answers:
        parts[one.domain or "other"].append(one)
    return dict(sorted(parts.items())) if len(parts) > 1 else {}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _seed(seed: int, name: str) -> int:
    """So that parts are resampled independently of each other, and of which parts there are."""
    return zlib.crc32(f"{seed}/{name}".encode())


def weights_hash(model: torch.nn.Module) -> str:
    """Of all parameters and buffers as they are held: names, shapes, dtypes and bytes; xxh3, 128 bits."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        for part, values in _held(name, tensor):
            digest.update(f"{part} {tuple(values.shape)} {values.dtype}\n".encode())
            digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _held(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A quantised weight is a tensor made of others."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [(name, tensor)]
    parts, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [piece for part in parts for piece in _held(f"{name}.{part}", getattr(tensor, part))]
