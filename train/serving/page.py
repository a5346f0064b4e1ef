"""A page to chat with the model that is served: pictures in, thoughts folded, boxes drawn on the picture.

The page asks the server's own service, so what holds for other clients holds for it: the limits, the queue, the numbers
of /metrics. With keys, it asks for one.
"""

import base64
import hmac
import math
import mimetypes
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before it is imported: it would tell its makers

import gradio as gr  # noqa: E402
from fastapi import FastAPI  # noqa: E402
from gradio.themes import Default  # noqa: E402
from PIL import Image  # noqa: E402
from pydantic import ValidationError  # noqa: E402

from ernie_model.images import MediaError, load_image  # noqa: E402
from ernie_model.inference.grounding import draw, parse_grounding  # noqa: E402
from ernie_model.inference.server.answers import Answer  # noqa: E402
from ernie_model.inference.server.errors import ApiError  # noqa: E402
from ernie_model.inference.server.gate import Busy  # noqa: E402
from ernie_model.inference.server.protocol import ChatRequest  # noqa: E402
from ernie_model.inference.server.service import Lagging, Service  # noqa: E402
from ernie_model.inference.server.steps import StepDelta  # noqa: E402

PATH = "/ui"
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
VIDEOS = (".mp4", ".webm", ".avi", ".mov", ".mkv")
KEPT_S = 3600
"""Uploads are deleted after an hour."""

DRAWN_ON = 448
"""The longer side, in pixels, of the smallest picture that boxes are drawn on; smaller ones are enlarged."""

Said = tuple[str, Any]
"""A piece of an answer: ("reasoning_content" or "content", text), or ("step", StepDelta)."""

Conversation = list[dict[str, Any]]
"""Messages as the protocol has them; in the browser's session, so the server keeps none."""


def add_page(app: FastAPI) -> FastAPI:
    """Mount the page at `PATH`."""
    service: Service = app.state.service
    return gr.mount_gradio_app(
        app,
        _blocks(service),
        PATH,
        auth=_door(service.settings.keys),
        auth_message="Any name; the password is a key of this server.",
        max_file_size=service.settings.limits.body_bytes // 2,  # base64 makes 4 bytes of 3
        theme=Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=_CSS,
        footer_links=[],
        show_error=True,
    )


_CSS = """
.gradio-container { width: 100% !important; max-width: 60rem !important; margin: 0 auto !important; }
#chat { border: 1px solid var(--border-color-primary) !important; box-shadow: none !important; }
#chat img { max-height: 18rem; width: auto; }
#chat .message-buttons, #chat [class*="message-buttons"] { display: none; }
"""


def _door(keys: tuple[str, ...]) -> Any:
    if not keys:
        return None
    return lambda name, password: any([hmac.compare_digest(password.encode(), key.encode()) for key in keys])


def _blocks(service: Service) -> gr.Blocks:
    sampling, name = service.settings.sampling, service.settings.name
    with gr.Blocks(title=name, fill_height=True, delete_cache=(KEPT_S, KEPT_S)) as blocks:
        gr.Markdown(f"### {name}")
        talk = gr.State([])
        chat = gr.Chatbot(
            elem_id="chat",
            show_label=False,
            scale=1,
            height="60vh",
            layout="panel",
            buttons=[],
            feedback_options=None,
            allow_tags=False,
            latex_delimiters=[],
            placeholder="Ask something. Pictures and videos go in with the clip below, or by pasting.",
        )
        box = gr.MultimodalTextbox(
            show_label=False,
            file_types=[*IMAGES, *VIDEOS],
            file_count="multiple",
            sources=["upload"],
            placeholder="Message",
            stop_btn=True,
            autofocus=True,
        )
        with gr.Accordion("Settings", open=False):
            system = gr.Textbox("", label="System message", lines=2)
            with gr.Row():
                thinking = gr.Checkbox(
                    service.settings.thinking and service.processor.chat.think,
                    label="Think first",
                    interactive=service.processor.chat.think,
                )
                temperature = gr.Slider(0, 2, sampling.temperature, step=0.05, label="Temperature (0: likeliest)")
                tokens = gr.Slider(
                    1,
                    service.settings.limits.new_tokens,
                    min(sampling.max_new_tokens, service.settings.limits.new_tokens),
                    step=1,
                    label="Longest answer, in tokens",
                )
            clear = gr.Button("Begin anew")

        async def answer(
            message: dict[str, Any],
            shown: list[Any],
            talk: Conversation,
            system: str,
            thinking: bool,
            temperature: float,
            tokens: int,
        ) -> AsyncIterator[tuple[Any, ...]]:
            parts = parts_of(message)
            if not parts:
                yield gr.update(), shown, talk
                return
            talk = [*talk, {"role": "user", "content": parts}]
            asked: list[Any] = [{"role": "user", "content": _file(file)} for file in message["files"]]
            if message["text"]:
                asked.append({"role": "user", "content": message["text"]})
            shown = [*shown, *asked]
            cleared = gr.MultimodalTextbox(value=None)
            yield cleared, shown, talk
            said: list[Said] = []
            opening = [{"role": "system", "content": system}] if system else []
            options = {"enable_thinking": thinking, "temperature": float(temperature), "max_tokens": int(tokens)}
            async with aclosing(ask(service, {"messages": [*opening, *talk], **options})) as pieces:
                async for piece in pieces:
                    if piece[0] == "error":
                        yield cleared, [*shown, _bubble(f"**{piece[1]}**")], talk[:-1]
                        return
                    said = joined(said, piece)
                    yield cleared, [*shown, *bubbles(said)], talk
            talk = [*talk, message_of(said)]
            shown = [*shown, *bubbles(said)]
            if (picture := with_boxes(talk)) is not None:
                shown.append(_bubble(gr.Image(picture, show_label=False, format="png")))
            yield cleared, shown, talk

        inputs = [box, chat, talk, system, thinking, temperature, tokens]
        asking = box.submit(answer, inputs, [box, chat, talk], api_visibility="private", concurrency_limit=None)
        box.stop(None, cancels=[asking], api_visibility="private")
        clear.click(lambda: ([], []), None, [chat, talk], cancels=[asking], api_visibility="private")
        chat.clear(lambda: [], None, [talk], cancels=[asking], api_visibility="private")
    return blocks


def _file(path: str) -> dict[str, Any]:
    return {"path": path, "mime_type": mimetypes.guess_type(path)[0], "alt_text": Path(path).name}


def parts_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """What was typed and uploaded, as parts of a message; gradio has checked that the files are uploads."""
    parts: list[dict[str, Any]] = []
    for file in message["files"]:
        kind = "video" if Path(file).suffix.lower() in VIDEOS else "image"
        mime = mimetypes.guess_type(file)[0] or f"{kind}/unknown"
        url = f"data:{mime};base64,{base64.b64encode(Path(file).read_bytes()).decode()}"
        parts.append({"type": f"{kind}_url", f"{kind}_url": {"url": url}})
    if message["text"]:
        parts.append({"type": "text", "text": message["text"]})
    return parts


async def ask(service: Service, fields: dict[str, Any]) -> AsyncGenerator[Said, None]:
    """Yields (field of the answer's message, text that is added to it), ("step", it), or ("error", what to tell)."""
    try:
        request = ChatRequest.model_validate({"model": service.settings.name, **fields})
        async with service.admit():
            job = await service.prepare(request)
            answer = Answer(job, service.processor.tokenizer, service.settings.moderation)
            async with aclosing(service.attempts(job)) as batches:
                async for batch in batches:
                    for chunk in answer.take(batch):
                        if chunk.choices[0].finish_reason == "content_filter":
                            yield "error", "A filter has found something in the answer."
                            return
                        delta = chunk.choices[0].delta
                        for field in ("reasoning_content", "content"):
                            if text := getattr(delta, field):
                                yield field, text
                        for step in delta.steps or ():
                            yield "step", step
    except (ApiError, Busy, Lagging) as error:
        yield "error", str(error)
    except ValidationError as error:
        yield "error", error.errors()[0]["msg"]


def joined(said: list[Said], piece: Said) -> list[Said]:
    """With the piece: a text goes on with the one before it, and a step takes the place of what was said of it."""
    field, what = piece
    if field != "step":
        if said and said[-1][0] == field:
            return [*said[:-1], (field, said[-1][1] + what)]
        return [*said, piece]
    known = [isinstance(one, StepDelta) and one.index == what.index for _, one in said]
    return [piece if same else one for same, one in zip(known, said, strict=True)] if any(known) else [*said, piece]


def message_of(said: list[Said]) -> dict[str, Any]:
    """As it goes back in history: what was said before a tool was called is no answer."""
    places = [place for place, (field, _) in enumerate(said) if field == "step"]
    content = "".join(text for field, text in said[places[-1] + 1 if places else 0 :] if field == "content")
    thought = "".join(text for field, text in said if field == "reasoning_content")
    return {"role": "assistant", "content": content} | ({"reasoning_content": thought} if thought else {})


def bubbles(said: list[Said]) -> list[dict[str, Any]]:
    """Thoughts and steps folded when they are over, in the order of what happened."""
    out = []
    for place, (field, what) in enumerate(said):
        if field == "step":
            over = what.result is not None
            title = {"title": what.name or "A call that cannot be read", "status": "done" if over else "pending"}
            out.append(_bubble(_step(what)) | {"metadata": title})
        elif field == "content":
            out.append(_bubble(what))
        elif what.strip():
            over = place + 1 < len(said)
            title = {"title": "Thought", "status": "done"} if over else {"title": "Thinking", "status": "pending"}
            out.append(_bubble(what.strip()) | {"metadata": title})
    return out


def _step(step: StepDelta) -> str:
    """In Markdown."""
    result = step.result
    texts = [step.arguments, *(() if result is None else (result.text,))]
    pictures = [] if result is None else [f"![{one.width} x {one.height}]({one.url})" for one in result.images]
    return "\n\n".join([*(_verbatim(text) for text in texts if text), *pictures])


def _verbatim(text: str) -> str:
    """A block that no run of backticks in it ends."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}\n{text}\n{fence}"


def _bubble(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def with_boxes(talk: Conversation) -> Image.Image | None:
    """The last picture of the conversation with what the last message points at; None if it points at nothing."""
    found = parse_grounding(talk[-1]["content"])
    urls = [
        part["image_url"]["url"]
        for message in talk
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image_url"
    ]
    if not urls or not (found.boxes or found.points):
        return None
    try:
        picture = load_image(base64.b64decode(urls[-1].partition(",")[2]))
    except MediaError:
        return None
    times = math.ceil(DRAWN_ON / max(picture.size))
    picture = picture.resize((picture.width * times, picture.height * times)) if times > 1 else picture
    return draw(picture, [*found.boxes, *found.points])
