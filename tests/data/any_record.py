"""Conversations and pairs with everything that one may carry, drawn by hypothesis."""

from hypothesis import strategies as st

from data.conversation import Conversation, Message, Pair, Part, Source, ToolCall, VideoSampling

HERE = Source("train.jsonl", 7)

HOSTILE = [
    "<image>", "<video>", "<think>", "<think>a</think>b", "</think>", "<|IMAGE_PLACEHOLDER|>", "<|end_of_sentence|>",
    "<tool_call>", "Picture 1:", "\nAssistant: ", "data:image/png;base64,AAAA", "\n", "{", "é\U0001f600",
]  # fmt: skip
TEXT = st.text(max_size=6) | st.sampled_from(HOSTILE)
NAME = st.text(max_size=4)
PLACE = st.sampled_from(["a.png", "data/b.jpg", "https://example.org/c.png", ""]) | st.binary(max_size=4)
SAMPLING = st.sampled_from(
    [
        None,
        VideoSampling(fps=0.5),
        VideoSampling(num_frames=3),
        VideoSampling(start_s=0.0),
        VideoSampling(fps=2, start_s=1.25, end_s=7),
    ]
)
PART = st.one_of(TEXT.map(Part.of_text), PLACE.map(Part.of_image), st.builds(Part.of_video, PLACE, SAMPLING))
JSON = st.sampled_from([None, True, 3, -0.5, "", "é", [], [1, None], {}, {"a": {"b": [False]}}])
OBJECT = st.dictionaries(NAME, JSON, max_size=2)
CALLS = st.lists(st.builds(ToolCall, NAME, OBJECT, st.none() | NAME), max_size=2).map(tuple)
OTHERS = st.builds(
    Message,
    role=st.sampled_from(["system", "user", "tool"]),
    parts=st.lists(PART, max_size=3).map(tuple),
    tool_call_id=st.none() | NAME,
    name=st.none() | NAME,
    train=st.none() | st.just(False),
    weight=st.just(1.0) | st.sampled_from([0.0, 0.5, 3.25]),
)
ASSISTANT = st.builds(
    Message,
    role=st.just("assistant"),
    parts=st.lists(PART, max_size=2).map(tuple),
    reasoning=st.none() | TEXT,
    tool_calls=CALLS,
    name=st.none() | NAME,
    train=st.none() | st.booleans(),
    weight=st.just(1.0) | st.sampled_from([0.0, 0.5, 3.25]),
)
SHARED = dict(
    id=NAME | st.just(str(HERE)),
    tools=st.lists(OBJECT, max_size=2).map(tuple),
    answer=st.none() | TEXT,
    reward=st.none() | NAME,
    label=st.none() | st.booleans(),
    extra=st.dictionaries(
        NAME | st.sampled_from(["messages", "reward", "label", "extra", "src", "ernie"]), JSON, max_size=2
    ),
    source=st.just(HERE),
)


def messages(last, min_size=0):
    return st.lists(OTHERS | ASSISTANT, min_size=min_size, max_size=3).flatmap(
        lambda before: last.map(lambda message: (*before, message))
    )


CONVERSATIONS = st.builds(Conversation, messages=messages(OTHERS | ASSISTANT), **SHARED)
PROMPTS = st.builds(Conversation, messages=messages(OTHERS), **SHARED)
ANSWERS = st.builds(
    lambda first, between, last: (first, *between, last) if last else (first,),
    ASSISTANT,
    st.lists(OTHERS | ASSISTANT, max_size=1),
    st.none() | ASSISTANT,
)
SCORE = st.none() | st.sampled_from([0.0, 1.0, -2.5, 8.25])
PAIRS = st.builds(Pair, prompt=PROMPTS, chosen=ANSWERS, rejected=ANSWERS, chosen_score=SCORE, rejected_score=SCORE)
ITEMS = CONVERSATIONS | PROMPTS | PAIRS

# What ERNIEKit's forms are for: turns with one text each, media before it, one thought, calls and their results.
SAY = st.text("ab <|", min_size=1, max_size=5).map(Part.of_text)


def _ernie_turn(role, media):
    parts = st.lists(st.builds(Part.of_image, PLACE), max_size=2) if media else st.just([])
    videos = st.lists(st.builds(Part.of_video, PLACE, SAMPLING), max_size=1) if media else st.just([])
    if role == "assistant":
        return st.builds(
            Message,
            role=st.just(role),
            parts=SAY.map(lambda part: (part,)),
            reasoning=st.none() | st.text("ab\n", max_size=4),
            tool_calls=CALLS,
            train=st.none() | st.booleans(),
            weight=st.sampled_from([1.0, 0.0, 0.5]),
        )
    return st.builds(lambda a, b, c: Message(role=role, parts=(*a, *b, c)), parts, videos, SAY)


@st.composite
def ernie_conversations(draw):
    media = draw(st.booleans())
    messages = [Message(role="system", parts=(draw(SAY),))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(draw(_ernie_turn(draw(st.sampled_from(["user", "tool"])), media)))
        messages.append(draw(_ernie_turn("assistant", media)))
    shared = {name: draw(strategy) for name, strategy in SHARED.items()}
    return Conversation(messages=tuple(messages), **shared)
