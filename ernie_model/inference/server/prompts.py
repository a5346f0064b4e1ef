"""A chat completion request -> what the engine takes. Runs in threads: it decodes images and tokenises."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ernie_model.chat import ChatError
from ernie_model.images import MediaError
from ernie_model.inference.json_regex import json_regex
from ernie_model.inference.moderation import Blocked, Moderation, check
from ernie_model.inference.request import ConstraintError, JsonSchema, Prompt, RequestError, SamplingParams
from ernie_model.inference.server import calls
from ernie_model.inference.server.errors import ApiError, invalid
from ernie_model.inference.server.protocol import (
    AsJson,
    AsSchema,
    AssistantMessage,
    ChatRequest,
    ImagePart,
    TextPart,
    Tool,
    ToolMessage,
    VideoPart,
)
from ernie_model.inference.server.settings import ServerSettings
from ernie_model.processor import Processor
from ernie_model.tokenizer import END_THINK, END_TOOL_CALL, TOOL_CALL, TokenizerError

LOW_DETAIL = 512
"""Longest side, in pixels, of an image with `"detail": "low"`."""


class MediaOpener(Protocol):
    """What an address in a request leads to. Raises MediaError for whatever cannot be honoured."""

    def image(self, url: str, max_pixels: int) -> Image.Image:
        """Decoded, upright, RGB; of at most `max_pixels`."""
        ...

    def video(self, url: str) -> Path | bytes:
        """What `Processor.encode` takes as a video."""
        ...


@dataclass(frozen=True, eq=False)
class Job:
    """A request that the engine can answer."""

    request: ChatRequest
    prompt: Prompt
    attempts: tuple[SamplingParams, ...]
    in_reasoning: bool
    """Do the answers begin within a thought?"""
    offers_tools: bool
    """May the answers hold tool calls?"""
    one_call: bool
    """The answers end with their first tool call."""
    must_call: bool
    """The answers are one tool call (calls.py)."""
    conversation: Sequence[Mapping[str, Any]] | None = None
    """Of `prompt`, for an agent that answers with the server's tools; None: the engine alone answers."""


def prepare(request: ChatRequest, processor: Processor, settings: ServerSettings, opener: MediaOpener | None) -> Job:
    """Raises ApiError, naming the field."""
    if request.model != settings.name:
        raise ApiError(
            404,
            f"model is {request.model!r}; this server has {settings.name!r}.",
            param="model",
            code="model_not_found",
        )
    thinking = _thinking(request, settings.thinking)
    tools = request.tools if request.tools and request.tool_choice != "none" else None
    calls.check_tools(request)
    tools_here = bool(settings.toolbox.tools) and request.tools is None and request.tool_choice in (None, "auto")
    if tools_here:
        calls.check_tools_here(request, settings.toolbox)
    _look_at(request, settings.moderation)
    messages = _Messages(settings, opener).read(request.messages)
    definitions = settings.toolbox.definitions() if tools_here else list(map(definition, tools or ()))
    try:
        encoded = processor.encode(
            messages,
            tools=definitions or None,
            thinking=thinking,
            add_generation_prompt=True,
        )
    except (ChatError, MediaError, TokenizerError) as error:
        raise invalid(str(error), "messages") from error
    in_reasoning = thinking and processor.chat.think
    return Job(
        request=request,
        prompt=Prompt.of(encoded),
        attempts=_attempts(request, processor, settings, in_reasoning, tools, may_call=bool(definitions)),
        in_reasoning=in_reasoning,
        offers_tools=bool(definitions),
        one_call=tools is not None and request.parallel_tool_calls is False,
        must_call=calls.forced(request, tools) is not None,
        conversation=messages if tools_here else None,
    )


def _look_at(request: ChatRequest, moderation: Moderation) -> None:
    """Every text that the model did not write."""
    if moderation.output and request.logprobs:
        raise invalid("logprobs would tell what this server's filters keep back. Leave them out.", "logprobs")
    for number, message in enumerate(request.messages):
        if isinstance(message, AssistantMessage):
            continue
        content = message.content
        texts = [content] if isinstance(content, str) else [one.text for one in content if isinstance(one, TextPart)]
        for text in texts:
            try:
                check(moderation.input, text)
            except Blocked as finding:
                field = f"messages[{number}].content"
                raise invalid(f"{field} was refused by a filter: {finding}.", field, "content_filter") from finding


def definition(tool: Tool) -> dict[str, Any]:
    """As the chat format prints it: what the client said, and nothing else."""
    return tool.model_dump(exclude_unset=True)


def _thinking(request: ChatRequest, default: bool) -> bool:
    said = {
        "enable_thinking": request.enable_thinking,
        "chat_template_kwargs.enable_thinking": request.chat_template_kwargs
        and request.chat_template_kwargs.enable_thinking,
        "reasoning_effort": False if request.reasoning_effort == "none" else None,
    }
    values = {value for value in said.values() if value is not None}
    if len(values) > 1:
        names = [name for name, value in said.items() if value is not None]
        raise invalid(f"{' and '.join(names)} contradict each other. Give one of them.", names[0])
    return values.pop() if values else default


# ------------------------------------------------------------------------------------------------------- messages


class _Messages:
    """Counts what the media of one request take together."""

    def __init__(self, settings: ServerSettings, opener: MediaOpener | None):
        self.limits = settings.limits
        self.opener = opener
        self.pixels_left = settings.limits.pixels
        self.num_images = self.num_videos = 0

    def read(self, messages: Sequence[Any]) -> list[dict[str, Any]]:
        out = []
        for number, message in _results_in_order(messages):
            where = f"messages[{number}]"
            if isinstance(message, AssistantMessage):
                out.append(_assistant(message, where))
                continue
            role = "system" if message.role == "developer" else message.role
            out.append({"role": role, "content": self.content(message.content, f"{where}.content")})
        return out

    def content(self, content: str | Sequence[Any], where: str) -> str | list[dict[str, Any]]:
        if isinstance(content, str):
            return content
        return [self.part(part, f"{where}[{number}]") for number, part in enumerate(content)]

    def part(self, part: TextPart | ImagePart | VideoPart, where: str) -> dict[str, Any]:
        if isinstance(part, TextPart):
            return {"type": "text", "text": part.text}
        where += f".{part.type}.url"
        if self.opener is None:
            raise invalid(f"{where}: this server takes no images and no videos.", where)
        try:
            if isinstance(part, ImagePart):
                return {"type": "image", "image": self.image(part, where, self.opener)}
            self.num_videos += 1
            self.check("videos", self.num_videos, self.limits.videos, where)
            sampling = part.video_url.model_dump(exclude={"url"}, exclude_none=True)
            return {"type": "video", "video": self.opener.video(part.video_url.url), "sampling": sampling or None}
        except MediaError as error:
            raise invalid(f"{where}: {error}", where, "invalid_media") from error

    def image(self, part: ImagePart, where: str, opener: MediaOpener) -> Image.Image:
        self.num_images += 1
        self.check("images", self.num_images, self.limits.images, where)
        image = opener.image(part.image_url.url, self.pixels_left)
        self.pixels_left -= image.width * image.height
        if part.image_url.detail == "low":
            image.thumbnail((LOW_DETAIL, LOW_DETAIL))
        return image

    def check(self, what: str, number: int, most: int, where: str) -> None:
        if number > most:
            raise invalid(f"{where}: a request may have {most} {what}, and this one has more. Leave some out.", where)


def _assistant(message: AssistantMessage, where: str) -> dict[str, Any]:
    if message.content is None and not message.tool_calls:
        raise invalid(f"{where}.content is missing, and there are no tool_calls either.", f"{where}.content")
    content = message.content
    if content is not None and not isinstance(content, str):
        content = [{"type": "text", "text": part.text} for part in content]
    out: dict[str, Any] = {"role": "assistant", "content": content}
    if message.reasoning_content:
        out["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        out["tool_calls"] = [call.model_dump() for call in message.tool_calls]
    return out


def _results_in_order(messages: Sequence[Any]) -> list[tuple[int, Any]]:
    """The results of a turn's calls in the order of the calls: the model is not shown the ids, only the order."""
    out: list[tuple[int, Any]] = []
    number = 0
    while number < len(messages):
        message = messages[number]
        where = f"messages[{number}]"
        if isinstance(message, ToolMessage):
            raise invalid(
                f"{where}.tool_call_id is {message.tool_call_id!r}, and no assistant message before it waits for the "
                "result of a call. Put the assistant's message with its tool_calls first.",
                f"{where}.tool_call_id",
            )
        out.append((number, message))
        number += 1
        wanted = [call.id for call in message.tool_calls or ()] if isinstance(message, AssistantMessage) else []
        if len(set(wanted)) < len(wanted):
            raise invalid(f"{where}.tool_calls: two of them have the same id.", f"{where}.tool_calls")
        results: dict[str, tuple[int, Any]] = {}
        while wanted and number < len(messages) and isinstance(result := messages[number], ToolMessage):
            if result.tool_call_id not in wanted or result.tool_call_id in results:
                rule = "answered already" if result.tool_call_id in results else "not among the calls before it"
                field = f"messages[{number}].tool_call_id"
                raise invalid(f"{field} is {result.tool_call_id!r}, which is {rule}.", field)
            results[result.tool_call_id] = (number, result)
            number += 1
        if missing := [one for one in wanted if one not in results]:
            raise invalid(
                f"{where}.tool_calls: no tool message behind it answers {', '.join(missing)}. Every call needs one.",
                f"{where}.tool_calls",
            )
        out += [results[one] for one in wanted]
    return out


# ------------------------------------------------------------------------------------------------------- sampling


def _attempts(
    request: ChatRequest,
    processor: Processor,
    settings: ServerSettings,
    in_reasoning: bool,
    tools: Sequence[Tool] | None,
    *,
    may_call: bool,
) -> tuple[SamplingParams, ...]:
    """One for each of `n` answers; number i is sampled with seed + i."""
    count = request.n or 1
    if count > settings.limits.attempts:
        raise invalid(f"n is {count}; at most {settings.limits.attempts} are written for one request.", "n")
    if request.top_logprobs and not request.logprobs:
        raise invalid(f"top_logprobs is {request.top_logprobs}, which needs logprobs=true.", "top_logprobs")
    stop = request.stop or ()
    tokenizer = processor.tokenizer
    changes: dict[str, Any] = {
        "max_new_tokens": _max_new_tokens(request, settings),
        "logit_bias": _logit_bias(request, tokenizer.vocab_size),
        "stop": (stop,) if isinstance(stop, str) else tuple(stop),
        "stop_ids": tuple(_token_ids(request.stop_token_ids or (), "stop_token_ids", tokenizer.vocab_size)),
        "top_logprobs": request.top_logprobs or 0,
    }
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    changes |= {name: value for name in names if (value := getattr(request, name)) is not None}
    call_id, end_call_id = tokenizer.special_id(TOOL_CALL), tokenizer.special_id(END_TOOL_CALL)
    if not may_call and call_id is not None:
        changes["banned_ids"] = (*settings.sampling.banned_ids, call_id)  # there is nothing to call
    elif request.parallel_tool_calls is False and end_call_id is not None:
        changes["stop_ids"] += (end_call_id,)
    try:
        changes |= _constraint(request, in_reasoning, tools)
        params = replace(settings.sampling, **changes)
    except ConstraintError as error:  # of a call's arguments
        raise invalid(str(error), "tools") from error
    except RequestError as error:
        raise invalid(str(error)) from error
    if request.seed is None:
        return (params,) * count
    return tuple(replace(params, seed=(request.seed + number) % 2**63) for number in range(count))


def _max_new_tokens(request: ChatRequest, settings: ServerSettings) -> int:
    given = {
        name: value for name in ("max_completion_tokens", "max_tokens") if (value := getattr(request, name)) is not None
    }
    if len(set(given.values())) > 1:
        raise invalid("max_tokens and max_completion_tokens contradict each other. Give one of them.", "max_tokens")
    for name, value in given.items():
        if value > settings.limits.new_tokens:
            raise invalid(f"{name} is {value}; this server writes at most {settings.limits.new_tokens}.", name)
        return value
    return min(settings.sampling.max_new_tokens, settings.limits.new_tokens)


def _logit_bias(request: ChatRequest, vocab_size: int) -> dict[int, float]:
    bias = {}
    for key, value in (request.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit()):
            raise invalid(f"logit_bias.{key}: keys are token ids, such as 17.", "logit_bias")
        bias[int(key[:20])] = value
    _token_ids(bias, "logit_bias", vocab_size)
    return bias


def _token_ids(ids: Mapping[int, float] | Sequence[int], field: str, vocab_size: int) -> list[int]:
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise invalid(f"{field} has {token_id}; token ids of this model are 0..{vocab_size - 1}.", field)
    return list(ids)


def _constraint(request: ChatRequest, in_reasoning: bool, tools: Sequence[Tool] | None) -> dict[str, Any]:
    after = {"constrain_after": END_THINK if in_reasoning else None}
    wanted = request.response_format
    schema: dict[str, Any] | None = None
    if isinstance(wanted, AsJson):
        schema = {"type": "object"}
    elif isinstance(wanted, AsSchema):
        schema = wanted.json_schema.schema_
    call = calls.forced(request, tools)
    if call is not None:
        if schema is not None:
            raise invalid(
                "response_format asks for a JSON answer and tool_choice for a call. Give one of them.", "tool_choice"
            )
        json_regex(call.schema)  # now, rather than behind a thought
        return {"constraint": call}
    if schema is None:
        return {}
    if tools is not None:
        raise invalid(
            "response_format together with tools is not supported: the answer would either be JSON or a call. Send "
            'tool_choice="none", or leave response_format out until the calls are done.',
            "response_format",
        )
    return {"constraint": JsonSchema(schema=schema), **after}


Prepare = Callable[[ChatRequest], Job]
