"""Results as tables in the terminal.

        asked   score       95 %    ppl  forced  tokens    cut
───────────────────────────────────────────────────────────────
digits    359  97.5 %  95.8–98.9  1.057  97.5 %     2.0  0.0 %
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

Result = Mapping[str, Any]


def make_console() -> Console:
    """As wide as the terminal; a file or pipe gets whole tables."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=140)


def results_table(results: Mapping[str, Any]) -> Table:
    """One row for each task, its domains below it; columns that would say the same everywhere are left out."""
    tasks: Mapping[str, Result] = results["tasks"]
    columns: list[tuple[str, Callable[[Result], str]]] = [
        ("asked", lambda one: f"{one['questions']:,}"),
        ("score", lambda one: mean(one["score"])),
        ("95 %", lambda one: bounds(one["score"])),
    ]
    if any(one["accuracy"] != one["score"] for one in tasks.values()):
        columns.append(("right", lambda one: mean(one["accuracy"])))
    for k in sorted({k for one in tasks.values() for k in one["pass_at"]} - {"1"}, key=int):
        columns.append((f"pass@{k}", lambda one, k=k: mean(one["pass_at"].get(k))))
    known = [one for one in tasks.values() if one["likelihood"]]
    if known:
        columns.append(("ppl", lambda one: number(one["likelihood"]["perplexity"]) if _has(one) else ""))
        columns.append(("forced", lambda one: share(one["likelihood"]["exact"]) if _has(one) else ""))
    columns.append(("tokens", lambda one: f"{one['tokens']:.1f}" if "tokens" in one else ""))
    columns.append(("cut", lambda one: share(one["truncated"]) if "truncated" in one else ""))
    if any(one["calls"] for one in tasks.values()):
        columns.append(("used tools", lambda one: share(one["tool_use"]) if "tool_use" in one else ""))
        columns.append(("worked", lambda one: share(one.get("tool_success"))))
    if any(one["unscored"] for one in tasks.values()):
        columns.append(("no score", lambda one: f"{one['unscored']:,}" if one.get("unscored") else ""))

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    for name, _ in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for name, one in tasks.items():
        table.add_row(Text(name, style="bold"), *(value(one) for _, value in columns))
        for domain, part in one["domains"].items():
            table.add_row(f"  {domain}", *(value(part) for _, value in columns), style="dim")
    if len(tasks) > 1 and results["overall"]:
        table.add_section()
        whole = results["overall"]
        shown = {"score": mean(whole["score"]), "95 %": bounds(whole["score"]), "right": mean(whole["accuracy"])}
        table.add_row("mean of tasks", *(shown.get(name, "") for name, _ in columns))
    return table


def _has(one: Result) -> bool:
    return bool(one.get("likelihood"))


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """One row for each task: both means, the difference with its interval, and p; the tests below. 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    for name in ("asked", "before", "after", "change", "95 %", "better", "worse", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    tests = {one["test"]: [] for one in comparison["tasks"].values()}
    for task, one in comparison["tasks"].items():
        tests[one["test"]].append(task)
    table.caption = "; ".join(f"p by {test}: {', '.join(tasks)}" for test, tasks in tests.items())
    table.caption_justify = "left"
    for task, one in comparison["tasks"].items():
        low, high = one["low"], one["high"]
        style = "" if low <= 0 <= high else "green" if low > 0 else "red"
        table.add_row(
            Text(task, style="bold"),
            f"{one['questions']:,}",
            share(one["before"]),
            share(one["after"]),
            Text(f"{100 * one['difference']:+.1f}", style=style),
            f"{100 * low:+.1f}…{100 * high:+.1f}",
            str(one["better"]),
            str(one["worse"]),
            "<0.001" if one["p_value"] < 0.001 else f"{one['p_value']:.3f}",
        )
    return table


def mean(one: Mapping[str, float] | None) -> str:
    return "" if one is None else share(one["mean"])


def bounds(one: Mapping[str, float] | None) -> str:
    return "" if one is None else f"{100 * one['low']:.1f}–{100 * one['high']:.1f}"


def share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def number(value: float) -> str:
    """3.14159 -> 3.142, 1234.5 -> 1,234, 1e9 -> 1.0e+09."""
    if value >= 1e6:
        return f"{value:.1e}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3f}"


def endings_line(tasks: Mapping[str, Result], words: Sequence[str] = ("answered",)) -> str:
    """How attempts ended that did not end well; "" when all did."""
    parts = []
    for name, one in tasks.items():
        bad = [f"{count} {ending.replace('_', ' ')}" for ending, count in one["endings"].items() if ending not in words]
        if bad:
            parts.append(f"{name}: {', '.join(bad)}")
    return "; ".join(parts)
