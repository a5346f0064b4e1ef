"""What a run will be shown, in a form for people: every token with its author, weight and position; pictures again.

    PackedStream ──► PackedBatch ──► Row      how records lie in the packed rows of each rank
                         │
                         '─────────► Sample   one of them: tokens, and pixels turned back into pictures

A sample is a conversation, or a prompt and its answers: one section for each segment of the record.

Everything is read from the batches that training itself would get. Only the authors are not in them, because training
needs no more than weights; a `Witness` in the processor's place remembers those.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data.batch import PackedBatch, Role
from ernie_model.chat import SpanKind
from ernie_model.images import pictures
from ernie_model.processor import Encoded, Processor, Span, token_types
from ernie_model.rope import Grid, num_media_tokens
from ernie_model.tokenizer import Tokenizer


@dataclass(frozen=True)
class Authors:
    """Who wrote which tokens of one conversation."""

    spans: tuple[Span, ...]
    roles: tuple[str, ...]
    """Of each message."""
    media: tuple[str, ...]
    """Names of its images and videos, in order; "" for those that have none."""


class Witness(Processor):
    """A processor that remembers the authors of everything it encodes."""

    def __init__(self, inner: Processor):
        super().__init__(inner.tokenizer, inner.config, inner.image, inner.video, inner.chat)
        self._seen: dict[bytes, Authors] = {}

    def encode(self, messages: Sequence[Mapping[str, Any]], **settings: Any) -> Encoded:
        encoded = super().encode(messages, **settings)
        roles = tuple(str(message["role"]) for message in messages)
        if settings.get("add_generation_prompt"):
            roles += ("assistant",)  # whose turn is opened
        self._seen[_key(encoded.token_T)] = Authors(encoded.spans, roles, tuple(_media_names(messages)))
        return encoded

    def authors(self, token_T: Tensor) -> Authors:
        """Of a conversation that has been encoded here."""
        return self._seen[_key(token_T)]


def _key(token_T: Tensor) -> bytes:
    return token_T.numpy().tobytes()


def _media_names(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for message in messages:
        content = message["content"]
        for part in () if isinstance(content, str) else content:
            if part["type"] == "text":
                continue
            media = part[part["type"]]
            # A picture, or its size, carries the name of its file; of a video, the path itself is handed on.
            name = media if isinstance(media, str | Path) else getattr(media, "filename", "")
            yield str(name)


@dataclass(frozen=True)
class Medium:
    """An image or a video, as the model sees it."""

    name: str
    is_video: bool
    grid: Grid
    frames: tuple[Image.Image, ...]
    start: int
    """Its first placeholder in the sample's tokens."""
    num_tokens: int


@dataclass(frozen=True)
class Section:
    """One segment: a conversation, a prompt, an answer. Places are those of the sample's lists."""

    role: Role
    start: int
    stop: int
    spans: tuple[Span, ...]
    roles: tuple[str, ...]
    """Of each message of the conversation that it is of, from the prompt's first."""
    score: float | None = None
    """Of an answer, where its record has one."""


@dataclass(frozen=True)
class Sample:
    """One record of a packed row. Lists with one entry per token."""

    id: str
    dataset: str
    row: int
    """Index of its row among those drawn."""
    record: int
    """Its place in the row."""
    sections: tuple[Section, ...]
    ids: list[int]
    texts: list[str]
    positions: list[tuple[int, int, int]]
    """time, height, width"""
    weights: list[float]
    """How much *writing this token* counts: the weight of the place before it, whose target it is."""
    in_vision_pool: list[bool]
    media: list[Medium]
    right: str = ""
    """Of a prompt, which holds no answer: the right one, and what compares it."""

    @property
    def spans(self) -> Iterator[Span]:
        return itertools.chain.from_iterable(section.spans for section in self.sections)

    @property
    def num_trained(self) -> int:
        return sum(weight != 0 for weight in self.weights)


@dataclass(frozen=True)
class Stretch:
    """A record's place in a row."""

    id: str
    tokens: int
    trained: int
    media_tokens: int
    patches: int
    sample: int | None = None
    """Its number among the samples, where it is one of them."""


@dataclass(frozen=True)
class Row:
    """One packed row, which is one micro-batch of one rank."""

    step: int
    rank: int
    stretches: list[Stretch]

    @property
    def tokens(self) -> int:
        return sum(stretch.tokens for stretch in self.stretches)

    @property
    def patches(self) -> int:
        return sum(stretch.patches for stretch in self.stretches)


def samples_of(batch: PackedBatch, processor: Witness, *, row: int) -> Iterator[Sample]:
    """The records of a packed row, in order; each is worked out when it is asked for."""
    config = processor.config
    grids, patch = iter(batch.grids), 0
    starts = list(itertools.accumulate(batch.lengths, initial=0))
    for record, segments in enumerate(batch.record_segments):
        start, stop = starts[segments[0]], starts[segments[-1] + 1]
        sections, media, weights = [], [], []
        for segment in segments:
            section, names = _section(batch, processor, starts, segment, start)
            sections.append(section)
            weights += [0.0, *batch.weight_T[starts[segment] : starts[segment + 1] - 1].tolist()]
            for name, (is_video, first) in zip(names, _media_starts(section.spans), strict=True):
                grid = next(grids)
                assert batch.patch_PX is not None  # the batch has placeholders
                size = grid[0] * grid[1] * grid[2]
                settings = processor.video if is_video else processor.image
                frames = pictures(batch.patch_PX[patch : patch + size].numpy(), grid, settings)
                media.append(Medium(name, is_video, grid, tuple(frames), first, num_media_tokens(grid)))
                patch += size
        token_T = batch.token_T[start:stop]
        ids = token_T.tolist()
        yield Sample(
            id=batch.ids[segments[0]],
            dataset=batch.datasets[segments[0]],
            row=row,
            record=record,
            sections=tuple(sections),
            ids=ids,
            texts=token_texts(ids, processor.tokenizer),
            positions=[(t, h, w) for t, h, w in batch.position_3T[:, start:stop].T.tolist()],
            weights=weights,
            in_vision_pool=(token_types(token_T, config, brackets=True) != 0).tolist(),
            media=media,
        )


def kind_of(samples: Sequence[Sample]) -> str:
    """What these are called, in the plural."""
    roles = {section.role for sample in samples for section in sample.sections}
    if not any(sample.num_trained for sample in samples):
        return "prompts"
    if Role.CHOSEN in roles:
        return "pairs"
    return "labelled answers" if roles & {Role.WANTED, Role.UNWANTED} else "conversations"


def _section(
    batch: PackedBatch, processor: Witness, starts: Sequence[int], segment: int, offset: int
) -> tuple[Section, list[str]]:
    """A segment of the sample that begins at token `offset` of the row, and the names of its images and videos.

    Authors are known of whole conversations: of a prompt and the answer behind it.
    """
    role = batch.roles[segment] if batch.roles else Role.WHOLE
    stem = batch.stems[segment] if batch.stems else -1
    own = range(starts[segment], starts[segment + 1])
    first, answer = (segment, segment + 1) if role is Role.PROMPT else (segment if stem < 0 else stem, segment)
    prompt_T = batch.token_T[starts[first] : starts[first + 1]] if first != answer else batch.token_T[:0]
    authors = processor.authors(torch.cat([prompt_T, batch.token_T[starts[answer] : starts[answer + 1]]]))
    low = 0 if role is Role.PROMPT or stem < 0 else len(prompt_T)
    move = own.start - offset - low
    spans, before, shown = [], 0, 0
    for span in authors.spans:
        is_medium = span.kind in (SpanKind.IMAGE, SpanKind.VIDEO)
        begin, end = max(span.start, low), min(span.stop, low + len(own))
        if begin < end:
            spans.append(dataclasses.replace(span, start=begin + move, stop=end + move))
            shown += is_medium
        else:
            before += is_medium and span.stop <= low
    score = batch.scores[segment] if batch.scores else math.nan
    section = Section(
        role,
        own.start - offset,
        own.stop - offset,
        tuple(spans),
        authors.roles,
        score=None if math.isnan(score) else score,
    )
    names = authors.media[before : before + shown]
    return section, [f"{name} (corrupted)" if name and role is Role.CORRUPTED else name for name in names]


def _media_starts(spans: Sequence[Span]) -> Iterator[tuple[bool, int]]:
    """Whether it is a video, and its first placeholder: of every image and video, in order.

    A span is the start token, the placeholders and the end token; the tokeniser keeps media apart, so each is whole.
    """
    for span in spans:
        if span.kind in (SpanKind.IMAGE, SpanKind.VIDEO):
            yield span.kind is SpanKind.VIDEO, span.start + 1


def stretches_of(batch: PackedBatch, processor: Processor, samples: Mapping[int, int]) -> list[Stretch]:
    """How a row is divided; `samples` says which record is which sample."""
    grids = list(batch.grids)
    starts = list(itertools.accumulate(batch.lengths, initial=0))
    out = []
    for record, segments in enumerate(batch.record_segments):
        start, stop = starts[segments[0]], starts[segments[-1] + 1]
        media_tokens = int((token_types(batch.token_T[start:stop], processor.config) != 0).sum())
        patches, left = 0, media_tokens
        while left > 0:
            grid = grids.pop(0)
            patches += grid[0] * grid[1] * grid[2]
            left -= num_media_tokens(grid)
        trained = int((batch.weight_T[start:stop] != 0).sum())
        out.append(Stretch(batch.ids[segments[0]], stop - start, trained, media_tokens, patches, samples.get(record)))
    return out


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """What each token writes. Of a letter that several byte tokens spell, the last one shows it, the others "·"."""
    texts: list[str] = []
    pending = b""
    for token_id in ids:
        token = tokenizer.token(token_id) or ""
        if len(token) != 6 or not token.startswith("<0x"):
            texts.append(token.replace("▁", " ") if token else f"<{token_id}>")
            pending = b""
            continue
        pending += bytes([int(token[3:5], 16)])
        try:
            texts.append(pending.decode("utf-8"))
            pending = b""
        except UnicodeDecodeError:
            texts.append("·")
            pending = pending if len(pending) < 4 else b""  # no letter has more bytes: these spell none
    return texts
