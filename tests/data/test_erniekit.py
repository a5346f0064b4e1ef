"""ERNIEKit's four forms, by example: read, and written as they were."""

import dataclasses

import pytest

from data import formats
from data.conversation import Conversation, Message, Part, PartKind, Source, ToolCall, VideoSampling
from data.errors import DataError
from data.records import Record

HERE = Source("train.jsonl", 7)
ERNIEKIT = formats.by_name("erniekit")

TEXT = {
    "system": "You answer briefly.",
    "src": ["Capital of Norway?", "And of Kenya?"],
    "tgt": ["Oslo.", "Nairobi."],
    "label": [0, 1],
}
PAIR = {
    "src": ["Hi", "Is a whale a fish?"],
    "tgt": ["Hello."],
    "response": [["No, it is a mammal."], ["Yes."]],
    "sort": [1, 0],
}
IMAGES = {
    "image_info": [
        {"matched_text_index": 0, "image_url": "img/till_1.png"},
        {"matched_text_index": 2, "image_url": "img/till_2.png"},
    ],
    "text_info": [
        {"text": "What is the total?", "tag": "mask"},
        {"text": "18.40", "tag": "no_mask"},
        {"text": "And on this one?", "tag": "mask"},
        {"text": "7.95", "tag": "no_mask"},
    ],
}
SYSTEM = {
    "is_system": 1,
    "text_info": [
        {"text": "You read receipts.", "tag": "mask"},
        {"text": "OK", "tag": "no_mask"},
        {"text": "Total?", "tag": "mask"},
        {"text": "<think>Last line.</think>18.40", "tag": "no_mask"},
    ],
    "image_info": [{"matched_text_index": 2, "image_url": "img/till_1.png"}],
}
VIDEO = {
    "video_info": [{"matched_text_index": 0, "image_url": "vid/door.mp4"}],
    "text_info": [
        {"text": "When does the door open?", "tag": "mask"},
        {"text": "At 00:07.", "tag": "no_mask"},
    ],
}
ZOOM = {
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "image_zoom_in_tool",
                "parameters": {
                    "type": "object",
                    "properties": {"bbox_2d": {"type": "array"}, "index": {"type": "integer"}},
                },
            },
        }
    ],
    "image_info": [
        {"matched_text_index": 0, "image_url": "img/shelf.png"},
        {"matched_text_index": 2, "image_url": "img/shelf_crop.png"},
    ],
    "text_info": [
        {"text": "Price of the tea?", "tag": "mask"},
        {
            "text": "<think>Too small.</think>",
            "tag": "no_mask",
            "tool_calls": [
                {"name": "image_zoom_in_tool", "arguments": '{"bbox_2d": [410, 520, 560, 610], "index": 0}'}
            ],
        },
        {"text": "", "tag": "mask", "tool_response": True},
        {"text": "3.20", "tag": "no_mask"},
    ],
}
CALLS = {
    "messages": [
        {"role": "user", "content": "Weather in Bergen?"},
        {
            "role": "assistant",
            "content": "<think>Call it.</think>",
            "tool_calls": [
                {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Bergen"}'}}
            ],
        },
        {"role": "tool", "content": "rain, 8 C"},
        {"role": "assistant", "content": "Rain, 8 degrees."},
    ],
    "tools": [],
}
EXAMPLES = dict(text=TEXT, pair=PAIR, images=IMAGES, system=SYSTEM, video=VIDEO, zoom=ZOOM, calls=CALLS)


def read(value):
    return ERNIEKIT.read(Record(value, HERE))


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_record_is_written_as_it_was_read(name):
    assert ERNIEKIT.write(read(EXAMPLES[name])) == EXAMPLES[name]


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_record_is_recognised(name):
    """The messages form is OpenAI's, and needs no other reader."""
    assert formats.recognise(Record(EXAMPLES[name], HERE)).name == ("messages" if name == "calls" else "erniekit")


def test_text():
    conversation = read(TEXT)

    assert [(m.role, m.text, m.train) for m in conversation.messages] == [
        ("system", "You answer briefly.", None),
        ("user", "Capital of Norway?", None),
        ("assistant", "Oslo.", False),
        ("user", "And of Kenya?", None),
        ("assistant", "Nairobi.", None),
    ]
    assert conversation.id == "train.jsonl:7"


def test_one_turn_needs_no_lists():
    assert read({"src": "Hi", "tgt": "Hello."}) == read({"src": ["Hi"], "tgt": ["Hello."]})


def test_a_pair_by_its_sort():
    pair = read({**PAIR, "sort": [0, 1]})

    assert [m.text for m in pair.prompt.messages] == ["Hi", "Hello.", "Is a whale a fish?"]
    assert (pair.chosen[0].text, pair.rejected[0].text) == ("Yes.", "No, it is a mammal.")


def test_of_several_answers_the_best_and_the_worst():
    pair = read({**PAIR, "response": [["a"], ["b"], ["c"], ["d"]], "sort": [2, 7, -1, 7]})

    assert (pair.chosen[0].text, pair.rejected[0].text) == ("b", "c")
    assert pair.scores == (7.0, -1.0)
    assert read(PAIR).scores == (None, None)


def test_scores_are_kept_as_sort_or_as_a_note():
    cases = (((3.5, 1.0), [3.5, 1.0], False), ((1.0, 0.0), [1.0, 0.0], True), ((1.0, 2.0), [1, 0], True))
    for scores, sort, noted in cases:
        pair = dataclasses.replace(read(PAIR), chosen_score=scores[0], rejected_score=scores[1])
        value = ERNIEKIT.write(pair)
        assert value["sort"] == sort and ("ernie" in value) == noted
        assert read(value) == pair


def test_answers_of_several_turns():
    pair = read({**PAIR, "response": [["No.", "Sure?", "Yes."], ["Yes."]]})

    assert [(m.role, m.text) for m in pair.chosen] == [("assistant", "No."), ("user", "Sure?"), ("assistant", "Yes.")]


def test_media_stand_before_their_text():
    first, second = read(IMAGES).messages[0], read(IMAGES).messages[2]

    assert first.parts == (Part.of_image("img/till_1.png"), Part.of_text("What is the total?"))
    assert second.parts[0].media == "img/till_2.png"
    assert read(VIDEO).messages[0].parts[0].kind is PartKind.VIDEO


def test_the_answer_that_fills_a_place_is_not_shown():
    conversation = read(SYSTEM)

    assert [(m.role, m.text) for m in conversation.messages] == [
        ("system", "You read receipts."),
        ("user", "Total?"),
        ("assistant", "18.40"),
    ]
    assert conversation.messages[2].reasoning == "Last line."
    texts = [SYSTEM["text_info"][0], {"text": "Sure.", "tag": "no_mask"}, *SYSTEM["text_info"][2:]]
    kept = ERNIEKIT.write(read({**SYSTEM, "text_info": texts}))
    assert kept["text_info"] == texts  # another filler than OK is not forgotten


def test_a_tool_that_returns_an_image():
    _, call, result, _ = read(ZOOM).messages

    assert call.tool_calls == (ToolCall("image_zoom_in_tool", {"bbox_2d": [410, 520, 560, 610], "index": 0}),)
    assert (call.reasoning, call.parts) == ("Too small.", ())
    assert (result.role, result.parts) == ("tool", (Part.of_image("img/shelf_crop.png"),))


def test_what_has_no_words_becomes_a_note():
    """The text is ERNIEKit's; what it does not know stands beside it, for us."""
    clip = Part.of_video("a.mp4", VideoSampling(fps=1, end_s=3))
    conversation = Conversation(
        id="door",
        messages=(
            Message(role="user", parts=(clip, Part.of_text("Open?")), name="Ada"),
            Message(role="assistant", parts=(Part.of_text("Yes."),), weight=0.5, train=True),
        ),
        answer="yes",
        label=True,
        extra={"split": "a"},
        source=HERE,
    )

    value = ERNIEKIT.write(conversation)

    assert value == {
        "id": "door",
        "answer": "yes",
        "extra": {"split": "a"},
        "video_info": [{"matched_text_index": 0, "image_url": "a.mp4"}],
        "text_info": [{"text": "Open?", "tag": "mask"}, {"text": "Yes.", "tag": "no_mask"}],
        "ernie": {
            "label": True,
            "messages": {
                "0": {"name": "Ada", "sampling": {"0": {"fps": 1, "end_s": 3}}},
                "1": {"weight": 0.5, "train": True},
            },
        },
    }
    assert read(value) == conversation


def test_notes_are_never_dropped_in_silence():
    value = {**CALLS, "ernie": {"messages": {"3": {"train": False}}}}

    assert formats.recognise(Record(value, HERE)).read(Record(value, HERE)).messages[3].train is False
    with pytest.raises(DataError, match="notes under `ernie`, which belong to data.format=erniekit"):
        formats.by_name("messages").read(Record(value, HERE))


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (["user", "user", "assistant"], "is a user's after a user's; with images or videos, somebody must answer"),
        (["user", "assistant", "system", "assistant"], "its system text comes first"),
    ],
)
def test_what_erniekit_would_show_otherwise_is_refused(messages, said):
    parts = {"user": (Part.of_image("a.png"), Part.of_text("x"))}
    turns = tuple(Message(role=role, parts=parts.get(role, (Part.of_text("y"),))) for role in messages)

    with pytest.raises(DataError, match=f"record 'a' cannot be written for ERNIEKit: messages.*{said}"):
        ERNIEKIT.write(Conversation(id="a", messages=turns))


def test_an_image_behind_the_text_is_refused():
    turn = Message(role="user", parts=(Part.of_text("x"), Part.of_image("a.png")))
    with pytest.raises(DataError, match="it shows images first, then videos, then the text"):
        ERNIEKIT.write(Conversation(id="a", messages=(turn,)))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({**TEXT, "tgt": ["a", "b", "c"]}, "src has 2 texts and tgt 3"),
        ({**TEXT, "label": [1]}, r"label is \[1\]; it must be 2 times 0 or 1"),
        ({**PAIR, "sort": [1, 1]}, r"response has 2 answers and sort is \[1, 1\]"),
        ({**PAIR, "sort": [1, "0"]}, r"response has 2 answers and sort is \[1, \"0\"\]"),
        ({**PAIR, "sort": [2, 1, 0]}, r"response has 2 answers and sort is \[2, 1, 0\]"),
        ({**PAIR, "response": [["a"]]}, "response has 1 answers"),
        ({**PAIR, "tgt": ["a", "b"]}, "tgt already answers every text"),
        ({"text_info": []}, "text_info is empty"),
        (
            {"text_info": [{"text": "a", "tag": "masked"}]},
            r'text_info\[0\].tag is "masked"; it must be mask or',
        ),
        ({"text_info": [{"text": "a", "tag": "mask"}] * 2}, r"text_info\[1\] has the tag 'mask', as the text before"),
        ({"text_info": [{"text": "a", "tag": "mask", "x": 1}]}, r"text_info\[0\] has 'x', which has no meaning"),
        (
            {**IMAGES, "image_info": [{"matched_text_index": 4, "image_url": "a"}]},
            r"image_info\[0\].matched_text_index is 4; it must be the number of a text, 0 to 3",
        ),
        (
            {**IMAGES, "image_info": [{"matched_text_index": 1, "image_url": "a"}]},
            r"text_info\[1\] has an image or video before it, but its tag is no_mask",
        ),
        ({**IMAGES, "ernie": {"messages": {"9": {}}}}, "ernie.messages.9: there is no message of this number"),
        ({**IMAGES, "ernie": {"x": 1}}, "ernie has 'x', which has no meaning"),
        ({"src": ["a"], "tgt": ["<think>b"]}, r"tgt\[0\] begins with <think>, but there is no </think>"),
    ],
)
def test_what_is_refused_is_named(value, said):
    with pytest.raises(DataError, match=f"^train.jsonl:7: .*{said}"):
        read(value)
