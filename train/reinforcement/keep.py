"""Rows and groups as tensors, for a checkpoint: everything in one dictionary that safetensors can hold.

Tensors have names of their own; all else is JSON, as bytes in a tensor called `json`.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.batch import PackedBatch, Role
from data.encode import Example
from train.reinforcement.groups import AttemptSummary, Outcome, Summary


class Kept(NamedTuple):
    summary: Summary
    rollout: int
    examples: list[tuple[Example, list[int]]]


def to_tensors(pending: Sequence[Sequence[PackedBatch]], ready: Sequence[Kept]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}

    def put(name: str, value: PackedBatch | Example) -> dict[str, Any]:
        rest: dict[str, Any] = {}
        for field in dataclasses.fields(value):
            one = getattr(value, field.name)
            if isinstance(one, Tensor):
                tensors[f"{name}/{field.name}"] = one
            elif field.name == "roles":
                rest["roles"] = [role.value for role in one]
            elif one is not None:
                rest[field.name] = one
        return rest

    about = {
        "pending": [
            [put(f"pending/{update}/{row}", batch) for row, batch in enumerate(rows)]
            for update, rows in enumerate(pending)
        ],
        "ready": [
            {
                "summary": dataclasses.asdict(one.summary),
                "rollout": one.rollout,
                "examples": [
                    [put(f"ready/{place}/{number}", example), held]
                    for number, (example, held) in enumerate(one.examples)
                ],
            }
            for place, one in enumerate(ready)
        ],
    }
    tensors["json"] = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
    return tensors


def from_tensors(tensors: dict[str, Tensor]) -> tuple[list[list[PackedBatch]], list[Kept]]:
    about = json.loads(bytes(tensors["json"].tolist()))

    def take(kind: type, name: str, rest: dict[str, Any]) -> Any:
        own = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
        rest = {key: _tuples(value) for key, value in rest.items()}
        if "roles" in rest:
            rest["roles"] = tuple(map(Role, rest["roles"]))
        return kind(**own, **rest)

    pending = [
        [take(PackedBatch, f"pending/{update}/{row}", rest) for row, rest in enumerate(rows)]
        for update, rows in enumerate(about["pending"])
    ]
    ready = [
        Kept(
            _summary(one["summary"]),
            one["rollout"],
            [
                (take(Example, f"ready/{place}/{number}", rest), held)
                for number, (rest, held) in enumerate(one["examples"])
            ],
        )
        for place, one in enumerate(about["ready"])
    ]
    return pending, ready


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _summary(saved: dict[str, Any]) -> Summary:
    outcome = saved["outcome"]
    return Summary(
        outcome=Outcome(**{**outcome, "accuracies": tuple(outcome["accuracies"])}),
        domain=saved["domain"],
        version=saved["version"],
        attempts=tuple(AttemptSummary(**one) for one in saved["attempts"]),
    )
