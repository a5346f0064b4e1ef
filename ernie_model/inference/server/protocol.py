"""A chat completion request, field by field.

Types are strict: "5" is not a number, 1 is not true. A field that is not here is refused by name, and so is one that
OpenAI has and this server would have to ignore although it changes the answer. docs/serving.md lists which is which.
"""

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from ernie_model.inference.server.errors import ApiError, invalid

NAME = r"^[a-zA-Z0-9_.-]{1,64}$"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


# ------------------------------------------------------------------------------------------------------- messages


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: str = Field(min_length=1, description="data:image/...;base64,... or, where allowed, file:// or https://")
    detail: Literal["auto", "low", "high", "original"] = Field(
        "auto", description="low shrinks the image to fit 512 x 512; the others leave it as it is"
    )


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class VideoUrl(Strict):
    url: str = Field(min_length=1, description="data:video/...;base64,... or, where allowed, file:// or https://")
    fps: float | None = Field(None, gt=0, description="Frames per second to look at")
    num_frames: int | None = Field(None, ge=1, description="How many frames to look at instead")
    start_s: float | None = Field(None, ge=0, description="Seconds into the video where the clip begins")
    end_s: float | None = Field(None, gt=0, description="Seconds into the video where it ends")


class VideoPart(Strict):
    type: Literal["video_url"]
    video_url: VideoUrl


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


def _text_or_list(value: Any) -> str:
    return "list" if isinstance(value, list | tuple) else "text"


Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[Part], Tag("list")],
    Discriminator(_text_or_list),
]
TextContent = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[TextPart], Tag("list")],
    Discriminator(_text_or_list),
]


class CalledFunction(Strict):
    name: str = Field(pattern=NAME)
    arguments: str = Field(description="A JSON object, as text")


class ToolCall(Strict):
    id: str = Field(min_length=1)
    type: Literal["function"]
    function: CalledFunction


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: Content


class UserMessage(Strict):
    role: Literal["user"]
    content: Content


class AssistantMessage(Strict):
    """Also as a client's `message.model_dump()` prints an answer of this server. Its steps are not shown again."""

    role: Literal["assistant"]
    content: TextContent | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None
    steps: list[dict[str, Any]] | None = None


class ToolMessage(Strict):
    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


# ---------------------------------------------------------------------------------------------------------- tools


class FunctionDefinition(Strict):
    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of the arguments")
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: FunctionDefinition


class ChosenFunction(Strict):
    name: str


class ChosenTool(Strict):
    type: Literal["function"]
    function: ChosenFunction


def _word_or_tool(value: Any) -> str:
    return "tool" if isinstance(value, dict | ChosenTool) else "word"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("word")] | Annotated[ChosenTool, Tag("tool")],
    Discriminator(_word_or_tool),
]


# --------------------------------------------------------------------------------------------------------- format


class AsText(Strict):
    type: Literal["text"]


class AsJson(Strict):
    type: Literal["json_object"]


class NamedSchema(Strict):
    name: str = Field(pattern=NAME)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class AsSchema(Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


Format = Annotated[AsText | AsJson | AsSchema, Field(discriminator="type")]


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TemplateArguments(Strict):
    enable_thinking: bool | None = None


def _one_or_many(value: Any) -> str:
    return "many" if isinstance(value, list | tuple) else "one"


Stop = Annotated[
    Annotated[str, Field(min_length=1), Tag("one")]
    | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16), Tag("many")],
    Discriminator(_one_or_many),
]


def _false(value: bool) -> bool:
    """Not `Literal[False]`, which takes 0 too."""
    if value:
        raise ValueError("it should be false")
    return value


class ChatRequest(Strict):
    model: str
    messages: list[Message] = Field(min_length=1)

    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | None = None
    n: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: Format | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # beyond OpenAI's
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    stop_token_ids: list[int] | None = Field(None, max_length=16)
    enable_thinking: bool | None = None
    chat_template_kwargs: TemplateArguments | None = None

    # OpenAI's, honoured as far as this server has what they speak of
    reasoning_effort: Literal["none"] | None = None
    modalities: list[Literal["text"]] | None = None
    store: Annotated[bool, AfterValidator(_false), Field(json_schema_extra={"const": False})] | None = None
    service_tier: Literal["auto", "default"] | None = None

    # OpenAI's, without a bearing on the answer: taken and not used
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


ADVICE = {
    "functions": "Use tools.",
    "function_call": "Use tool_choice.",
    "audio": "This model writes text.",
    "prediction": "Leave it out.",
    "verbosity": "Say it in the system message.",
    "web_search_options": "There is no web search here.",
    "reasoning_effort": 'A thought is on or off here: use enable_thinking, or reasoning_effort="none".',
    "store": "Nothing is kept here.",
    "modalities": "This model writes text.",
    "name": "The chat format has no names: write it into the content.",
    "refusal": "Move its text to content.",
    "service_tier": "There is one tier here.",
}
"""What to do about a field of OpenAI's that is refused."""

_NOT_OURS = ("extra_forbidden", "literal_error", "none_required", "value_error")


def read_request(body: bytes) -> ChatRequest:
    """Raises ApiError, which names the first field at fault."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _explained(error) from None


def _explained(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    kind, loc, context = first["type"], list(first["loc"]), dict(first.get("ctx") or {})
    if kind == "json_invalid":
        return invalid(f"The body is not JSON: {context['error']}.")
    if not loc:
        return invalid("The body must be a JSON object with `model` and `messages`.")
    path = _path(loc)
    field = path.rpartition(".")[2]
    advice = f" {ADVICE[field]}" if field in ADVICE and kind in _NOT_OURS else ""
    if kind == "extra_forbidden":
        known = {name for model in Strict.__subclasses__() for name in model.model_fields}
        near = difflib.get_close_matches(field, known - {field}, n=1)
        hint = advice or (f" Did you mean {near[0]}?" if near else " Leave it out.")
        return invalid(f"{path} is not supported.{hint}", path, "unsupported_parameter")
    if kind == "missing":
        return invalid(f"{path} is missing.", path, "missing_required_parameter")
    rule = re.sub(r"^\w+ should|^Value error, it should", "it should", first["msg"]).replace(" after validation", "")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        at = context["discriminator"].strip("'")
        path = f"{path}.{at}" if at in ("type", "role") else path
        expected = context.get("expected_tags")
        value = context.get("tag")
        rule = f"it must be one of {expected}" if expected else "it must be given"
        return invalid(f"{path} is {value!r}; {rule}.", path)
    return invalid(f"{path} is {_short(first['input'])}; {rule}.{advice}", path)


def _path(loc: list[int | str]) -> str:
    """`("messages", 0, "user", "content", "list", 1, "text", "text")` without the names of the variants in it."""
    path = ""
    variants = {"system", "developer", "user", "assistant", "tool", "list", "text", "word", "one", "many"}
    variants |= {"image_url", "video_url", "json_object", "json_schema", "constrained-str"}
    for place, step in enumerate(loc):
        if isinstance(step, int):
            path += f"[{step}]"
        elif place and step in variants and _is_variant(loc, place):
            continue
        else:
            path += f".{step}" if path else step
    return path


def _is_variant(loc: list[int | str], place: int) -> bool:
    """A variant's name stands behind an index (a message, a part) or behind the field that has variants."""
    before = loc[place - 1]
    return isinstance(before, int) or before in ("content", "tool_choice", "response_format", "stop")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
