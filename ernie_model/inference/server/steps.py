"""What the server's tools did for an answer, as clients are told it beyond OpenAI's fields.

    turn 0   "I will look."  image_zoom_in_tool {...} ──► 112 x 112, a small picture of it      message.steps[0]
    turn 1   "It is a 7."                                                                       message.content

In a stream a step comes twice: when it is called, and with its result; `index` says which it is. A turn's text has come
as content before it is known that the turn calls tools: with the turn's first step the content begins anew, and the
step's `content` is what the turn had said.
"""

import base64
import io
from dataclasses import dataclass

from PIL import Image
from pydantic import BaseModel

from ernie_model.inference.agent import AgentEvent
from ernie_model.inference.tools import ToolResult

SHOWN_SIDE = 448
"""Longest side, in pixels, of what clients see of a tool's picture. The model sees the picture itself."""


class StepImage(BaseModel):
    width: int
    height: int
    """Of the picture that the model was shown, in pixels."""
    url: str
    """A data URL: the picture as JPEG, shrunk to fit SHOWN_SIDE x SHOWN_SIDE."""


class StepResult(BaseModel):
    text: str
    images: list[StepImage]
    error: bool


class Step(BaseModel):
    """One call of a tool."""

    turn: int
    """From 0; several calls of one turn are made at once."""
    content: str | None = None
    """What the turn said before its calls; with the first of them."""
    name: str | None = None
    """None, and so are the arguments: the model wrote a call that cannot be read. It is told so by the result."""
    arguments: str | None = None
    """A JSON object, as text."""
    result: StepResult | None = None
    """None: the call was not made, or has not returned."""


class StepDelta(Step):
    index: int
    """Which of the answer's steps; what is said replaces what was said of it before."""


@dataclass(frozen=True, eq=False)
class Told:
    """An agent's event, and what clients see of its result."""

    event: AgentEvent
    result: StepResult | None = None


def tell(event: AgentEvent) -> Told:
    """Takes a while where there are pictures: for a thread."""
    return Told(event, None if event.result is None else _shown(event.result))


def _shown(result: ToolResult) -> StepResult:
    images = [StepImage(width=one.width, height=one.height, url=_url(one)) for one in result.images]
    return StepResult(text=_unicode(result.text), images=images, error=result.error)


def _url(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    file = io.BytesIO()
    small.save(file, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _unicode(text: str) -> str:
    """Half of a surrogate pair becomes a question mark, as for the model."""
    return text.encode("utf-8", "replace").decode()
