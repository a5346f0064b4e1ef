"""A conversation becomes an example: tokens, what follows each of them, and which of those are learned.

    token_T    <s> U s e r : ... A s s i s t a n t : \\s   7    </s>
    target_T    U  s e r : ... A s s i s t a n t : \\s  7  </s>   0
    weight_T    0  0 0 0 0 ... 0 0 0 0 0 0 0 0 0 0   1   1    0

Weights belong to the *target*: position t is learned if the assistant wrote token t+1, in a message that is trained.
The processor says who wrote what (its spans); a token whose author is unknown is never trained.

Answers to one prompt share its tokens and its pictures (data/batch.py has the row). Both conversations are encoded
whole, which shows that they begin alike, and are cut where the assistant begins to write:

    chosen     <s> U s e r : ... A s s i s t a n t : | \\s   7    </s>
    rejected   <s> U s e r : ... A s s i s t a n t : | \\s   1    </s>
    example    <s> U s e r : ... A s s i s t a n t   | : \\s 7 </s> | : \\s 1 </s>       prompt, chosen, rejected

Shape letters:  T tokens   P patches   X numbers in a patch
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.batch import Role
from data.conversation import Conversation, Judged, Media, Message, Pair, PartKind, thinks
from data.corrupt import Corruption, corrupted
from data.errors import DataError, TooLongError
from data.media import MediaFolder, media_name
from ernie_model.images import ImageSize, KnownGrid, MediaError
from ernie_model.processor import Encoded, Processor, Span
from ernie_model.rope import Grid


@dataclass(frozen=True, kw_only=True)
class Example:
    """One encoded record; the streams are those of `PackedBatch`. A conversation is one segment, a pair several."""

    id: str
    token_T: Tensor  # int64
    target_T: Tensor  # int64; 0 at the end
    weight_T: Tensor  # float32; 0 at the end
    position_3T: Tensor  # int64, rows time, height, width
    grids: tuple[tuple[int, int, int], ...] = ()
    patch_PX: Tensor | None = None  # float32
    dataset: str = ""
    """Name of the dataset it came from."""
    lengths: tuple[int, ...] = ()
    """Tokens of its segments; empty: one, of all tokens. The other tuples are those of `PackedBatch`."""
    stems: tuple[int, ...] = ()
    roles: tuple[Role, ...] = ()
    scores: tuple[float, ...] = ()
    waited: tuple[int, ...] = ()
    engine_logprob_T: Tensor | None = None
    advantage_T: Tensor | None = None
    expert_TLK: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.token_T.shape[0]

    @property
    def num_patches(self) -> int:
        return sum(frames * rows * columns for frames, rows, columns in self.grids)

    @property
    def num_bytes(self) -> int:
        streams = (self.token_T, self.target_T, self.weight_T, self.position_3T, self.patch_PX)
        return sum(stream.nbytes for stream in streams if stream is not None)


def encode(
    conversation: Conversation,
    processor: Processor,
    *,
    media: MediaFolder | None = None,
    max_tokens: int | None = None,
    max_patches: int | None = None,
    thinking: bool | None = None,
    every_turn: bool = True,
    max_image_pixels: int | None = None,
    pixels: bool = True,
) -> Example:
    """Tokens, targets, weights, positions and pixels of one conversation.

    `thinking` and `every_turn` are those of the chat format (ernie_model/chat.py). With `every_turn`, all of the
    assistant's turns are learned in one pass. Without, a turn is learned only where it stands as it would at inference:
    the last one, and those with reasoning; the others are history. `max_image_pixels` is the area that a picture may
    have instead of the processor's own limit. Without `pixels`, only the headers of pictures are read: everything is
    right but `patch_PX`, which lacks them.

    Raises DataError when nothing in the conversation is trained, TooLongError when it does not fit in a row, and
    MediaError for an image or video that cannot be read; each names the record.
    """
    if max_image_pixels is not None:
        processor = with_image_limit(processor, max_image_pixels)
    open_media = _opener(media or MediaFolder(None), pixels)
    encoded = _processed(conversation, processor, open_media, thinking=thinking, every_turn=every_turn)
    example = Example(
        id=conversation.id,
        token_T=encoded.token_T,
        target_T=shift(encoded.token_T),
        weight_T=shift(author_weights(conversation, encoded.spans, len(encoded.token_T))),
        position_3T=encoded.position_3T,
        grids=encoded.grids,
        patch_PX=encoded.patch_PX,
    )
    _check_size(conversation.name, example, max_tokens, max_patches)
    if not example.weight_T.any():
        raise DataError(
            f"{conversation.name}: no token is trained. It needs an assistant message with some content, whose `train` "
            "is not false and whose `weight` is not 0."
        )
    return example


class _Answer(NamedTuple):
    """One of the answers to a prompt."""

    role: Role
    said: str
    """What errors call it."""
    messages: tuple[Message, ...]
    score: float | None = None


def encode_pair(
    pair: Pair,
    processor: Processor,
    *,
    media: MediaFolder | None = None,
    max_tokens: int | None = None,
    max_patches: int | None = None,
    thinking: bool | None = None,
    max_image_pixels: int | None = None,
    pixels: bool = True,
    corruption: Corruption | None = None,
) -> Example:
    """Segments: prompt, chosen, rejected; with `corruption`, and where there are pictures, corrupted too.

    Only the answers are learned, message by message as in `encode`; the prompt's turns are history, shown as inference
    shows them. Every image and video is opened once. `grids` are the prompt's, the chosen answer's, the rejected one's,
    and those of both segments of the corrupted conversation (prompt, chosen) once more.

    Raises what `encode` raises; DataError for answers that are the same, or do not share their prompt.
    """
    return _encode_answers(
        pair.prompt,
        (
            _Answer(Role.CHOSEN, "chosen", pair.chosen, pair.chosen_score),
            _Answer(Role.REJECTED, "rejected", pair.rejected, pair.rejected_score),
        ),
        processor,
        media or MediaFolder(None),
        max_tokens=max_tokens,
        max_patches=max_patches,
        thinking=thinking,
        max_image_pixels=max_image_pixels,
        pixels=pixels,
        corruption=corruption,
    )


def encode_labelled(
    judged: Judged,
    processor: Processor,
    *,
    media: MediaFolder | None = None,
    max_tokens: int | None = None,
    max_patches: int | None = None,
    thinking: bool | None = None,
    max_image_pixels: int | None = None,
    pixels: bool = True,
) -> Example:
    """Segments: prompt, wanted or unwanted, and mismatched where there is another record's answer. As `encode_pair`."""
    wanted = judged.conversation.label
    assert wanted is not None
    answers = [_Answer(Role.WANTED if wanted else Role.UNWANTED, "its answer", judged.answer)]
    if judged.other:
        answers.append(_Answer(Role.MISMATCHED, "the other record's answer", judged.other))
    return _encode_answers(
        judged.prompt,
        answers,
        processor,
        media or MediaFolder(None),
        max_tokens=max_tokens,
        max_patches=max_patches,
        thinking=thinking,
        max_image_pixels=max_image_pixels,
        pixels=pixels,
    )


def _encode_answers(
    prompt: Conversation,
    answers: Sequence[_Answer],
    processor: Processor,
    folder: MediaFolder,
    *,
    max_tokens: int | None,
    max_patches: int | None,
    thinking: bool | None,
    max_image_pixels: int | None,
    pixels: bool,
    corruption: Corruption | None = None,
) -> Example:
    if max_image_pixels is not None:
        processor = with_image_limit(processor, max_image_pixels)
    _check_thoughts(prompt, answers, thinking)
    asked = len(prompt.messages)
    shared = sum(part.kind is not PartKind.TEXT for part in prompt.parts)
    wholes: list[Encoded] = []
    weights: list[Tensor] = []
    stop = 0  # where the prompt ends
    for answer in answers:
        known = wholes[0].grids[:shared] if wholes else ()
        conversation = dataclasses.replace(prompt, messages=prompt.messages + answer.messages)
        whole = _processed(
            conversation, processor, _opener(folder, pixels, known), thinking=thinking, written_from=asked
        )
        weight_T = author_weights(conversation, whole.spans, len(whole.token_T), first=asked)
        if not weight_T.any():
            raise DataError(
                f"{prompt.name}: no token of {answer.said} is trained. It needs an assistant message whose `train` is "
                "not false and whose `weight` is not 0."
            )
        begins = next(span.start for span in whole.spans if span.message >= asked and span.generated)
        if wholes and not (begins == stop and torch.equal(whole.token_T[:stop], wholes[0].token_T[:stop])):
            raise DataError(f"{prompt.name}: the prompt is not shown alike before {answers[0].said} and {answer.said}.")
        stop = begins
        wholes.append(whole)
        weights.append(weight_T)
    if len(answers) == 2 and answers[1].role is Role.REJECTED:
        _check_different(prompt, answers, wholes)

    stem = slice(0, stop - 1)
    first = wholes[0]
    tokens, targets = [first.token_T[stem]], [shift(first.token_T[stem])]
    learned, positions = [torch.zeros(stop - 1)], [first.position_3T[:, stem]]
    for whole, weight_T in zip(wholes, weights, strict=True):
        tokens.append(whole.token_T[stop - 1 :])
        targets.append(shift(whole.token_T)[stop - 1 :])
        learned.append(shift(weight_T)[stop - 1 :])
        positions.append(whole.position_3T[:, stop - 1 :])
    grids = first.grids + tuple(grid for whole in wholes[1:] for grid in whole.grids[shared:])
    patches = [whole.patch_PX for whole in wholes if whole.patch_PX is not None]
    stems, roles = [-1, *(0 for _ in answers)], [Role.PROMPT, *(answer.role for answer in answers)]
    scores = [math.nan if answer.score is None else answer.score for answer in answers]
    if corruption is not None and first.grids:
        tokens.append(first.token_T)
        targets.append(shift(first.token_T))
        learned.append(shift(weights[0]))
        positions.append(first.position_3T)
        grids += first.grids
        if pixels:
            assert first.patch_PX is not None
            patches.append(corrupted(first.patch_PX, first.grids, processor, corruption, prompt.id))
        stems.append(-1)
        roles.append(Role.CORRUPTED)
        scores.append(math.nan)
    example = Example(
        id=prompt.id,
        token_T=torch.cat(tokens),
        target_T=torch.cat(targets),
        weight_T=torch.cat(learned),
        position_3T=torch.cat(positions, dim=1),
        grids=grids,
        patch_PX=torch.cat(patches) if patches else None,
        lengths=tuple(map(len, tokens)),
        stems=tuple(stems),
        roles=tuple(roles),
        scores=() if all(map(math.isnan, scores)) else (math.nan, *scores),
    )
    sizes = [f"{len(whole.token_T) - stop} of {answer.said}" for whole, answer in zip(wholes, answers, strict=True)]
    _check_size(prompt.name, example, max_tokens, max_patches, f" ({stop} of the prompt, {', '.join(sizes)})")
    return example


def _check_thoughts(prompt: Conversation, answers: Sequence[_Answer], thinking: bool | None) -> None:
    """A thought begins behind another generation prompt than a plain answer, so the prompts would differ."""
    if thinking is None and len({thinks(answer.messages) for answer in answers}) > 1:
        with_, without = sorted(answers, key=lambda answer: not thinks(answer.messages))
        raise DataError(
            f"{prompt.name}: {with_.said} begins with a thought (reasoning_content) and {without.said} does not. The "
            "model is asked to think before it answers, so their prompts differ. Give both a thought, or neither."
        )


def _check_different(prompt: Conversation, answers: Sequence[_Answer], wholes: Sequence[Encoded]) -> None:
    media = [[part.media for message in answer.messages for part in message.parts] for answer in answers]
    if torch.equal(wholes[0].token_T, wholes[1].token_T) and media[0] == media[1]:
        raise DataError(
            f"{prompt.name}: chosen and rejected are the same, token by token, so there is nothing to prefer. Remove "
            "the record, or mend one of them."
        )


def _opener(folder: MediaFolder, pixels: bool, known: Sequence[Grid] = ()) -> Callable[[PartKind, Media], Any]:
    """What opens the media of one conversation, in order, for the processor.

    The first of them have been cut already and have these grids. Without `pixels`, of pictures only the size is read.
    """
    grids = iter(known)

    def open_media(kind: PartKind, reference: Media) -> Any:
        grid = next(grids, None)
        if grid is not None:
            return KnownGrid(grid, media_name(reference))
        if kind is PartKind.IMAGE and not pixels:
            return ImageSize(*folder.image_size(reference), filename=media_name(reference))
        return folder.open(kind, reference)

    return open_media


def _processed(
    conversation: Conversation, processor: Processor, open_media: Callable[[PartKind, Media], Any], **shown: Any
) -> Encoded:
    """`Processor.encode`, whose errors name the record."""
    try:
        return processor.encode(conversation.to_chat(open_media), tools=list(conversation.tools) or None, **shown)
    except MediaError as error:
        raise MediaError(error.file, f"{error.problem} (In {conversation.name}.)") from error
    except ValueError as error:
        raise DataError(f"{conversation.name}: {error}") from error


def with_image_limit(processor: Processor, max_pixels: int) -> Processor:
    """The same processor for smaller pictures."""
    other = copy.copy(processor)
    smallest = min(processor.image.min_pixels, max_pixels)
    other.image = dataclasses.replace(processor.image, min_pixels=smallest, max_pixels=max_pixels)
    return other


def shift(value_T: Tensor) -> Tensor:
    """What belongs to the next token, at each token; 0 at the end, where none follows."""
    return torch.cat([value_T[1:], value_T.new_zeros(1)])


def author_weights(conversation: Conversation, spans: Sequence[Span], num_tokens: int, *, first: int = 0) -> Tensor:
    """float32 (T,): the weight of each token as something to be *written* (not yet shifted).

    Nothing before message `first` is learned.
    """
    weight_T = torch.zeros(num_tokens)
    for span in spans:
        if not span.generated or span.message < first:
            continue
        message = conversation.messages[span.message]
        if span.prompted:
            weight_T[span.start : span.stop] = message.trained_weight
        elif message.train:
            raise DataError(
                f"{conversation.name}: messages[{span.message}].train is true, but with every_turn=False this "
                "turn is shown as history, without its generation prompt. Pass every_turn=True, or end the "
                "conversation there."
            )
    return weight_T


def _check_size(name: str, example: Example, max_tokens: int | None, max_patches: int | None, parts: str = "") -> None:
    sizes = (
        ("tokens", example.num_tokens, "data.max_tokens", max_tokens),
        ("image patches", example.num_patches, "data.max_patches", max_patches),
    )
    for what, size, key, limit in sizes:
        if limit is not None and size > limit:
            raise TooLongError(
                f"{name}: {size} {what}{parts if what == 'tokens' else ''}, more than a row holds ({key}={limit}). "
                f"Raise {key}, shorten the conversation, or see data.too_long for what may be done about it."
            )
