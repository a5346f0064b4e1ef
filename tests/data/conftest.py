"""A processor small enough to follow by hand, and conversations for it.

Every character is a token (its code point), a picture is four: `[**]` with 16 patches. A turn is `u<text>` or
`a<text>$`; the assistant writes the text and the `$`.
"""

import io
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from data.conversation import Conversation, Message, Part
from data.dataset import ListDataset
from ernie_model.images import ImageSize, KnownGrid
from ernie_model.processor import Processor
from tests.tiny import tiny_processor


class LetterProcessor:
    """Stands in for ernie_model.processor.Processor. Counts what it encodes."""

    begin_id = ord("^")

    def __init__(self):
        self.encoded: list[str] = []
        """With pixels."""

    def encode(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Any = None,
        thinking: Any = None,
        every_turn: bool = False,
        written_from: int | None = None,
    ) -> Any:
        tokens: list[int] = []
        spans: list[Any] = []
        patches: list[torch.Tensor] = []
        grids: list[tuple[int, int, int]] = []
        measuring = False

        def write(text: str, message: int, generated: bool) -> None:
            spans.append(
                SimpleNamespace(
                    start=len(tokens),
                    stop=len(tokens) + len(text),
                    message=message,
                    generated=generated,
                    prompted=every_turn
                    or message == len(messages) - 1
                    or (written_from is not None and message >= written_from),
                )
            )
            tokens.extend(map(ord, text))

        for index, message in enumerate(messages):
            write(message["role"][0], index, False)
            content = message["content"]
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part["type"] == "text":
                    write(part["text"], index, message["role"] == "assistant")
                else:
                    write("[**]", index, False)
                    grids.append((1, 4, 4))
                    if isinstance(part["image"], ImageSize):
                        measuring = True
                    elif not isinstance(part["image"], KnownGrid):
                        patches.append(torch.full((16, 3), float(len(patches) + 1)))
            if message["role"] == "assistant":
                write("$", index, True)
        if not measuring:
            self.encoded.append("".join(map(chr, tokens)))
        return SimpleNamespace(
            token_T=torch.tensor(tokens),
            position_3T=torch.arange(len(tokens)).expand(3, -1),
            patch_PX=torch.cat(patches) if patches else None,
            grids=tuple(grids),
            spans=tuple(spans),
        )


@pytest.fixture
def processor() -> LetterProcessor:
    return LetterProcessor()


@pytest.fixture
def talk() -> Callable[..., Conversation]:
    """talk("id", "question", "answer", ...): user and assistant take turns."""

    def make(id: str, *texts: str, **of_assistant: Any) -> Conversation:
        messages = [
            Message(role="assistant", parts=(Part.of_text(text),), **of_assistant)
            if index % 2
            else Message(role="user", parts=(Part.of_text(text),))
            for index, text in enumerate(texts)
        ]
        return Conversation(id=id, messages=tuple(messages))

    return make


@pytest.fixture
def sized(talk: Callable[..., Conversation]) -> Callable[..., ListDataset]:
    """sized(5, 7, ...): a dataset whose conversation i has that many tokens under `LetterProcessor` (at least 4)."""

    def make(*lengths: int) -> ListDataset:
        # u + question + a + 1 letter + $
        return ListDataset("test", [talk(str(i), "q" * (length - 4), "x") for i, length in enumerate(lengths)])

    return make


@pytest.fixture
def png() -> bytes:
    """An 8 x 8 grey picture as a PNG file."""
    file = io.BytesIO()
    Image.new("L", (8, 8), 128).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def real_processor() -> Processor:
    return tiny_processor()
