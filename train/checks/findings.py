"""What a check finds: fine, worth knowing, or in the way of training; and the report that they add up to."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from ernie_model.atomic import atomic_write


class Level(Enum):
    OK = "ok"
    WARNING = "warning"
    """The run would start; somebody should have a look first."""
    PROBLEM = "problem"
    """The run would fail, or train something else than was meant."""


MARKS = {Level.OK: "[green]✓[/]", Level.WARNING: "[yellow]![/]", Level.PROBLEM: "[red]✗[/]"}


@dataclass(frozen=True)
class Finding:
    level: Level
    text: str
    """What is so; for a warning or a problem, with the way out."""


def ok(text: str) -> Finding:
    return Finding(Level.OK, text)


def warning(text: str) -> Finding:
    return Finding(Level.WARNING, text)


def problem(text: str) -> Finding:
    return Finding(Level.PROBLEM, text)


@dataclass
class Report:
    """Findings by section, told as they come in."""

    console: Console
    errors: tuple[type[BaseException], ...]
    """What a check may raise for something that the user can put right; it becomes a problem."""
    sections: dict[str, list[Finding]] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    """For doctor.json: what was measured, JSON-able."""

    @contextmanager
    def section(self, name: str) -> Iterator[Callable[[Sequence[Finding]], None]]:
        """Gives a function that adds findings. An error in the section ends it, not the doctor."""
        self.console.print(f"\n[bold]{name}[/]")
        self.sections[name] = []

        def add(findings: Sequence[Finding]) -> None:
            for finding in findings:
                self.sections[name].append(finding)
                self.console.print(f"  {MARKS[finding.level]} ", end="")
                self.console.print(finding.text, markup=False)

        try:
            yield add
        except self.errors as error:
            add([problem(str(error))])

    def show(self, picture: RenderableType) -> None:
        self.console.print(picture)

    def of(self, level: Level) -> list[tuple[str, Finding]]:
        return [(name, one) for name, found in self.sections.items() for one in found if one.level is level]

    def write(self, path: Path) -> None:
        """doctor.json: findings by section, and the numbers behind them."""
        content = {
            "problems": len(self.of(Level.PROBLEM)),
            "warnings": len(self.of(Level.WARNING)),
            "sections": {
                name: [{"level": one.level.value, "text": one.text} for one in found]
                for name, found in self.sections.items()
            },
            "numbers": self.numbers,
        }
        atomic_write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
