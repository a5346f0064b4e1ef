"""Evaluations without a model that knows anything: written answers, and tiny files of questions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from ernie_model.inference.request import Prompt
from ernie_model.model import ErnieModel
from tests.ernie_model.inference.scripted import ScriptedEngine
from tests.tiny import tiny_processor
from train.compose import plain
from train.evaluation.evaluation import agents_of, evaluate
from train.evaluation.questions import open_tasks
from train.inference_config import EvaluationConfig, SamplingConfig
from train.served import Served


@pytest.fixture(scope="session")
def served() -> Served:
    processor = tiny_processor()
    torch.manual_seed(0)
    return Served(ErnieModel(processor.config).eval(), processor)


@pytest.fixture
def write(tmp_path):
    """Writes records as a file of questions, and gives its path."""

    def write(records: list[dict[str, Any]], name: str = "mine.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


@pytest.fixture
def sums(write) -> str:
    """Twelve sums as a file; the domain says whether the result is even."""
    return write(
        [
            {"id": f"q{a}", "prompt": f"{a} + {a % 3} = ?", "answer": str(a + a % 3), "reward": "number"}
            | {"domain": "odd" if (a + a % 3) % 2 else "even"}
            for a in range(12)
        ],
        "sums.jsonl",
    )


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (56, 56), "#336699").save(path)
    return path


Reply = Callable[[Prompt], str]


@pytest.fixture
def run(served, tmp_path):
    """Carry out an evaluation whose answers `reply` writes; gives results.json and the engine."""

    def run(tasks: list[str], reply: Reply, console: Console | None = None, **settings):
        settings.setdefault("output", str(tmp_path / "out"))
        settings.setdefault("sampling", SamplingConfig(max_new_tokens=64, temperature=0.0))
        settings.setdefault("likelihood", False)
        config = EvaluationConfig(checkpoint="tiny", tasks=tasks, **settings)
        asked = open_tasks(config)
        engine = ScriptedEngine(served.processor.tokenizer, reply)
        agents = agents_of(config, asked, served, engine)
        quiet = console or Console(quiet=True)
        return evaluate(config, plain(config), asked, served, agents, quiet, {"versions": {}}), engine

    return run


@pytest.fixture
def text_of(served) -> Callable[[Prompt], str]:
    return lambda prompt: served.processor.decode(list(prompt.token_ids))


@pytest.fixture
def adds(text_of) -> Reply:
    """Answers the sums rightly."""

    def reply(prompt: Prompt) -> str:
        line = text_of(prompt).split("User: ")[-1].split("\n")[0]
        a, b = line.replace("= ?", "").split("+")
        return str(int(a) + int(b))

    return reply
