"""What an answer holds: vLLM's results on a list of cases, and the same results from a stream, however it is cut.

parser_cases.json was filled by vLLM 0.32.0's own `Ernie45ReasoningParser` and `Ernie45ToolParser`:

    reasoning, content   of the text, by `extract_reasoning`
    tools                of that content, by `extract_tool_calls`
    streamed             the pieces of `extract_reasoning_streaming`, token by token, put together
    tools_of_text        of the text itself, by `extract_tool_calls`
"""

import json
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ernie_model.inference.parsing import Parsed, StreamParser, ToolCallText, parse, split_calls, split_reasoning
from ernie_model.tokenizer import END_RESPONSE, END_THINK, END_TOOL_CALL, RESPONSE, THINK, TOOL_CALL

CASES = json.loads(Path(__file__).with_name("parser_cases.json").read_text("utf-8"))
THINKING = [case for case in CASES if "reasoning" in case]
WEATHER = '<tool_call>\n{"name": "get_weather", "arguments": {"location": "Beijing", "unit": "c"}}\n</tool_call>\n'

# Where only the end of a text tells what its beginning was; the stream has shown the beginning by then.
ONLY_THE_END_TELLS = [
    "x<think>abc</think>def",
    "a</think>b<think>c",
    "a<think>b<think>c</think>d",
    "a</think>\n<think>b</think>c",
    "abc</think>x<response>def</response>y",
    "abc</think><response>a</response>b</response>c",
    f'a</think>{WEATHER}<tool_call>\n{{"broken"}}\n</tool_call>\n',
]


def as_json(calls) -> list[dict[str, str]]:
    return [{"name": call.name, "arguments": call.arguments} for call in calls]


def streamed(parts, in_reasoning: bool) -> tuple[str, str, tuple[ToolCallText, ...]]:
    parser = StreamParser(in_reasoning=in_reasoning)
    pieces = [piece for part in parts for piece in parser.push(part)] + parser.finish()
    reasoning, content = ("".join(piece.text for piece in pieces if piece.kind == k) for k in ("reasoning", "content"))
    return reasoning, content, tuple(piece.call for piece in pieces if piece.call is not None)


def whole(parsed: Parsed) -> tuple[str, str, tuple[ToolCallText, ...]]:
    return parsed.reasoning or "", parsed.content or "", parsed.calls


# ------------------------------------------------------------------------------------------------------- as vLLM reads


def test_there_are_enough_cases():
    assert len(CASES) >= 60 and len({case["text"] for case in CASES}) >= 95


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["text"][:40].encode("unicode_escape").decode())
def test_the_whole_text_as_vllm(case):
    if "reasoning" in case:
        assert split_reasoning(case["text"]) == (case["reasoning"], case["content"])
    text, expected = (
        (case["content"] or "", case["tools"]) if "tools" in case else (case["text"], case["tools_of_text"])
    )
    called, content, calls = split_calls(text)
    assert (called, content, as_json(calls)) == (expected["called"], expected["content"], expected["calls"])


@pytest.mark.parametrize("case", THINKING, ids=lambda case: case["text"][:40].encode("unicode_escape").decode())
def test_parse_is_that_without_the_newlines_of_the_format(case):
    parsed = parse(case["text"], in_reasoning=True)
    content = (case["tools"]["content"] or "").strip("\n")
    assert (parsed.reasoning, as_json(parsed.calls)) == (case["reasoning"], case["tools"]["calls"])
    assert (parsed.content or "").strip("\n") in (content, content.removeprefix(RESPONSE).lstrip("\n"))


@pytest.mark.parametrize("case", [case for case in THINKING if "streamed" in case], ids=lambda case: case["text"][:40])
def test_the_stream_as_vllm(case):
    """But for newlines, of which vLLM keeps some, and stray tags, which it drops."""
    reasoning, content, _ = streamed(case["text"], True)
    for tag in (THINK, END_THINK, RESPONSE, END_RESPONSE):
        reasoning, content = reasoning.replace(tag, ""), content.replace(tag, "")
    if not case["text"].endswith("b</response>c"):  # behind the last tag but one: vLLM's stream shows it, its whole not
        if "<response>b" not in case["text"]:
            assert content.strip("\n") == case["streamed"]["content"].strip("\n")
        assert reasoning.strip("\n") == case["streamed"]["reasoning"].strip("\n")


def test_half_of_a_surrogate_pair_is_no_text():
    """vLLM takes the call, and cannot write its answer."""
    for body in ('{"name": "\\ud800"}', '{"name": "f", "arguments": {"x": "\\ud800"}}'):
        parsed = parse(f"a</think><tool_call>{body}</tool_call>", in_reasoning=True)
        assert parsed.calls == () and "surrogates" in parsed.errors[0]


# ----------------------------------------------------------------------------------------------------------- our words


def test_the_format_around_the_content_is_not_part_of_it():
    assert parse("abc\n</think>\n\n4\n", in_reasoning=True) == Parsed("abc\n", "4\n")
    assert parse("abc\n</think>\n\n<response>\ndef\n</response>\n", in_reasoning=True) == Parsed("abc\n", "def")
    assert parse("abc\n</think>\n\n<response>\ndef", in_reasoning=True) == Parsed("abc\n", "def")
    assert parse("\n\n4", in_reasoning=False) == Parsed(None, "4")
    assert parse("\n<think>abc</think>4", in_reasoning=False) == Parsed("abc", "4")
    assert parse("<response>\n4\n</response>", in_reasoning=False) == Parsed(None, "4")
    assert parse("", in_reasoning=False) == Parsed(None, None)


def test_arguments():
    def parsed(arguments):
        return (
            parse(f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>', in_reasoning=False)
            .calls[0]
            .parsed
        )

    assert parsed('{"x": 1}') == {"x": 1} == parsed(r'"{\"x\": 1}"')
    assert parsed("[1]") is parsed("null") is parsed('"x"') is parsed('"[1]"') is None


@pytest.mark.parametrize(
    "text, why",
    [
        ('<tool_call>{"name": }</tool_call>', "Expecting value"),
        ("<tool_call>f(1)</tool_call>", "not followed by a JSON object"),
        ('<tool_call>\n{"name": "f"}\n', "not followed by a JSON object and </tool_call>"),
        ('<tool_call>{"name": 5}</tool_call>', "`name`"),
        ('<tool_call>{"a": ' + "[" * 100_000 + "}</tool_call>", "recursion"),
    ],
)
def test_errors_say_why(text, why):
    parsed = parse(text, in_reasoning=False)
    assert parsed.calls == () and len(parsed.errors) == 1 and why in parsed.errors[0] and len(parsed.errors[0]) < 300


# ---------------------------------------------------------------------------------------------------------- the stream


@pytest.mark.parametrize("in_reasoning", [True, False])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["text"][:40].encode("unicode_escape").decode())
def test_the_stream_says_what_the_whole_says(case, in_reasoning):
    """Character by character, and wherever the answer is cut off."""
    text = case["text"]
    texts = [] if text in ONLY_THE_END_TELLS else [text[:end] for end in range(len(text) + 1)]
    for text in texts:
        if not any(text.startswith(odd[:-1]) for odd in ONLY_THE_END_TELLS):
            assert streamed(text, in_reasoning) == whole(parse(text, in_reasoning=in_reasoning)), text


@pytest.mark.parametrize("text", ONLY_THE_END_TELLS)
def test_where_the_stream_cannot_know(text):
    assert streamed(text, True) != whole(parse(text, in_reasoning=True))


bits = st.sampled_from(
    [THINK, END_THINK, RESPONSE, END_RESPONSE, TOOL_CALL, END_TOOL_CALL, "\n", "\n\n", "a", " ", "<", "</", "{", "}"]
    + ['{"name": "f", "arguments": {"x": "é"}}', '{"name"}', "<tool_", "call>", "</thin", "k>", '"']
)


@given(st.lists(bits, max_size=12).map("".join), st.data(), st.booleans())
@example("a</think>b</response>", None, True)
def test_any_cut_gives_the_same(text, data, in_reasoning):
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6))) if data else []
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert streamed(parts, in_reasoning) == streamed([text], in_reasoning) == streamed(text, in_reasoning)
    parse(text, in_reasoning=in_reasoning)


words = st.text("ab<>/ \n{}é", max_size=6)
calls = st.sampled_from([WEATHER, '<tool_call>{"name": "f"}</tool_call>', "<tool_call>none</tool_call>\n"])
answers = st.one_of(
    st.builds("{}</think>{}{}".format, words, words, st.lists(calls, max_size=3).map("".join)),
    st.builds("{}</think>\n\n<response>\n{}\n</response>\n".format, words, words),
    st.builds('{}</think>{}<tool_call>{{"broken"}}</tool_call>{}'.format, words, words, words),
)


@given(answers, st.data())
def test_regular_answers_stream_as_they_are_wherever_they_are_cut_off(text, data):
    text = text[: data.draw(st.integers(0, len(text)))]
    assert streamed(text, True) == whole(parse(text, in_reasoning=True))


def test_what_is_certain_is_shown_at_once():
    parser = StreamParser(in_reasoning=True)
    assert [piece.text for piece in parser.push("\nabc d")] == ["\nabc d"]
    assert parser.push("</thi") == []
    assert [piece.text for piece in parser.push("s")] == ["</this"]
    assert [piece.kind for piece in parser.push("</think>\n\n4")] == ["content"]
    assert parser.push("\n") == []
    assert [piece.text for piece in parser.push("2")] == ["\n2"]
    assert parser.push("\n" + WEATHER[:-3]) == []
    (call,) = parser.push(WEATHER[-3:])
    assert call.kind == "call" and call.call is not None and call.call.parsed == {"location": "Beijing", "unit": "c"}
    assert parser.push("\nmore") == parser.finish() == []


def test_hostile_texts_do_not_take_long():
    start = time.process_time()
    for text in (
        "<tool_call>{" * 20_000,
        "<tool_call>" * 20_000,
        '<tool_call>{"' + "</tool_call>" * 20_000,
        "<" * 100_000,
    ):
        parse(text, in_reasoning=False)
        streamed([text[at : at + 7] for at in range(0, len(text), 7)], False)
    assert time.process_time() - start < 20  # 2 s


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_where_no_tools_were_offered_a_call_is_content(size):
    text = f"a\n</think>\n\nWrite:\n{WEATHER}"
    whole = parse(text, in_reasoning=True, calls=False)
    assert whole == Parsed("a\n", f"Write:\n{WEATHER}")
    parser = StreamParser(in_reasoning=True, calls=False)
    pieces = [piece for at in range(0, len(text), size) for piece in parser.push(text[at : at + size])]
    pieces += parser.finish()
    assert {piece.kind for piece in pieces} == {"reasoning", "content"}
    assert "".join(piece.text for piece in pieces if piece.kind == "content") == whole.content
