"""`ernie chat`: commands, what is shown, what is remembered; with answers that are written beforehand."""

import asyncio
import io
import json
import os
import signal
import sys
import threading

import pytest
from PIL import Image
from rich.console import Console

from data.conversation import Source
from data.formats import messages as messages_format
from data.records import Record
from ernie_model.inference.agent import Agent, Limits
from ernie_model.inference.moderation import ListFilter, Moderation
from ernie_model.inference.tools import ToolBox, tool_from_function, zoom_tool
from ernie_model.processor import Processor
from tests import programs
from tests.ernie_model.inference.scripted import ScriptedEngine
from tests.tiny import SPARSE, save_tiny, tiny_processor
from train.chat import Chat, Lines, Page

ZOOM = '<tool_call>\n{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [0, 0, 500, 500]}}\n</tool_call>\n'


@pytest.fixture(scope="module")
def processor() -> Processor:
    return tiny_processor(SPARSE)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "big picture.png"
    Image.new("RGB", (224, 112), "red").save(path)
    return path


class Talk:
    """A chat that was held, line by line."""

    def __init__(self, processor, lines, *replies, pause_s=0.0, **agent):
        self.engine = ScriptedEngine(processor.tokenizer, replies, pause_s)
        self.file = io.StringIO()
        console = Console(file=self.file, highlight=False, soft_wrap=True)
        tools = agent.pop("toolbox", ToolBox([zoom_tool()]))
        with asyncio.Runner() as runner:
            self.chat = Chat(Agent(self.engine, processor, tools, **agent), console, runner)
            self.honoured = self.chat.talk(iter(lines))
        self.shown = self.file.getvalue()

    def prompt(self, processor, number: int = -1) -> str:
        text = processor.decode(self.engine.prompts[number].token_ids)
        return text[text.index("User: ") :].replace("<|IMAGE_PLACEHOLDER|>", "")


def test_questions_and_answers(processor):
    talk = Talk(processor, ["Hi", "", "And?"], "Hello [bold]you[/].", "Bye.")
    assert talk.honoured and talk.shown == "Hello [bold]you[/].\nBye.\n", "what a model writes is no markup"
    assert talk.prompt(processor) == (
        "User: Hi\nAssistant: Hello [bold]you[/].<|end_of_sentence|>User: And?\nAssistant: <think>\n\n</think>\n\n"
    )


def test_a_picture_a_tool_and_folded_thoughts(processor, picture):
    talk = Talk(
        processor,
        [f"/image {picture}", "What is it?", "/think"],
        f"\nToo small.\n</think>\n\n{ZOOM}",
        "\nNow I see.\n</think>\n\nRed.",
        thinking=True,
    )
    lines = talk.shown.splitlines()
    assert lines[0] == "picture 1: 224 x 112"
    assert lines[1].startswith("(thought, ") and lines[1].endswith(" tokens; /think shows it)")
    assert lines[2] == '-> image_zoom_in_tool {"bbox_2d": [0, 0, 500, 500]}'
    assert lines[3] == "<- picture 112 x 56"
    assert lines[4].startswith("(thought, ") and lines[5] == "Red."
    assert lines[6:] == ["Too small.", "Now I see."]
    assert "Picture 1:<|IMAGE_START|><|IMAGE_END|>What is it?" in talk.prompt(processor)
    assert len(talk.engine.prompts[1].media) == 2


def test_pictures_are_counted_over_the_conversation_and_shown_once(processor, picture):
    talk = Talk(processor, [f"/image {picture}", "A?", f"/image '{picture}'", "B?", "C?"], ZOOM, "a", "b", "c")
    assert "picture 1: 224 x 112" in talk.shown and "picture 3: 224 x 112" in talk.shown, "the crop was the second"
    assert [len(prompt.media) for prompt in talk.engine.prompts] == [1, 2, 3, 3]
    assert "Picture 3:<|IMAGE_START|><|IMAGE_END|>B?" in talk.prompt(processor)


@pytest.mark.parametrize(
    "line, problem",
    [
        ("/imgae x.png", "there is no command /imgae. /help lists them; //imgae says it to the model."),
        ("/image", "usage: /image PATH"),
        ("/image nowhere.png", "nowhere.png: there is no such file."),
        ("/video nowhere.mp4", "nowhere.mp4: there is no such file."),
        ("/save", "usage: /save FILE"),
        ("/save chat.jsonl", "there is nothing to save yet."),
    ],
)
def test_mistakes_are_told_and_the_chat_goes_on(processor, line, problem):
    talk = Talk(processor, [line, "Hi"], "Hello.")
    assert not talk.honoured and talk.shown == f"{problem}\nHello.\n"


def test_a_video_that_is_none_is_told_and_does_not_stay(processor, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"none")
    talk = Talk(processor, [f"/video {tmp_path}/a.mp4", "What?", "Hi"], "Hello.")
    first, second, third = talk.shown.splitlines()
    assert not talk.honoured and first == "video 1: a.mp4" and "a.mp4: " in second and third == "Hello."


def test_commands(processor):
    talk = Talk(processor, ["Hi", "/reset", "/think", "/help", "//help", "/quit", "never said"], "A.", "B.")
    assert "a new conversation\nthe last answer has no thoughts\n/image PATH" in talk.shown
    assert talk.prompt(processor) == "User: /help\nAssistant: <think>\n\n</think>\n\n"
    assert len(talk.engine.prompts) == 2


def test_thinking_is_switched(processor):
    talk = Talk(processor, ["/thinking", "Hi"], "\nHm.\n</think>\n\nHello.")
    assert talk.shown.startswith("thinking is on\n(thought, ") and talk.shown.endswith("\nHello.\n")
    assert talk.prompt(processor).endswith("Assistant: <think>")


def test_what_ends_an_answer_is_told(processor):
    talk = Talk(processor, ["Hi", "Again"], ZOOM, "Sorry.", limits=Limits(max_turns=1))
    assert "(turn_limit: turn 1 is the last that agent.max_turns allows, and calls tools.)" in talk.shown
    assert "<tool_call>" not in talk.prompt(processor).partition("Assistant:")[2], (
        "a call that nobody ran is no history"
    )
    talk = Talk(processor, ["secret", "Hi"], "Hello.", moderation=Moderation(input=(ListFilter(["secret"]),)))
    assert talk.shown == "(withheld: input: the phrase 'secret')\nHello.\n"
    assert "secret" not in talk.prompt(processor)


def test_an_empty_answer_is_told(processor):
    talk = Talk(processor, ["Hi"], "\nHm.\n", thinking=True)
    first, second = talk.shown.splitlines()
    assert first.startswith("(thought, ") and second == "(an empty answer)"


def test_an_error_of_a_tool_is_shown(processor):
    schema = {"type": "object", "properties": {}}
    broken = tool_from_function(lambda: 1 / 0, schema, name="f", description="It.")
    reply = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n'
    talk = Talk(processor, ["Hi"], "Let me see.\n" + reply, "I can't.", toolbox=ToolBox([broken]))
    assert talk.shown == ("Let me see.\n-> f {}\n<- error: f failed: ZeroDivisionError: division by zero\nI can't.\n")


def test_what_is_saved_can_be_trained_on(processor, picture, tmp_path):
    file = tmp_path / "saved" / "chat.jsonl"
    lines = [f"/image {picture}", "What?", f"/save {file}", "And?", f"/save {file}"]
    talk = Talk(
        processor,
        lines,
        f"\nHm.\n</think>\n\n{ZOOM}",
        "\nAh.\n</think>\n\nRed.",
        "\nSo.\n</think>\n\nYes.",
        thinking=True,
    )
    assert talk.honoured, talk.shown
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["id"] for record in records] == ["chat-1", "chat-2"]
    first, second = (messages_format.read(Record(record, Source(str(file), 1))) for record in records)
    assert [message.role for message in first.messages] == ["user", "assistant", "tool", "assistant"]
    assert [message.role for message in second.messages] == [*(m.role for m in first.messages), "user", "assistant"]
    assert first.messages[1].tool_calls[0].arguments == {"bbox_2d": [0, 0, 500, 500]}
    assert first.messages[1].reasoning.strip() == "Hm." and first.tools
    crop = first.messages[2].parts[0].media
    with Image.open(file.parent / crop) as opened:
        assert opened.size == (112, 56)


def test_what_is_saved_begins_a_line(processor, tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text('{"id": "mine"}')  # as an editor may leave it, without an end of its last line
    talk = Talk(processor, ["Hi", f"/save {file}", f"/save {file}"], "a\u2028b")  # no end of a line in JSON Lines
    assert talk.honoured and f"saved as line 3 of {file}" in talk.shown
    assert [json.loads(line)["id"] for line in file.read_text().split("\n")[:-1]] == ["mine", "chat-2", "chat-3"]


@pytest.fixture
def usual_interrupt():
    """Ctrl-C as in a program that has just begun, whatever an earlier test left behind."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before or signal.default_int_handler)  # None: not set by Python


def test_ctrl_c_stops_the_answer_and_not_the_chat(processor, usual_interrupt):
    def press():
        os.kill(os.getpid(), signal.SIGINT)

    class Slow(ScriptedEngine):
        async def stream(self, prompt, params, *, timeout_s=None):
            async for delta in super().stream(prompt, params, timeout_s=timeout_s):
                yield delta
                if len(self.prompts) == 1 and delta.text.strip():
                    threading.Timer(0.05, press).start()
                    await asyncio.sleep(30)

    file = io.StringIO()
    engine = Slow(processor.tokenizer, ["One two three.", "Hello."])
    with asyncio.Runner() as runner:
        chat = Chat(Agent(engine, processor), Console(file=file, highlight=False, soft_wrap=True), runner)
        assert chat.talk(iter(["Count", "Hi"]))
    said = file.getvalue().splitlines()
    assert said[0] and "One two three.".startswith(said[0]) and said[1:] == ["(stopped)", "Hello."]
    assert chat.messages[1] == {"role": "assistant", "content": said[0]}
    assert engine.running == 0


@pytest.mark.parametrize(
    "text, width, lines",
    [
        ("one two three", 9, ["one two ", "three"]),
        ("one two three", 8, ["one two ", "three"]),
        ("one two three", 7, ["one two", "three"]),  # the space at the edge is left out
        ("one\n\n  two", 20, ["one", "", "  two"]),
        ("x" * 70, 30, ["x" * 30, "x" * 30, "x" * 10]),
        ("日本語の文", 4, ["日本", "語の", "文"]),
        ("", 9, []),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_lines_break_between_words(text, width, lines, size):
    file = io.StringIO()
    page = Page(Console(file=file, width=width, force_terminal=True, color_system=None, soft_wrap=True))
    for at in range(0, len(text), size):
        page.write(text[at : at + size])
    page.finish()
    shown = file.getvalue()
    if "x" * 31 in text:  # the terminal itself breaks it
        assert shown.replace("\n", "") == text
    else:
        assert shown.splitlines() == lines


def test_lines_of_a_pipe(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb \\\nc\n\nd\\"))
    assert list(Lines(typed=False)) == ["a", "b \nc", "", "d"]


def test_lines_that_are_typed(monkeypatch):
    typed = iter(["a\\", "b", KeyboardInterrupt(), "c", EOFError()])

    def read(prompt):
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    lines = Lines(typed=True)
    assert next(lines) == "a\nb"
    with pytest.raises(KeyboardInterrupt):
        next(lines)
    assert list(lines) == ["c"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_tiny(SPARSE, folder)
    return folder


def test_the_program_answers_what_comes_through_a_pipe(checkpoint, picture):
    """The real engine; weights are random, so what it says is nothing, and how it ends is told."""
    command = ["-m", "train.cli", "chat", f"checkpoint={checkpoint}", "cpu=true", "precision=fp32"]
    settings = ["sampling.max_new_tokens=5", "agent.tools=[image_zoom_in_tool]", "engine.cache_gib=0.1"]
    lines = f"/image {picture}\nWhat is it?\n/nothing\n"
    result = programs.run([*command, *settings], input=lines, timeout=200)
    assert result.returncode == 1 and result.stderr == "", result.stderr
    shown = result.stdout.splitlines()
    assert shown[0] == "picture 1: 224 x 112"
    assert shown[-2] == "(truncated: turn 1 has no room for more tokens.)"
    assert shown[-1].startswith("there is no command /nothing")
