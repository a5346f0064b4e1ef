"""`ernie index` from its settings to the files, and the tools that settings name."""

import dataclasses
import subprocess
from types import SimpleNamespace

import pytest
from PIL import Image

from ernie_model.inference.image_index import ImageIndex
from tests import programs
from tests.tiny import SPARSE, save_tiny
from train.agents import open_agent, open_filters, open_toolbox, sampling_params
from train.config import Precision, UserError
from train.index import index_folder
from train.inference_config import AgentConfig, ChatConfig, IndexConfig, SamplingConfig
from train.served import open_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_tiny(SPARSE, folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for colour in ("red", "green", "blue"):
        Image.new("RGB", (60, 60), colour).save(folder / f"{colour}.png")
    (folder / "broken.png").write_bytes(b"")
    return folder


def ernie(*arguments: str) -> subprocess.CompletedProcess[str]:
    return programs.run(["-m", "train.cli", *arguments], timeout=120)


def test_an_index_is_made_by_its_settings_and_searched_by_a_chat(checkpoint, pictures):
    config = IndexConfig(checkpoint=str(checkpoint), folder=str(pictures), cpu=True)
    lines = index_folder(config)
    assert lines[:2] == ["computed  3", "kept      0"] and lines[2].startswith("left out  broken.png: ")
    index = pictures / ".ernie_index"
    assert lines[3] == f"written   {index}"
    assert [entry.caption for entry in ImageIndex.load(index).entries] == ["blue", "green", "red"]
    agent = AgentConfig(tools=["image_search"], index=str(index))
    chat = ChatConfig(checkpoint=str(checkpoint), cpu=True, agent=agent)
    made = open_agent(chat, open_model(chat), SimpleNamespace(max_context=4096), tools=["image_zoom_in_tool"])  # pyright: ignore
    assert list(made.toolbox.tools) == ["image_search", "image_zoom_in_tool"]
    in_float32 = dataclasses.replace(config, precision=Precision.fp32)
    assert index_folder(in_float32)[:2] == ["computed  0", "kept      3"], "the same model, held otherwise"


def test_the_command(checkpoint, pictures, tmp_path):
    result = ernie("index", f"checkpoint={checkpoint}", "cpu=true", f"folder={pictures}", f"output={tmp_path}/index")
    assert result.returncode == 0 and f"written   {tmp_path}/index\n" in result.stdout, result.stderr


def test_mistakes_are_told(checkpoint, tmp_path):
    with pytest.raises(UserError, match="folder=/nowhere is not a folder"):
        index_folder(IndexConfig(checkpoint=str(checkpoint), folder="/nowhere", cpu=True))
    with pytest.raises(UserError, match="max_pixels is 3"):
        IndexConfig(checkpoint="x", folder="y", max_pixels=3)


@pytest.mark.parametrize(
    "agent, problem",
    [
        (
            dict(tools=["zoom"]),
            "there is no tool 'zoom'; use image_zoom_in_tool, image_search or python:module.function",
        ),
        (dict(tools=["image_search"]), "needs agent.index"),
        (dict(tools=["image_search"], index="/nowhere"), "/nowhere holds no index.json"),
        (dict(tools=["python:no_such_module.f"]), "ModuleNotFoundError"),
    ],
)
def test_tools_that_there_are_not(checkpoint, agent, problem):
    config = ChatConfig(checkpoint=str(checkpoint), agent=AgentConfig(**agent))
    with pytest.raises(UserError, match="agent.tools=") as raised:
        open_toolbox(config.agent, None)  # pyright: ignore
    assert problem in str(raised.value)


def test_settings_become_sampling():
    assert sampling_params(SamplingConfig(temperature=0.5), seed=3).temperature == 0.5
    with pytest.raises(UserError, match=r"sampling\.top_p is 2"):
        sampling_params(SamplingConfig(top_p=2.0))
    with pytest.raises(ValueError, match=r"agent\.max_turns is 0; it must be 1 or more"):
        AgentConfig(max_turns=0)


def looks(text: str) -> str | None:
    return "a question" if "?" in text else None


def test_filters_are_files_of_phrases_or_functions(tmp_path):
    (tmp_path / "phrases.txt").write_text("lock pick\n\nsecret\n")
    phrases, function = open_filters([f"{tmp_path}/phrases.txt", f"python:{__name__}.looks"], "agent.input_filters")
    assert phrases("a SECRET") == "the phrase 'secret'" and phrases("") is None
    assert function("what?") == "a question"
    for name in (
        f"{tmp_path}/none.txt",
        "python:no_such.f",
        f"python:{__name__}.nothing",
        f"python:{__name__}.__doc__",
    ):
        with pytest.raises(UserError, match="agent.output_filters: "):
            open_filters([name], "agent.output_filters")
