"""Imports point down only, and a few libraries stay in their rooms.

    roof     train/{sft, dashboard, ...}.py   the commands of train/cli.py; imported by nobody
    floor 2  train/...
    floor 1  data/...                         may import ernie_model
    ground   ernie_model/...                  imports nothing of ours

The rules are functions of (file, imported module), so each can be shown to fail on an import that breaks it.
"""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from train.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
OURS = ("ernie_model", "data", "train", "tests", "vllm_plugin", "configs", "launch")
MAY_IMPORT = {
    "ernie_model": {"ernie_model"},
    "data": {"data", "ernie_model"},
    "train": {"train", "data", "ernie_model", "vllm_plugin"},
    "tests": {"tests", "train", "data", "ernie_model", "vllm_plugin"},
    "vllm_plugin": {"vllm_plugin"},
}
ENTRY_POINTS = ("cli", *(module.removeprefix("train.") for module, _ in COMMANDS.values()))
TESTS_ONLY = ("trl", "pytest", "hypothesis")
# `ernie export` starts programs in processes of their own, to let others compute what we computed: there the others are
# the point. Code that is written beside exported weights runs inside of vLLM.
OTHERS = ("transformers", "vllm")
MAY_ASK_OTHERS = re.compile(r"train/oracles/ask_\w+\.py|vllm_plugin/.*|tests/.*")
CONFIG_LIBRARIES = ("hydra", "omegaconf")
# Where the model may know of other devices. Everything else in ernie_model is maths on one.
MAY_COMMUNICATE = ("ernie_model/expert_parallel.py", "ernie_model/sequence_parallel.py")
# config.py and compose.py turn settings into dataclasses, run.py tells Hydra's errors to the user.
MAY_READ_HYDRA = re.compile(rf"train/((inference_)?config|compose|explain|run|{'|'.join(ENTRY_POINTS)})\.py|tests/.*")


def imports(source: str) -> list[str]:
    """Every module that a file imports, at the top or inside a function, as a dotted name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: write the full name, so that the direction can be seen"
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def complaint(file: str, module: str) -> str | None:
    """Why `file` (relative to the root) may not import `module`; None if it may."""
    package, top = file.split("/")[0], module.split(".")[0]
    if top in OURS and top not in MAY_IMPORT.get(package, ()):
        return f"{package} may not import {top}: imports point down only"
    if top in OTHERS and not MAY_ASK_OTHERS.fullmatch(file):
        return f"{top} is for tests only, and for train/oracles/ask_*.py"
    if top in TESTS_ONLY and package != "tests":
        return f"{top} is for tests only"
    if module.startswith("train.oracles.ask") and package != "tests":
        return "train/oracles/ask_*.py run in processes of their own; nobody imports them"
    if top in CONFIG_LIBRARIES and not MAY_READ_HYDRA.fullmatch(file):
        return f"{top} belongs to train/{{config,compose,explain,run}}.py and entry points; all below sees dataclasses"
    parts = module.split(".")
    if parts[:2] == ["torch", "distributed"] and package == "ernie_model" and file not in MAY_COMMUNICATE:
        return "model maths knows one device; communication belongs to expert_parallel.py, sequence_parallel.py"
    if package == "train" and parts[0] == "train" and len(parts) > 1 and parts[1] in ENTRY_POINTS:
        return f"train/{parts[1]}.py is an entry point; nobody imports it"
    return None


FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for package in ("ernie_model", "data", "train", "tests", "vllm_plugin")
    for path in (ROOT / package).rglob("*.py")
)


@pytest.mark.parametrize("file", FILES)
def test_imports_point_down(file):
    found = [complaint(file, module) for module in imports((ROOT / file).read_text(encoding="utf-8"))]
    assert not [text for text in found if text]


@pytest.mark.parametrize(
    ("file", "source", "reason"),
    [
        ("ernie_model/moe.py", "import data.batch", "down only"),
        ("ernie_model/moe.py", "def f():\n    from train import loop", "down only"),
        ("data/pack.py", "from train.loop import fit", "down only"),
        ("train/loop.py", "from tests import models", "down only"),
        ("train/loop.py", "import transformers", "tests only"),
        ("ernie_model/chat.py", "from transformers import AutoTokenizer", "tests only"),
        ("train/loop.py", "from omegaconf import DictConfig", "dataclasses"),
        ("data/loader.py", "import hydra", "dataclasses"),
        ("ernie_model/moe.py", "import torch.distributed as dist", "one device"),
        ("ernie_model/moe.py", "from torch import distributed", "one device"),
        ("train/loop.py", "from train.sft import main", "entry point"),
        ("train/loop.py", "from train import sft", "entry point"),
        ("train/certificate.py", "import transformers", "tests only"),
        ("train/oracles/__init__.py", "import vllm", "tests only"),
        ("train/oracles/ask_vllm.py", "import pytest", "tests only"),
        ("train/certificate.py", "from train.oracles import ask_vllm", "processes of their own"),
        ("vllm_plugin/fixes.py", "from ernie_model import moe", "down only"),
    ],
)
def test_a_rule_notices_what_breaks_it(file, source, reason):
    assert any(reason in (complaint(file, module) or "") for module in imports(source))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("data/pack.py", "from ernie_model.config import ErnieConfig"),
        ("train/loop.py", "from data.batch import PackedBatch\nfrom train.optim import adamw"),
        ("train/sft.py", "import hydra\nfrom omegaconf import DictConfig"),
        ("train/loop.py", "import torch.distributed"),
        ("ernie_model/expert_parallel.py", "import torch.distributed"),
        ("tests/parity/test_logits.py", "import transformers\nfrom train.sft import main"),
        ("train/oracles/ask_transformers.py", "import transformers"),
        ("train/vllm_layout.py", "import vllm_plugin"),
    ],
)
def test_a_rule_allows_what_keeps_it(file, source):
    assert [complaint(file, module) for module in imports(source)] == [None] * len(imports(source))


def test_values_hold_no_code():
    assert [path for folder in ("configs", "launch") for path in (ROOT / folder).rglob("*.py")] == []


@pytest.mark.parametrize("package", ["ernie_model", "data", "train"])
def test_every_third_party_import_is_a_declared_dependency(package):
    """Declared in pyproject.toml itself, not merely installed because something else needed it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    # [test] and [dev] are not there when a user runs the suite.
    extras = [lines for name, lines in project["optional-dependencies"].items() if name not in ("test", "dev")]
    declared = {
        re.match(r"[\w.-]+", line).group().lower().replace("_", "-")
        for line in [*project["dependencies"], *sum(extras, [])]
    }
    providers = packages_distributions()
    unknown = {}
    for path in (ROOT / package).rglob("*.py"):
        for module in imports(path.read_text(encoding="utf-8")):
            top = module.split(".")[0]
            if top in OURS or top in sys.stdlib_module_names:
                continue
            if top in OTHERS and MAY_ASK_OTHERS.fullmatch(path.relative_to(ROOT).as_posix()):
                continue
            names = {name.lower().replace("_", "-") for name in providers.get(top, [top])}
            if not names & declared:
                unknown.setdefault(top, []).append(path.relative_to(ROOT).as_posix())
    assert not unknown
