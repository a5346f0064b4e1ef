"""A conversation becomes an example: tokens, what follows each of them, and which of those are learned.

    token_T    <s> U s e r : ... A s s i s t a n t : \\s   7    </s>
    target_T    U  s e r : ... A s s i s t a n t : \\s  7  </s>   0
    weight_T    0  0 0 0 0 ... 0 0 0 0 0 0 0 0 0 0   1   1    0

Weights belong to the *target*: position t is learned if the assistant wrote token t+1, in a message that is trained.
The processor says who wrote what (its spans); a token whose author is unknown is never trained.

Shape letters:  T tokens   P patches   X numbers in a patch
"""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.batch import Role
from data.conversation import Conversation, Media, PartKind
from data.errors import DataError, TooLongError
from data.media import MediaFolder, media_name
from ernie_model.images import ImageSize, MediaError
from ernie_model.processor import Processor, Span


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
    ref_logprob_T: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.token_T.shape[0]

    @property
    def num_patches(self) -> int:
        return sum(frames * rows * columns for frames, rows, columns in self.grids)

    @property
    def num_bytes(self) -> int:
        streams = (self.token_T, self.target_T, self.weight_T, self.position_3T, self.patch_PX, self.ref_logprob_T)
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
    folder = media or MediaFolder(None)

    def open_media(kind: PartKind, reference: Media) -> Any:
        if kind is PartKind.IMAGE and not pixels:
            return ImageSize(*folder.image_size(reference), filename=media_name(reference))
        return folder.open(kind, reference)

    if max_image_pixels is not None:
        processor = with_image_limit(processor, max_image_pixels)
    try:
        encoded = processor.encode(
            conversation.to_chat(open_media),
            tools=list(conversation.tools) or None,
            thinking=thinking,
            every_turn=every_turn,
        )
    except MediaError as error:
        raise MediaError(error.file, f"{error.problem} (In {conversation.name}.)") from error
    except ValueError as error:
        raise DataError(f"{conversation.name}: {error}") from error
    example = Example(
        id=conversation.id,
        token_T=encoded.token_T,
        target_T=shift(encoded.token_T),
        weight_T=shift(author_weights(conversation, encoded.spans, len(encoded.token_T))),
        position_3T=encoded.position_3T,
        grids=encoded.grids,
        patch_PX=encoded.patch_PX,
    )
    _check_size(conversation, example, max_tokens, max_patches)
    if not example.weight_T.any():
        raise DataError(
            f"{conversation.name}: no token is trained. It needs an assistant message with some content, whose `train` "
            "is not false and whose `weight` is not 0."
        )
    return example


def with_image_limit(processor: Processor, max_pixels: int) -> Processor:
    """The same processor for smaller pictures."""
    other = copy.copy(processor)
    smallest = min(processor.image.min_pixels, max_pixels)
    other.image = dataclasses.replace(processor.image, min_pixels=smallest, max_pixels=max_pixels)
    return other


def shift(value_T: Tensor) -> Tensor:
    """What belongs to the next token, at each token; 0 at the end, where none follows."""
    return torch.cat([value_T[1:], value_T.new_zeros(1)])


def author_weights(conversation: Conversation, spans: Sequence[Span], num_tokens: int) -> Tensor:
    """float32 (T,): the weight of each token as something to be *written* (not yet shifted)."""
    weight_T = torch.zeros(num_tokens)
    for span in spans:
        if not span.generated:
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


def _check_size(conversation: Conversation, example: Example, max_tokens: int | None, max_patches: int | None) -> None:
    sizes = (
        ("tokens", example.num_tokens, "data.max_tokens", max_tokens),
        ("image patches", example.num_patches, "data.max_patches", max_patches),
    )
    for what, size, key, limit in sizes:
        if limit is not None and size > limit:
            raise TooLongError(
                f"{conversation.name}: {size} {what}, more than a row holds ({key}={limit}). Raise {key}, shorten the "
                "conversation, or see data.too_long for what may be done about it."
            )
