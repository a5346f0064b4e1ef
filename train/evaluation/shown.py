"""Answers with their pictures, to look at: on the page, in the contact sheet, in the trackers' tables.

Where the right answer is boxes or points, both are drawn: the right ones in green, the answer's in red. What a tool was
asked to look at (`bbox_2d` of its arguments) is drawn in blue.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data.conversation import PartKind
from ernie_model.images import MediaError
from ernie_model.inference.grounding import Box, draw, parse_grounding
from ernie_model.video import decode_frames, probe
from train.contact_sheet import SheetItem
from train.evaluation.asking import Answer
from train.evaluation.questions import AskedTask, Question
from train.evaluation.results import is_right

GREEN, RED, BLUE = "#2da44e", "#cf222e", "#0969da"
FRAMES = 4
"""Frames of a video that are shown, evenly over it."""
FRAME_HEIGHT = 96

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Shown:
    answer: Answer
    question: str
    """In words."""
    right: bool | None
    """None: it has no score."""
    picture: Image.Image | None
    """The first one of the question, with boxes; of a video some frames side by side."""
    tool_pictures: tuple[Image.Image, ...]


def shown(task: AskedTask, answers: Sequence[Answer], *, most: int, right_at: float, folder: Path) -> list[Shown]:
    """At most `most` of the answers, one for each question: its first wrong attempt, or else its first. Wrong ones come
    first, otherwise in order."""
    questions = {one.id: one for one in task.questions}
    chosen: dict[str, Answer] = {}
    for one in answers:
        if one.id not in chosen or (_right(chosen[one.id], right_at) and not _right(one, right_at)):
            chosen[one.id] = one
    order = sorted(chosen.values(), key=lambda one: _right(one, right_at) is True)[:most]
    return [
        Shown(
            answer=one,
            question=words(questions[one.id]),
            right=_right(one, right_at),
            picture=_annotated(questions[one.id], one),
            tool_pictures=tuple(Image.open(folder / path) for path in one.pictures if (folder / path).exists()),
        )
        for one in order
    ]


def _right(answer: Answer, right_at: float) -> bool | None:
    return None if answer.score is None else is_right(answer.score, right_at)


def words(question: Question) -> str:
    """The last thing the user says."""
    users = [message for message in question.asked.messages if message.role == "user"]
    return users[-1].text if users else question.asked.messages[-1].text


def _annotated(question: Question, answer: Answer) -> Image.Image | None:
    try:
        picture = picture_of(question)
    except MediaError as error:  # it could be shown to the model a moment ago; the page is not worth an evaluation
        logger.warning("%s is not shown: %s", question.id, error)
        return None
    right = parse_grounding(answer.expected)
    items = (*right.boxes, *right.points)
    looked_at = [box for call in answer.calls for box in boxes_of_call(call["arguments"])]
    if picture is None or not (items or looked_at):
        return picture
    enlarged = 320 / max(picture.size)
    if enlarged > 1:  # or the lines would cover what they surround
        size = (round(picture.width * enlarged), round(picture.height * enlarged))
        picture = picture.resize(size, Image.Resampling.NEAREST)
    picture = draw(draw(picture, looked_at, color=BLUE), items, color=GREEN)
    if not items:
        return picture
    said = parse_grounding(answer.answer, most=4 * len(items))
    return draw(picture, (*said.boxes, *said.points), color=RED)


def boxes_of_call(arguments: str) -> tuple[Box, ...]:
    """Where a tool was asked to look."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return ()
    asked = value.get("bbox_2d") if isinstance(value, dict) else None
    return parse_grounding(json.dumps({"bbox_2d": asked})).boxes


def picture_of(question: Question) -> Image.Image | None:
    """The first one, or frames of the first video side by side.

    Raises:
        MediaError: it cannot be opened.
    """
    for message in question.asked.messages:
        for part in message.parts:
            if part.media is None:
                continue
            if part.kind is PartKind.IMAGE:
                return question.media.open_image(part.media)
            file = question.media.open_video(part.media)
            places = np.linspace(0, max(probe(file).num_frames - 1, 0), FRAMES).round().astype(int)
            return _side_by_side(list(decode_frames(file, sorted({int(place) for place in places}))))
    return None


def _side_by_side(frames: Sequence[Image.Image]) -> Image.Image | None:
    if not frames:
        return None
    frames = [
        frame.convert("RGB").resize((max(1, round(frame.width * FRAME_HEIGHT / frame.height)), FRAME_HEIGHT))
        for frame in frames
    ]
    strip = Image.new("RGB", (sum(frame.width + 4 for frame in frames) - 4, FRAME_HEIGHT), "white")
    at = 0
    for frame in frames:
        strip.paste(frame, (at, 0))
        at += frame.width + 4
    return strip


def sheet_items(items: Sequence[Shown]) -> list[SheetItem]:
    """For a contact sheet: those with a picture and a score."""
    return [
        SheetItem(one.picture, expected=one.answer.expected, answer=one.answer.answer, correct=one.right)
        for one in items
        if one.picture is not None and one.right is not None
    ]
