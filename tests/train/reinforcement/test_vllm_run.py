"""`ernie rl` with rollout.backend=vllm, against a server that speaks vLLM's endpoints (fake_vllm.py)."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from ernie_model.checkpoint import load_model
from ernie_model.model import ErnieModel
from tests.tiny import SPARSE, save_tiny, tiny_processor
from tests.train.reinforcement.fake_vllm import FakeVLLM
from train import rl

QUICK = ["data.max_tokens=256", "data.max_patches=256", "tracker=[]", "run.steps=3", "run.save_every=1"]


@pytest.fixture
def server():
    torch.manual_seed(9)
    with FakeVLLM(ErnieModel(SPARSE).eval(), tiny_processor(SPARSE)) as one:
        yield one


@pytest.fixture
def files(tmp_path) -> Path:
    save_tiny(SPARSE, tmp_path / "model")
    Image.new("RGB", (84, 56), (200, 30, 60)).save(tmp_path / "red.png")
    with (tmp_path / "prompts.jsonl").open("w") as file:
        for number in range(6):
            content = [{"type": "image", "image": "red.png"}] if number % 2 else []
            content += [{"type": "text", "text": f"Say {number}."}]
            record = {"messages": [{"role": "user", "content": content}], "answer": "e", "reward": "python:own.letters"}
            file.write(json.dumps(record) + "\n")
    (tmp_path / "own.py").write_text("def letters(attempt, expected):\n    return len(attempt.answer) % 7 / 7\n")
    return tmp_path


def ernie_rl(monkeypatch, files: Path, server: FakeVLLM, *settings: str) -> int:
    given = [f"model.checkpoint={files / 'model'}", f"data.path={files / 'prompts.jsonl'}", *QUICK]
    given += ["rollout.backend=vllm", f"rollout.vllm.urls=[{server.url}]", "rollout.groups=2", "rollout.attempts=2"]
    given += ["rollout.updates=1", "sampling.max_new_tokens=6", "agent.max_tokens=250", "rewards.workers=0"]
    given += ["rollout.keep_equal=true", "rollout.max_lag=0", "objective.entropy=0.1", "optim.lr=1e-3"]
    monkeypatch.setattr(sys, "argv", ["ernie rl", *given, f"run.folder={files / 'run'}", *settings])
    monkeypatch.chdir(files)
    monkeypatch.syspath_prepend(str(files))
    try:
        rl.main()
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    return 0


def test_a_run(files, server, monkeypatch, capfd):
    assert ernie_rl(monkeypatch, files, server) == 0, capfd.readouterr()
    lines = [json.loads(line) for line in (files / "run/metrics.jsonl").read_text().splitlines()]
    updates = [one for one in lines if "loss" in one]
    assert len(updates) == 3 and all(one["vllm_servers"] == 1 and one["vllm_load_s"] > 0 for one in updates)
    labels = [body["weight_version"] for path, body in server.said if path.endswith("/finish_weight_update")]
    assert [label.rpartition(".")[2] for label in labels] == ["0", "1", "2"]
    start, end = (load_model(files / name).state_dict() for name in ("model", "run/export"))
    pushed = server.state.model.state_dict()
    for other in (start, end):
        assert sum(not torch.equal(pushed[name], other[name]) for name in pushed) > len(pushed) / 2
    assert not list((files / "run/vllm").iterdir())
    # The server has the weights of each update, and the trainer finds the log-probabilities that it reported.
    assert all(one["mismatch_max"] < 1e-4 for one in updates)
