"""docs/adapt_your_data.md, command by command, in the page's order, on a folder of real scans and a tiny checkpoint.

Each command runs as it stands on the page; what is appended replaces the 28B checkpoint by a tiny one of the same kind
and shortens the run. Then what the page says will be there, is there, and its Python block runs.
"""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from data.records import write_jsonl
from data.tasks import digits
from ernie_model.tokenizer import MEDIA_TOKENS
from tests import programs
from tests.tiny import DENSE, SPARSE, save_tiny
from train.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "adapt_your_data.md").read_text(encoding="utf-8")
# What makes the commands of the page small: the checkpoint, the length of the run, and nothing that needs a network.
SMALL = [
    "model.checkpoint=tiny-checkpoint",
    "model.config=null",
    "model.precision=fp32",
    "parallel.cpu=true",
    "run.epochs=0.3",
    "data.max_tokens=256",
    "data.max_patches=null",
    "data.accumulation=1",
    "data.workers=2",
    "optim.warmup_steps=1",
    "tracker=none",
]
RECORDS = 60
TEXT = dict(vision=None, mrope_section=None) | dict.fromkeys(MEDIA_TOKENS)
SHARED = SPARSE.replace(num_shared_experts=1)
MODELS = {
    "vl": SHARED,
    "moe": SHARED.replace(vision_expert_width=0, **TEXT),
    "dense": DENSE.replace(**TEXT),
}
"""One tiny model of each kind that the recipes are for."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


def commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line]
    assert len(lines) >= 5
    return lines


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The reader's working directory: receipts/ with images and a ShareGPT copy, and the tiny checkpoint."""
    folder = tmp_path_factory.mktemp("reader")
    paths = digits.write_jsonl(folder / "receipts")
    lines = paths["train"].read_text().splitlines()[:RECORDS]
    paths["train"].write_text("\n".join(lines) + "\n")
    records = [sharegpt(json.loads(line)) for line in lines]
    (folder / "receipts" / "sharegpt.json").write_text(json.dumps(records))
    for kind, config in MODELS.items():
        name = "tiny-checkpoint" if kind == "vl" else f"tiny-{kind}"
        save_tiny(config, folder / name)
    chats = [{"messages": [*turn("user", f"{n} plus 1?"), *turn("assistant", str(n + 1))]} for n in range(40)]
    write_jsonl(folder / "chats.jsonl", chats)
    return folder


def sharegpt(record: dict) -> dict:
    (image, text), answer = record["messages"][0]["content"], record["messages"][1]["content"]
    return {
        "conversations": [{"from": "human", "value": f"<image>{text['text']}"}, {"from": "gpt", "value": answer}],
        "images": [image["image"]],
    }


def turn(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def run(place: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return programs.run(arguments, cwd=place, env=environment, timeout=240)


def as_typed(line: str) -> list[str]:
    words = shlex.split(line)
    assert words[0] == "ernie", line
    small = [] if words[1] == "convert" else [*SMALL, "peft.rank=4"]
    return ["-m", COMMANDS[words[1]][0], *words[2:], *small]


@pytest.mark.timeout(900)
def test_the_page_from_the_first_command_to_the_last(place):
    for line in commands():
        # On GPUs, by a person, with questions that are not here: test_readme.py composes these.
        if line.startswith(("accelerate", "ernie chat", "ernie evaluate")):
            continue
        out = run(place, as_typed(line))
        assert out.returncode == 0, f"{line}\n{out.stdout[-3000:]}\n{out.stderr[-3000:]}"
    converted = (place / "receipts" / "converted.jsonl").read_text().splitlines()
    assert len(converted) == RECORDS
    for name in ("lora_vl_28b/preview.html", "lora_vl_28b/doctor.json"):
        assert (place / "runs" / name).stat().st_size > 100, name
    listed = re.search(r"```\nruns/receipts/\n(.*?)```", PAGE, re.S)
    assert listed is not None
    for name in re.findall(r"^  (\w+)/", listed[1], re.M):
        assert (place / "runs" / "receipts" / name).is_dir(), name
    for code in blocks("python"):
        out = run(place, ["-c", code + "\nprint(sum(p.numel() for p in model.parameters()))"])
        assert out.returncode == 0 and int(out.stdout.split()[-1]) > 100_000, out.stderr[-3000:]


RECIPES = [("full_vl_28b", "tiny-checkpoint", "receipts/train.jsonl"), ("lora_21b_text", "tiny-moe", "chats.jsonl")]
RECIPES += [("full_0_3b", "tiny-dense", "chats.jsonl")]


@pytest.mark.parametrize("recipe, checkpoint, data", RECIPES, ids=[name for name, *_ in RECIPES])
def test_the_other_recipes_train_a_model_of_their_kind(place, recipe, checkpoint, data):
    """As they stand but for sizes: what they freeze, adapt and recompute is what this runs."""
    name = f"run.name={recipe}"
    small = [*SMALL, f"model.checkpoint={checkpoint}", f"data.path={data}", "run.epochs=1", "run.steps=2", name]
    out = run(place, ["-m", "train.sft", f"experiment={recipe}", *small])
    assert out.returncode == 0, out.stdout[-3000:] + out.stderr[-3000:]
    lora = recipe.startswith("lora")
    assert (place / "runs" / recipe / ("adapter/adapter_model.safetensors" if lora else "export")).exists()
    # the table of what trains
    assert re.search(r"router +\S+ \S* *no" if lora else r"\bnorms\b", out.stdout)
    if recipe == "full_vl_28b":
        assert re.search(r"vision +.* no\b", out.stdout) and re.search(r"router .* 1e-07", out.stdout)
