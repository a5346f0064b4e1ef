"""Pairs and labelled answers in files, with pictures and without, and a checkpoint of random weights to align."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.records import write_jsonl
from tests.tiny import SPARSE, save_tiny

# What an image changes in a layer is seen by text in the next one.
MODEL = SPARSE.replace(num_hidden_layers=3, sparse_layers=(1, 2))
# `ernie dpo` on a CPU, in seconds. Weights move by much more than roundings do, and nothing is clipped: on a CPU
# PyTorch's norm of 100,000 float32 is only good to 1e-5.
QUICK = [
    *("tracker=none", "parallel.cpu=true", "parallel.threads=1", "model.precision=fp32"),
    *("data.max_tokens=160", "data.workers=0", "data.lookahead=4", "evaluate.max_examples=2"),
    *("optim.lr=0.003", "optim.eps=1e-3", "optim.freeze=[]", "optim.max_grad_norm=1000", "objective.beta=0.5"),
]
COLOURS = ("red", "green", "blue", "grey")


def write_preferences(folder: Path, pairs: int = 24) -> list[str]:
    """The settings that name them: model, pairs.jsonl and heldout.jsonl; `labelled` for the other kind.

    Every third prompt is text alone; every sixth rejected answer is of a tool's picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_tiny(MODEL, folder / "model")
    every = [pair(folder, number) for number in range(pairs + 3)]
    for name, kept in (("pairs", every[3:]), ("heldout", every[:3])):
        write_jsonl(folder / f"{name}.jsonl", kept)
        write_jsonl(folder / f"labelled-{name}.jsonl", [one for record in kept for one in labelled(record)])
    return [f"model.checkpoint={folder / 'model'}", *files(folder)]


def files(folder: Path, kind: str = "") -> list[str]:
    return [f"data.path={folder / f'{kind}pairs.jsonl'}", f"data.eval_path={folder / f'{kind}heldout.jsonl'}"]


def pair(folder: Path, number: int) -> dict[str, Any]:
    colour = number % len(COLOURS)
    question: list[dict[str, str]] = [{"type": "text", "text": f"Which colour, {'please, ' * (number % 4)}{number}?"}]
    if number % 3:
        question.insert(0, {"type": "image", "image": picture(folder, f"{number}.png", number, colour)})
    wrong = COLOURS[(colour + 1) % len(COLOURS)]
    rejected: list[dict[str, Any]] = [{"role": "assistant", "content": f"{wrong}{'!' * (number % 5)}"}]
    if number % 6 == 5:
        seen = [{"type": "image", "image": picture(folder, f"{number}-seen.png", number + 100, colour + 1)}]
        call = {"type": "function", "function": {"name": "look", "arguments": "{}"}, "id": "1"}
        rejected = [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": seen, "tool_call_id": "1"},
            *rejected,
        ]
    return {
        "id": f"pair-{number:02d}",
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": COLOURS[colour]}],
        "rejected": rejected,
    }


def labelled(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"id": f"{record['id']}-{side}", "messages": record["prompt"] + record[side], "label": side == "chosen"}
        for side in ("chosen", "rejected")
    ]


def picture(folder: Path, name: str, seed: int, colour: int) -> str:
    """28 or 56 pixels wide: 4 or 8 patches."""
    pixels = np.random.default_rng(seed).integers(0, 90, (28, 28 + 28 * (seed % 2), 3), dtype=np.uint8)
    pixels[..., colour % 3] += 120
    Image.fromarray(pixels).save(folder / name)
    return name
