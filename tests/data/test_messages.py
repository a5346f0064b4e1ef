"""Records with `messages`: what they may say, what becomes of it, and what is refused."""

import base64

import pytest

from data.conversation import Conversation, Message, Part, PartKind, Source, ToolCall
from data.errors import DataError
from data.formats import messages
from data.records import Record

HERE = Source("train.jsonl", 7)


def read(*turns, **columns):
    return messages.read(Record({"messages": list(turns), **columns}, HERE))


USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yo"}


def test_plain_text():
    conversation = read(USER, ASSISTANT)

    assert conversation == Conversation(
        id="train.jsonl:7",
        messages=(
            Message(role="user", parts=(Part.of_text("hi"),)),
            Message(role="assistant", parts=(Part.of_text("yo"),)),
        ),
        source=HERE,
    )
    assert conversation.to_chat() == [USER, ASSISTANT]
    assert [message.trained_weight for message in conversation.messages] == [0.0, 1.0]


def test_the_record_may_name_itself_and_its_answer():
    conversation = read(USER, ASSISTANT, id=17, answer=42, split="train")

    assert (conversation.id, conversation.answer) == ("17", "42")
    assert conversation.name == "record '17' (train.jsonl:7)"


@pytest.mark.parametrize(
    ("part", "kind", "media"),
    [
        ({"type": "image", "image": "a.png"}, "image", "a.png"),
        ({"type": "image_url", "image_url": {"url": "a.png"}}, "image", "a.png"),
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}}, "image", "a.png"),
        ({"type": "image_url", "image_url": "a.png"}, "image", "a.png"),
        ({"type": "image", "url": "a.png"}, "image", "a.png"),
        ({"type": "image", "path": "a.png"}, "image", "a.png"),
        ({"type": "image_url", "value": "a.png"}, "image", "a.png"),
        ({"type": "video", "video": "a.mp4"}, "video", "a.mp4"),
        ({"type": "video_url", "video_url": {"url": "a.mp4"}}, "video", "a.mp4"),
    ],
)
def test_parts_stay_in_order(part, kind, media):
    content = [{"type": "text", "text": "before"}, part, {"type": "text", "value": "after"}]

    chat = read({"role": "user", "content": content}, ASSISTANT).to_chat()

    assert chat[0]["content"] == [
        {"type": "text", "text": "before"},
        {"type": kind, kind: media},
        {"type": "text", "text": "after"},
    ]


def test_text_parts_alone_are_a_string():
    content = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]

    assert read({"role": "user", "content": content}, ASSISTANT).to_chat()[0]["content"] == "one two"


def test_media_are_opened_by_the_caller():
    conversation = read({"role": "user", "content": [{"type": "image", "image": "a.png"}]}, ASSISTANT)

    opened = conversation.to_chat(lambda kind, media: (kind, media))

    assert opened[0]["content"] == [{"type": "image", "image": (PartKind.IMAGE, "a.png")}]


@pytest.mark.parametrize("arguments", ['{"x": 1}', {"x": 1}])
@pytest.mark.parametrize("tools", ['[{"name": "zoom"}]', [{"name": "zoom"}]])
def test_reasoning_tools_and_calls(arguments, tools):
    call = {"id": "c1", "type": "function", "function": {"name": "zoom", "arguments": arguments}}
    conversation = read(
        USER,
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "seen"},
        ASSISTANT,
        tools=tools,
    )

    assert conversation.tools == ({"name": "zoom"},)
    first = conversation.messages[1]
    assert (first.parts, first.reasoning, first.tool_calls) == ((), "hm", (ToolCall("zoom", {"x": 1}, "c1"),))
    assert conversation.to_chat()[1:3] == [
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "zoom", "arguments": {"x": 1}}}],
        },
        {"role": "tool", "content": "seen", "tool_call_id": "c1"},
    ]


@pytest.mark.parametrize(
    ("extra", "weight"),
    [({"train": False}, 0.0), ({"weight": 0}, 0.0), ({"loss_weight": 0.5}, 0.5), ({"train": True, "weight": 2}, 2.0)],
)
def test_train_and_weight(extra, weight):
    assert read(USER, {**ASSISTANT, **extra}).messages[1].trained_weight == weight


def test_loss_weight_of_a_user_is_never_trained():
    """LLaMA-Factory writes a weight on every message."""
    assert read({**USER, "loss_weight": 0.0}, {**ASSISTANT, "loss_weight": 1.0}).messages[0].trained_weight == 0.0


def refused(*turns, **columns):
    with pytest.raises(DataError) as error:
        read(*turns, **columns)
    assert str(error.value).startswith("train.jsonl:7: ")
    return str(error.value)


def test_what_is_refused_is_named():
    part = {"type": "text", "text": "x"}
    assert "messages is empty" in refused()
    assert "messages[0] is 5; it must be an object" in refused(5)
    assert "messages[0].role is null; it must be a string" in refused({"content": "x"})
    assert "messages[1]: role is 'bot'; it must be one of system, user" in refused(USER, {"role": "bot"})
    assert "messages[0].content is 5; it must be a string or a list of parts" in refused({"role": "user", "content": 5})
    assert 'messages[0].content[1].type is "audio"' in refused({"role": "user", "content": [part, {"type": "audio"}]})
    assert 'messages[0].content[0] has type "image" but no "image"' in refused(
        {"role": "user", "content": [{"type": "image"}]}
    )
    assert "messages[0].content[0].image is 5; it must be a string" in refused(
        {"role": "user", "content": [{"type": "image", "image": 5}]}
    )
    assert "messages[1] has 'reasoning', which has no meaning here" in refused(USER, {**ASSISTANT, "reasoning": "x"})
    assert "messages[0]: a user message has tool_calls" in refused({**USER, "tool_calls": [{"name": "f"}]})
    assert "messages[0]: a user message has train=true" in refused({**USER, "train": True})
    assert 'messages[1].train is "no"; it must be true or false' in refused(USER, {**ASSISTANT, "train": "no"})
    assert "messages[1].weight is '1'" in refused(USER, {**ASSISTANT, "weight": "1"})
    assert "messages[1]: weight is -1" in refused(USER, {**ASSISTANT, "weight": -1})
    assert "messages[1].tool_calls[0].name is null" in refused(USER, {**ASSISTANT, "tool_calls": [{}]})
    assert "messages[1].tool_calls[0].function.arguments is a string that is not JSON" in refused(
        USER, {**ASSISTANT, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}
    )
    assert "tools is a string that is not JSON" in refused(USER, ASSISTANT, tools="[")
    assert "the text has 0 <image> markers and `images` has 1 images" in refused(USER, ASSISTANT, images=["a.png"])
    assert "a user message has loss_weight=0.5; only what the assistant writes" in refused({**USER, "loss_weight": 0.5})
    assert "answer is [1]" in refused(USER, ASSISTANT, answer=[1])


def test_a_record_without_messages():
    with pytest.raises(DataError, match="train.jsonl:7: the record has no `messages`, only 'instruction', 'output'"):
        messages.read(Record({"instruction": "x", "output": "y"}, HERE))


def test_bytes_are_written_as_a_data_url(png):
    conversation = Conversation(id="a", messages=(Message(role="user", parts=(Part.of_image(png),)),))

    url = messages.write(conversation)["messages"][0]["content"][0]["image"]

    assert url.startswith("data:image/png;base64,")
    assert base64.b64decode(url.split(",")[1]) == png


def test_null_means_absent():
    """Tables written as JSON lines have every column in every record, null where there is nothing."""
    conversation = read(USER, ASSISTANT | {"weight": None, "loss_weight": 0.5}, id=None)

    assert conversation.id == "train.jsonl:7"
    assert conversation.messages[1].weight == 0.5


def test_two_weights_that_disagree_are_refused():
    with pytest.raises(DataError, match=r"messages\[1\] has both weight \(0.25\) and loss_weight \(0.5\)"):
        read(USER, ASSISTANT | {"weight": 0.25, "loss_weight": 0.5})


@pytest.mark.parametrize(
    "turn", [USER | {"content": [{"type": ["image"], "image": "a.png"}]}, ASSISTANT | {"weight": 10**400}]
)
def test_strange_json_is_refused_by_name(turn):
    with pytest.raises(DataError, match=r"train.jsonl:7: messages\[1\]\.(content\[0\]\.type|weight) is"):
        read(USER, turn)
