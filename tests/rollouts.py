"""Prompts in files, with pictures and without, a checkpoint of random weights, and a reward that it can win."""

from pathlib import Path
from typing import Any

import torch

from data.records import write_jsonl
from ernie_model.checkpoint import save_model
from ernie_model.model import ErnieModel
from tests.preferences import MODEL, picture
from tests.tiny import tiny_processor

OWN = "tests.train.reinforcement.own_rewards"
# `ernie rl` on a CPU, in seconds; see tests.preferences.QUICK. Four groups of four make two updates.
QUICK = [
    *("tracker=none", "parallel.cpu=true", "parallel.threads=1", "model.precision=fp32", "evaluate.max_examples=4"),
    *("data.max_tokens=160", "agent.max_tokens=160", "sampling.max_new_tokens=12", "engine.cache_gib=0.05"),
    *("optim.lr=3e-4", "optim.eps=1e-3", "optim.freeze=[embeddings]", "optim.max_grad_norm=1000"),
    *("objective.clip_low=0.2", "objective.clip_high=0.2", "rewards.workers=0"),
    *("rollout.groups=4", "rollout.attempts=4", "rollout.updates=2"),
]


def write_prompts(folder: Path, prompts: int = 24) -> None:
    """model/, prompts.jsonl and heldout.jsonl. Every third prompt is text alone."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(ends_often(), folder / "model")
    tiny_processor(MODEL).save(folder / "model")
    every = [prompt(folder, number) for number in range(prompts + 4)]
    write_jsonl(folder / "prompts.jsonl", every[4:])
    write_jsonl(folder / "heldout.jsonl", every[:4])


def ends_often() -> ErnieModel:
    """Random weights that end an answer after a few tokens: at about every fifth place the end is likely."""
    torch.manual_seed(0)
    model = ErnieModel(MODEL)
    end = tiny_processor(MODEL).end_id
    row = model.embed_tokens.weight.data[end]
    row.mul_(10 / row.norm())
    return model


def files(folder: Path) -> list[str]:
    return [
        f"model.checkpoint={folder / 'model'}",
        f"data.path={folder / 'prompts.jsonl'}",
        f"data.eval_path={folder / 'heldout.jsonl'}",
    ]


def prompt(folder: Path, number: int) -> dict[str, Any]:
    question: list[dict[str, str]] = [{"type": "text", "text": f"Which colour, {'please, ' * (number % 4)}{number}?"}]
    if number % 3:
        question.insert(0, {"type": "image", "image": picture(folder, f"{number}.png", number, number % 4)})
    return {
        "id": f"prompt-{number:02d}",
        "messages": [{"role": "user", "content": question}],
        "answer": "any",
        "reward": f"python:{OWN}.{('even', 'vowels')[number % 2]}",
        "domain": ("plain", "odd")[number % 2],
    }
