"""One record, from its number to an example or to a refusal: the same in training, in checks, and in any process.

    mixture[key] ──read, format──► Conversation ──fit──► Fitted (sizes) ──decode──► Example (pixels)
                       │                             │                      │
                       '──── RefusedError: at which stage, which record, what is wrong ────'

`measure` opens nothing but headers of pictures (a video is decoded, as only that tells its frames), so every rank can
afford it for every record. `decode` is for the rank that trains on it.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from data.conversation import Conversation, PartKind
from data.encode import Example
from data.errors import DataError, Refusal, RefusedError, Stage, TooLongError
from data.fit import Fitted, Rules, encoded, fit
from data.mixture import Mixture
from data.order import Key
from ernie_model.images import MediaError
from ernie_model.processor import Processor


class Checked(NamedTuple):
    """What a look at one record found; small, so that it can be sent between processes."""

    id: str
    refusal: Refusal | None
    """None: it can be trained on. Then the numbers below are its."""
    tokens: int = 0
    trained: int = 0
    """Tokens that are learned."""
    patches: int = 0
    images: int = 0
    videos: int = 0


def measure(mixture: Mixture, key: Key, processor: Processor, rules: Rules) -> Fitted:
    """Raises RefusedError."""
    conversation = mixture[key]
    with _refusing(conversation, mixture.sets[key.set].name):
        fitted = fit(conversation, processor, mixture.media(key), rules)
        return dataclasses.replace(fitted, example=_named(fitted.example, mixture, key))


def decode(mixture: Mixture, key: Key, fitted: Fitted, processor: Processor, rules: Rules) -> Example:
    """The example with its pixels. Raises RefusedError."""
    conversation = fitted.conversation
    with _refusing(conversation, mixture.sets[key.set].name):
        example = encoded(conversation, processor, mixture.media(key), rules, fitted.max_image_pixels, pixels=True)
        if example.grids != fitted.example.grids or example.num_tokens != fitted.example.num_tokens:
            raise MediaError(
                conversation.name, "an image has another size than its header says, or was replaced during the run."
            )
        return _named(example, mixture, key)


def check_record(mixture: Mixture, key: Key, processor: Processor, rules: Rules, *, pixels: bool = True) -> Checked:
    """Everything that training would do with a record; raises nothing that is the record's fault.

    All arguments can be sent to a process of a pool. `pixels=False` believes the headers of pictures.
    """
    try:
        fitted = measure(mixture, key, processor, rules)
        example = decode(mixture, key, fitted, processor, rules) if pixels and not fitted.is_whole else fitted.example
    except RefusedError as error:
        return Checked(error.refusal.id, error.refusal)
    parts = [part.kind for message in fitted.conversation.messages for part in message.parts]
    return Checked(
        example.id,
        None,
        tokens=example.num_tokens,
        trained=int((example.weight_T != 0).sum()),
        patches=example.num_patches,
        images=parts.count(PartKind.IMAGE),
        videos=parts.count(PartKind.VIDEO),
    )


def _named(example: Example, mixture: Mixture, key: Key) -> Example:
    return dataclasses.replace(example, dataset=mixture.sets[key.set].name)


@contextmanager
def _refusing(conversation: Conversation, dataset: str) -> Iterator[None]:
    """Say at which stage a conversation failed."""
    source = conversation.source
    try:
        yield
    except (MediaError, DataError) as error:
        stage = Stage.ENCODE
        if isinstance(error, MediaError):
            stage = Stage.MEDIA
        elif isinstance(error, TooLongError):
            stage = Stage.SIZE
        file, line = (None, None) if source is None else (source.file, source.line)
        raise RefusedError(Refusal(conversation.id, dataset, file, line, stage, str(error))) from error
