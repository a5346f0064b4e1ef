"""Answers that are JSON.

json_fields   share of right fields            {"name": "Ann", "sum": 12.5}
json_valid    the answer is JSON, and what a schema asks for
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from ernie_model.inference.grounding import last_json
from train.rewards.base import Attempt
from train.rewards.text import normalised

_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)\n?```", re.DOTALL)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def json_fields(attempt: Attempt, expected: str, *, tolerance: float = 0.0) -> float | None:
    """Right fields over all fields, asked for or invented. Texts are compared as `exact` does, numbers within the
    relative tolerance ("12.50" is 12.5); a nested field counts for itself.
    """
    right = last_json(expected)
    if not isinstance(right, dict):
        return None
    right = dict(_leaves(right))
    if any(isinstance(value, float) and not math.isfinite(value) for value in right.values()):
        return None  # NaN and Infinity are not JSON
    said = last_json(attempt.answer)
    if not isinstance(said, dict):
        return 0.0
    said = dict(_leaves(said))
    hits = sum(_same(said[key], right[key], tolerance) for key in right.keys() & said.keys())
    return hits / len(right.keys() | said.keys())


def _leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """((keys on the way), value) of everything that is not an object or a list with something in it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not items or not value:
        yield path, value
    else:
        for key, inner in items:
            yield from _leaves(inner, (*path, key))


def _same(said: Any, right: Any, tolerance: float) -> bool:
    if isinstance(right, bool) or isinstance(said, bool) or right is None or said is None:
        return said is right
    if isinstance(right, dict | list) or isinstance(said, dict | list):  # empty ones
        return said == right and type(said) is type(right)
    a, b = _number(said), _number(right)
    if a is not None and b is not None:
        return abs(a - b) <= (tolerance + 1e-9) * abs(b)
    return normalised(str(said)) == normalised(str(right))


def _number(value: Any) -> float | None:
    try:
        return float(value.replace(",", "") if isinstance(value, str) else value)
    except (ValueError, OverflowError):
        return None


def json_valid(attempt: Attempt, expected: str, *, schema: Mapping[str, Any] | str | None = None) -> float | None:
    """1 if the whole answer is JSON (a ``` fence around it is allowed), and fits the JSON schema where one is given.

    None for a schema that is not one. `expected` is not looked at.
    """
    try:
        schema = dict(json.loads(schema) if isinstance(schema, str) else schema) if schema is not None else None
        if schema is not None:
            Draft202012Validator.check_schema(schema)
            if any(path[-1] == "$ref" and not str(value).startswith("#") for path, value in _leaves(schema) if path):
                return None  # it would be fetched
    except (ValueError, TypeError, SchemaError):
        return None
    text = attempt.answer.strip()
    if fenced := _FENCE.fullmatch(text):
        text = fenced[1]
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return 0.0
    if schema is None:
        return 1.0
    try:
        return float(Draft202012Validator(schema).is_valid(value))
    except Exception:  # a schema may pass as one and refer to nothing, or hold a pattern that is none
        return None
