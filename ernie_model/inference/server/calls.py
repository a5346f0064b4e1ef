"""tool_choice: which tool calls an answer may hold, must hold, and what they look like.

    none       tools are not shown, and <tool_call> is never sampled
    auto       the model decides
    required   the answer (behind the thought) is one call of any of the tools
    a name     the answer is one call of this tool

    <tool_call>⏎{"name": "weather", "arguments": {"place": "Lima"}}⏎</tool_call>⏎      (reference 6.2)
    |  given  ||                    a JSON schema                 || given |

A call that must be is begun by the server, with the very tokens the model was trained on, and what stands between the
tags is held to a schema.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from ernie_model.inference.request import Completion, Delta, Finish, Generates, JsonSchema, Prompt, SamplingParams
from ernie_model.inference.server.errors import invalid
from ernie_model.inference.server.protocol import AsText, ChatRequest, ChosenTool, Tool
from ernie_model.inference.tools import ToolBox
from ernie_model.tokenizer import END_THINK, END_TOOL_CALL, TOOL_CALL, Tokenizer

BEGIN_CALL, END_CALL = f"{TOOL_CALL}\n", f"\n{END_TOOL_CALL}"


def check_tools(request: ChatRequest) -> None:
    """Raises ApiError: names that are not unique, a choice of what is not there."""
    names = [tool.function.name for tool in request.tools or ()]
    for number, name in enumerate(names):
        if name in names[:number]:
            field = f"tools[{number}].function.name"
            raise invalid(f"{field} is {name!r}, as that of another tool. Names must be unique.", field)
    choice = request.tool_choice
    if isinstance(choice, ChosenTool) and choice.function.name not in names:
        listing = ", ".join(names) or "there are none"
        raise invalid(
            f"tool_choice.function.name is {choice.function.name!r}, which is not among tools ({listing}).",
            "tool_choice",
        )
    if choice == "required" and not names:
        raise invalid("tool_choice is 'required', but there are no tools.", "tool_choice")


def check_tools_here(request: ChatRequest, toolbox: ToolBox) -> None:
    """Raises ApiError: what does not go with tools that the server runs while it answers."""
    refused = {
        "response_format": request.response_format is not None and not isinstance(request.response_format, AsText),
        "logprobs": request.logprobs,
        "parallel_tool_calls": request.parallel_tool_calls is False,
    }
    for field, said in refused.items():
        if said:
            raise invalid(
                f"{field} is not supported while the server's tools ({', '.join(toolbox.tools)}) may be called. Send "
                f'tool_choice="none" to have none called, or leave {field} out.',
                field,
            )


def forced(request: ChatRequest, tools: Sequence[Tool] | None) -> JsonSchema | None:
    """What stands in the call that must be; None if there need not be one."""
    choice = request.tool_choice
    if tools is None or choice in (None, "auto", "none"):
        return None
    if isinstance(choice, ChosenTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    if len(tools) == 1:
        return JsonSchema(schema=_call_schema(tools[0], "#"))
    return JsonSchema(schema={"anyOf": [_call_schema(tool, f"#/anyOf/{number}") for number, tool in enumerate(tools)]})


def _call_schema(tool: Tool, at: str) -> dict[str, Any]:
    parameters = tool.function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}
    arguments = _moved(parameters, f"{at}/properties/arguments")
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, to: str) -> Any:
    """A schema that now stands at `to` within another: its references to itself are counted from there."""
    if isinstance(schema, list):
        return [_moved(one, to) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: to + value[1:] if key == "$ref" and isinstance(value, str) and value.startswith("#") else _moved(value, to)
        for key, value in schema.items()
    }


# ------------------------------------------------------------------------------------------------ the call that must be


async def forced_call(
    engine: Generates, prompt: Prompt, params: SamplingParams, tokenizer: Tokenizer, *, in_reasoning: bool
) -> AsyncGenerator[Delta, None]:
    """The stream of an answer that is one call, behind its thought where there is one.

    The thought is written up to `</think>`; then the prompt goes on with it and the begin of the call, so what was
    computed is shared, and the call is written under `params.constraint`.
    """
    before: Completion | None = None
    budget = params.max_new_tokens
    if in_reasoning:
        end_think = tokenizer.require(END_THINK)
        free = replace(params, constraint=None, constrain_after=None, stop_ids=(*params.stop_ids, end_think))
        async with aclosing(as_generator(engine.stream(prompt, free))) as deltas:
            async for delta in deltas:
                before = delta.completion
                if before is None:
                    yield delta
                elif before.stop == end_think and len(before.token_ids) < budget:
                    yield replace(delta, text=delta.text + END_THINK, completion=None)
                else:  # it ended within the thought
                    yield delta
                    return
        assert before is not None
        prompt = prompt.extended((*before.token_ids, *tokenizer.encode_markup("\n")))
        budget -= len(before.token_ids)
    prompt = prompt.extended(tokenizer.encode_markup(BEGIN_CALL))
    yield Delta(BEGIN_CALL)
    call = replace(params, max_new_tokens=budget, constrain_after=None)
    async with aclosing(as_generator(engine.stream(prompt, call))) as deltas:
        async for delta in deltas:
            completion = delta.completion
            if completion is None:
                yield delta
                continue
            end = END_CALL if completion.finish is Finish.STOP else ""
            whole = completion if before is None else _joined(before, completion)
            yield replace(delta, text=delta.text + end, completion=whole)


def as_generator(deltas: AsyncIterator[Delta]) -> AsyncGenerator[Delta, None]:
    """The stream of an engine is a generator: leaving it must cancel the request at once."""
    assert isinstance(deltas, AsyncGenerator)
    return deltas


def _joined(first: Completion, second: Completion) -> Completion:
    return replace(
        second,
        token_ids=first.token_ids + second.token_ids,
        text=first.text + second.text,
        logprobs=first.logprobs + second.logprobs,
        versions=first.versions + second.versions,
        top_logprobs=first.top_logprobs + second.top_logprobs,
        num_prompt_tokens=first.num_prompt_tokens,
        num_cached_tokens=first.num_cached_tokens,
    )
