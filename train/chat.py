"""`ernie chat`: a conversation in the terminal, with pictures, videos and tools.

ernie chat checkpoint=runs/digits
ernie chat checkpoint=runs/zoom agent.tools=[image_zoom_in_tool]
printf '/image digit.png\nWhich digit?\n' | ernie chat checkpoint=runs/digits        one line, one question

Lines that begin with / are commands; /help lists them. Ctrl-C stops the answer, Ctrl-D ends the program. With input
from a pipe nothing is asked for; the exit code is 1 when a line could not be honoured.
"""

import asyncio
import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from PIL import Image
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.status import Status as Spinner

from data.media import save_media
from ernie_model.chat import ChatError
from ernie_model.images import MediaError, load_image
from ernie_model.inference.agent import Agent, AgentEvent, Episode, EventKind, Status
from ernie_model.inference.async_engine import AsyncEngine
from ernie_model.inference.request import EngineFull, RequestError
from train.agents import open_agent
from train.compose import to_typed
from train.inference_config import ChatConfig
from train.run import program
from train.served import open_engine, open_model

HELP = """\
/image PATH      show a picture with the next question
/video PATH      show a video with the next question
/think           the thoughts behind the last answer
/thinking        let the model think before it answers, or stop that
/reset           begin anew
/save FILE       append the conversation to a .jsonl file for data=files
/help            this list
/quit            leave; Ctrl-D too. Ctrl-C stops an answer
A line that ends in \\ goes on in the next one; //word says /word to the model."""
SHOWN_CHARS = 300
"""Of a tool's call or result."""
LONGEST_WORD = 30
"""Longer ones are shown before they end."""


@program("chat")
def main(cfg: DictConfig) -> None:
    config = to_typed(cfg, ChatConfig)
    console = Console(highlight=False, soft_wrap=True)
    with _busy(console, f"loading {config.checkpoint}"):
        served = open_model(config)
        engine = AsyncEngine(open_engine(config, served))
    with asyncio.Runner() as runner:
        try:
            chat = Chat(open_agent(config, served, engine), console, runner)
            if console.is_terminal:
                tools = ", ".join(chat.agent.toolbox.tools) or "none"
                console.print(f"[dim]{escape(config.checkpoint)}, tools: {escape(tools)}. /help lists the commands.[/]")
            honoured = chat.talk(Lines(typed=sys.stdin.isatty() and console.is_terminal))
        finally:
            runner.run(engine.close(drain=False))
    sys.exit(0 if honoured else 1)


class Chat:
    """One conversation.

    Args:
        runner: every answer runs in it; Ctrl-C there cancels the answer alone.
    """

    def __init__(self, agent: Agent, console: Console, runner: asyncio.Runner):
        self.agent, self.console, self.runner = agent, console, runner
        self.thinking = agent.thinking
        self.messages: list[dict[str, Any]] = []
        self.pending: list[dict[str, Any]] = []
        """Pictures and videos of the next question."""
        self.thoughts: list[str] = []
        self.leaving = False

    def talk(self, lines: Iterator[str]) -> bool:
        """Until the lines end. False: one of them could not be honoured."""
        honoured = True
        while not self.leaving:
            try:
                line = next(lines, None)
            except KeyboardInterrupt:
                self.console.print("\n[dim]Ctrl-D leaves.[/]")
                continue
            if line is None:
                break
            try:
                self.take(line)
            except (Refused, ChatError, MediaError, RequestError, EngineFull, OSError) as error:
                honoured = False
                self.console.print(f"[red]{escape(str(error) or type(error).__name__)}[/]")
        return honoured

    def take(self, line: str) -> None:
        """A command, or a question."""
        if not line.strip():
            return
        if not line.startswith("/") or line.startswith("//"):
            self.ask(line.removeprefix("/") if line.startswith("//") else line)
            return
        word, _, rest = line.partition(" ")
        command = self.commands.get(word)
        if command is None:
            raise Refused(f"there is no command {word}. /help lists them; //{word[1:]} says it to the model.")
        command(self, rest.strip())

    # -------------------------------------------------------------------------------------------------------- answers

    def ask(self, text: str) -> None:
        """Put a question and show its answer as it is written."""
        content = [*self.pending, {"type": "text", "text": text}] if self.pending else text
        question = {"role": "user", "content": content}
        view = _View(self.console, self._count)
        try:
            with view:
                run = self.agent.run([*self.messages, question], thinking=self.thinking, on_event=view)
                episode = self.runner.run(run)
        except (ChatError, MediaError, RequestError):
            self.pending = []  # they would be refused again with the next question
            raise
        except KeyboardInterrupt:
            self.console.print("[dim](stopped)[/]")
            self._remember(question, [{"role": "assistant", "content": view.content}], view.thoughts)
            return
        if episode.status is Status.BLOCKED:
            self.console.print(f"[dim](withheld: {escape(str(episode.error))})[/]")
            return
        if episode.status is Status.ANSWERED and not episode.answer.strip():
            self.console.print("[dim](an empty answer)[/]")
        elif episode.status is not Status.ANSWERED:
            self.console.print(f"[dim]({escape(f'{episode.status.value}: {episode.error}')})[/]")
        self._remember(question, _without_open_calls(episode), view.thoughts)

    def _remember(self, question: dict[str, Any], answer: list[dict[str, Any]], thoughts: list[str]) -> None:
        self.messages += [question, *answer]
        self.thoughts = thoughts
        self.pending = []

    def _count(self, text: str) -> int:
        return len(self.agent.processor.tokenizer.encode_plain(text)[0])

    # ------------------------------------------------------------------------------------------------------- commands

    def image(self, path: str) -> None:
        picture = load_image(Path(_needed(path, "/image PATH")).expanduser())
        picture.filename = path  # type: ignore[attr-defined]  # what errors call it
        self.pending.append({"type": "image", "image": picture})
        self._note(f"picture {self._number('image')}: {picture.width} x {picture.height}")

    def video(self, path: str) -> None:
        file = Path(_needed(path, "/video PATH")).expanduser()
        if not file.is_file():
            raise MediaError(str(file), "there is no such file.")
        self.pending.append({"type": "video", "video": str(file)})
        self._note(f"video {self._number('video')}: {file.name}")

    def _number(self, kind: str) -> int:
        """Of the last one of this kind, counted over the conversation as the model's labels are."""
        contents = [message["content"] for message in self.messages if not isinstance(message["content"], str)]
        return sum(part["type"] == kind for content in [*contents, self.pending] for part in content)

    def think(self, _: str) -> None:
        for thought in self.thoughts or ["the last answer has no thoughts"]:
            self.console.print(thought.strip(), style="dim italic", markup=False)

    def switch_thinking(self, _: str) -> None:
        if not self.agent.processor.chat.think:
            raise Refused("this model's chat format has no thinking mode.")
        self.thinking = not self.thinking
        self._note(f"thinking is {'on' if self.thinking else 'off'}")

    def reset(self, _: str) -> None:
        self.messages, self.pending, self.thoughts = [], [], []
        self._note("a new conversation")

    def save(self, path: str) -> None:
        """Append a record of data/formats/messages.py."""
        file = Path(_needed(path, "/save FILE")).expanduser()
        if not self.messages:
            raise Refused("there is nothing to save yet.")
        file.parent.mkdir(parents=True, exist_ok=True)
        before = file.read_text("utf-8") if file.exists() else ""
        gap = "\n" if before and not before.endswith("\n") else ""
        number = (before + gap).count("\n") + 1
        record: dict[str, Any] = {"id": f"{file.stem}-{number}"}
        if definitions := self.agent.toolbox.definitions():
            record["tools"] = definitions
        names = (f"{file.stem}_media/{number}-{picture}.png" for picture in range(1, sys.maxsize))
        record["messages"] = [_on_disk(message, file.parent, lambda: next(names)) for message in self.messages]
        with file.open("a", encoding="utf-8") as out:
            out.write(gap + json.dumps(record, ensure_ascii=False) + "\n")
        self._note(f"saved as line {number} of {file}")

    def help(self, _: str) -> None:
        self.console.print(HELP, markup=False)

    def quit(self, _: str) -> None:
        self.leaving = True

    def _note(self, text: str) -> None:
        self.console.print(f"[dim]{escape(text)}[/]")

    commands: dict[str, Callable[["Chat", str], None]] = {
        "/image": image,
        "/video": video,
        "/think": think,
        "/thinking": switch_thinking,
        "/reset": reset,
        "/save": save,
        "/help": help,
        "/quit": quit,
    }


class Refused(Exception):
    """A line that cannot be honoured; the message says why."""


class _View:
    """One answer on the screen, as it is written."""

    def __init__(self, console: Console, count: Callable[[str], int]):
        self.console, self.count = console, count
        self._page = Page(console)
        self.thoughts: list[str] = []
        self.content = ""
        """Of the turn being written."""
        self._thought = ""
        self._pieces = 0
        self._begun = False
        self._spinner: Spinner | None = None

    def __enter__(self) -> "_View":
        self._spin("reading")
        return self

    def __exit__(self, *_: object) -> None:
        self._fold()
        self._stop_spinning()
        self._end_line()

    def __call__(self, event: AgentEvent) -> None:
        if event.kind is EventKind.REASONING:
            self._thought += event.text
            self._pieces += 1
            self._spin(f"thinking, {self._pieces} tokens")
            return
        self._fold()
        self._stop_spinning()
        if event.kind is EventKind.CONTENT:
            text = event.text if self._begun else event.text.lstrip("\n")
            self._begun = self._begun or bool(text)
            self.content += text
            self._page.write(text)
        elif event.kind is EventKind.CALL and event.call is not None:
            self._end_line()
            self.console.print(f"[cyan]-> {escape(event.call.name)}[/] [dim]{escape(_short(event.call.arguments))}[/]")
        elif event.kind is EventKind.RESULT and event.result is not None:
            self._end_line()
            style = "red" if event.result.error else "dim"
            for part in event.result.parts:
                shown = f"picture {part.width} x {part.height}" if isinstance(part, Image.Image) else _short(part)
                self.console.print(f"[{style}]<- {escape(shown)}[/]")
            self.content = ""
            self._spin("reading")

    def _fold(self) -> None:
        """A finished thought becomes one line."""
        if not self._thought.strip():
            return
        self.thoughts.append(self._thought)
        self._stop_spinning()
        self.console.print(f"[dim](thought, {self.count(self._thought)} tokens; /think shows it)[/]")
        self._thought, self._pieces = "", 0

    def _end_line(self) -> None:
        self._page.finish()
        self._begun = False

    def _spin(self, text: str) -> None:
        if not self.console.is_terminal:
            return
        if self._spinner is None:
            self._spinner = self.console.status(f"[dim]{text}[/]")
            self._spinner.start()
        else:
            self._spinner.update(f"[dim]{text}[/]")

    def _stop_spinning(self) -> None:
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None


class Page:
    """Text that comes in pieces, with lines broken between words where it is read on a terminal."""

    def __init__(self, console: Console):
        self.console = console
        self.column = 0
        self._word = ""

    def write(self, text: str) -> None:
        if not self.console.is_terminal:
            self._put(text)
            self.column = 0 if text.endswith("\n") else self.column + len(text)
            return
        for character in text:
            if character.isspace():
                self._put_word()
                if character == "\n" or self.column < self.console.width:
                    self._put(character)
                self.column = 0 if character == "\n" else self.column + 1
            else:
                self._word += character
                if cell_len(self._word) > LONGEST_WORD or cell_len(character) > 1:  # scripts without spaces
                    self._put_word()

    def finish(self) -> None:
        """End the line that was begun."""
        self._put_word()
        if self.column:
            self._put("\n")
        self.column = 0

    def _put_word(self) -> None:
        length = cell_len(self._word)
        if self.column and self.column + length > self.console.width:
            self._put("\n")
            self.column = 0
        self._put(self._word)
        self.column += length
        self._word = ""

    def _put(self, text: str) -> None:
        if text:
            self.console.print(text, end="", markup=False)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}... ({len(text):,} characters)"


def _without_open_calls(episode: Episode) -> list[dict[str, Any]]:
    """The episode's messages; calls that were never run are left out of the last."""
    messages = episode.messages
    if messages and messages[-1]["role"] == "assistant":
        messages[-1].pop("tool_calls", None)
    return messages


def _on_disk(message: dict[str, Any], folder: Path, name: Callable[[], str]) -> dict[str, Any]:
    """The message with its pictures as files of `folder`."""
    if isinstance(message["content"], str):
        return message
    parts = []
    for part in message["content"]:
        if part["type"] == "image":
            parts.append({"type": "image", "image": save_media(folder, name(), _png(part["image"]))})
        elif part["type"] == "video":
            parts.append(part | {"video": str(Path(part["video"]).resolve())})
        else:
            parts.append(part)
    return message | {"content": parts}


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def _needed(text: str, usage: str) -> str:
    if not text:
        raise Refused(f"usage: {usage}")
    return text.strip("'\"")


@contextlib.contextmanager
def _busy(console: Console, text: str) -> Iterator[None]:
    if console.is_terminal:
        with console.status(f"[dim]{escape(text)}[/]"):
            yield
    else:
        yield


class Lines:
    """What is typed, or comes through a pipe; a line that ends in \\ goes on in the next one.

    Raises KeyboardInterrupt where Ctrl-C is pressed, and may be asked for the next line after that.
    """

    def __init__(self, *, typed: bool):
        self.typed = typed
        if typed:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # arrow keys and history of `input`

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        lines: list[str] = []
        while True:
            line = self._read("  " if lines else "> ")
            if line is None and not lines:
                raise StopIteration
            if line is not None:
                lines.append(line.removesuffix("\\"))
            if line is None or not line.endswith("\\"):
                return "\n".join(lines)

    def _read(self, prompt: str) -> str | None:
        if not self.typed:
            line = sys.stdin.readline()
            return line.rstrip("\n") if line else None
        try:
            return input(prompt)
        except EOFError:
            print()
            return None


if __name__ == "__main__":
    main()
