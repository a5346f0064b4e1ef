"""Rewards, and the parts that shape them, by name.

reward_named("grounding_f1")(attempt, expected, iou=0.75)
reward_named("python:my_metrics.close_enough")(attempt, expected)          def close_enough(attempt, expected): ...
"""

import importlib
import inspect
import logging
import traceback
from collections.abc import Callable, Mapping
from functools import wraps
from math import nan
from pathlib import Path
from typing import Any

from train.config import UserError, suggestion
from train.rewards.base import Attempt, Part, Reward
from train.rewards.boxes import grounding_f1, points
from train.rewards.choice import multiple_choice
from train.rewards.equation import math
from train.rewards.json_answer import json_fields, json_valid
from train.rewards.number import counting, number
from train.rewards.shaping import COMPARISONS, PARTS
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


def raised(function: Callable[..., Any], error: BaseException) -> str:
    """What a function of the user's own raised, with the deepest line of its own file on the way there."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    own = [one for one in traceback.extract_tb(error.__traceback__) if code and one.filename == code.co_filename]
    where = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    return f"raised {type(error).__name__}: {error}{where}"


class RewardProblem(Exception):
    """A function of the user's own has returned what it must not."""


def reward_named(name: str) -> Reward:
    """The function of that name; one of the user's own is `guarded`.

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


def raising_reward(name: str) -> Reward:
    """The same, but one of the user's own raises what it raises, and RewardProblem for what is not in [0, 1]."""
    return _within(imported(name), 0, 1) if name.startswith(OWN) else reward_named(name)


def part_named(name: str) -> Part:
    """A part that shapes the reward; one of the user's own raises what it raises, and RewardProblem for what is not in
    [-1, 1].

    Raises:
        UserError: there is none; a function of the user's own that cannot be imported or called.
    """
    if name.startswith(OWN):
        return _within(imported(name), -1, 1)
    if name not in PARTS:
        raise UserError(
            f"there is no part {name!r} of a reward{suggestion(name, sorted(PARTS)) or '.'} Known: {', '.join(PARTS)}, "
            "and python:module.function for one of your own."
        )
    return PARTS[name]


def check_part(name: str, options: Mapping[str, Any]) -> None:
    """Raises UserError: there is no such part, or it does not take these options."""
    function = COMPARISONS.get(name) or (imported(name) if name.startswith(OWN) else part_named(name))
    if not isinstance(options, Mapping):
        raise UserError(f"rewards.options.{name} is {options!r}; it must be like {{length: 4096}}.")
    _check_known(f"rewards.options.{name}", function, options)
    parameters = list(inspect.signature(function).parameters.values())[2:]
    missing = [one.name for one in parameters if one.default is one.empty and one.kind is one.KEYWORD_ONLY]
    for key in missing:
        if key not in options:
            needed = ", ".join(f"{key}: ..." for key in missing)
            raise UserError(
                f"rewards.weights.{name} needs rewards.options.{name}.{key}: rewards.options.{name}={{{needed}}}."
            )
    if not name.startswith(OWN):
        try:
            attempt = Attempt(answer="an answer", text="an answer")
            function(*([attempt], [1.0]) if name in COMPARISONS else (attempt, 1.0), **options)
        except (ValueError, TypeError) as error:
            raise UserError(f"rewards.options.{name} is {dict(options)}: {error}") from error


def needs_answer(name: str) -> bool:
    return name not in WITHOUT_ANSWER and not name.startswith(OWN)


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises UserError for an option that the reward does not have."""
    function = imported(name) if name.startswith(OWN) else reward_named(name)
    _check_known(f"reward {name}", function, options)


def _check_known(who: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(function).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return
    known = list(parameters)[2:]
    for key in options:
        if key not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise UserError(f"{who} has no option {key!r}{suggestion(str(key), known)}; {has}.")


def imported(name: str) -> Callable[..., Any]:
    path = name.removeprefix(OWN)
    module_name, _, function_name = path.rpartition(".")
    if not module_name or not function_name:
        raise UserError(f"reward {name!r} names no function; write {OWN}module.function.")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module's own code runs, and may raise anything
        absent = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        way_out = "Name the folder that holds it: PYTHONPATH=folder ernie ..." if absent else "Mend it."
        raise UserError(
            f"reward {name!r}: the module {module_name} cannot be imported ({type(error).__name__}: {error}). {way_out}"
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


def _within(function: Callable[..., Any], least: float, most: float) -> Callable[..., float | None]:
    @wraps(function)
    def held(attempt: Any, other: Any, **options: Any) -> float | None:
        value = function(attempt, other, **options)
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = nan
        if not least <= number <= most:  # nor nan
            raise RewardProblem(f"returned {repr(value)[:100]}, which is not in [{least}, {most}]")
        return number

    return held


def guarded(name: str, function: Callable[..., Any]) -> Reward:
    """A function of the user's own, held to what a `Reward` promises: what it raises, and what is not a number in
    [0, 1], becomes None, and the first time it is said."""
    told = False
    held = _within(function, 0, 1)

    def reward(attempt: Any, expected: str, **options: Any) -> float | None:
        nonlocal told
        try:
            return held(attempt, expected, **options)
        except RewardProblem as error:
            problem = str(error)
        except Exception as error:
            problem = raised(function, error)
        if not told:
            told = True
            logger.warning("reward %s %s; such attempts have no score. Said once.", name, problem)
        return None

    return reward
