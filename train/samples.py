"""What a run will be shown, in a form for people: every token with its author, weight and position; pictures again.

    PackedStream ──► PackedBatch ──► Row      how conversations lie in the packed rows of each rank
                         │
                         '─────────► Sample   one of them: tokens, and pixels turned back into pictures

Everything is read from the batches that training itself would get. Only the authors are not in them, because training
needs no more than weights; a `Witness` in the processor's place remembers those.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from data.batch import PackedBatch
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
class Sample:
    """One conversation of a packed row. Lists with one entry per token."""

    id: str
    dataset: str
    row: int
    """Index of its row among those drawn."""
    segment: int
    ids: list[int]
    texts: list[str]
    positions: list[tuple[int, int, int]]
    """time, height, width"""
    weights: list[float]
    """How much *writing this token* counts: the weight of the place before it, whose target it is."""
    in_vision_pool: list[bool]
    authors: Authors
    media: list[Medium]

    @property
    def num_trained(self) -> int:
        return sum(weight != 0 for weight in self.weights)


@dataclass(frozen=True)
class Segment:
    """A conversation's place in a row."""

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
    segments: list[Segment]

    @property
    def tokens(self) -> int:
        return sum(segment.tokens for segment in self.segments)

    @property
    def patches(self) -> int:
        return sum(segment.patches for segment in self.segments)


def samples_of(batch: PackedBatch, processor: Witness, *, row: int) -> Iterator[Sample]:
    """The conversations of a packed row, in order; each is worked out when it is asked for."""
    config = processor.config
    grids, patch = list(batch.grids), 0
    start = 0
    for segment, length in enumerate(batch.lengths):
        stop = start + length
        token_T = batch.token_T[start:stop]
        ids = token_T.tolist()
        authors = processor.authors(token_T)
        media = []
        for name, (is_video, first) in zip(authors.media, _media_starts(token_T, authors.spans), strict=True):
            grid = grids.pop(0)
            assert batch.patch_PX is not None  # the batch has placeholders
            size = grid[0] * grid[1] * grid[2]
            settings = processor.video if is_video else processor.image
            frames = pictures(batch.patch_PX[patch : patch + size].numpy(), grid, settings)
            media.append(Medium(name, is_video, grid, tuple(frames), first, num_media_tokens(grid)))
            patch += size
        yield Sample(
            id=batch.ids[segment],
            dataset=batch.datasets[segment],
            row=row,
            segment=segment,
            ids=ids,
            texts=token_texts(ids, processor.tokenizer),
            positions=[(t, h, w) for t, h, w in batch.position_3T[:, start:stop].T.tolist()],
            weights=[0.0, *batch.weight_T[start : stop - 1].tolist()],
            in_vision_pool=(token_types(token_T, config, brackets=True) != 0).tolist(),
            authors=authors,
            media=media,
        )
        start = stop


def _media_starts(token_T: Tensor, spans: Sequence[Span]) -> Iterator[tuple[bool, int]]:
    """Whether it is a video, and its first placeholder: of every image and video, in order.

    A span is the start token, the placeholders and the end token; the tokeniser keeps media apart, so each is whole.
    """
    for span in spans:
        if span.kind in (SpanKind.IMAGE, SpanKind.VIDEO):
            yield span.kind is SpanKind.VIDEO, span.start + 1


def segments_of(batch: PackedBatch, processor: Processor, samples: Mapping[int, int]) -> list[Segment]:
    """How a row is divided; `samples` says which segment is which sample."""
    grids = list(batch.grids)
    out, start = [], 0
    for index, length in enumerate(batch.lengths):
        stop = start + length
        media_tokens = int((token_types(batch.token_T[start:stop], processor.config) != 0).sum())
        patches, left = 0, media_tokens
        while left > 0:
            grid = grids.pop(0)
            patches += grid[0] * grid[1] * grid[2]
            left -= num_media_tokens(grid)
        trained = int((batch.weight_T[start:stop] != 0).sum())
        out.append(Segment(batch.ids[index], length, trained, media_tokens, patches, samples.get(index)))
        start = stop
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
