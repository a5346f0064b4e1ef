"""`ernie rl` with an engine that disagrees with the trainer: replaying its experts brings the two closer."""

import json
import sys
from pathlib import Path

import pytest
import torch

from data.records import write_jsonl
from ernie_model.checkpoint import save_model
from ernie_model.model import ErnieModel
from tests.preferences import picture
from tests.tiny import DENSE, SPARSE, save_tiny, tiny_processor
from train import rl

MODEL = SPARSE.replace(num_hidden_layers=3, sparse_layers=(0, 1, 2), num_experts=16)
SETTINGS = [
    *("tracker=none", "parallel.cpu=true", "parallel.threads=1", "model.precision=fp32", "evaluate.every=0"),
    *("data.max_tokens=256", "agent.max_tokens=200", "sampling.max_new_tokens=16", "engine.cache_gib=0.05"),
    *("rewards.workers=0", "rollout.groups=2", "rollout.attempts=4", "rollout.updates=2", "run.steps=2"),
    *("optim.lr=1e-6", "optim.freeze=[]", "data.eval_fraction=0", "run.save_every=1"),
]


def even(attempt, expected) -> float:
    """A reward that some attempts get."""
    return float(len(attempt.text) % 2)


def prompt(folder: Path, number: int) -> dict:
    question: list[dict[str, str]] = [{"type": "text", "text": f"Which colour, {number}?"}]
    if number % 2:
        question.insert(0, {"type": "image", "image": picture(folder, f"{number}.png", number, number % 4)})
    reward = "python:tests.end_to_end.test_rl_replay.even"
    return {"messages": [{"role": "user", "content": question}], "answer": "any", "reward": reward}


def run(monkeypatch, folder: Path, *settings: str) -> list[dict[str, float]]:
    data = folder.parent / "data"
    files = [f"model.checkpoint={data / 'model'}", f"data.path={data / 'prompts.jsonl'}", f"run.folder={folder}"]
    monkeypatch.setattr(sys, "argv", ["ernie rl", *files, *SETTINGS, *settings])
    rl.main()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "mismatch_mean" in line]


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    torch.manual_seed(1)
    model = ErnieModel(MODEL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # or nothing would depend on experts
        end = model.embed_tokens.weight[tiny_processor(MODEL).end_id]
        end.mul_(6 / end.norm())  # about every eighth token is the last
    save_model(model, folder / "model")
    tiny_processor(MODEL).save(folder / "model")
    write_jsonl(folder / "prompts.jsonl", [prompt(folder, number) for number in range(12)])
    return folder


def test_a_noisy_engine_whose_experts_are_replayed(data, tmp_path, monkeypatch):
    noisy = "rollout.noise=0.02"
    own = run(monkeypatch, tmp_path / "own", noisy, "mismatch.routing=true")
    replayed = run(monkeypatch, tmp_path / "replayed", noisy, "rollout.replay_experts=true")
    neither = run(monkeypatch, tmp_path / "neither", noisy)
    for without, with_it, silent in zip(own, replayed, neither, strict=True):
        for group in ("text", "sampled"):
            assert 0.5 < without[f"routing_{group}_agreement"] < with_it[f"routing_{group}_agreement"] < 1
        assert with_it["mismatch_mean"] < without["mismatch_mean"]
        assert without["mismatch_mean"] == silent["mismatch_mean"], "to compare changes nothing"
        assert not any(name.startswith("routing_text") for name in silent)
    assert 0.5 < own[0]["routing_vision_agreement"] < 1
    # The experts themselves are disturbed too; what is left is that.
    assert sum(one["mismatch_mean"] for one in replayed) < 0.7 * sum(one["mismatch_mean"] for one in own)


def test_a_model_without_experts(tmp_path, monkeypatch, capsys):
    save_tiny(DENSE, tmp_path / "data" / "model")
    write_jsonl(tmp_path / "data" / "prompts.jsonl", [prompt(tmp_path, 0), prompt(tmp_path, 2)])
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "run", "rollout.replay_experts=true")
    assert "rollout.replay_experts is true, and this model has no experts" in capsys.readouterr().err
