"""The page: what it asks of the server and what it shows. (How it looks is in docs/images/serving.png.)"""

import asyncio
import base64
import gc
import io

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from ernie_model.config import ErnieConfig
from ernie_model.inference.server.app import make_app
from ernie_model.inference.server.settings import Limits, ServerSettings
from ernie_model.inference.tools import ToolBox, zoom_tool
from ernie_model.processor import Processor
from ernie_model.tokenizer import load_tiny_tokenizer
from tests.ernie_model.inference.scripted import ScriptedEngine
from tests.load.serving import tiny_model
from train.serving import page
from train.serving.media import MediaDoor

# gradio leaves an event loop behind that nobody closes.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collected():
    yield
    gc.collect()  # here, not in the middle of somebody else's test


def app_that_says(text, **settings):
    tokenizer = load_tiny_tokenizer()
    config = ErnieConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=8,
    )
    engine = ScriptedEngine(tokenizer, lambda prompt: text)
    return make_app(engine, Processor(tokenizer, config), ServerSettings(name="tiny", **settings)), engine


def picture(width=100, height=50):
    file = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(file, format="PNG")
    return file.getvalue()


def test_the_page_stands_beside_the_routes():
    app, _ = app_that_says("Hi.")
    with TestClient(page.add_page(app)) as client:
        answer = client.get("/ui/")
        assert answer.status_code == 200 and "tiny" in answer.text
        assert "fonts.googleapis" not in answer.text, "a page that works without a network"
        assert client.get("/v1/nothing").json()["error"]["code"] == "not_found"
        assert client.get("/health").json()["status"] == "ok"


def test_with_keys_the_page_asks_for_one():
    app, _ = app_that_says("Hi.", keys=("a-key",))
    with TestClient(page.add_page(app)) as client:
        assert client.get("/ui/config").status_code == 401
        assert client.post("/ui/login", data={"username": "me", "password": "another"}).status_code == 400
        assert client.post("/ui/login", data={"username": "me", "password": "a-key"}).status_code == 200
        assert client.get("/ui/config").status_code == 200


def asked(app, **fields):
    async def ask():
        return [piece async for piece in page.ask(app.state.service, fields)]

    return asyncio.run(ask())


def test_it_asks_the_service_with_its_limits():
    app, engine = app_that_says("Let me see.\n</think>\n\nFour.", limits=Limits(new_tokens=50))
    hello = [{"role": "user", "content": "Hello?"}]
    said = asked(app, messages=hello, enable_thinking=True, max_tokens=40, temperature=0.5)
    texts = {field: "".join(text for name, text in said if name == field) for field, _ in said}
    assert texts["content"] == "Four." and texts["reasoning_content"].strip() == "Let me see."
    for fields, message in (
        ({"messages": hello, "max_tokens": 51}, "at most 50"),
        ({"messages": hello, "temperature": 3.0}, "less than or equal to 2"),
    ):
        ((field, text),) = asked(app, **fields)
        assert field == "error" and message in text
    app.state.service.draining = True
    assert asked(app, messages=hello) == [("error", "The server is shutting down.")]
    assert engine.running == 0 and app.state.service.gate.inside == 0


def test_uploads_become_parts(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "b.mp4").write_bytes(b"film")
    first, second, third = page.parts_of({"files": [f"{tmp_path}/a.png", f"{tmp_path}/b.mp4"], "text": "What is it?"})
    assert base64.b64decode(first["image_url"]["url"].removeprefix("data:image/png;base64,")) == picture()
    assert second["video_url"]["url"] == "data:video/mp4;base64," + base64.b64encode(b"film").decode()
    assert third == {"type": "text", "text": "What is it?"}
    assert page.parts_of({"files": [], "text": ""}) == []


@pytest.mark.parametrize(
    ("answer", "drawn"),
    [
        ('[{"bbox_2d": [100, 200, 500, 900], "label": "cat"}]', True),
        ("There is nothing.", False),
        ('{"bbox_2d": "none"}', False),
    ],
)
def test_boxes_are_drawn_on_the_last_picture(answer, drawn):
    urls = [f"data:image/png;base64,{base64.b64encode(picture(*size)).decode()}" for size in ((30, 30), (100, 50))]
    talk = [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}} for url in urls]},
        {"role": "assistant", "content": answer},
    ]
    shown = page.with_boxes(talk)
    assert (shown is not None) == drawn
    if shown is not None:
        assert shown.size == (500, 250), "small pictures are enlarged, or their boxes could not be told apart"
        assert shown.getpixel((50, 150)) != (255, 255, 255)  # x = 100 / 1000 * 500
        assert shown.getpixel((25, 150)) == shown.getpixel((150, 150)) == (255, 255, 255)
    assert page.with_boxes([talk[1]]) is None


def test_steps_are_folded_between_what_was_thought_and_said():
    _, processor = tiny_model()
    call = '<tool_call>\n{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [0, 0, 500, 500]}}\n</tool_call>\n'
    engine = ScriptedEngine(processor.tokenizer, lambda prompt: f"Small.\n</think>\n\nI will ``look``.\n{call}")
    app = make_app(engine, processor, ServerSettings(name="tiny", toolbox=ToolBox([zoom_tool()])), opener=MediaDoor())
    url = f"data:image/png;base64,{base64.b64encode(picture(200, 100)).decode()}"
    ask = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    pieces = asked(app, messages=ask, enable_thinking=True)
    said: list[page.Said] = []
    for piece in pieces[: [field for field, _ in pieces].index("step") + 1]:
        said = page.joined(said, piece)
    thought, text, step = page.bubbles(said)
    assert thought["metadata"] == {"title": "Thought", "status": "done"} and thought["content"] == "Small."
    assert text["content"] == "I will ``look``." and "metadata" not in text
    assert step["metadata"] == {"title": "image_zoom_in_tool", "status": "pending"} and "bbox_2d" in step["content"]
    for piece in pieces[[field for field, _ in pieces].index("step") + 1 :]:
        said = page.joined(said, piece)
    step = page.bubbles(said)[2]
    assert step["metadata"]["status"] == "done" and "![100 x 50](data:image/jpeg;base64," in step["content"]
    steps = [what for field, what in said if field == "step"]
    assert [one.index for one in steps] == list(range(6)), "each is there once, up to agent.max_turns"
    assert page.message_of([*said, ("content", "A 7.")])["content"] == "A 7."
    assert page.message_of([("content", "Hi.")]) == {"role": "assistant", "content": "Hi."}
    assert page._verbatim("a ``` b").startswith("````\n") and page._verbatim("a").startswith("```\n")
