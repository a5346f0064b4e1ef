"""The `ernie` command."""

import importlib.util
import subprocess
import sys
import time

import pytest

from train import cli


def ernie(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "train.cli", *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(arguments, capsys):
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert f"\n  {command} " in out


@pytest.mark.parametrize("module", [module for module, _ in cli.COMMANDS.values()])
def test_every_listed_command_exists(module):
    assert importlib.util.find_spec(module) is not None


def test_help_answers_within_a_second_and_imports_nothing_heavy():
    taken = []
    for _ in range(3):  # the best of three: another process may have the core
        start = time.perf_counter()
        assert ernie("--help").returncode == 0
        taken.append(time.perf_counter() - start)
    assert min(taken) < 1.0, taken

    show = "import sys; from train import cli; cli.main(['--help']); print(*{m.split('.')[0] for m in sys.modules})"
    out = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True).stdout
    loaded = set(out.splitlines()[-1].split())
    assert not loaded & {"torch", "numpy", "hydra", "omegaconf", "rich", "transformers", "PIL", "trackio"}


def test_an_unknown_command_names_the_nearest(capsys):
    assert cli.main(["stf", "experiment=digits"]) == 2
    err = capsys.readouterr().err
    assert "'stf'" in err
    assert "Did you mean: ernie sft experiment=digits" in err


def test_an_unknown_command_with_nothing_near_points_to_the_help(capsys):
    assert cli.main(["xyzzy"]) == 2
    assert "See: ernie --help" in capsys.readouterr().err


def test_a_command_is_the_module_with_its_arguments_and_exit_code():
    by_command = ernie("dashboard", "--port", "not-a-port")
    by_module = subprocess.run(
        [sys.executable, "-m", "train.dashboard", "--port", "not-a-port"], capture_output=True, text=True, timeout=120
    )
    assert by_command.returncode == by_module.returncode == 2
    assert by_command.stderr == by_module.stderr
    assert "not-a-port" in by_command.stderr


def test_ctrl_c_ends_without_a_traceback(capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.runpy, "run_module", interrupted)
    assert cli.main(["sft"]) == 130
    assert capsys.readouterr().err == "stopped.\n"


@pytest.mark.parametrize("module, extra", [("fastapi", "serve"), ("uvicorn.config", "serve"), ("gradio", "ui")])
def test_a_command_without_its_extra_names_it(capsys, monkeypatch, module, extra):
    def absent(*_, **__):
        raise ModuleNotFoundError(name=module)

    monkeypatch.setattr(cli.runpy, "run_module", absent)
    assert cli.main(["serve"]) == 1
    assert capsys.readouterr().err == f"error: ernie serve needs {module}: pip install 'ernie-train[{extra}]'\n"


def test_another_missing_module_keeps_its_traceback(monkeypatch):
    def absent(*_, **__):
        raise ModuleNotFoundError(name="train.nothing")

    monkeypatch.setattr(cli.runpy, "run_module", absent)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["serve"])
