"""What a model may call while it answers, and what comes back.

    {"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [285, 235, 999, 652]}}
       │
       ├─ arguments against the tool's JSON schema        ┐
       ├─ tool.run(arguments, context), within its time   ├─ whatever goes wrong: a short text, which the model reads
       └─ texts and pictures, within their limits         ┘
       ▼
    ToolResult(parts=(picture,))

Where a tool runs
-----------------
A tool that is a Python object here runs in a thread. A thread cannot be ended: when the time is over nobody waits for
it any longer, and a tool with `MAX_STUCK` such calls is not called again until one of them returns. That is fit for
what is known to end, such as the built-in tools. A user's own function, `python:module.function`, runs in a process of
its own (`tool_process.py`), which is killed when the time is over. Neither is a sandbox: a tool may do what this user
may.

Source: reference 5.2, 5.3.
"""

import asyncio
import json
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import jsonschema
from jsonschema.exceptions import best_match
from jsonschema.validators import validator_for
from PIL import Image

from ernie_model.images import load_image

GRID = 1000
"""Boxes are in thousandths of the picture's width and height."""
TOKEN_SIDE = 28
"""Pixels along the side of one image token: patch 14 x merge 2."""
MAX_ASPECT = 100
MAX_STUCK = 8
"""Calls of one tool that may have outlived their time."""
ERROR_CHARS = 400

Value = TypeVar("Value")


@dataclass(kw_only=True)
class Limits:
    """What one question may take.

    Raises:
        ValueError: a value outside its range; it is named as on the command line.
    """

    max_turns: int = 6
    """Answers written, tool calls among them."""
    max_calls: int = 4
    """Tool calls of one turn."""
    max_tokens: int = 16384
    """Prompt, answers and results together."""
    time_s: float = 600.0
    """Seconds for the whole question by the clock, waiting for the engine and for tools included; in a `ToolContext`,
    what is left of it."""
    tool_time_s: float = 20.0
    """Seconds for one call of a tool."""
    max_result_chars: int = 8192
    """Longer text of a result is cut, and says so."""
    max_result_images: int = 4
    """Pictures of one result; more are left out, and it says so."""
    max_image_pixels: int = 6177 * TOKEN_SIDE**2
    """Width times height of a result's picture; larger ones are shrunk. The default is what the family's processor
    makes of larger ones anyway."""

    def __post_init__(self):
        for name in ("max_turns", "max_tokens", "max_image_pixels"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("max_calls", "max_result_chars", "max_result_images"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("time_s", "tool_time_s"):
            _check(getattr(self, name) > 0, name, getattr(self, name), "more than 0")


def _check(holds: bool, name: str, value: float, rule: str) -> None:
    if not holds:
        raise ValueError(f"agent.{name} is {value}; it must be {rule}.")


class ToolError(Exception):
    """A call that a tool cannot honour; the message is for the model."""


@dataclass(frozen=True, eq=False)
class ToolResult:
    parts: tuple[str | Image.Image, ...]
    error: bool = False

    @staticmethod
    def failure(problem: str) -> "ToolResult":
        return ToolResult((f"error: {problem}",), error=True)

    @property
    def text(self) -> str:
        return "\n".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> tuple[Image.Image, ...]:
        return tuple(part for part in self.parts if isinstance(part, Image.Image))

    def message(self) -> dict[str, Any]:
        """As the chat format takes it; what is no Unicode (half of a surrogate pair) becomes a question mark."""
        content: list[dict[str, Any]] = [
            {"type": "text", "text": part.encode("utf-8", "replace").decode()}
            if isinstance(part, str)
            else {"type": "image", "image": part}
            for part in self.parts
        ]
        return {"role": "tool", "content": content}


@dataclass(frozen=True, eq=False)
class ToolContext:
    """What a tool knows of the conversation, and what it may take."""

    images: tuple[Image.Image, ...] = ()
    """All pictures so far, as they were given (upright, RGB, not resized), in order: "Picture 1" comes first."""
    from_user: tuple[bool, ...] = ()
    """For each: the user gave it; else it is a tool's."""
    limits: Limits = field(default_factory=Limits)
    given_up: threading.Event | None = None
    """Set when nobody waits for the result any longer."""


@dataclass(frozen=True, eq=False)
class Tool:
    """Something the model may call.

    Raises:
        ValueError: `parameters` is not a JSON schema of an object.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON schema of the arguments."""
    run: Callable[[dict[str, Any], ToolContext], ToolResult]
    """Arguments that fit the schema -> result. May raise anything; `ToolError` to tell the model what it did wrong."""
    strict: bool | None = None
    """`function.strict` of the definition; None leaves the key out."""
    sees_context: bool = True
    """`run` looks at the pictures of its context."""
    keeps_limits: bool = False
    """`run` itself keeps to `context.limits`, in time and in size."""

    def __post_init__(self):
        try:
            validator_for(self.parameters, jsonschema.Draft202012Validator).check_schema(dict(self.parameters))
            if self.parameters.get("type") != "object":
                raise ValueError(f'its "type" is {self.parameters.get("type")!r}; arguments are an "object"')
        except (jsonschema.SchemaError, ValueError, TypeError, AttributeError) as error:
            problem = getattr(error, "message", str(error))
            raise ValueError(f"parameters of tool {self.name!r} are not the schema of an object: {problem}") from error

    @property
    def definition(self) -> dict[str, Any]:
        """In OpenAI's form."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        if self.strict is not None:
            function["strict"] = self.strict
        return {"type": "function", "function": function}

    @cached_property
    def _validator(self) -> Any:
        return validator_for(self.parameters, jsonschema.Draft202012Validator)(dict(self.parameters))

    def problem(self, arguments: Any) -> str | None:
        """What is wrong with the arguments, in one line."""
        if not isinstance(arguments, dict):
            return f"arguments of {self.name} must be a JSON object."
        found = best_match(self._validator.iter_errors(arguments))
        if found is None:
            return None
        where = ".".join(map(str, found.absolute_path))
        return f"arguments of {self.name}{f', {where}' if where else ''}: {found.message[:ERROR_CHARS]}"


class ToolBox:
    """The tools of one agent. One may serve any number of conversations at once, in one event loop.

    Raises:
        ValueError: two tools of one name.
    """

    def __init__(self, tools: Iterable[Tool]):
        self.tools: dict[str, Tool] = {}
        for tool in tools:
            if tool.name in self.tools:
                raise ValueError(f"there are two tools named {tool.name!r}.")
            self.tools[tool.name] = tool
        self._stuck = dict.fromkeys(self.tools, 0)

    def __contains__(self, name: object) -> bool:
        return name in self.tools

    def definitions(self) -> list[dict[str, Any]]:
        """In OpenAI's form, as the chat format prints them."""
        return [tool.definition for tool in self.tools.values()]

    async def run(self, name: str, arguments: Any, context: ToolContext) -> ToolResult:
        """The result of one call within `context.limits`; nothing is raised but the end of the task itself."""
        if name not in self.tools:
            return ToolResult.failure(f"there is no tool {name!r}; there is {', '.join(self.tools) or 'none'}.")
        tool = self.tools[name]
        if problem := tool.problem(arguments):
            return ToolResult.failure(problem)
        if self._stuck[name] >= MAX_STUCK:
            return ToolResult.failure(f"{name} is still busy with {MAX_STUCK} calls that took too long.")
        time_s = context.limits.tool_time_s
        context = replace(context, given_up=(given_up := threading.Event()))
        running = asyncio.ensure_future(in_thread(lambda: tool.run(arguments, context)))
        try:
            await asyncio.wait({running}, timeout=None if tool.keeps_limits else time_s)
        finally:
            if not running.done():
                given_up.set()
                self._stuck[name] += 1
                running.add_done_callback(lambda late: self._returned(name, late))
        if not running.done():
            return ToolResult.failure(took_too_long(name, time_s))
        try:
            result = running.result()
            return result if tool.keeps_limits else await asyncio.to_thread(bounded, result, context.limits)
        except Exception as error:
            return ToolResult.failure(what_happened(name, error))

    def _returned(self, name: str, late: "asyncio.Future[ToolResult]") -> None:
        self._stuck[name] -= 1
        if not late.cancelled():
            late.exception()  # looked at, so that nobody is told it never was


def took_too_long(name: str, time_s: float) -> str:
    return f"{name} took longer than {time_s:g} s."


def what_happened(name: str, error: Exception) -> str:
    if isinstance(error, ToolError):
        return f"{error}"[:ERROR_CHARS]
    return f"{name} failed: {type(error).__name__}: {error}"[:ERROR_CHARS]


async def in_thread(job: Callable[[], Value]) -> Value:
    """`job()` in a thread of its own that no pool and no end of the program waits for."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Value] = loop.create_future()

    def settle(value: Value | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)  # type: ignore[arg-type]

    def work() -> None:
        value, problem = None, None
        try:
            value = job()
        except Exception as error:
            problem = error
        except BaseException as error:  # SystemExit and the like would end the event loop
            problem = RuntimeError(f"{type(error).__name__}: {error}")
        with suppress(RuntimeError):  # the loop is closed: nobody waits any longer
            loop.call_soon_threadsafe(settle, value, problem)

    threading.Thread(target=work, daemon=True, name="tool").start()
    return await future


def bounded(result: ToolResult, limits: Limits) -> ToolResult:
    """`result` within the limits of text and pictures."""
    parts: list[str | Image.Image] = []
    room, images, left_out = limits.max_result_chars, 0, 0
    for part in result.parts:
        if isinstance(part, str):
            if len(part) > room:
                part = f"{part[:room]}\n[cut: {len(part) - room:,} more characters]"
                room = 0
            room = max(0, room - len(part))
            parts.append(part)
        elif images == limits.max_result_images:
            left_out += 1
        else:
            images += 1
            parts.append(shrunk(part, limits.max_image_pixels))
    if left_out:
        parts.append(f"[{left_out} more pictures left out]")
    return ToolResult(tuple(parts), result.error)


def shrunk(image: Image.Image, max_pixels: int) -> Image.Image:
    """`image` as the model would be shown it, with at most `max_pixels` (width times height)."""
    image = load_image(image, "the picture")
    if image.width * image.height <= max_pixels:
        return image
    scale = math.sqrt(max_pixels / (image.width * image.height))
    size = (max(1, math.floor(image.width * scale)), max(1, math.floor(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


# -------------------------------------------------------------------------------------------------- a user's functions


def tool_from_function(
    function: Callable[..., Any],
    parameters: Mapping[str, Any],
    *,
    name: str | None = None,
    description: str | None = None,
) -> Tool:
    """A Python function as a tool.

    Args:
        function: called with the arguments by keyword, and `context=ToolContext` if it has a parameter of that name.
            Returns a text, a picture, a sequence of both, a `ToolResult`, or a value that JSON can express.
        parameters: JSON schema of the arguments.
        name: default the function's.
        description: default the first line of its docstring.

    Raises:
        ValueError: `parameters` is not the schema of an object; there is no description.
    """
    name = name or function.__name__
    description = description or (function.__doc__ or "").strip().partition("\n")[0]
    if not description:
        raise ValueError(f"tool {name!r} has no description. Give it one, or a docstring.")
    code = getattr(function, "__code__", None)
    wants_context = code is not None and "context" in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]

    def run(arguments: dict[str, Any], context: ToolContext) -> ToolResult:
        return as_result(function(**arguments, **({"context": context} if wants_context else {})))

    return Tool(name, description, parameters, run, sees_context=wants_context)


def as_result(value: Any) -> ToolResult:
    """What a user's function returned, as a result."""
    if isinstance(value, ToolResult):
        return value
    if isinstance(value, str | Image.Image):
        return ToolResult((value,))
    if isinstance(value, Sequence) and value and all(isinstance(part, str | Image.Image) for part in value):
        return ToolResult(tuple(value))
    try:
        return ToolResult((json.dumps(value, ensure_ascii=False),))
    except (TypeError, ValueError) as error:
        raise TypeError(f"returned {type(value).__name__}, which is neither text nor picture nor JSON") from error


TOOL_ATTRIBUTE = "ernie_tool"


def tool(
    parameters: Mapping[str, Any], *, name: str | None = None, description: str | None = None
) -> Callable[[Callable[..., Value]], Callable[..., Value]]:
    """Marks a function as a tool: `agent.tools=[python:module.function]` finds it.

        @tool({"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]})
        def price(item: str) -> str:
            "Price of an item in the shop."
            return PRICES[item]

    The function stays as it is. Arguments: see `tool_from_function`.
    """

    def mark(function: Callable[..., Value]) -> Callable[..., Value]:
        made = tool_from_function(function, parameters, name=name, description=description)
        setattr(function, TOOL_ATTRIBUTE, made)
        return function

    return mark


# --------------------------------------------------------------------------------------------------------------- zoom


def crop_box(bbox_2d: Sequence[float], width: int, height: int) -> tuple[int, int, int, int]:
    """A box in thousandths of the picture -> (left, upper, right, lower) in its pixels (reference 5.3).

    Clamped to the picture; rounded outwards. [100, 200, 300, 400] of 640 x 480 pixels is (64, 96, 192, 192).

    Raises:
        ToolError: not four finite numbers in order; less than one pixel; a side 100 times the other.
    """
    if len(bbox_2d) != 4 or not all(math.isfinite(value) for value in bbox_2d):
        raise ToolError(f"bbox_2d is {list(bbox_2d)}; it must be four numbers from 0 to {GRID}.")
    x1, y1, x2, y2 = (min(max(value, 0), GRID) for value in bbox_2d)
    if not (x1 < x2 and y1 < y2):
        raise ToolError(
            f"bbox_2d is {list(bbox_2d)}; it must be [x1, y1, x2, y2] with x1 < x2 and y1 < y2, from 0 to {GRID}."
        )
    if (x2 - x1) * width < GRID or (y2 - y1) * height < GRID:
        raise ToolError(
            f"bbox_2d {list(bbox_2d)} covers less than one pixel of {width} x {height}. Choose a larger one."
        )
    left, upper = math.floor(x1 * width / GRID), math.floor(y1 * height / GRID)
    right, lower = math.ceil(x2 * width / GRID), math.ceil(y2 * height / GRID)
    if max(right - left, lower - upper) > MAX_ASPECT * min(right - left, lower - upper):
        raise ToolError(
            f"bbox_2d {list(bbox_2d)} is {right - left} x {lower - upper} pixels; one side may be at most {MAX_ASPECT} "
            "times the other."
        )
    return left, upper, right, lower


def crop(image: Image.Image, bbox_2d: Sequence[float]) -> Image.Image:
    """The part of `image`, in its own pixels; enlarged (bicubic) where a side has less than one image token's 28.

    Raises:
        ToolError: see `crop_box`.
    """
    part = image.crop(crop_box(bbox_2d, image.width, image.height))
    shorter = min(part.size)
    if shorter < TOKEN_SIDE:
        size = (round(part.width * TOKEN_SIDE / shorter), round(part.height * TOKEN_SIDE / shorter))
        part = part.resize(size, Image.Resampling.BICUBIC)
    return part


def zoom_tool() -> Tool:
    """`image_zoom_in_tool`: a crop of the last picture that the user gave.

    Names, texts and schema are those that the family's model was trained with and publishes, to the letter. It has no
    index of a picture: boxes are always those of the user's picture, also for a look into what a crop showed. Where the
    user gave several pictures, the last is meant.
    """
    return Tool(ZOOM["name"], ZOOM["description"], ZOOM["parameters"], _zoom, strict=False)


def _zoom(arguments: dict[str, Any], context: ToolContext) -> ToolResult:
    given = [image for image, from_user in zip(context.images, context.from_user, strict=True) if from_user]
    if not given:
        raise ToolError("the user gave no image to zoom into.")
    return ToolResult((crop(given[-1], arguments["bbox_2d"]),))


# Part of the model's input, like the chat format: FastDeploy's guide to ERNIE-4.5-VL-28B-A3B-Thinking.
ZOOM: dict[str, Any] = {
    "name": "image_zoom_in_tool",
    "description": "Zoom in on a specific region of an image by cropping it based on a bounding box (bbox) and an "
    "optional object label.",
    "parameters": {
        "type": "object",
        "properties": {
            "bbox_2d": {
                "type": "array",
                "items": {"type": "number"},
                "minItems": 4,
                "maxItems": 4,
                "description": "The bounding box of the region to zoom in, as [x1, y1, x2, y2], where (x1, y1) is the "
                "top-left corner and (x2, y2) is the bottom-right corner, and the values of x1, y1, x2, y2 are all "
                "normalized to the range 0–1000 based on the original image dimensions.",
            },
            "label": {
                "type": "string",
                "description": "The name or label of the object in the specified bounding box (optional).",
            },
        },
        "required": ["bbox_2d"],
    },
}
