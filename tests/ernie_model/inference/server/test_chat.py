"""The server as OpenAI's own client sees it. The engine's answers are written beforehand (scripted.py)."""

import base64
import io
import json

import httpx
import jsonschema
import openai
import pytest
from PIL import Image

from ernie_model.images import MediaError, load_image
from ernie_model.inference.moderation import ListFilter, Moderation
from ernie_model.inference.request import JsonSchema, SamplingParams
from ernie_model.inference.server.app import make_app
from ernie_model.inference.server.settings import Limits, ServerSettings
from tests.ernie_model.inference.scripted import ScriptedEngine
from tests.ernie_model.inference.server.running import client, running

HELLO = [{"role": "user", "content": "Hello?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


class DataUrls:
    """Opens data: URLs; what else may be opened is tested in tests/train/serving."""

    def image(self, url, max_pixels):
        if not url.startswith("data:"):
            raise MediaError(url, "no such file.")
        image = load_image(base64.b64decode(url.partition(",")[2]))
        if image.width * image.height > max_pixels:
            raise MediaError("picture", f"more than {max_pixels} pixels")
        return image

    def video(self, url):
        return base64.b64decode(url.partition(",")[2])


class Recording(ScriptedEngine):
    """Remembers the parameters too."""

    def __init__(self, tokenizer, replies):
        super().__init__(tokenizer, replies)
        self.params: list[SamplingParams] = []

    def stream(self, prompt, params, *, timeout_s=None):
        self.params.append(params)
        return super().stream(prompt, params, timeout_s=timeout_s)


class World:
    """A server, the client of it, and the engine behind."""

    def __init__(self, url, engine, client):
        self.url, self.engine, self.client = url, engine, client
        self.says = "Good morning."

    def create(self, messages=HELLO, **options):
        return self.client.chat.completions.create(model="tiny", messages=messages, **options)

    def ask(self, messages=HELLO, **options):
        return self.create(messages, **options).choices[0]


@pytest.fixture(scope="module")
def world_of_module(processor):
    said = {}
    engine = Recording(processor.tokenizer, lambda prompt: said["world"].says)
    settings = ServerSettings(name="tiny", limits=Limits(images=3, megapixels=0.01, new_tokens=500, attempts=4))
    with running(make_app(engine, processor, settings, opener=DataUrls())) as url, client(url) as one:
        said["world"] = World(url, engine, one)
        yield said["world"]


@pytest.fixture
def world(world_of_module):
    world_of_module.says = "Good morning."
    world_of_module.engine.prompts.clear()
    world_of_module.engine.params.clear()
    return world_of_module


def prompt_text(world, processor):
    return processor.decode(world.engine.prompts[-1].token_ids)


def put_together(stream):
    """What a stream's chunks say: message, finish reason and usage, of each choice."""
    out, usage = {}, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            one = out.setdefault(choice.index, dict(content="", reasoning="", calls=[], reason=None, logprobs=[], n=0))
            one["n"] += 1
            one["content"] += choice.delta.content or ""
            one["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
            for call in choice.delta.tool_calls or ():
                while len(one["calls"]) <= call.index:
                    one["calls"].append(["", ""])
                one["calls"][call.index][0] += call.function.name or ""
                one["calls"][call.index][1] += call.function.arguments or ""
            if choice.logprobs:
                one["logprobs"] += choice.logprobs.content
            one["reason"] = choice.finish_reason or one["reason"]
    return out, usage


# ------------------------------------------------------------------------------------------------------------- answers


def test_an_answer(world, processor):
    completion = world.create([{"role": "system", "content": "Be brief."}, *HELLO])
    (choice,) = completion.choices
    assert choice.message.content == "Good morning." and choice.message.role == "assistant"
    assert choice.finish_reason == "stop" and choice.message.tool_calls is None and choice.logprobs is None
    assert prompt_text(world, processor) == processor.render(
        [{"role": "system", "content": "Be brief."}, *HELLO], add_generation_prompt=True, thinking=False
    )
    sampled = len(processor.tokenizer.encode_markup("Good morning.")) + 1  # and the terminator
    assert completion.usage.completion_tokens == sampled
    assert completion.usage.prompt_tokens == len(world.engine.prompts[0].token_ids)
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + sampled
    assert completion.usage.prompt_tokens_details.cached_tokens == 0
    assert completion.model == "tiny" and completion.object == "chat.completion"


def test_a_stream_put_together_is_the_answer(world):
    world.says = "Let me see.\n</think>\n\nIt is 7 o'clock, für Élise 你好."
    whole = world.ask(extra_body={"enable_thinking": True}, logprobs=True)
    stream = list(
        world.create(
            stream=True, stream_options={"include_usage": True}, extra_body={"enable_thinking": True}, logprobs=True
        )
    )
    parts, usage = put_together(stream)
    assert parts[0]["content"] == whole.message.content == "It is 7 o'clock, für Élise 你好."
    assert parts[0]["reasoning"] == whole.message.reasoning_content and "Let me see." in parts[0]["reasoning"]
    assert parts[0]["reason"] == whole.finish_reason == "stop"
    assert parts[0]["n"] > 10, "it comes in pieces"
    assert [one.token for one in parts[0]["logprobs"]] == [one.token for one in whole.logprobs.content]
    assert (
        usage.completion_tokens > 0 and 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens
    )
    assert {chunk.id for chunk in stream} == {stream[0].id} and stream[0].object == "chat.completion.chunk"
    assert stream[0].choices[0].delta.role == "assistant" and stream[1].choices[0].delta.role is None
    assert stream[-1].choices == [] and all(chunk.usage is None for chunk in stream[:-1])


def test_several_answers_at_once(world):
    completion = world.create(n=3, seed=7, temperature=1.0)
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert [params.seed for params in world.engine.params] == [7, 8, 9]
    one = world.create(n=1).usage
    assert completion.usage.completion_tokens == 3 * one.completion_tokens
    assert completion.usage.prompt_tokens == one.prompt_tokens

    parts, _ = put_together(world.create(n=3, stream=True))
    assert {number: part["content"] for number, part in parts.items()} == dict.fromkeys(range(3), "Good morning.")


def test_an_answer_that_is_cut(world):
    choice = world.ask(max_tokens=2)
    assert choice.finish_reason == "length" and "Good morning.".startswith(choice.message.content)
    assert world.ask(max_completion_tokens=2).message.content == choice.message.content


def test_log_probabilities_carry_the_bytes_of_each_token(world):
    world.says = "Ça va 😀"
    content = world.ask(logprobs=True, top_logprobs=2).logprobs.content
    assert b"".join(bytes(one.bytes) for one in content).decode() == "Ça va 😀"
    assert all(one.logprob == -0.5 for one in content) and world.engine.params[0].top_logprobs == 2


def test_parameters_reach_the_engine(world):
    world.create(
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.1,
        frequency_penalty=-0.2,
        seed=5,
        stop=["END", "\n\n"],
        max_tokens=33,
        logit_bias={"17": -100},
        extra_body={"top_k": 11, "min_p": 0.05, "repetition_penalty": 1.1, "stop_token_ids": [9]},
    )
    params = world.engine.params[0]
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 11, 0.05)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.1, -0.2, 1.1)
    assert (params.seed, params.stop, params.stop_ids) == (5, ("END", "\n\n"), (9,))
    assert (params.max_new_tokens, params.logit_bias, params.constraint) == (33, {17: -100.0}, None)


def test_what_a_request_does_not_say_is_the_servers(processor):
    engine = Recording(processor.tokenizer, ["Yes.\n</think>\n\nYes."])
    settings = ServerSettings(name="tiny", sampling=SamplingParams(temperature=0.3, max_new_tokens=77), thinking=True)
    with running(make_app(engine, processor, settings)) as url, client(url) as one:
        choice = one.chat.completions.create(model="tiny", messages=HELLO).choices[0]
    assert choice.message.reasoning_content and choice.message.content == "Yes."
    assert engine.params[0].temperature == 0.3 and engine.params[0].max_new_tokens == 77


@pytest.mark.parametrize(
    ("options", "thinks"),
    [
        ({}, False),
        ({"enable_thinking": True}, True),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"reasoning_effort": "none"}, False),
    ],
)
def test_thinking(world, processor, options, thinks):
    world.create(extra_body=options)
    assert prompt_text(world, processor).endswith("<think>" if thinks else "</think>\n\n")


# ---------------------------------------------------------------------------------------------------------- tool calls


def test_tool_calls_and_their_results(world, processor):
    call = '<tool_call>\n{"name": "weather", "arguments": {"place": "%s"}}\n</tool_call>\n'
    world.says = "I will look.\n" + call % "Lima" + call % "Oslo"
    choice = world.ask(tools=[WEATHER, CLOCK])
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I will look."
    assert [one.function.name for one in choice.message.tool_calls] == ["weather", "weather"]
    assert [json.loads(one.function.arguments) for one in choice.message.tool_calls] == [
        {"place": "Lima"},
        {"place": "Oslo"},
    ]
    assert '"name": "clock"' in prompt_text(world, processor)

    parts, _ = put_together(world.create(tools=[WEATHER], stream=True))
    assert [[name, json.loads(text)] for name, text in parts[0]["calls"]] == [
        ["weather", {"place": "Lima"}],
        ["weather", {"place": "Oslo"}],
    ]
    assert parts[0]["content"].strip() == "I will look." and parts[0]["reason"] == "tool_calls"

    # The answer goes back as the client prints it; results may come in any order, the model sees that of the calls.
    first, second = choice.message.tool_calls
    world.says = "Warm in Lima."
    results = [
        {"role": "tool", "tool_call_id": second.id, "content": "3 C"},
        {"role": "tool", "tool_call_id": first.id, "content": [{"type": "text", "text": "22 C"}]},
    ]
    final = world.ask([*HELLO, choice.message.model_dump(), *results], tools=[WEATHER])
    assert final.message.content == "Warm in Lima." and final.finish_reason == "stop"
    text = prompt_text(world, processor)
    assert text.index('"place": "Lima"') < text.index('"place": "Oslo"') < text.index("22 C") < text.index("3 C")


def test_one_call_only(world, processor):
    tokenizer = processor.tokenizer
    world.create(tools=[WEATHER], parallel_tool_calls=False)
    assert tokenizer.require("</tool_call>") in world.engine.params[0].stop_ids


def test_without_tools_no_call_is_sampled(world, processor):
    for options in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        world.create(**options)
        assert processor.tokenizer.require("<tool_call>") in world.engine.params[-1].banned_ids
        assert "weather" not in prompt_text(world, processor)
    world.create(tools=[WEATHER])
    assert world.engine.params[-1].banned_ids == ()


def allows(params, call):
    assert isinstance(params.constraint, JsonSchema)
    return jsonschema.Draft202012Validator(params.constraint.schema).is_valid(call)


def test_a_call_that_is_asked_for_is_begun_and_held_to_its_schema(world, processor):
    weather = {"name": "weather", "arguments": {"place": "Lima"}}
    clock = {"name": "clock", "arguments": {}}
    tools = [WEATHER, CLOCK]

    world.says = json.dumps(weather)
    choice = world.ask(tools=tools, tool_choice="required")
    (call,) = choice.message.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments) == {"place": "Lima"}
    assert choice.message.content is None and choice.finish_reason == "tool_calls"
    assert prompt_text(world, processor).endswith("</think>\n\n<tool_call>\n")
    params = world.engine.params[-1]
    assert allows(params, weather) and allows(params, clock)
    assert not allows(params, {"name": "weather", "arguments": {"town": "Lima"}}) and not allows(params, {})
    assert not allows(params, {"name": "clock", "arguments": {"place": "Lima"}})

    named = {"type": "function", "function": {"name": "clock"}}
    world.says = json.dumps(clock)
    parts, _ = put_together(world.create(tools=tools, tool_choice=named, stream=True))
    assert parts[0]["calls"] == [["clock", "{}"]] and parts[0]["reason"] == "tool_calls"
    assert allows(world.engine.params[-1], clock) and not allows(world.engine.params[-1], weather)


def test_a_call_that_is_asked_for_comes_behind_the_thought(world, processor):
    def reply(prompt):
        text = processor.decode(prompt.token_ids)
        return (
            '{"name": "clock", "arguments": {}}' if text.endswith("<tool_call>\n") else "What time is it?\n</think>No."
        )

    engine = Recording(processor.tokenizer, reply)
    with running(make_app(engine, processor, ServerSettings(name="tiny", thinking=True))) as url, client(url) as one:
        create = one.chat.completions.create
        asked = {"model": "tiny", "messages": HELLO, "tools": [CLOCK], "tool_choice": "required"}
        choice = create(**asked, max_tokens=100).choices[0]
        cut = create(**asked, max_tokens=3).choices[0]
    assert "What time is it?" in choice.message.reasoning_content and choice.finish_reason == "tool_calls"
    assert [call.function.name for call in choice.message.tool_calls] == ["clock"] and not choice.message.content
    first, second = engine.params[:2]
    thought = processor.tokenizer.encode_markup("What time is it?\n</think>")
    assert first.constraint is None and first.max_new_tokens == 100
    assert isinstance(second.constraint, JsonSchema) and second.max_new_tokens == 100 - len(thought)
    begin = (*thought, *processor.tokenizer.encode_markup("\n"), *processor.tokenizer.encode_markup("<tool_call>\n"))
    assert engine.prompts[1].token_ids == engine.prompts[0].token_ids + begin
    assert cut.finish_reason == "length" and cut.message.tool_calls is None and len(engine.prompts) == 3


def test_references_in_parameters_are_counted_from_where_they_stand(world):
    point = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    parameters = {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/point"}},
        "required": ["at"],
        "$defs": {"point": point},
    }
    draw = {"type": "function", "function": {"name": "draw", "parameters": parameters}}
    for tools in ([draw], [CLOCK, draw]):
        world.create(tools=tools, tool_choice="required")
        params = world.engine.params[-1]
        assert allows(params, {"name": "draw", "arguments": {"at": {"x": 3}}})
        assert not allows(params, {"name": "draw", "arguments": {"at": {"y": 3}}})


def test_formats_are_constraints(world):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    world.says = '{"a": 3}'
    choice = world.ask(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})
    assert json.loads(choice.message.content) == {"a": 3}
    assert world.engine.params[-1].constraint == JsonSchema(schema=schema)
    world.create(response_format={"type": "json_object"}, extra_body={"enable_thinking": True})
    assert world.engine.params[-1].constraint == JsonSchema(schema={"type": "object"})
    assert world.engine.params[-1].constrain_after == "</think>"
    world.create(response_format={"type": "text"})
    assert world.engine.params[-1].constraint is None


# ------------------------------------------------------------------------------------------------------------ filters


def test_filters_look_at_questions_and_answers(processor):
    says = ["A quiet day."]
    engine = Recording(processor.tokenizer, lambda prompt: says[0])
    filters = Moderation(input=(ListFilter(["weapon"]),), output=(ListFilter(["lockpick"]),))
    settings = ServerSettings(name="tiny", moderation=filters)
    with running(make_app(engine, processor, settings)) as url, client(url) as one:
        world = World(url, engine, one)
        for content in ("Which WEAPON?", [{"type": "text", "text": "Which weapon?"}]):
            with pytest.raises(openai.BadRequestError) as error:
                world.create([*HELLO, {"role": "user", "content": content}])
            assert error.value.code == "content_filter" and error.value.param == "messages[1].content"
        with pytest.raises(openai.BadRequestError, match="logprobs would tell"):
            world.create(logprobs=True)
        assert engine.prompts == []

        thinks = {"extra_body": {"enable_thinking": True}}
        for text, options, content, reasoning in (
            ("All is well with the locks.", {}, "All is well with the locks.", ""),
            ("Take a lockpick. Then go in.", {}, "Take a", ""),
            ("First a lock.\n</think>\n\nThen a key.", thinks, "Then a key.", "First a lock."),
            ("First a lockpick.\n</think>\n\nThen a key.", thinks, "", "First a"),
        ):
            says[0] = text
            whole = world.ask(**options)
            parts, _ = put_together(world.create(stream=True, **options))
            reason = "content_filter" if "lockpick" in text else "stop"
            assert whole.finish_reason == parts[0]["reason"] == reason
            assert whole.message.content == parts[0]["content"] == content
            shown = whole.message.reasoning_content or ""
            assert shown == parts[0]["reasoning"] and shown.strip() == reasoning

        call = '<tool_call>\n{"name": "weather", "arguments": {"place": "a lockpick"}}\n</tool_call>'
        says[0] = "I look.\n" + call
        choice = world.ask(tools=[WEATHER])
        assert choice.finish_reason == "content_filter" and choice.message.tool_calls is None
        assert choice.message.content == "I look."
    assert engine.running == 0


# ------------------------------------------------------------------------------------------------------------- images


def image_part(width, height, shade=128, **options):
    file = io.BytesIO()
    Image.new("RGB", (width, height), (shade, 0, 0)).save(file, format="PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url, **options}}


def test_images_reach_the_engine_in_order(world, processor):
    parts = [{"type": "text", "text": "Which is larger?"}, image_part(56, 28), image_part(84, 56)]
    world.create([{"role": "user", "content": parts}])
    prompt = world.engine.prompts[-1]
    assert [item.grid for item in prompt.media] == [
        processor.encode([{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", size)}]}]).grids[0]
        for size in ((56, 28), (84, 56))
    ]
    assert "Picture 1:" in prompt_text(world, processor) and "Picture 2:" in prompt_text(world, processor)


def test_a_low_detail_image_is_shrunk(world):
    whole = world.create([{"role": "user", "content": [image_part(600, 16)]}]).usage.prompt_tokens
    low = world.create([{"role": "user", "content": [image_part(600, 16, detail="low")]}]).usage.prompt_tokens
    assert low < whole


def test_images_in_tool_results(world, processor):
    asked = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "a", "type": "function", "function": {"name": "clock", "arguments": "{}"}}],
    }
    world.create([*HELLO, asked, {"role": "tool", "tool_call_id": "a", "content": [image_part(28, 28)]}], tools=[CLOCK])
    assert len(world.engine.prompts[-1].media) == 1


# ------------------------------------------------------------------------------------------------------------- errors


def part(**fields):
    return [{"role": "user", "content": [fields]}]


@pytest.mark.parametrize(
    ("messages", "options", "field", "message"),
    [
        (HELLO, {"temperature": 3}, "temperature", "less than or equal to 2"),
        (HELLO, {"temperature": "1"}, "temperature", "a valid number"),
        (HELLO, {"n": 5}, "n", "at most 4"),
        (HELLO, {"max_tokens": 501}, "max_tokens", "at most 500"),
        (HELLO, {"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "contradict"),
        (HELLO, {"top_logprobs": 2}, "top_logprobs", "needs logprobs=true"),
        (HELLO, {"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        (HELLO, {"logit_bias": {"999999999": 1}}, "logit_bias", "token ids of this model"),
        (HELLO, {"logit_bias": {"1": 1000}}, "logit_bias.1", "less than or equal to 100"),
        (HELLO, {"store": True}, "store", "Nothing is kept"),
        (HELLO, {"reasoning_effort": "high"}, "reasoning_effort", "use enable_thinking"),
        (HELLO, {"modalities": ["audio"]}, "modalities[0]", "it should be 'text'"),
        (HELLO, {"functions": []}, "functions", "Use tools."),
        (HELLO, {"extra_body": {"temprature": 1}}, "temprature", "Did you mean temperature?"),
        (HELLO, {"extra_body": {"enable_thinking": True, "reasoning_effort": "none"}}, "enable_thinking", "contradict"),
        (HELLO, {"tool_choice": "required"}, "tool_choice", "there are no tools"),
        (HELLO, {"tools": [CLOCK, CLOCK]}, "tools[1].function.name", "must be unique"),
        (
            HELLO,
            {"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
            "not among tools (clock)",
        ),
        (HELLO, {"tools": [CLOCK], "response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ([], {}, "messages", "at least 1 item"),
        ([{"role": "user"}], {}, "messages[0].content", "is missing"),
        ([{"role": "bot", "content": "x"}], {}, "messages[0].role", "must be one of"),
        ([{"role": "user", "content": "x", "name": "Bob"}], {}, "messages[0].name", "The chat format has no names"),
        ([{"role": "assistant", "content": None}], {}, "messages[0].content", "no tool_calls either"),
        (
            [{"role": "tool", "content": "x", "tool_call_id": "a"}],
            {},
            "messages[0].tool_call_id",
            "no assistant message before it waits",
        ),
        (part(type="input_audio", input_audio={}), {}, "messages[0].content[0].type", "'image_url', 'video_url'"),
        (part(type="image_url", image_url={"url": "/etc/passwd"}), {}, "messages[0].content[0].image_url.url", "file"),
        (
            part(type="image_url", image_url={"url": "data:image/png;base64,iVBORw0KGgo="}),
            {},
            "messages[0].content[0].image_url.url",
            "cannot be decoded",
        ),
        (
            part(type="video_url", video_url={"url": "data:video/mp4;base64,AAAA"}),
            {},
            "messages",
            "cannot be decoded as a video",
        ),
        ([{"role": "user", "content": [image_part(10, 10)] * 4}], {}, "messages[0].content[3].image_url.url", "3 im"),
        ([{"role": "user", "content": [image_part(80, 80)] * 2}], {}, "messages[0].content[1].image_url.url", "3600"),
    ],
)
def test_a_request_that_cannot_be_honoured_names_the_field(world, messages, options, field, message):
    with pytest.raises(openai.BadRequestError) as error:
        world.create(messages, **options)
    assert error.value.param == field and message in error.value.body["message"]
    assert error.value.type == "invalid_request_error"
    assert world.engine.prompts == []


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([], "no tool message behind it answers a, b"),
        (["a"], "no tool message behind it answers b"),
        (["a", "a", "b"], "answered already"),
        (["a", "c", "b"], "not among the calls before it"),
    ],
)
def test_every_call_needs_one_result(world, results, message):
    calls = [{"id": one, "type": "function", "function": {"name": "clock", "arguments": "{}"}} for one in "ab"]
    asked = {"role": "assistant", "content": None, "tool_calls": calls}
    answers = [{"role": "tool", "tool_call_id": one, "content": "x"} for one in results]
    with pytest.raises(openai.BadRequestError, match=message):
        world.create([*HELLO, asked, *answers], tools=[CLOCK])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b"\xff\xfe\x00", "not JSON"),
        (b'{"a":' * 100_000, "recursion limit"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', "not JSON"),
        (b'{"model": "tiny", "temperature": NaN, "messages": [{"role": "user", "content": "x"}]}', "finite"),
    ],
)
def test_bodies_that_are_no_requests(world, body, message):
    response = httpx.post(
        f"{world.url}/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400 and message in response.json()["error"]["message"]


def test_other_errors_have_openais_shape_too(world):
    with pytest.raises(openai.NotFoundError) as error:
        world.client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert error.value.code == "model_not_found" and error.value.param == "model"
    with pytest.raises(openai.NotFoundError, match="There is nothing at /v1/embeddings"):
        world.client.embeddings.create(model="tiny", input="x")
    plain = httpx.post(f"{world.url}/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert plain.status_code == 415 and "must be application/json" in plain.json()["error"]["message"]
    assert httpx.get(f"{world.url}/v1/chat/completions").status_code == 405


def test_models_health_and_metrics(world):
    assert [model.id for model in world.client.models.list()] == ["tiny"]
    assert world.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        world.client.models.retrieve("gpt-9")
    assert httpx.get(f"{world.url}/health").json() == {"status": "ok", "model": "tiny"}

    def counts():
        lines = httpx.get(f"{world.url}/metrics").text.splitlines()
        return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))

    before = counts()
    usage = world.create().usage
    after = counts()

    def grown(name):
        return float(after[name]) - float(before[name])

    assert grown('ernie_requests_total{outcome="done"}') == 1 == grown("ernie_request_seconds_count")
    assert grown("ernie_sampled_tokens_total") == usage.completion_tokens
    assert grown("ernie_prompt_tokens_total") == usage.prompt_tokens
    assert after["ernie_requests_inside"] == after["ernie_requests_waiting"] == "0.0"
