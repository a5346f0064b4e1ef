"""docs/rewards.md names every reward and every part, with its options and what they are without being set."""

import inspect
import re
from pathlib import Path

import pytest

from train.rewards.registry import REWARDS
from train.rewards.shaping import COMPARISONS, PARTS

PAGE = Path(__file__).resolve().parents[3] / "docs" / "rewards.md"


def shown(parameter: inspect.Parameter) -> str:
    default = parameter.default
    if default is parameter.empty:
        return parameter.name
    value = "null" if default is None else str(default).lower() if isinstance(default, bool) else repr(default)
    return f"{parameter.name}={value}"


@pytest.mark.parametrize("heading, functions", [("Is it right?", REWARDS), ("How was it made?", PARTS | COMPARISONS)])
def test_the_tables_are_whole(heading, functions):
    section = PAGE.read_text(encoding="utf-8").partition(f"## {heading}")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \|([^|]*)\|", section, re.MULTILINE))
    assert sorted(rows) == sorted(functions)
    for name, function in functions.items():
        options = [shown(one) for one in list(inspect.signature(function).parameters.values())[2:]]
        assert re.findall(r"`([^`]+)`", rows[name]) == options, name
