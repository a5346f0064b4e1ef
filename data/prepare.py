"""One record, from its number to an example or to a refusal: the same in training, in checks, and in any process.

    mixture[key] ──read, format──►    Item      ──fit──► Fitted (sizes) ──decode──► Example (pixels)
                       │                             │                      │
                       '──── RefusedError: at which stage, which record, what is wrong ────'

An item is a conversation, a pair, or a labelled answer, as `Rules.learns` says.

`measure` opens nothing but headers of pictures (a video is decoded, as only that tells its frames), so every rank can
afford it for every record. `decode` is for the rank that trains on it.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from data.batch import Role
from data.conversation import Conversation, Item, Judged, Learns, Message, Pair, PartKind, last_answer, thinks
from data.dataset import TRIES, StreamDataset
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
    answers: tuple[tuple[Role, int], ...] = ()
    """Of a pair and of a labelled answer: what each is, and its tokens that are learned."""
    score_gap: float | None = None
    """Score of the chosen answer less that of the rejected one, where both have one."""
    is_cut: bool = False
    """One answer of the pair is the beginning of the other."""


def measure(mixture: Mixture, key: Key, processor: Processor, rules: Rules) -> Fitted:
    """Raises RefusedError."""
    record = mixture[key]
    with _refusing(record, mixture.sets[key.set].name):
        item = _item(mixture, key, record, rules)
        fitted = fit(item, processor, mixture.media(key), rules)
        return dataclasses.replace(fitted, example=_named(fitted.example, mixture, key))


def decode(mixture: Mixture, key: Key, fitted: Fitted, processor: Processor, rules: Rules) -> Example:
    """The example with its pixels. Raises RefusedError."""
    item = fitted.item
    with _refusing(item, mixture.sets[key.set].name):
        example = encoded(item, processor, mixture.media(key), rules, fitted.max_image_pixels, pixels=True)
        if example.grids != fitted.example.grids or example.num_tokens != fitted.example.num_tokens:
            raise MediaError(
                item.name, "an image has another size than its header says, or was replaced during the run."
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
    parts = [part.kind for part in fitted.item.parts]
    return Checked(
        example.id,
        None,
        tokens=example.num_tokens,
        trained=int((example.weight_T != 0).sum()),
        patches=example.num_patches,
        images=parts.count(PartKind.IMAGE),
        videos=parts.count(PartKind.VIDEO),
        answers=_answers(example),
        score_gap=_score_gap(fitted.item),
        is_cut=isinstance(fitted.item, Pair) and _is_cut(fitted.item),
    )


def _answers(example: Example) -> tuple[tuple[Role, int], ...]:
    kinds = (Role.CHOSEN, Role.REJECTED, Role.WANTED, Role.UNWANTED)
    if not example.lengths:
        return ()
    learned = [int((weight_T != 0).sum()) for weight_T in example.weight_T.split(example.lengths)]
    return tuple((role, count) for role, count in zip(example.roles, learned, strict=True) if role in kinds)


def _is_cut(pair: Pair) -> bool:
    # Texts, not tokens: a word that was cut is another token.
    chosen, rejected = (
        "\0".join(part for m in answer for part in (m.reasoning or "", m.text, *map(repr, m.tool_calls)))
        for answer in (pair.chosen, pair.rejected)
    )
    return chosen.startswith(rejected) or rejected.startswith(chosen)


def _score_gap(item: Item) -> float | None:
    if not isinstance(item, Pair) or item.chosen_score is None or item.rejected_score is None:
        return None
    return item.chosen_score - item.rejected_score


def check_possible(mixture: Mixture, rules: Rules) -> None:
    """Raises DataError where a set has no other record whose answer could be shown (`Rules.mismatched`)."""
    for one in mixture.sets if rules.mismatched else ():
        way_out = "or a loss that needs no such answer, objective.preference_loss_type=apo_zero_unpaired"
        if isinstance(one.dataset, StreamDataset):
            raise DataError(
                f"{one.name} is streaming, and kto estimates a KL divergence with the answer of the next record, which "
                f"a stream does not give twice. Use streaming: false, {way_out}."
            )
        if len(one.dataset) < 2:
            raise DataError(
                f"{one.name} holds a single record, and kto estimates a KL divergence with the answer of another one. "
                f"Add records, {way_out}."
            )


def _item(mixture: Mixture, key: Key, record: Conversation | Pair, rules: Rules) -> Item:
    if rules.learns is not Learns.LABELLED:
        return record
    assert isinstance(record, Conversation)
    return Judged(conversation=record, other=other_answer(mixture, key, record) if rules.mismatched else ())


def other_answer(mixture: Mixture, key: Key, record: Conversation) -> tuple[Message, ...]:
    """The answer of the next record that can be read and thinks before it answers if this one does.

    After the last record comes the first. Raises DataError where none of the next ones will do.
    """
    dataset = mixture.sets[key.set].dataset
    assert not isinstance(dataset, StreamDataset), "check_possible refuses streams"
    wanted = thinks(last_answer(record))
    for step in range(1, min(len(dataset), TRIES + 1)):
        try:
            next_ = dataset[(key.number + step) % len(dataset)]
        except DataError:  # refused, in its own place
            continue
        answer = last_answer(next_) if isinstance(next_, Conversation) else ()
        if answer and thinks(answer) == wanted:
            return answer
    raise DataError(
        f"{record.name}: none of the next {min(len(dataset) - 1, TRIES)} records has an answer that could be shown in "
        f"place of its own: one that can be read, and begins {'with' if wanted else 'without'} a thought, as its own."
    )


def _named(example: Example, mixture: Mixture, key: Key) -> Example:
    return dataclasses.replace(example, dataset=mixture.sets[key.set].name)


@contextmanager
def _refusing(item: Item, dataset: str) -> Iterator[None]:
    """Say at which stage a record failed."""
    source = item.source
    try:
        yield
    except (MediaError, DataError) as error:
        stage = Stage.ENCODE
        if isinstance(error, MediaError):
            stage = Stage.MEDIA
        elif isinstance(error, TooLongError):
            stage = Stage.SIZE
        file, line = (None, None) if source is None else (source.file, source.line)
        raise RefusedError(Refusal(item.id, dataset, file, line, stage, str(error))) from error
