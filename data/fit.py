"""A conversation that is longer than a row: what may be done about it, and what is never done.

    too_long        max_tokens=900       system | turn 1   | turn 2   | turn 3        what is trained
                                          20      400        380       300
    quarantine                                                                        nothing: refused with its length
    drop_turns                            20       -         380       300            the newest turns that fit
    shrink_images                         20      290        270       300            all of it, with coarser pictures

A turn is a user message with all that follows it up to the next one: answers, tool calls and their results stay
together, and turns whose tool results answer a call of an earlier turn go with it. Nothing is ever cut inside a
message, a picture or an answer. What is done depends on the record and the settings alone, so that all ranks agree.

Of a pair, and of a labelled answer, the turns of the prompt are dropped, for all its answers at once.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from data.batch import Role
from data.conversation import Conversation, Item, Judged, Learns, Message, Pair, PartKind
from data.corrupt import Corruption
from data.encode import Example, encode, encode_labelled, encode_pair
from data.errors import DataError, TooLongError
from data.media import MediaFolder
from ernie_model.processor import Processor


class TooLong(Enum):
    """What becomes of a conversation that does not fit in one row."""

    QUARANTINE = "quarantine"
    DROP_TURNS = "drop_turns"
    """The oldest whole turns are left out; the system message stays."""
    SHRINK_IMAGES = "shrink_images"
    """Its pictures are made smaller, down to `min_image_pixels` each."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How conversations become examples; the fields are settings of `data`. Can be sent to another process."""

    max_tokens: int
    max_patches: int | None = None
    thinking: bool | None = None
    every_turn: bool = True
    """Of whole conversations; before the answers of pairs and labelled records, turns are history (data/encode.py)."""
    too_long: TooLong = TooLong.QUARANTINE
    min_image_pixels: int = 16 * 28 * 28
    """Area that `shrink_images` leaves to a picture at least; 28 x 28 pixels are one token."""
    learns: Learns = Learns.CONVERSATIONS
    corruption: Corruption | None = None
    """Of pairs: show prompt and chosen answer once more, with pictures that were made hard to read."""
    scored: bool = False
    """Of pairs: both answers need scores, and the chosen one the higher."""
    mismatched: bool = False
    """Of labelled answers: show another record's answer to the same prompt too."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a row depends on besides its records, by the settings that say it; checked on resume."""
        kept: Mapping[str, Any] = {} if self.corruption is None else vars(self.corruption)
        return {
            "data.max_tokens": self.max_tokens,
            "data.max_patches": self.max_patches,
            "data.too_long": self.too_long.value,
            "what is learned from a record": self.learns.value,
            "corrupted pictures": {k: getattr(v, "value", v) for k, v in kept.items()} or None,
            "pairs without scores left out": self.scored,
            "another record's answer": self.mismatched,
        }


@dataclass(frozen=True)
class Fitted:
    """A record that fits in a row."""

    item: Item
    """Without the turns that were dropped."""
    max_image_pixels: int | None
    """Area that its pictures may have; None leaves the processor's own limit."""
    example: Example
    """Its pictures have sizes but no pixels yet."""

    is_changed: bool = False
    """Turns were dropped, or pictures are to be shrunk."""

    @property
    def is_whole(self) -> bool:
        """There is no picture, so the example lacks nothing."""
        return not has_images(self.item) and Role.CORRUPTED not in self.example.roles


def fit(item: Item, processor: Processor, media: MediaFolder, rules: Rules) -> Fitted:
    """Measure a record from its text and the headers of its pictures, and make it fit if `rules` say how.

    Raises what `encode` raises; TooLongError when all that is allowed was not enough.
    """
    try:
        return measured(item, processor, media, rules)
    except TooLongError as error:
        if rules.too_long is TooLong.DROP_TURNS:
            fitted = _with_fewer_turns(item, processor, media, rules, error)
        elif rules.too_long is TooLong.SHRINK_IMAGES and has_images(item):
            fitted = _with_smaller_images(item, processor, media, rules, error)
        else:
            raise
    return dataclasses.replace(fitted, is_changed=True)


def measured(
    item: Item,
    processor: Processor,
    media: MediaFolder,
    rules: Rules,
    max_image_pixels: int | None = None,
) -> Fitted:
    """As it stands. Raises what `encode` raises."""
    example = encoded(item, processor, media, rules, max_image_pixels, pixels=False)
    return Fitted(item, max_image_pixels, example)


def encoded(
    item: Item,
    processor: Processor,
    media: MediaFolder,
    rules: Rules,
    max_image_pixels: int | None,
    *,
    pixels: bool,
) -> Example:
    shared: dict[str, Any] = dict(
        media=media,
        max_tokens=rules.max_tokens,
        max_patches=rules.max_patches,
        thinking=rules.thinking,
        max_image_pixels=max_image_pixels,
        pixels=pixels,
    )
    if isinstance(item, Pair):
        if rules.scored:
            check_scores(item)
        return encode_pair(item, processor, corruption=rules.corruption, **shared)
    if isinstance(item, Judged):
        return encode_labelled(item, processor, **shared)
    return encode(item, processor, every_turn=rules.every_turn, **shared)


def check_scores(pair: Pair) -> None:
    """Raises DataError unless both answers have scores, and the chosen one the higher."""
    chosen, rejected = pair.scores
    if chosen is None or rejected is None or not chosen > rejected:
        raise DataError(
            f"{pair.name}: {_told(chosen, 'chosen')} and {_told(rejected, 'rejected')}, and objective.offset_alpha "
            "asks for a margin by how much better chosen is. Give both answers scores (score_chosen, score_rejected), "
            "chosen the higher one; or set objective.offset_alpha=0."
        )


def _told(score: float | None, side: str) -> str:
    return f"{side} has no score" if score is None else f"{side} has the score {score:g}"


def has_images(item: Item) -> bool:
    return any(part.kind is PartKind.IMAGE for part in item.parts)


def _with_fewer_turns(
    item: Item, processor: Processor, media: MediaFolder, rules: Rules, error: TooLongError
) -> Fitted:
    for shorter in shorter_ones(item):
        try:
            return measured(shorter, processor, media, rules)
        except TooLongError:
            continue
        except DataError as nothing_left:  # only the dropped turns were trained
            raise TooLongError(f"{error} (What fits after dropping turns: {nothing_left})") from error
    raise TooLongError(f"{error} (Its last turn alone is too long.)") from error


def shorter_ones(item: Item) -> Iterator[Item]:
    """The record without its oldest turn, without its two oldest, ..., down to its last."""
    if isinstance(item, Pair):
        yield from (dataclasses.replace(item, prompt=prompt) for prompt in _shorter(item.prompt))
    elif isinstance(item, Judged):
        yield from (dataclasses.replace(item, conversation=shorter) for shorter in _shorter(item.conversation))
    else:
        yield from _shorter(item)


def _shorter(conversation: Conversation) -> Iterator[Conversation]:
    system, turns = split_turns(conversation.messages)
    for first in range(1, len(turns)):
        kept = [message for turn in turns[first:] for message in turn]
        yield dataclasses.replace(conversation, messages=(*system, *kept))


def split_turns(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system messages at the beginning, and the turns after them that can be dropped one by one."""
    start = next((index for index, message in enumerate(messages) if message.role != "system"), len(messages))
    turns: list[list[Message]] = []
    for message in messages[start:]:
        if message.role == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    # A result without its call is nonsense: join the turns from a call to the last of its results.
    called_in: dict[str, int] = {}
    joined: list[list[Message]] = []
    for turn in turns:
        asked = [called_in[m.tool_call_id] for m in turn if m.tool_call_id in called_in]
        keep = min(asked, default=len(joined))
        merged = [message for earlier in joined[keep:] for message in earlier] + turn
        joined[keep:] = [merged]
        called_in = {call: min(place, keep) for call, place in called_in.items()}
        called_in |= {call.id: keep for message in turn for call in message.tool_calls if call.id is not None}
    return list(messages[:start]), joined


def _with_smaller_images(
    item: Item, processor: Processor, media: MediaFolder, rules: Rules, error: TooLongError
) -> Fitted:
    """With the largest limit, in steps of one token's area, under which it fits."""
    area = processor.image.factor**2
    low, high = -(-rules.min_image_pixels // area), processor.image.max_pixels // area
    try:
        best = measured(item, processor, media, rules, low * area)
    except TooLongError as still:
        raise TooLongError(
            f"{error} (With its pictures shrunk to data.min_image_pixels={rules.min_image_pixels}: {still})"
        ) from error
    while low < high:
        middle = (low + high + 1) // 2
        try:
            best, low = measured(item, processor, media, rules, middle * area), middle
        except TooLongError:
            high = middle - 1
    return best
