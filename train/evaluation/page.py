"""Answers as one HTML page that needs nothing else: no network, no other files.

    header     what was evaluated, and the table of results
    filter     all, wrong, right
    cards      picture with boxes, question, right answer, answer; thought and tool calls folded

Whatever comes from data or a model is escaped.
"""

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.table import Table

from train.evaluation.shown import Shown

CSS = Path(__file__).resolve().parents[1] / "assets" / "answers.css"
MAX_SHOWN = 560
"""Longest side of a picture on the page, in pixels."""
LOSSLESS = 160 * 160
"""Pictures of at most this many pixels are stored as PNG, others as JPEG."""


def write_page(title: str, subtitle: str, table: Table, tasks: Mapping[str, Sequence[Shown]]) -> str:
    """The page's HTML."""
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}</title><style>{CSS.read_text('utf-8')}</style></head><body>",
        f"<h1>{_text(title)}</h1><p class=sub>{_text(subtitle)}</p>",
        *_table(table),
        "<div class=filter>",
        "<label><input type=radio name=which id=all checked> all</label>",
        "<label><input type=radio name=which id=wrong> wrong</label>",
        "<label><input type=radio name=which id=right> right</label>",
        "<small class=keys>boxes: <i class=g>right</i>, <i class=r>the model's</i>, ",
        "<i class=b>looked at by a tool</i></small></div>",
    ]
    for name, items in tasks.items():
        parts.append(f"<h2>{_text(name)}</h2><div class=cards>")
        parts += [part for one in items for part in _card(one)]
        parts.append("</div>")
    return "\n".join([*parts, "</body></html>"])


def _table(table: Table) -> Iterator[str]:
    """A table of the terminal, cell by cell."""
    columns = [list(map(str, column._cells)) for column in table.columns]
    yield "<table><tr>" + "".join(f"<th>{_text(column.header)}</th>" for column in table.columns) + "</tr>"
    for row in zip(*columns, strict=True):
        part = " class=part" if row[0].startswith("  ") else ""
        yield f"<tr{part}>" + "".join(f"<td>{_text(cell.strip())}</td>" for cell in row) + "</tr>"
    yield "</table>"


def _card(one: Shown) -> Iterator[str]:
    answer = one.answer
    kind = {True: "right", False: "wrong", None: "none"}[one.right]
    score = "no score" if answer.score is None else "score " + f"{answer.score:.2f}".rstrip("0").rstrip(".")
    yield f"<article class={kind}><header><b>{score}</b><small>{_text(answer.id)}</small></header>"
    if one.picture is not None:
        yield _img(one.picture)
    yield f"<div>{_text(one.question)}</div><dl>"
    yield f"<dt>right</dt><dd>{_text(answer.expected)}</dd>"
    yield f"<dt>said</dt><dd class=said>{_text(answer.answer) or '<small>nothing</small>'}</dd>"
    if answer.status != "answered":
        yield f"<dt>ended</dt><dd>{_text(answer.status.replace('_', ' '))} {_text(answer.error or '')}</dd>"
    yield "</dl>"
    if answer.reasoning:
        yield f"<details><summary>thought</summary><pre>{_text(answer.reasoning)}</pre></details>"
    if answer.calls:
        lines = "\n".join(
            f"{call['name']}({call['arguments']}){' failed' if call['failed'] else ''}" for call in answer.calls
        )
        yield f"<details><summary>{len(answer.calls)} tool call{'s' * (len(answer.calls) > 1)}</summary>"
        yield f"<pre>{_text(lines)}</pre></details>"
    if one.tool_pictures:
        yield "<div class=crops>" + "".join(map(_img, one.tool_pictures)) + "</div>"
    yield "</article>"


def _img(picture: Image.Image) -> str:
    picture = picture.convert("RGB")
    picture.thumbnail((MAX_SHOWN, MAX_SHOWN))
    file = io.BytesIO()
    small = picture.width * picture.height <= LOSSLESS
    picture.save(file, format="PNG" if small else "JPEG", **({} if small else {"quality": 88}))
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img{" class=small" * small} src="data:image/{"png" if small else "jpeg"};base64,{data}" alt="">'


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)
