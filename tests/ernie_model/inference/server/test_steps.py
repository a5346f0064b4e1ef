"""Tools that the server runs, as OpenAI's own client sees them. The engine's answers are written beforehand."""

import asyncio
import base64
import contextlib
import io
import json
import random
import threading
import time
from dataclasses import replace

import httpx
import openai
import pytest
from PIL import Image

from ernie_model.inference.agent import Limits as AgentLimits
from ernie_model.inference.moderation import ListFilter, Moderation
from ernie_model.inference.request import Completion, Finish
from ernie_model.inference.server.app import make_app
from ernie_model.inference.server.settings import Limits, ServerSettings
from ernie_model.inference.tools import Tool, ToolBox, ToolResult, tool_from_function, zoom_tool
from tests.ernie_model.inference.server.running import client, running
from tests.ernie_model.inference.server.test_chat import CLOCK, DataUrls, Recording, put_together
from tests.ernie_model.inference.server.test_limits import LONG, counted, head, raw, until

X = {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>\n"


ZOOM = call("image_zoom_in_tool", bbox_2d=[0, 0, 500, 250])
DOUBLE = call("double", x=21)


def question(side=224):
    file = io.BytesIO()
    Image.new("RGB", (side, side), (200, 0, 0)).save(file, format="PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Which digit?"}]
    return [{"role": "user", "content": parts}]


HELLO = [{"role": "user", "content": "Hello?"}]


class World:
    def __init__(self, url, engine, service, client):
        self.url, self.engine, self.service, self.client = url, engine, service, client

    def create(self, messages=HELLO, **options):
        return self.client.chat.completions.create(model="tiny", messages=messages, **options)

    def ask(self, messages=HELLO, **options):
        return self.create(messages, **options).choices[0]


@pytest.fixture
def world(processor):
    """A function: turns that the engine writes, over and over -> a server of tools."""
    with contextlib.ExitStack() as stack:

        def make(*turns, says=None, tools=(), agent=None, **settings):
            double = tool_from_function(lambda x: 2 * x, X, name="double", description="Twice.")

            def reply(prompt):
                return turns[processor.decode(prompt.token_ids).count("</tool_output>\n\nAssistant:") % len(turns)]

            engine = Recording(processor.tokenizer, says or reply)
            made = ServerSettings(
                name="tiny", toolbox=ToolBox([zoom_tool(), double, *tools]), agent=agent or AgentLimits(), **settings
            )
            app = make_app(engine, processor, made, opener=DataUrls())
            url = stack.enter_context(running(app))
            return World(url, engine, app.state.service, stack.enter_context(client(url)))

        yield make


def split(stream):
    """A stream by the rule of steps.py: what was said after the last turn that calls, and the steps."""
    content, steps = "", {}
    for chunk in stream:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            for step in getattr(choice.delta, "steps", None) or ():
                if step["turn"] not in {one["turn"] for one in steps.values()}:
                    assert content == (step["content"] or "")
                    content = ""
                steps[step.pop("index")] = step
    return content, [steps[index] for index in sorted(steps)]


# ------------------------------------------------------------------------------------------------------------- answers


def test_the_server_looks_closer_for_the_client(world, processor):
    here = world(f"\nToo small.</think>\n\nI will look.\n{ZOOM}", "Now I see.\n</think>\n\nA seven.")
    completion = here.create(question(), extra_body={"enable_thinking": True}, seed=3)
    (choice,) = completion.choices
    assert choice.message.content == "A seven." and choice.finish_reason == "stop" and choice.status == "answered"
    assert choice.message.reasoning_content == "\nToo small.\nNow I see.\n" and choice.message.tool_calls is None
    (step,) = choice.message.steps
    assert step["turn"] == 0 and step["name"] == "image_zoom_in_tool" and step["content"] == "I will look."
    assert json.loads(step["arguments"]) == {"bbox_2d": [0, 0, 500, 250]}
    (shown,) = step["result"]["images"]
    assert (shown["width"], shown["height"]) == (112, 56) and not step["result"]["error"]
    picture = Image.open(io.BytesIO(base64.b64decode(shown["url"].removeprefix("data:image/jpeg;base64,"))))
    red, green, blue = picture.getpixel((50, 20))
    assert picture.size == (112, 56) and abs(red - 200) < 10 and green < 10 and blue < 10

    first, second = here.engine.prompts
    assert second.token_ids[: len(first.token_ids)] == first.token_ids and len(second.media) == 2
    assert '"image_zoom_in_tool"' in processor.decode(first.token_ids)
    assert here.engine.params[0].seed == 3 and here.engine.params[1].seed not in (3, None)
    assert processor.tokenizer.require("<tool_call>") not in here.engine.params[0].banned_ids

    turns = [f"\nToo small.</think>\n\nI will look.\n{ZOOM}", "Now I see.\n</think>\n\nA seven."]
    sampled = [len(processor.tokenizer.encode_markup(turn)) + 1 for turn in turns]
    results = len(second.token_ids) - len(first.token_ids) - sampled[0]
    usage = completion.usage
    assert usage.completion_tokens == sum(sampled) and usage.prompt_tokens == len(first.token_ids) + results
    assert usage.total_tokens == len(second.token_ids) + sampled[1]
    thoughts = [len(processor.tokenizer.encode_markup(turn.partition("\n\n")[0])) for turn in turns]
    assert usage.completion_tokens_details.reasoning_tokens == sum(thoughts)


def test_a_stream_of_turns_put_together_is_the_answer(world):
    here = world(
        f"\nToo small.\n</think>\n\nI will look.\n{ZOOM}{DOUBLE}", f"\nHm.\n</think>{DOUBLE}", "</think>\n\nA 7."
    )
    options = {"extra_body": {"enable_thinking": True}}
    whole = here.ask(question(), **options)
    stream = list(here.create(question(), stream=True, stream_options={"include_usage": True}, **options))
    content, steps = split(stream)
    assert content == whole.message.content == "A 7." and steps == whole.message.steps
    assert [(step["turn"], step["name"]) for step in steps] == [(0, "image_zoom_in_tool"), (0, "double"), (1, "double")]
    assert [step["content"] for step in steps] == ["I will look.", None, None]
    assert [step["result"]["text"] for step in steps] == ["", "42", "42"]
    parts, usage = put_together(stream)
    assert parts[0]["reasoning"] == whole.message.reasoning_content == "\nToo small.\n\nHm.\n"
    assert parts[0]["reason"] == "stop" and parts[0]["n"] > 10 and usage.completion_tokens > 20
    ends = [choice.status for chunk in stream for choice in chunk.choices if choice.finish_reason]
    assert ends == ["answered"]


def test_a_call_is_told_before_its_tool_returns(world):
    told = threading.Event()

    def slow():
        assert told.wait(10)
        return "done"

    schema = {"type": "object", "properties": {}}
    here = world(call("slow"), "Good.", tools=[tool_from_function(slow, schema, name="slow", description="Slow.")])
    seen = []
    for chunk in here.create(stream=True):
        seen += getattr(chunk.choices[0].delta, "steps", None) or ()
        if seen:
            told.set()
    assert [step["result"] and step["result"]["text"] for step in seen] == [None, "done"]


def test_several_answers_at_once(world):
    here = world(DOUBLE, "42.")
    completion = here.create(n=2, seed=7, temperature=1.0)
    assert [choice.message.content for choice in completion.choices] == ["42.", "42."]
    assert [len(choice.message.steps) for choice in completion.choices] == [1, 1]
    assert sorted(params.seed for params in here.engine.params if params.seed < 10) == [7, 8]
    one = here.create().usage
    assert completion.usage.completion_tokens == 2 * one.completion_tokens
    parts, _ = put_together(here.create(n=2, stream=True))
    assert {number: part["content"] for number, part in parts.items()} == {0: "42.", 1: "42."}


def test_an_answer_goes_back_as_it_is(world, processor):
    here = world(DOUBLE, "42.")
    message = here.ask().message
    here.ask([*HELLO, message.model_dump(), {"role": "user", "content": "And then?"}])
    text = processor.decode(here.engine.prompts[2].token_ids)
    assert text.endswith("And then?\nAssistant: <think>\n\n</think>\n\n") and text.count("42") == 1


# --------------------------------------------------------------------------------------------- what may go otherwise


@pytest.mark.parametrize(
    ("turn", "told"),
    [
        (call("image_zoom_in_tool", bbox_2d=[0, 0, 500, 250]), "the user gave no image"),
        (call("double", x="many"), "arguments of double, x"),
        (call("halve", x=1), "there is no tool 'halve'"),
        ('<tool_call>\n{"name": "double", "arguments": {"x": 3\n</tool_call>\n', "error: "),
    ],
)
def test_what_goes_wrong_in_a_tool_is_read_by_the_model(world, processor, turn, told):
    here = world(turn, "Sorry.")
    choice = here.ask()
    assert choice.message.content == "Sorry." and choice.finish_reason == "stop"
    (step,) = choice.message.steps
    assert step["result"]["error"] and told in step["result"]["text"]
    assert told in processor.decode(here.engine.prompts[1].token_ids)
    assert split(here.create(stream=True)) == ("Sorry.", choice.message.steps)


@pytest.mark.parametrize(
    ("agent", "status", "returned"),
    [
        (AgentLimits(max_turns=2), "turn_limit", [True, False]),
        (AgentLimits(max_calls=0), "tool_limit", [False]),
        (AgentLimits(max_tokens=440), "truncated", None),
    ],
)
def test_limits_of_the_agent(world, agent, status, returned):
    here = world(f"So:\n{DOUBLE}", agent=agent)
    choice = here.ask()
    assert (choice.finish_reason, choice.status) == ("length", status)
    if returned is not None:
        assert [step["result"] is not None for step in choice.message.steps] == returned
        assert choice.message.content == "" and choice.message.steps[-1]["content"] == "So:"
    assert split(here.create(stream=True)) == (choice.message.content, choice.message.steps or [])
    with pytest.raises(openai.BadRequestError, match=r"agent.max_tokens"):
        here.ask([{"role": "user", "content": "word " * 20_000}])


def test_max_tokens_is_of_one_turn(world):
    here = world(DOUBLE, "word " * 100)
    choice = here.ask(max_tokens=40)
    assert (choice.finish_reason, choice.status) == ("length", "truncated") and len(choice.message.steps) == 1
    assert [params.max_new_tokens for params in here.engine.params] == [40, 40]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long(world, stream):
    here = world(DOUBLE, LONG, agent=AgentLimits(time_s=0.3))
    here.engine.stream = as_engines_do(here.engine)
    with pytest.raises(openai.APIError, match=r"agent.time_s") as error:
        list(here.create(stream=stream))
    assert error.value.code == "timeout"
    until(lambda: here.service.gate.inside == 0)
    assert counted(here.service, "timeout") == 1 and here.engine.running == 0


def as_engines_do(engine):
    """Its stream, which ends when `timeout_s` is over."""
    write = engine.stream
    engine.pause_s = 0.01

    async def stream(prompt, params, *, timeout_s=None):
        end = time.monotonic() + timeout_s
        async with contextlib.aclosing(write(prompt, params)) as deltas:
            async for delta in deltas:
                if time.monotonic() > end:
                    yield replace(delta, completion=Completion((), "", Finish.TIMEOUT, (), ()))
                    return
                yield delta

    return stream


@pytest.mark.parametrize("stream", [False, True])
def test_filters_of_what_is_written(world, stream):
    moderation = Moderation(input=(ListFilter(["forbidden"]),), output=(ListFilter(["a lockpick"]),))
    here = world(DOUBLE, "Take a lockpick and go.", moderation=moderation)
    if stream:
        parts, _ = put_together(here.create(stream=True))
        content, reason = parts[0]["content"], parts[0]["reason"]
    else:
        choice = here.ask()
        content, reason = choice.message.content, choice.finish_reason
        assert choice.status == "blocked" and len(choice.message.steps) == 1
    assert reason == "content_filter" and "Take a lockpick and go.".startswith(content) and "lock" not in content
    with pytest.raises(openai.BadRequestError, match="refused by a filter") as error:
        here.ask([{"role": "user", "content": "A forbidden thing"}])
    assert error.value.param == "messages[0].content"

    here = world(call("double", x=21, note="a lockpick"), moderation=moderation)
    assert here.ask().finish_reason == "content_filter" and here.ask().message.steps is None


# ------------------------------------------------------------------------------------------------------ whose tools


def test_who_brings_tools_or_wants_none_is_answered_as_ever(world, processor):
    here = world(call("clock"))
    choice = here.ask(tools=[CLOCK])
    assert choice.finish_reason == "tool_calls" and choice.message.steps is None and choice.status is None
    assert "image_zoom_in_tool" not in processor.decode(here.engine.prompts[-1].token_ids)
    for options in ({"tool_choice": "none"}, {"tools": []}):
        here.ask(**options, logprobs=True, response_format={"type": "json_object"})
        assert processor.tokenizer.require("<tool_call>") in here.engine.params[-1].banned_ids
        assert "image_zoom_in_tool" not in processor.decode(here.engine.prompts[-1].token_ids)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "double"}}}, "tool_choice"),
    ],
)
def test_what_does_not_go_with_them_is_refused(world, options, field):
    here = world("Hi.")
    with pytest.raises(openai.BadRequestError) as error:
        here.ask(**options)
    assert error.value.param == field and here.engine.prompts == []
    assert here.ask(response_format={"type": "text"}).message.content == "Hi."


# -------------------------------------------------------------------------------------------------------------- clients


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("where", ["tool", "second turn"])
def test_a_client_that_leaves_takes_all_along(world, stream, where):
    inside, freed = threading.Event(), threading.Event()

    def wait(arguments, context):
        inside.set()
        if where == "tool":
            assert context.given_up.wait(10)
            freed.set()
        return ToolResult(("done",))

    schema = {"type": "object", "properties": {}}
    here = world(call("wait"), LONG, tools=[Tool("wait", "Waits.", schema, wait)], limits=Limits(concurrency=1))
    here.engine.pause_s = 0.002
    with raw(here.url) as connection:
        body = json.dumps({"model": "tiny", "messages": HELLO, "stream": stream}).encode()
        connection.sendall(head(len(body)) + body)
        assert inside.wait(10)
        if where == "second turn":
            until(lambda: len(here.engine.prompts) == 2 and here.engine.running == 1)
    until(lambda: here.service.gate.inside == 0 and here.engine.running == 0)
    assert where != "tool" or freed.wait(10)
    assert counted(here.service, "gone") == 1 and counted(here.service, "done") == 0
    assert len(here.engine.prompts) == (1 if where == "tool" else 2)


def test_nobody_gets_anothers_results(world, processor):
    """Many at once, of whom a third leave at some time."""

    def says(prompt):
        text = processor.decode(prompt.token_ids)
        number = int(text.rpartition("number ")[2].partition("\n")[0])
        results = [int(one.partition("\n")[0]) for one in text.split("<tool_output>\n")[1:]]
        assert results == [2 * number] * len(results)
        return call("double", x=number) if len(results) < 2 else f"It is {results[0]}."

    here = world(says=says, limits=Limits(concurrency=16))
    chance = random.Random(0)

    async def ask(session, number):
        body = {"model": "tiny", "messages": [{"role": "user", "content": f"number {number}"}]}
        asking = session.post(f"{here.url}/v1/chat/completions", json=body)
        if number % 3 == 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asking, chance.uniform(0.01, 0.5))
            return
        message = (await asking).json()["choices"][0]["message"]
        assert message["content"] == f"It is {2 * number}."
        assert [step["result"]["text"] for step in message["steps"]] == [str(2 * number)] * 2

    async def all_at_once():
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=60)) as session:
            await asyncio.gather(*(ask(session, number) for number in range(1, 61)))

    asyncio.run(all_at_once())
    until(lambda: here.service.gate.inside == 0 and here.engine.running == 0)
    assert counted(here.service, "done") >= 40 and counted(here.service, "failed") == 0
