"""An attempt as a line of rollouts.jsonl: what it was asked, what it wrote token by token, what became of it.

    pieces    reasoning │ tool_call │ result (of a tool, not sampled) ░░ picture ░░ │ answer
              texts, ids and the engine's log-probabilities of every token; of a picture, how many tokens it has

Pictures lie in files beside it, named by what they hold, so that a prompt that is asked again stores none twice.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.conversation import PartKind
from ernie_model.atomic import atomic_write
from ernie_model.images import MediaError
from ernie_model.inference.agent import Episode
from ernie_model.processor import Processor
from ernie_model.tokenizer import END_OF_SENTENCE, END_THINK, END_TOOL_CALL, STOP, THINK, TOOL_CALL
from train.evaluation.questions import Question
from train.evaluation.shown import boxes_of_call, picture_of, words
from train.page_parts import encode_picture, fitted
from train.reinforcement.groups import Group
from train.samples import token_texts

LONGEST_SIDE = 640
"""Of a stored picture, in pixels."""
LONGEST_RESULT = 2000
"""Characters of a tool's text."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and when a group was asked."""

    rollout: int
    step: int
    """Updates done before."""
    domain: str
    kind: str
    """Of the group: source.KINDS."""


def key_of(token_ids: Sequence[int]) -> str:
    """Of an attempt, from the last token of its prompt on: as a segment of a packed row has it."""
    return hashlib.blake2b(np.asarray(token_ids, np.int64).tobytes(), digest_size=12).hexdigest()


def lines_of(
    group: Group,
    question: Question,
    place: Place,
    fates: Sequence[str],
    advantages: Sequence[float] | None,
    processor: Processor,
    folder: Path,
) -> Iterator[dict[str, Any]]:
    """One for each attempt.

    Args:
        advantages: None while the group waits, or teaches nothing.
        folder: of the run; pictures are written below it.
    """
    shared = _prompt_of(group, question, processor, folder)
    looked_at = _looked_at(question)
    for number, one in enumerate(group.attempts):
        episode, scores = one.episode, one.scores
        prompt = episode.num_prompt_tokens
        yield {
            "rollout": place.rollout,
            "step": place.step,
            "group": group.ticket.group,
            "attempt": number,
            "version": group.version,
            "id": f"{question.task}/{question.id}",
            "domain": place.domain,
            "kind": place.kind,
            "fate": fates[number],
            **shared,
            "status": episode.status.value,
            "error": episode.error,
            "problem": scores.problem,
            "reward": scores.total,
            "accuracy": scores.accuracy,
            "parts": scores.parts,
            "advantage": None if advantages is None else round(advantages[number], 6),
            "tokens": episode.num_sampled,
            "text": "".join(turn.text for turn in episode.turns),
            "answer": episode.answer,
            "calls": list(_calls(episode, looked_at, folder)),
            "key": key_of(episode.token_ids[prompt - 1 :]) if prompt else "",
            "pieces": list(pieces_of(episode, processor, thinking=question.thinking)) if prompt else [],
        }


def _prompt_of(group: Group, question: Question, processor: Processor, folder: Path) -> dict[str, Any]:
    """What all attempts of a group share."""
    asked = next((one.episode for one in group.attempts if one.episode.num_prompt_tokens), None)
    count = sum(part.kind is PartKind.IMAGE for message in question.asked.messages for part in message.parts)
    pictures = [] if asked is None else asked.images[:count]
    if not pictures:
        try:
            picture = picture_of(question)
        except MediaError as error:  # it could be shown a moment ago, and is not worth a run
            logger.warning("%s is not shown: %s", question.id, error)
            picture = None
        pictures = [] if picture is None else [picture]
    ids = [] if asked is None else asked.token_ids[: asked.num_prompt_tokens]
    return {
        "question": words(question),
        "prompt": _with_media(ids, processor),
        "expected": question.expected,
        "pictures": [store(picture, folder) for picture in pictures],
    }


def _with_media(token_ids: Sequence[int], processor: Processor) -> str:
    """The text of a prompt, special tokens and all; a picture's placeholders in one word."""
    out, placeholders = [], set(processor.config.placeholder_token_ids)
    for ids in _runs(token_ids, lambda index: token_ids[index] in placeholders):
        run = token_ids[ids.start : ids.stop]
        if run[0] in placeholders:
            out.append(f"[{len(run)} tokens]")
        else:
            out += token_texts(run, processor.tokenizer)
    return "".join(out)


def _runs(sequence: Sequence[Any], kind: Any) -> Iterator[range]:
    """Ranges of equal kinds, in order."""
    start = 0
    for index in range(1, len(sequence) + 1):
        if index == len(sequence) or kind(index) != kind(start):
            yield range(start, index)
            start = index


def store(picture: Image.Image, folder: Path) -> str:
    """Its path in the folder."""
    file, kind = encode_picture(picture, fitted(picture.size, LONGEST_SIDE))
    name = f"rollouts/{hashlib.blake2b(file, digest_size=10).hexdigest()}.{'png' if kind == 'png' else 'jpg'}"
    if not (folder / name).exists():
        (folder / name).parent.mkdir(exist_ok=True)
        atomic_write(folder / name, file)
    return name


def _looked_at(question: Question) -> int | None:
    """Which picture of the prompt the zoom tool cuts out of: the last that the user gave."""
    number, last = 0, None
    for message in question.asked.messages:
        for part in message.parts:
            if part.kind is PartKind.IMAGE:
                last = number if message.role != "tool" else last
                number += 1
    return last


def _calls(episode: Episode, looked_at: int | None, folder: Path) -> Iterator[dict[str, Any]]:
    for number, turn in enumerate(episode.turns):
        calls = [(call.name, call.arguments) for call in turn.calls]
        if not calls and turn.problem is not None:
            calls = [("", "")]
        for place, (name, arguments) in enumerate(calls):
            result = turn.results[place] if place < len(turn.results) else None
            boxes = boxes_of_call(arguments)
            yield {
                "turn": number,
                "name": name,
                "arguments": arguments,
                "failed": result is None or result.error,
                "result": (turn.problem or "not run") if result is None else result.text[:LONGEST_RESULT],
                "boxes": [list(box.xyxy) for box in boxes],
                "on": looked_at if boxes else None,
                "pictures": [] if result is None else [store(image, folder) for image in result.images],
            }


def pieces_of(episode: Episode, processor: Processor, *, thinking: bool) -> Iterator[dict[str, Any]]:
    """What stands behind the prompt, in order; `thinking`: prompts and results open a thought."""
    start = episode.num_prompt_tokens
    ids = episode.token_ids[start:]
    sampled, logprobs = episode.sampled[start:], episode.logprobs[start:]
    texts = token_texts(ids, processor.tokenizer)
    config = processor.config
    media = {config.image_token_id: "image", config.video_token_id: "video"} if config.placeholder_token_ids else {}
    kinds: list[str] = []
    state = "reasoning" if thinking else "answer"
    for index, token in enumerate(ids):
        if not sampled[index]:
            kinds.append(media.get(token, "result"))
            state = "reasoning" if thinking else "answer"
            continue
        written = texts[index]
        if written == THINK:
            state = "reasoning"
        elif written == TOOL_CALL:
            state = "tool_call"
        kinds.append("end" if written in (END_OF_SENTENCE, STOP) else state)
        if written in (END_THINK, END_TOOL_CALL):
            state = "answer"
    shown = 0
    for run in _runs(ids, lambda index: (sampled[index], kinds[index])):
        own, kind = slice(run.start, run.stop), kinds[run.start]
        if kind in ("image", "video"):
            yield {"kind": kind, "count": len(run), "number": shown}
            shown += 1
            continue
        piece: dict[str, Any] = {"kind": kind, "texts": texts[own], "ids": ids[own]}
        if sampled[run.start]:
            piece["logprobs"] = [round(value, 4) for value in logprobs[own]]
        yield piece


def to_line(line: Mapping[str, Any]) -> str:
    """As JSON, which has no nan and no inf: they become null. What is no Unicode (half of a surrogate pair, which a
    model can write) becomes a question mark."""
    return json.dumps(_plain(line), ensure_ascii=False, separators=(",", ":")) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
