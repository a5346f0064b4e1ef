"""The README's commands run, and what it points to exists.

Commands come out of the ```bash blocks of every page for users. A training command runs in its `--cfg job` form, which
composes and prints the settings; a `make` target is asked for its recipe; other programs must be listed here.
The first line with a command of `ernie` starts Python, as a person would; the others are forks (tests/programs.py).
"""

import importlib.util
import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests import programs
from train.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "launch/README.md", "docs/model.md", "docs/data.md", "docs/lora.md")
PAGES += ("docs/adapt_your_data.md", "docs/telemetry.md", "docs/parallel.md", "docs/tools.md", "docs/inference.md")
PAGES += ("docs/evaluation.md", "docs/serving.md", "docs/tasks.md", "docs/export.md", "docs/dpo.md")
PAGES += ("docs/rewards.md", "docs/rl.md", "docs/rl_demo.md", "docs/rl_difficulty.md", "docs/rl_vllm.md")


def commands(page: str) -> list[str]:
    """The lines of the page's ```bash blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    blocks = [re.sub(r"\\\n\s*", "", block) for block in blocks]  # a line that goes on in the next one
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


KEYS = {"train.convert": ("input:", "output:"), "train.chat": ("checkpoint:", "agent:"), "train.index": ("folder:",)}
KEYS |= {"train.export": ("checkpoint:", "output:")}
KEYS |= {"train.serve": ("checkpoint:", "limits:")}
KEYS |= {"train.evaluate": ("checkpoint:", "tasks:"), "train.compare": ("runs:",)}
KEYS |= {"train.make_pairs": ("checkpoint:", "per_question:")}
"""What the settings of a program show, besides those of training."""
NOT_OURS = ("pip", "vllm")
ALL = [pytest.param(line, id=f"{page}: {line}") for page in PAGES for line in commands(page)]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120)


def python(arguments: Sequence[str], fresh: bool) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, *arguments) if fresh else programs.run(arguments, cwd=ROOT, timeout=120)


def words_of(line: str) -> list[str]:
    """Without the variables before the program: VARIABLE=value."""
    return list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), shlex.split(line)))


def as_python(line: str) -> list[str]:
    """A training command as what follows `python`: the same with the `ernie` command and under `accelerate launch`.

    ernie sft a=b                             -m train.sft a=b
    accelerate launch ... -m train.sft a=b    -m train.sft a=b      (and its --config_file must exist)
    sbatch ... train.sbatch a=b               -m train.sft a=b
    """
    words = words_of(line)
    if words[0] == "ernie":
        module, rest = COMMANDS[words[1]][0], words[2:]
    elif words[:2] == ["accelerate", "launch"]:
        config = words[words.index("--config_file") + 1]
        assert (ROOT / config).is_file()
        at = words.index("-m")
        module, rest = words[at + 1], words[at + 2 :]
    elif words[0] == "sbatch":
        at = next(number for number, word in enumerate(words) if word.endswith(".sbatch"))
        assert (ROOT / words[at]).is_file()
        module, rest = "train.sft", words[at + 1 :]
    else:
        raise AssertionError(f"the README runs {words[0]!r}, and this test does not know how to check that")
    return ["-m", module, *rest]


def is_ours(line: str) -> bool:
    program, *rest = words_of(line)
    other = program in ("make", *NOT_OURS) or (Path(program).name == "python" and rest[0] == "-m")
    return not other


FIRST = {as_python(line)[1]: line for page in reversed(PAGES) for line in reversed(commands(page)) if is_ours(line)}
"""The first line of each module that is run."""


@pytest.mark.parametrize("line", ALL)
def test_a_command_on_a_page_works(line):
    if line.startswith("make "):
        out = run("make", "-n", *shlex.split(line)[1:])
        assert out.returncode == 0, out.stderr
        return
    program, *rest = words_of(line)
    if not is_ours(line):
        assert program in NOT_OURS or importlib.util.find_spec(rest[1]) is not None  # here, or in another environment
        return
    arguments = as_python(line)
    fresh = FIRST[arguments[1]] == line
    if "train.dashboard" in arguments:
        assert python([*arguments, "--help"], fresh).returncode == 0
        return
    out = python([*arguments, *([] if "--cfg" in arguments else ["--cfg", "job"])], fresh)
    assert out.returncode == 0, out.stderr
    assert all(key in out.stdout for key in KEYS.get(arguments[1], ("model:", "optim:")))


def test_this_notices_a_command_with_a_typo():
    out = python([*as_python("ernie sft experiment=digits optim.lrr=1"), "--cfg", "job"], fresh=False)
    assert out.returncode != 0
    assert "optim.lr" in out.stdout + out.stderr


def test_the_two_first_commands_are_there():
    assert commands("README.md")[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_every_file_a_page_names_exists(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    for target in links:
        assert ((ROOT / page).parent / target).exists(), target
    for name in re.findall(r"`((?:train|data|ernie_model|configs|launch|tests|docs)/[\w./-]*)`", text):
        assert (ROOT / name).exists(), name


def test_the_examples_name_their_model_files():
    names = set(re.findall(r"\bmodel=(\w+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert names
    for name in names:
        assert (ROOT / "configs" / "model" / f"{name}.yaml").is_file()


def test_the_settings_that_pages_name_exist():
    """`group.key` in backticks, with or without a value."""
    from train.compose import known_keys
    from train.config import SFTConfig
    from train.dpo_config import DPOConfig
    from train.rl_config import RLConfig

    known = {*known_keys(SFTConfig), *known_keys(DPOConfig), *known_keys(RLConfig)}
    groups = {key.split(".")[0] for key in known}
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for key in re.findall(r"`([a-z]+\.[a-z_]+)(?:=[^`]*)?`", text):
            if key.split(".")[0] in groups and not (ROOT / key).exists():
                assert key in known, f"{page}: {key}"
