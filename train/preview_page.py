"""Samples and packed rows as one HTML page that needs nothing else: no network, no other files.

    header     what this is, in numbers; legend; switches for the grid
    rows       each packed row as a bar, its records as stretches of it
    samples    left: images and videos as the model sees them; right: the tokens, message by message; of a pair the
               prompt, and both answers under headings of their own
    settings   everything that made it

Tokens are written into the page in order, without attributes; one JSON list per sample holds what a token shows under
the mouse. Whatever comes from data is escaped.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from data.batch import Role
from ernie_model.chat import NO_MESSAGE, SpanKind
from train.page_parts import ASSETS, LOSSLESS, data_url, encode_picture, fitted, head, script_json, text
from train.samples import Medium, Row, Sample, Section, kind_of

MAX_SHOWN = 1024
"""Longest side of a picture in the page, in pixels; larger ones are shrunk, as their captions say."""
SCALE, ENLARGED = 3, 280
"""Small pictures are shown at three times their size, but no wider than this many pixels."""
TALLEST = 560
"""Height of a picture on the page, in pixels, at most."""
NARROW = 200
"""Width of the column that holds small pictures, in pixels."""
MAX_FRAME = 360
"""The same for one frame of a video."""

KINDS = {
    SpanKind.TEMPLATE: "chat template",
    SpanKind.TOOLS: "tool definitions",
    SpanKind.SYSTEM: "system",
    SpanKind.USER: "user",
    SpanKind.TOOL_RESULT: "tool result",
    SpanKind.IMAGE: "image",
    SpanKind.VIDEO: "video",
    SpanKind.REASONING: "reasoning",
    SpanKind.ANSWER: "answer",
    SpanKind.TOOL_CALL: "tool call",
    SpanKind.END: "end of turn",
}
ROLES = {
    Role.PROMPT: "prompt",
    Role.CHOSEN: "chosen",
    Role.REJECTED: "rejected",
    Role.CORRUPTED: "chosen, after corrupted pictures",
    Role.WANTED: "wanted",
    Role.UNWANTED: "unwanted",
    Role.MISMATCHED: "another record's answer",
}


@dataclass(frozen=True)
class Page:
    title: str
    subtitle: str
    samples: Sequence[Sample]
    rows: Sequence[Row]
    """Empty of prompts, which fill rows only together with what will be answered."""
    max_tokens: int
    max_patches: int | None
    patch_size: int
    settings: str
    """As YAML."""


def write_page(page: Page) -> str:
    """The page's HTML."""
    parts = [
        head(page.title, ["preview.css"]),
        *_header(page),
        *(_rows(page) if page.rows else ()),
        *(part for number, sample in enumerate(page.samples) for part in _sample(number, sample, page)),
        "<details class=settings><summary>Settings that made this</summary>",
        f"<pre>{text(page.settings)}</pre></details>",
        "<div id=tip hidden></div>",
        f"<script>const DATA={script_json([_data(sample) for sample in page.samples])};</script>",
        f"<script>{(ASSETS / 'preview.js').read_text('utf-8')}</script></body></html>",
    ]
    return "\n".join(parts)


# ------------------------------------------------------------------------------------------------- header and rows


def _header(page: Page) -> Iterator[str]:
    tokens = sum(len(sample.ids) for sample in page.samples)
    trained = sum(sample.num_trained for sample in page.samples)
    media = sum(medium.num_tokens for sample in page.samples for medium in sample.media)
    facts = [(f"{len(page.samples)}", f"{kind_of(page.samples)} shown"), (f"{tokens:,}", "tokens")]
    if page.rows:
        facts.append((f"{trained / tokens:.1%}", "of them trained"))
    facts.append((f"{media / tokens:.1%}", "image and video"))
    if page.rows:
        filled = sum(row.tokens for row in page.rows) / (len(page.rows) * page.max_tokens)
        facts.append((f"{filled:.1%}", f"of {len(page.rows)} row{'s' * (len(page.rows) > 1)} filled"))
    yield f"<header><h1>{text(page.title)}</h1><p class=sub>{text(page.subtitle)}</p><dl class=facts>"
    yield "".join(f"<div><dt>{value}</dt><dd>{label}</dd></div>" for value, label in facts)
    yield "</dl></header><nav class=legend><span class=group>"
    present = {span.kind for sample in page.samples for span in sample.spans}
    for kind, name in KINDS.items():
        if kind in present:
            yield f"<button data-kind={kind.value}><i class=k-{kind.value}>{name}</i></button>"
    yield "</span>"
    if page.rows:
        yield "<span class=group><button data-kind=t><i class='t k-answer'>trained</i></button>"
        yield "<button data-kind=w><i>weight<sup>×0.5</sup></i></button></span>"
    if any(sample.media for sample in page.samples):
        yield "<span class=group><label><input type=checkbox id=grid28 checked> token grid</label>"
        yield "<label><input type=checkbox id=grid14> patch grid</label></span>"
    yield "</nav>"


def _rows(page: Page) -> Iterator[str]:
    yield "<section class=rows><h2>Packed rows</h2><p class=sub>Each bar is one row (micro-batch) of "
    each = kind_of(page.samples).removesuffix("s")
    yield f"{page.max_tokens:,} tokens; each stretch is a {each}, its green part is trained, its violet part is "
    yield "image or video. Click on a numbered one to read it.</p>"
    ranks = {row.rank for row in page.rows}
    for row in page.rows:
        label = f"update {row.step + 1}" + (f" · rank {row.rank}" if len(ranks) > 1 else "")
        fill = row.tokens / page.max_tokens
        patches = f"{row.patches:,} patches" if row.patches else "no patches"
        if page.max_patches is not None:
            patches += f" of {page.max_patches:,}"
        yield f"<div class=row><span class=label>{label}</span><div class=bar>"
        for one in row.stretches:
            about = f"{one.id}: {one.tokens:,} tokens, {one.trained:,} trained, "
            about += f"{one.media_tokens:,} of images and videos, {one.patches:,} patches"
            link = "" if one.sample is None else f" data-sample={one.sample} tabindex=0 role=button"
            number = "" if one.sample is None else f"<b>{one.sample + 1}</b>"
            yield (
                f'<div class=seg style="width:{100 * one.tokens / page.max_tokens:.4f}%" data-tip="{text(about)}"'
                f'{link}><u style="width:{100 * one.media_tokens / one.tokens:.1f}%"></u>'
                f'<s style="width:{100 * one.trained / one.tokens:.1f}%"></s>{number}</div>'
            )
        yield f"</div><span class=fill>{fill:.1%}</span><span class=cost>{len(row.stretches)} "
        yield f"{kind_of(page.samples)}, {patches}"
        yield "</span></div>"
    yield "</section>"


# --------------------------------------------------------------------------------------------------------- samples


def _sample(number: int, sample: Sample, page: Page) -> Iterator[str]:
    facts = [f"{len(sample.ids):,} tokens"]
    if page.rows:
        facts.append(f"{sample.num_trained:,} trained ({sample.num_trained / len(sample.ids):.0%})")
    if sample.media:
        facts.append(f"{sum(m.num_tokens for m in sample.media):,} of images and videos")
    if page.rows:
        facts.append(f"row {sample.row + 1}, place {sample.record + 1}")
    if sample.right:
        facts.append(text(sample.right))
    dataset = f"<span class=dataset>{text(sample.dataset)}</span>" if sample.dataset else ""
    name = f"<span title='{text(sample.id)}'>{text(sample.id.rpartition('/')[2])}</span>"
    yield f"<article id=s{number}><h2><b>{number + 1}</b> {name}{dataset}"
    widest = max((medium.grid[2] * page.patch_size for medium in sample.media), default=0)
    columns = "one" if not sample.media else "narrow" if widest * SCALE <= NARROW else "two"
    yield f"<small>{' · '.join(facts)}</small></h2><div class={columns}>"
    if sample.media:
        yield "<div class=media>"
        for index, medium in enumerate(sample.media):
            yield from _medium(index, medium, page.patch_size)
        yield "</div>"
    yield f"<div class=toks data-sample={number}>"
    numbered = iter(range(len(sample.media)))
    for section in sample.sections:
        if section.role is Role.WHOLE:
            yield from _messages(sample, section, numbered)
            continue
        yield f"<section class='s-{section.role.value}'>{_heading(sample, section)}"
        yield from _messages(sample, section, numbered)
        yield "</section>"
    yield "</div></div></article>"


def _heading(sample: Sample, section: Section) -> str:
    trained = sum(weight != 0 for weight in sample.weights[section.start : section.stop])
    facts = [f"{section.stop - section.start:,} tokens", f"{trained:,} trained"]
    if section.score is not None:
        facts.append(f"score {section.score:g}")
    return f"<h3>{ROLES[section.role]}<small>{' · '.join(facts)}</small></h3>"


def _medium(index: int, medium: Medium, patch_size: int) -> Iterator[str]:
    frames, rows, columns = medium.grid
    height, width = rows * patch_size, columns * patch_size
    limit = MAX_FRAME if medium.is_video else MAX_SHOWN
    size = fitted((width, height), limit)
    caption = f"{width} × {height} pixels, {rows // 2} × {columns // 2} tokens"
    if medium.is_video:
        caption = f"{frames} frames of {caption} per pair of frames = {medium.num_tokens:,} tokens"
    else:
        caption += f" = {medium.num_tokens:,}"
    if size != (width, height):
        caption += f"; shown at {size[0]} × {size[1]}"
    kind = "video" if medium.is_video else "image"
    yield f"<figure class={kind} id=m{index}><div class=frames>"
    overlay = _overlay(rows, columns)
    # As large as the model sees it; small ones enlarged, tall ones not higher than a screen.
    wide = min(max(width, min(width * SCALE, ENLARGED)), TALLEST * width / height)
    for number, frame in enumerate(medium.frames):
        small = " class=small" if width * height <= LOSSLESS else ""
        # Two frames of a video share their tokens.
        time = number // 2 if medium.is_video else 0
        place = f"data-start={medium.start} data-time={time} data-rows={rows // 2} data-columns={columns // 2}"
        yield f'<div class=pic {place} style="max-width:{wide:.0f}px;aspect-ratio:{width}/{height}">'
        url = data_url(*encode_picture(frame, size))
        yield f'<img{small} alt="{text(medium.name or kind)}" src="{url}">{overlay}</div>'
    named = medium.name and not medium.name.startswith("<")  # bytes and data: URLs have no name
    name = f"<b>{text(Path(medium.name).name)}</b> " if named else ""
    yield f"</div><figcaption>{name}{caption}</figcaption></figure>"


def _overlay(rows: int, columns: int) -> str:
    """Lines between patches, those between tokens in a path of their own; one unit is a patch."""

    def lines(step: int) -> str:
        across = "".join(f"M0 {y}H{columns}" for y in range(step, rows, step))
        return across + "".join(f"M{x} 0V{rows}" for x in range(step, columns, step))

    return (
        f'<svg viewBox="0 0 {columns} {rows}" preserveAspectRatio=none><path class=p14 d="{lines(1)}"/>'
        f'<path class=p28 d="{lines(2)}"/><rect class=cell width=2 height=2 /></svg>'
    )


def _messages(sample: Sample, section: Section, numbered: Iterator[int]) -> Iterator[str]:
    """One block per message; spans are in order and cover all tokens. `numbered`: the media that are still to come."""
    for message, spans in groupby(section.spans, key=lambda span: span.message):
        role = "start" if message == NO_MESSAGE else section.roles[message]
        tokens: list[str] = []
        for span in spans:
            if span.kind in (SpanKind.IMAGE, SpanKind.VIDEO):
                tokens.append(_chip(sample.media[index := next(numbered)], index, span.stop - span.start))
            else:
                tokens += _tokens(sample, span.start, span.stop, span.kind)
        # In one piece: spaces and line breaks count here.
        yield f"<div class='msg r-{text(role)}'><span class=role>{text(role)}</span><p>{''.join(tokens)}</p></div>"


def _tokens(sample: Sample, start: int, stop: int, kind: SpanKind) -> Iterator[str]:
    for index in range(start, stop):
        weight = sample.weights[index]
        trained = " t" if weight else ""
        written = text(sample.texts[index]).replace("\n", "⏎\n").replace("\t", "⇥\t")
        # Said once, where a stretch of an unusual weight begins.
        said = weight not in (0, 1) and sample.weights[index - 1] != weight
        mark = f"<sup>×{weight:g}</sup>" if said else ""
        yield f"<i class='k-{kind.value}{trained}'>{mark}{written}</i>"


def _chip(medium: Medium, index: int, num_tokens: int) -> str:
    """All tokens of an image or video in one word: its start token, the placeholders, its end token."""
    frame = medium.frames[0]
    shrink = min(1.0, 48 / frame.height)
    size = (max(1, round(frame.width * shrink)), max(1, round(frame.height * shrink)))
    thumbnail = data_url(*encode_picture(frame, size))
    kind = "video" if medium.is_video else "image"
    return (
        f'<i class="k-{kind} chip" data-tokens={num_tokens} data-medium={index}><img alt="" src="{thumbnail}">'
        f"{num_tokens:,} tokens</i>"
    )


def _data(sample: Sample) -> dict[str, object]:
    """What the page's script knows of a sample."""
    return {
        "ids": sample.ids,
        "positions": [part for position in sample.positions for part in position],
        "weights": sample.weights
        if any(weight not in (0, 1) for weight in sample.weights)
        else [int(weight) for weight in sample.weights],
        "vision": [int(flag) for flag in sample.in_vision_pool],
        "texts": sample.texts,
        "stops": [section.stop for section in sample.sections],
    }
