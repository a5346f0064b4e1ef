"""The server over the real engine and a tiny random model: what only the two together can show."""

import asyncio
import json

import jsonschema
import openai
import pytest

from ernie_model.inference.async_engine import AsyncEngine
from ernie_model.inference.engine import Engine, EngineSettings
from ernie_model.inference.server.app import make_app
from ernie_model.inference.server.settings import ServerSettings
from ernie_model.tokenizer import END_THINK, load_tiny_tokenizer
from tests.ernie_model.inference.server.running import client, running
from tests.load.serving import tiny_model

LONG = [{"role": "user", "content": "Tell me about the sea. " * 20}]
HELLO = [{"role": "user", "content": "Hello?"}]
BOOK = {
    "type": "object",
    "properties": {"pages": {"type": "integer", "minimum": 1, "maximum": 900}, "lent": {"type": "boolean"}},
    "required": ["pages", "lent"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server():
    model, processor = tiny_model()
    engine = AsyncEngine(Engine(model, processor.tokenizer, EngineSettings(cache_gib=0.02, max_context=2000)))
    app = make_app(engine, processor, ServerSettings(name="tiny"), engine_stats=engine.stats)
    with running(app) as url, client(url) as one:
        yield one, engine
    asyncio.run(engine.close())


@pytest.fixture
def create(server):
    return lambda messages, **options: server[0].chat.completions.create(model="tiny", messages=messages, **options)


def test_attempts_share_the_prompt_and_differ(server, create):
    _, engine = server
    before = engine.stats()
    completion = create(LONG, n=4, temperature=1.0, seed=3, max_tokens=8)
    after = engine.stats()
    prompt = completion.usage.prompt_tokens
    assert len({choice.message.content for choice in completion.choices}) == 4
    sampled = after.sampled_tokens - before.sampled_tokens
    assert sampled == completion.usage.completion_tokens
    computed = after.computed_tokens - before.computed_tokens
    assert computed < 1.5 * prompt + sampled, "apart they would have computed it four times"
    alone = [create(LONG, temperature=1.0, seed=3 + number, max_tokens=8) for number in range(4)]
    assert [one.choices[0].message.content for one in alone] == [one.message.content for one in completion.choices]
    page = engine.engine.settings.page_tokens
    assert alone[3].usage.prompt_tokens_details.cached_tokens >= prompt - page - 1


def test_an_answer_is_held_to_a_schema(create):
    wanted = {"type": "json_schema", "json_schema": {"name": "book", "schema": BOOK}}
    for thinks in (False, True):
        for seed in range(3):
            completion = create(HELLO, response_format=wanted, seed=seed, **free(thinks))
            assert completion.choices[0].finish_reason == "stop", completion
            jsonschema.validate(json.loads(completion.choices[0].message.content), BOOK)
            assert (completion.usage.completion_tokens_details.reasoning_tokens > 0) == thinks


def free(thinks):
    """Random answers; with thoughts that end soon, since `</think>` is made likely."""
    bias = {str(load_tiny_tokenizer().require(END_THINK)): 5} if thinks else {}
    return dict(temperature=1.0, max_tokens=300, logit_bias=bias, extra_body={"enable_thinking": thinks})


@pytest.mark.parametrize("thinks", [False, True])
def test_a_call_that_is_asked_for_is_one(create, thinks):
    tools = [{"type": "function", "function": {"name": name, "parameters": BOOK}} for name in ("lend", "buy")]
    for seed in range(2):
        choice = create(HELLO, tools=tools, tool_choice="required", seed=seed, **free(thinks)).choices[0]
        assert choice.finish_reason == "tool_calls", choice
        (call,) = choice.message.tool_calls
        assert call.function.name in ("lend", "buy")
        jsonschema.validate(json.loads(call.function.arguments), BOOK)
        assert not choice.message.content


def test_schemas_that_cannot_be_held_to_are_errors(create):
    odd = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}, "required": ["a"]}
    with pytest.raises(openai.BadRequestError, match="not") as error:
        create(HELLO, response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": odd}})
    assert error.value.param == "response_format"
    tools = [{"type": "function", "function": {"name": "f", "parameters": odd}}]
    for thinks in (False, True):
        with pytest.raises(openai.BadRequestError, match="not") as error:
            create(HELLO, tools=tools, tool_choice="required", extra_body={"enable_thinking": thinks})
        assert error.value.param == "tools"
    huge = {"type": "object", "properties": {"a": {"type": "string", "pattern": "a{30000}"}}}  # the engine refuses it
    tools[0]["function"]["parameters"] = huge
    with pytest.raises(openai.BadRequestError, match="states") as error:
        create(HELLO, tools=tools, tool_choice="required")
    assert error.value.param == "tools"


def test_log_probabilities_are_those_of_the_likeliest_tokens(create):
    content = create(HELLO, temperature=0, logprobs=True, top_logprobs=3, max_tokens=5).choices[0].logprobs.content
    assert len(content) == 5
    for one in content:
        assert [top.logprob for top in one.top_logprobs] == sorted(
            (top.logprob for top in one.top_logprobs), reverse=True
        )
        assert one.top_logprobs[0].bytes == one.bytes and one.top_logprobs[0].logprob == one.logprob < 0


def test_a_prompt_that_is_too_long_is_told(server, create):
    for messages, options in (([{"role": "user", "content": "word " * 3000}], {}), (HELLO, {"max_tokens": 2000})):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="more than the 2000 tokens") as error:
                create(messages, stream=stream, **options)
            assert error.value.code == "context_length_exceeded" and error.value.param == "messages"
