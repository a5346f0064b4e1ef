"""Rewards by name.

reward_named("grounding_f1")(attempt, expected, iou=0.75)
reward_named("python:my_metrics.close_enough")(attempt, expected)          def close_enough(attempt, expected): ...
"""

import importlib
import inspect
import logging
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

from train.config import UserError, suggestion
from train.rewards.base import Reward
from train.rewards.boxes import grounding_f1, points
from train.rewards.choice import multiple_choice
from train.rewards.equation import math
from train.rewards.json_answer import json_fields, json_valid
from train.rewards.number import counting, number
from train.rewards.temporal import temporal_iou
from train.rewards.text import anls, edit_distance, exact
from train.rewards.tools import tool_success

logger = logging.getLogger(__name__)

REWARDS: dict[str, Reward] = {
    "exact": exact,
    "anls": anls,
    "edit_distance": edit_distance,
    "number": number,
    "multiple_choice": multiple_choice,
    "math": math,
    "counting": counting,
    "grounding_f1": grounding_f1,
    "points": points,
    "temporal_iou": temporal_iou,
    "json_fields": json_fields,
    "json_valid": json_valid,
    "tool_success": tool_success,
}
WITHOUT_ANSWER = ("json_valid", "tool_success")
"""Those that need no right answer. A function of the user's own may do without as well: it is then given ""."""

OWN = "python:"


def reward_named(name: str) -> Reward:
    """The function of that name.

    Raises:
        UserError: there is none; a function of the user's own that cannot be imported or called.
    """
    if name.startswith(OWN):
        return guarded(name, imported(name))
    if name not in REWARDS:
        raise UserError(
            f"there is no reward {name!r}{suggestion(name, sorted(REWARDS)) or '.'} Known: {', '.join(REWARDS)}, and "
            "python:module.function for one of your own."
        )
    return REWARDS[name]


def needs_answer(name: str) -> bool:
    return name not in WITHOUT_ANSWER and not name.startswith(OWN)


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises UserError for an option that the reward does not have."""
    function = imported(name) if name.startswith(OWN) else reward_named(name)
    parameters = inspect.signature(function).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return
    known = list(parameters)[2:]
    for key in options:
        if key not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise UserError(f"reward {name} has no option {key!r}{suggestion(str(key), known)}; {has}.")


def imported(name: str) -> Callable[..., Any]:
    path = name.removeprefix(OWN)
    module_name, _, function_name = path.rpartition(".")
    if not module_name or not function_name:
        raise UserError(f"reward {name!r} names no function; write {OWN}module.function.")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module's own code runs, and may raise anything
        raise UserError(
            f"reward {name!r}: the module {module_name} cannot be imported ({type(error).__name__}: {error}). It must "
            "lie on PYTHONPATH."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        what = "has no" if function is None else "has something that cannot be called as"
        raise UserError(f"reward {name!r}: the module {module_name} {what} {function_name}.")
    try:
        inspect.signature(function).bind("attempt", "expected")
    except TypeError as error:
        raise UserError(f"reward {name!r} must take (attempt, expected, **options): {error}.") from error
    return function


def guarded(name: str, function: Callable[..., Any]) -> Reward:
    """A function of the user's own, held to what a `Reward` promises: what it raises, and what is not a number in
    [0, 1], becomes None, and the first time it is said."""
    told = False

    def reward(attempt: Any, expected: str, **options: Any) -> float | None:
        nonlocal told
        try:
            value = function(attempt, expected, **options)
            if value is None:
                return None
            number = float(value)
            if isfinite(number) and 0 <= number <= 1:
                return number
            problem = f"returned {value!r}, which is not in [0, 1]"
        except Exception as error:
            problem = f"raised {type(error).__name__}: {error}"
        if not told:
            told = True
            logger.warning("reward %s %s; such attempts have no score. Said once.", name, problem)
        return None

    return reward
