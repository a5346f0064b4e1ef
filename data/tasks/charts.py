"""Reading charts: visitors by the hour, on one day or two.

    User: Picture 1:[bars, "Visitors on Tue 4 March", 10:00 to 17:00, 252 x 168 pixels]When was it quietest on Tuesday?
    Assistant: 14:00

A chart of two days has a legend with their dates, and the question names one of the days. Asked for is the quietest
hour, the busiest, or (where numbers stand at the bars) how many came in an hour.
"""

from datetime import date, timedelta
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from data.conversation import Conversation, Part
from data.errors import DataError
from data.tasks.base import Item, Split, Task, asked, choice, drawn
from data.tasks.drawing import png

WIDTH, HEIGHT = 252, 168
HOURS = range(10, 18)
FIRST_DAY = date(2025, 1, 6)
"""A Monday."""
GAP = 15
"""Visitors that the quietest and the busiest hour are apart from the next at least."""


def draw(rng: np.random.Generator, split: Split, seed: int) -> Item:
    ask = choice(rng, ("quietest", "busiest", "value"))
    days = 1 if ask == "value" else int(rng.integers(1, 3))
    bars = ask == "value" or bool(rng.integers(2))
    first = FIRST_DAY + timedelta(days=int(rng.integers(360)))
    dates = [first + timedelta(days=number) for number in range(days)]
    visitors = [_visitors(rng) for _ in dates]
    day = int(rng.integers(days))
    counts, name = visitors[day], f"{dates[day]:%A}"
    if ask == "value":
        hour = int(rng.integers(len(HOURS)))
        answer = str(counts[hour])
        question = choice(rng, (f"How many visitors came at {HOURS[hour]}:00?", f"How many came at {HOURS[hour]}:00?"))
    else:
        hour = counts.index(min(counts) if ask == "quietest" else max(counts))
        answer = f"{HOURS[hour]}:00"
        question = choice(rng, (f"When was it {ask} on {name}?", f"Which hour of {name} was the {ask}?"))
    colours = [COLOURS[int(index)] for index in rng.permutation(len(COLOURS))[:days]]

    def render(id: str) -> Conversation:
        picture = Part.of_image(png(_chart(dates, visitors, bars=bars, written=ask == "value", colours=colours)))
        return asked(
            id,
            (picture, Part.of_text(question)),
            answer,
            reward="number" if ask == "value" else "exact",
            domain=f"{ask}, {'one day' if days == 1 else 'two days'}",
        )

    return Item(f"{ask} {dates} {visitors} {day} {bars} {hour}", render)


COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")


def _visitors(rng: np.random.Generator) -> list[int]:
    """Of each hour, with one that is clearly the quietest and one that is clearly the busiest."""
    while True:
        counts = (5 * rng.integers(4, 40, size=len(HOURS))).tolist()
        low, *_, high = ordered = sorted(counts)
        if ordered[1] - low >= GAP and high - ordered[-2] >= GAP:
            return counts


@cache
def _paper() -> tuple[Any, Any]:
    """The canvas of all charts, and axes with what no chart changes: drawing that anew takes most of the time."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("charts are drawn by matplotlib: pip install matplotlib") from error

    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.13, 0.14, 0.85, 0.72))
    axes.set_xticks(HOURS, [f"{hour}" for hour in HOURS])
    axes.set_xlim(HOURS[0] - 0.6, HOURS[-1] + 0.6)
    axes.set_ylim(0, 240)
    axes.tick_params(labelsize=7, length=2, pad=1.5)
    axes.grid(axis="y", linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)
    axes.set_title("", fontsize=8, pad=3)
    canvas.draw()
    return canvas, axes


@cache
def _empty() -> Any:
    canvas, axes = _paper()
    return canvas.copy_from_bbox(axes.figure.bbox)


def _chart(
    dates: list[date], visitors: list[list[int]], *, bars: bool, written: bool, colours: list[str]
) -> Image.Image:
    canvas, axes = _paper()
    canvas.restore_region(_empty())
    artists: list[Any] = []
    width = 0.8 / len(dates)
    for number, (day, counts, colour) in enumerate(zip(dates, visitors, colours, strict=True)):
        label = f"{day:%a} {day.day} {day:%b}"
        if bars:
            places = [hour + (number - (len(dates) - 1) / 2) * width for hour in HOURS]
            columns = axes.bar(places, counts, width=width, color=colour, label=label)
            artists += columns
            artists += axes.bar_label(columns, fontsize=6.5, padding=1) if written else []
        else:
            artists += axes.plot(HOURS, counts, color=colour, marker="o", markersize=3, linewidth=1.2, label=label)
    only = dates[0]
    axes.title.set_text(f"Visitors on {only:%a} {only.day} {only:%B}" if len(dates) == 1 else "Visitors")
    drawn = [*artists, axes.title]
    if len(dates) > 1:
        places = dict(ncols=2, loc="upper center", borderaxespad=0.1, handlelength=1)
        drawn.append(axes.legend(fontsize=6.5, frameon=False, **places))
    for artist in drawn:
        axes.draw_artist(artist)
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    for artist in artists:
        artist.remove()
    axes.containers.clear()
    if axes.legend_ is not None:
        axes.legend_.remove()
    return picture


TASK = Task(
    name="charts",
    description="the quietest hour, the busiest, or a number in a chart of visitors",
    conversations=drawn("charts", {"train": 600, "heldout": 150}, draw),
    max_new_tokens=16,
)
