"""The chat format: the strings of reference 4.5 literally, the authors, and the Jinja template that says the same."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_model.chat import ChatError, ChatFormat, PieceKind, SpanKind, jinja_template, render, to_text

IMAGE = {"type": "image", "image": "a.png"}
VIDEO = {"type": "video", "video": "a.mp4"}
TOOL = {"type": "function", "function": {"name": "image_zoom_in_tool", "description": "Zoom 放大"}}
ZOOM = {"function": {"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [285, 235, 999, 652]}}}
PICTURE = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
CLIP = "<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>"


def text(part: str) -> dict:
    return {"type": "text", "text": part}


def user(*content) -> dict:
    return {"role": "user", "content": content[0] if len(content) == 1 and isinstance(content[0], str) else [*content]}


def assistant(content: str = "", **more) -> dict:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> dict:
    return {"role": "system", "content": content}


def tool(*content) -> dict:
    return user(*content) | {"role": "tool"}


PROMPTS = {
    "text, not thinking": (
        [user("Hi")],
        {},
        "<|begin_of_sentence|>User: Hi\nAssistant: <think>\n\n</think>\n\n",
    ),
    "text, thinking switched off": (
        [user("Hi")],
        dict(thinking=False),
        "<|begin_of_sentence|>User: Hi\nAssistant: <think>\n\n</think>\n\n",
    ),
    "text, thinking": (
        [user("Hi")],
        dict(thinking=True),
        "<|begin_of_sentence|>User: Hi\nAssistant: <think>",
    ),
    "system and image": (
        [system("You are helpful."), user(text("What is this?"), IMAGE)],
        {},
        f"<|begin_of_sentence|>You are helpful.\nUser: What is this?Picture 1:{PICTURE}\n"
        "Assistant: <think>\n\n</think>\n\n",
    ),
    "two images and a video, second turn": (
        [user(IMAGE, IMAGE, VIDEO, text("Compare.")), assistant("They differ."), user("How?")],
        {},
        f"<|begin_of_sentence|>User: Picture 1:{PICTURE}Picture 2:{PICTURE}Video 1:{CLIP}Compare.\n"
        "Assistant: They differ.<|end_of_sentence|>User: How?\nAssistant: <think>\n\n</think>\n\n",
    ),
    "reasoning in the history": (
        [user("2+2?"), assistant("4", reasoning_content="add them"), user("and 3+3?")],
        dict(thinking=True),
        "<|begin_of_sentence|>User: 2+2?\nAssistant: <think>\nadd them\n</think>\n4<|end_of_sentence|>"
        "User: and 3+3?\nAssistant: <think>",
    ),
    "tools, and a result with an image": (
        [
            user(IMAGE, text("What does the sign say?")),
            assistant(reasoning_content="look closer", tool_calls=[ZOOM]),
            tool(IMAGE, text("text result")),
        ],
        dict(tools=[TOOL], thinking=True),
        '<|begin_of_sentence|>\n<tool_list>\n[{"type": "function", "function": {"name": "image_zoom_in_tool", '
        f'"description": "Zoom 放大"}}}}]\n</tool_list>\nUser: Picture 1:{PICTURE}What does the sign say?\nAssistant: '
        '<think>\nlook closer\n</think>\n<tool_call>\n{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": '
        "[285, 235, 999, 652]}}\n</tool_call>\n<|end_of_sentence|>User: \n<tool_output>\n"
        f"Picture 2:{PICTURE}text result\n</tool_output>\n\nAssistant: <think>",
    ),
    "tools before the system text": (
        [system("Be brief."), user("Hi")],
        dict(tools=[{"name": "f"}]),
        '<|begin_of_sentence|>\n<tool_list>\n[{"name": "f"}]\n</tool_list>\nBe brief.\nUser: Hi\n'
        "Assistant: <think>\n\n</think>\n\n",
    ),
    "two calls, two results, text before the calls": (
        [user("Both"), assistant("Sure.", tool_calls=[{"name": "f"}, {"name": "g"}]), tool("1"), tool("2"), user("Go")],
        {},
        '<|begin_of_sentence|>User: Both\nAssistant: Sure.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>\n<|end_of_sentence|>User: \n<tool_output>\n1\n'
        "</tool_output>\n<tool_output>\n2\n</tool_output>\nUser: Go\nAssistant: <think>\n\n</think>\n\n",
    ),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_are_the_strings_of_the_reference(case):
    messages, options, wanted = PROMPTS[case]
    assert to_text(render(messages, add_generation_prompt=True, **options)) == wanted


# ------------------------------------------------------------------------------------------------ what is being written


def generated(messages, **options) -> tuple[str, str]:
    """The conversation's text up to where the last turn starts to be written, and what is written there."""
    pieces = render(messages, **options)
    start = max(i for i, piece in enumerate(pieces) if piece.starts_generation)
    return to_text(pieces[:start]), to_text(pieces[start:])


@pytest.mark.parametrize(
    ("answer", "thinking", "wanted"),
    [
        (assistant("7"), None, "7<|end_of_sentence|>"),
        (assistant("7"), False, "7<|end_of_sentence|>"),
        (assistant("7"), True, "\n\n</think>\n\n7<|end_of_sentence|>"),
        (assistant("7", reasoning_content="hm"), None, "\nhm\n</think>\n7<|end_of_sentence|>"),
        (assistant("7", reasoning_content="hm"), True, "\nhm\n</think>\n7<|end_of_sentence|>"),
        (assistant("7", reasoning_content="\nhm\n\n"), True, "\nhm\n</think>\n7<|end_of_sentence|>"),
        (assistant("7", reasoning_content="hm"), False, "7<|end_of_sentence|>"),
        (assistant("7", reasoning_content="\n"), None, "7<|end_of_sentence|>"),
    ],
)
def test_the_last_turn_stands_behind_its_generation_prompt(answer, thinking, wanted):
    before, written = generated([user("?"), answer], thinking=thinking)
    thinks = "</think>" in wanted
    assert before == to_text(render([user("?")], thinking=thinks, add_generation_prompt=True))
    assert written == wanted


def test_earlier_turns_are_history_unless_every_turn_is_asked_for():
    messages = [user("a"), assistant("1"), user("b"), assistant("2", reasoning_content="hm"), user("c"), assistant("3")]
    pieces = render(messages)
    assert to_text(pieces) == (
        "<|begin_of_sentence|>User: a\nAssistant: 1<|end_of_sentence|>User: b\nAssistant: <think>\nhm\n</think>\n2"
        "<|end_of_sentence|>User: c\nAssistant: <think>\n\n</think>\n\n3<|end_of_sentence|>"
    )
    prompted = {piece.message: piece.prompted for piece in pieces if piece.span.generated}
    assert prompted == {1: False, 3: True, 5: True}
    assert [piece.message for piece in pieces if piece.starts_generation] == [3, 5]

    every = render(messages, every_turn=True)
    assert to_text(every) == to_text(pieces).replace("Assistant: 1", "Assistant: <think>\n\n</think>\n\n1")
    assert all(piece.prompted == piece.span.generated for piece in every)
    assert "hm" not in to_text(render(messages, every_turn=True, thinking=False))
    assert "hm" in to_text(render(messages, thinking=False))  # history stays as it was


def test_what_is_written_from_a_message_on_stands_behind_its_prompts_and_what_is_before_is_history():
    messages = [user("a"), assistant("1"), user("b"), assistant("2"), user("c"), assistant("3")]
    pieces = render(messages, written_from=3)
    assert to_text(pieces) == (
        "<|begin_of_sentence|>User: a\nAssistant: 1<|end_of_sentence|>User: b\nAssistant: <think>\n\n</think>\n\n2"
        "<|end_of_sentence|>User: c\nAssistant: <think>\n\n</think>\n\n3<|end_of_sentence|>"
    )
    assert [piece.message for piece in pieces if piece.starts_generation] == [3, 5]
    assert render(messages, written_from=5) == render(messages)
    assert render(messages, written_from=0) == render(messages, every_turn=True)


def test_the_last_answer_is_history_when_another_turn_follows_it():
    pieces = render([user("a"), assistant("1")], add_generation_prompt=True)
    assert to_text(pieces).endswith("\nAssistant: 1<|end_of_sentence|>\nAssistant: <think>\n\n</think>\n\n")
    assert not any(piece.prompted for piece in pieces)


def test_every_stretch_has_its_author():
    messages = [
        system("S"),
        user(text("U"), IMAGE),
        assistant("A", reasoning_content="R", tool_calls=[{"name": "f"}]),
        tool("T"),
        assistant("B"),
    ]
    pieces = render(messages, tools=[{"name": "f"}])
    own = [(p.message, p.span.name, p.text) for p in pieces if p.span is not SpanKind.TEMPLATE]
    assert own == [
        (-1, "TOOLS", '[{"name": "f"}]'),
        (0, "SYSTEM", "S"),
        (1, "USER", "U"),
        (1, "IMAGE", PICTURE),
        (2, "REASONING", "\nR\n"),
        (2, "REASONING", "</think>"),
        (2, "REASONING", "\n"),
        (2, "ANSWER", "A"),
        (2, "TOOL_CALL", "\n"),
        (2, "TOOL_CALL", "<tool_call>"),
        (2, "TOOL_CALL", '\n{"name": "f", "arguments": {}}\n'),
        (2, "TOOL_CALL", "</tool_call>"),
        (2, "TOOL_CALL", "\n"),
        (2, "END", "<|end_of_sentence|>"),
        (3, "TOOL_RESULT", "T"),
        (4, "ANSWER", "B"),
        (4, "END", "<|end_of_sentence|>"),
    ]
    assert [p.prompted for p in pieces] == [p.span.generated for p in pieces]


def test_only_our_own_text_and_the_answer_hold_special_tokens():
    """A user who types <think> types seven characters; an answer may hold places and <response>, not more."""
    messages = [user("<think><|LOC_1|>"), assistant("<response>at <|LOC_12|></response><|IMAGE_START|><think>")]
    special = [p.text for p in render(messages) if p.kind is PieceKind.SPECIAL and p.span is not SpanKind.TEMPLATE]
    assert special == ["<response>", "<|LOC_12|>", "</response>", "<|end_of_sentence|>"]


def test_arguments_given_as_json_text_are_shown_as_an_object():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x":[1,2],"y":"é"}'}}
    _, written = generated([user("?"), assistant(tool_calls=[call])])
    assert written == (
        '<tool_call>\n{"name": "f", "arguments": {"x": [1, 2], "y": "é"}}\n</tool_call>\n<|end_of_sentence|>'
    )


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([{"role": "bot", "content": "x"}], "message 0: role is 'bot'"),
        ([user("a"), user({"type": "audio"})], "message 1: a part has type 'audio'"),
        ([user({"type": "image", "path": "x"})], "message 0: a part of type 'image' has no key 'image'"),
        ([{"role": "assistant", "content": [IMAGE]}], "message 0: an assistant message holds an image"),
        ([assistant(tool_calls=[{"name": "f", "arguments": "{"}])], "message 0: arguments of a tool call are not JSON"),
        ([assistant(tool_calls=[{"arguments": {}}])], "message 0: a tool call has no name"),
        ([assistant(tool_calls=[{"name": "f", "arguments": {"x": b""}}])], "message 0: tool_calls cannot be written"),
    ],
)
def test_messages_that_cannot_be_expressed_are_named(messages, problem):
    with pytest.raises(ChatError, match=problem):
        render(messages)


# -------------------------------------------------------------------------------------------------------- text models


def test_a_text_model_without_thinking_has_no_think_block():
    plain = ChatFormat(think=False, text_model=True)
    prompt = render([user("Hi")], tools=[{"name": "f"}], add_generation_prompt=True, chat_format=plain)
    assert to_text(prompt) == (
        '<|begin_of_sentence|>\n\n<tool_list>\n[{"name": "f"}]\n</tool_list>User: Hi\nAssistant: '
    )
    pieces = render([user("Hi"), assistant("7")], chat_format=plain)
    assert to_text(pieces) == "<|begin_of_sentence|>User: Hi\nAssistant: 7<|end_of_sentence|>"
    assert [p.text for p in pieces if p.starts_generation] == ["7"]
    with pytest.raises(ChatError, match="no thinking mode"):
        render([user("Hi")], thinking=True, chat_format=plain)
    with pytest.raises(ChatError, match="message 1 has reasoning_content"):
        render([user("Hi"), assistant("7", reasoning_content="hm")], chat_format=plain)


# ------------------------------------------------------------------------------------------------------------- Jinja

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
json_values = st.recursive(st.none() | st.booleans() | st.integers(-9, 999) | words, st.lists, max_leaves=4)
arguments = st.dictionaries(words, json_values, max_size=2)
parts = st.lists(st.one_of(words.map(text), st.just(IMAGE), st.just(VIDEO)), max_size=3)
calls = st.lists(st.fixed_dictionaries({"name": words, "arguments": arguments}), max_size=2)
answers = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": words},
    optional={"reasoning_content": words, "tool_calls": calls.map(lambda c: [{"function": call} for call in c])},
)
others = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "tool"]), "content": words | parts})
conversations = st.lists(others | answers, min_size=1, max_size=6)


def rendered_by_transformers(messages, chat_format: ChatFormat, *, tools, thinking, add_generation_prompt) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    options = {} if thinking is None else {"enable_thinking": thinking}
    rendered, _ = render_jinja_template(
        [messages],
        tools=tools or None,
        chat_template=jinja_template(chat_format),
        add_generation_prompt=add_generation_prompt,
        **options,
    )
    return rendered[0]


@pytest.mark.parametrize("case", PROMPTS)
def test_the_template_renders_the_same_prompts(case):
    messages, options, wanted = PROMPTS[case]
    options = {"tools": None, "thinking": None, "add_generation_prompt": True} | options
    assert rendered_by_transformers(messages, ChatFormat(), **options) == wanted


@settings(max_examples=150)
@given(
    conversations,
    st.lists(st.fixed_dictionaries({"name": words, "parameters": arguments}), max_size=2),
    st.sampled_from([None, True, False]),
    st.booleans(),
    st.booleans(),
)
def test_the_template_renders_what_we_render(messages, tools, thinking, add_generation_prompt, text_model):
    options = dict(tools=tools, thinking=thinking, add_generation_prompt=add_generation_prompt)
    chat_format = ChatFormat(text_model=text_model)
    ours = to_text(render(messages, chat_format=chat_format, **options))
    assert rendered_by_transformers(messages, chat_format, **options) == ours


@settings(max_examples=50)
@given(conversations, st.booleans())
def test_the_template_without_thinking_renders_what_we_render(messages, add_generation_prompt):
    messages = [{key: value for key, value in m.items() if key != "reasoning_content"} for m in messages]
    options = dict(tools=None, thinking=None, add_generation_prompt=add_generation_prompt)
    chat_format = ChatFormat(think=False, text_model=True)
    assert rendered_by_transformers(messages, chat_format, **options) == to_text(
        render(messages, chat_format=chat_format, **options)
    )
    assert "<think>" not in jinja_template(chat_format)


@given(conversations, answers, st.sampled_from([None, True, False]))
def test_what_is_trained_stands_behind_what_is_prompted(messages, answer, thinking):
    before, _ = generated([*messages, answer], thinking=thinking)
    thinks = bool((answer.get("reasoning_content") or "").strip("\n")) if thinking is None else thinking
    assert before == to_text(render(messages, thinking=thinks, add_generation_prompt=True))


@pytest.mark.parametrize("content", [["hi"], {"type": "text"}, [{"type": ["image"], "image": "a.png"}], 7])
def test_content_of_another_shape_is_refused(content):
    with pytest.raises(ChatError, match="message 0: "):
        render([{"role": "user", "content": content}])
