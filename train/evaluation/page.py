"""Answers as one HTML page that needs nothing else: no network, no other files.

    header     what was evaluated, and the table of results
    filter     all, wrong, right
    cards      picture with boxes, question, right answer, answer; thought and tool calls folded

Whatever comes from data or a model is escaped.
"""

from collections.abc import Iterator, Mapping, Sequence

from PIL import Image
from rich.table import Table

from train.evaluation.shown import Shown
from train.page_parts import data_url, encode_picture, fitted, head, text

MAX_SHOWN = 560
"""Longest side of a picture on the page, in pixels."""


def write_page(title: str, subtitle: str, table: Table, tasks: Mapping[str, Sequence[Shown]]) -> str:
    """The page's HTML."""
    parts = [
        head(title, ["answers.css"]),
        f"<h1>{text(title)}</h1><p class=sub>{text(subtitle)}</p>",
        *_table(table),
        "<div class=filter>",
        "<label><input type=radio name=which id=all checked> all</label>",
        "<label><input type=radio name=which id=wrong> wrong</label>",
        "<label><input type=radio name=which id=right> right</label>",
        "<small class=keys>boxes: <i class=g>right</i>, <i class=r>the model's</i>, ",
        "<i class=b>looked at by a tool</i></small></div>",
    ]
    for name, items in tasks.items():
        parts.append(f"<h2>{text(name)}</h2><div class=cards>")
        parts += [part for one in items for part in _card(one)]
        parts.append("</div>")
    return "\n".join([*parts, "</body></html>"])


def _table(table: Table) -> Iterator[str]:
    """A table of the terminal, cell by cell."""
    columns = [list(map(str, column._cells)) for column in table.columns]
    yield "<table><tr>" + "".join(f"<th>{text(column.header)}</th>" for column in table.columns) + "</tr>"
    for row in zip(*columns, strict=True):
        part = " class=part" if row[0].startswith("  ") else ""
        yield f"<tr{part}>" + "".join(f"<td>{text(cell.strip())}</td>" for cell in row) + "</tr>"
    yield "</table>"


def _card(one: Shown) -> Iterator[str]:
    answer = one.answer
    kind = {True: "right", False: "wrong", None: "none"}[one.right]
    score = "no score" if answer.score is None else "score " + f"{answer.score:.2f}".rstrip("0").rstrip(".")
    yield f"<article class={kind}><header><b>{score}</b><small>{text(answer.id)}</small></header>"
    if one.picture is not None:
        yield _img(one.picture)
    yield f"<div>{text(one.question)}</div><dl>"
    yield f"<dt>right</dt><dd>{text(answer.expected)}</dd>"
    yield f"<dt>said</dt><dd class=said>{text(answer.answer) or '<small>nothing</small>'}</dd>"
    if answer.status != "answered":
        yield f"<dt>ended</dt><dd>{text(answer.status.replace('_', ' '))} {text(answer.error or '')}</dd>"
    yield "</dl>"
    if answer.reasoning:
        yield f"<details><summary>thought</summary><pre>{text(answer.reasoning)}</pre></details>"
    if answer.calls:
        lines = "\n".join(
            f"{call['name']}({call['arguments']}){' failed' if call['failed'] else ''}" for call in answer.calls
        )
        yield f"<details><summary>{len(answer.calls)} tool call{'s' * (len(answer.calls) > 1)}</summary>"
        yield f"<pre>{text(lines)}</pre></details>"
    if one.tool_pictures:
        yield "<div class=crops>" + "".join(map(_img, one.tool_pictures)) + "</div>"
    yield "</article>"


def _img(picture: Image.Image) -> str:
    file, kind = encode_picture(picture, fitted(picture.size, MAX_SHOWN))
    return f'<img{" class=small" * (kind == "png")} src="{data_url(file, kind)}" alt="">'
