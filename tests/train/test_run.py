"""The run folder: who may write into it, and where a run starts from."""

import json
import sys
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from tests import programs
from tests.train import small
from train import checkpoint, rl
from train.config import RunConfig, UserError
from train.run import (
    Opened,
    check_same_maths,
    check_same_start,
    command,
    described,
    going_on,
    open_folder,
    start_trackers,
    stopped,
    write_start,
)
from train.weights import AllWeights


def saved(folder, step):
    policy = small.policy()
    return checkpoint.save(
        folder / "checkpoints",
        step,
        weights=AllWeights(policy.model),
        optimizer=small.optimizer(policy),
        state={},
        keep=5,
    ).path


def opened(folder, resume="auto"):
    with ExitStack() as at_end:
        return open_folder(RunConfig(folder=str(folder), resume=resume), at_end, main=True)


def test_auto_starts_anew_in_an_empty_folder_and_resumes_from_the_newest(tmp_path):
    assert opened(tmp_path / "new").resume_from is None
    saved(tmp_path, 5)
    newest = saved(tmp_path, 10)
    assert opened(tmp_path).resume_from == newest


def test_never_refuses_a_folder_with_a_checkpoint_or_metrics(tmp_path):
    assert opened(tmp_path, "never").resume_from is None
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="already holds the metrics of an earlier run, and run.resume is never"):
        opened(tmp_path, "never")
    saved(tmp_path, 5)
    with pytest.raises(UserError, match="already holds the checkpoint step-000005"):
        opened(tmp_path, "never")


def test_a_checkpoint_can_be_named_by_itself_or_by_its_run(tmp_path):
    old = saved(tmp_path / "a", 5)
    newest = saved(tmp_path / "a", 6)
    assert opened(tmp_path / "b", str(old)).resume_from == old
    assert opened(tmp_path / "c", str(tmp_path / "a")).resume_from == newest
    with pytest.raises(UserError, match="there is no checkpoint"):
        opened(tmp_path / "d", str(tmp_path / "nothing"))


def test_a_named_checkpoint_never_overwrites_newer_ones(tmp_path):
    old = saved(tmp_path, 5)
    newest = saved(tmp_path, 6)
    with pytest.raises(UserError, match=r"has checkpoints of its own \(newest: step-000006\)"):
        opened(tmp_path, str(old))
    assert opened(tmp_path, str(newest)).resume_from == newest


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    with ExitStack() as at_end:
        open_folder(RunConfig(folder=str(tmp_path)), at_end, main=True)
        with pytest.raises(UserError, match="another process is training in run.folder"):
            opened(tmp_path)
    opened(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run.folder=.*file/run cannot be written"):
        opened(tmp_path / "file" / "run")


def test_ranks_that_see_different_disks_are_told(tmp_path, monkeypatch):
    mine = Opened(tmp_path, tmp_path / "checkpoints" / "step-000005")
    check_same_start(small.accelerator(), mine)
    monkeypatch.setattr("train.run.gather_object", lambda chosen: [*chosen, None])
    with pytest.raises(UserError, match=r"different checkpoints: step-000005, None\. Is it on a disk"):
        check_same_start(small.accelerator(), mine)


def test_a_damaged_checkpoint_is_set_aside_by_the_main_rank_alone(tmp_path, caplog):
    good, bad = saved(tmp_path, 5), saved(tmp_path, 10)
    data = bytearray((bad / checkpoint.shard_name(0)).read_bytes())
    data[len(data) // 2] ^= 1
    (bad / checkpoint.shard_name(0)).write_bytes(data)
    with ExitStack() as at_end:
        assert open_folder(RunConfig(folder=str(tmp_path)), at_end, main=False).resume_from == good
    assert bad.exists() and not caplog.text
    with pytest.raises(UserError, match=r"step-000010 is damaged \(shard-00000.safetensors does not have the checksum"):
        opened(tmp_path / "other", str(tmp_path))  # whoever names it must decide
    assert opened(tmp_path).resume_from == good
    assert "step-000010 is damaged (shard-00000.safetensors does not have the checksum" in caplog.text
    assert "going on from step-000005. Kept as step-000010.damaged." in caplog.text
    assert not bad.exists()


def test_a_damaged_record_of_trackers_is_named(tmp_path):
    (tmp_path / "trackers.json").write_text("{")
    with ExitStack() as at_end, pytest.raises(UserError, match=r"trackers\.json is damaged"):
        start_trackers(SimpleNamespace(), Opened(tmp_path, None), None, at_end)


def test_a_run_that_ends_too_late_ends_itself():
    """SIGTERM, and a step that never ends, in C and holding the interpreter: exit code 1, with the stack."""
    program = """
import os, re, signal
from contextlib import ExitStack
from train.run import StopSignal
with ExitStack() as at_end:
    StopSignal(at_end, grace_s=0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    re.match("(a*)*b", "a" * 40)
"""
    done = programs.run(["-c", program], timeout=200)
    assert done.returncode == 1
    assert "SIGTERM: saving after this step; run.grace_s=0.5 seconds from now the process ends anyway." in done.stderr
    assert "most recent call first" in done.stderr


def test_ctrl_c_in_a_module_ends_without_a_traceback(monkeypatch, capsys):
    """`python -m train.rl` and what `accelerate launch` starts; `ernie rl` is train/cli.py's."""

    def interrupted(algorithm):
        raise KeyboardInterrupt

    monkeypatch.setattr(rl, "run", interrupted)
    monkeypatch.setattr(sys, "argv", ["train.rl", "data.path=prompts.jsonl"])
    with pytest.raises(SystemExit) as end:
        rl.main()
    assert end.value.code == 130 and capsys.readouterr().err == "stopped.\n"
    assert described(KeyboardInterrupt()) == "stopped."


def test_ctrl_c_tells_where_the_run_goes_on(tmp_path):
    def interrupted() -> str:
        with pytest.raises(KeyboardInterrupt) as error, ExitStack() as at_end:
            at_end.enter_context(going_on(tmp_path))
            raise KeyboardInterrupt
        return stopped(error.value)

    assert "begins anew: nothing was saved yet" in interrupted()
    saved(tmp_path, 5)
    newest = saved(tmp_path, 10)
    assert f"goes on from {newest}. SIGTERM" in interrupted()


def test_other_settings_are_refused_by_name(tmp_path):
    check_same_maths(tmp_path, {"optim": {"lr": 1}}, {"optim": {"lr": 1}})
    with pytest.raises(UserError, match=r"optim\.lr: 1 then, 2 now") as caught:
        check_same_maths(tmp_path, {"optim": {"lr": 1, "eps": 3}}, {"optim": {"lr": 2, "eps": 3}})
    assert "eps" not in str(caught.value)


def test_every_start_is_recorded(tmp_path):
    write_start(tmp_path, {"run": {"steps": 3}}, None)
    write_start(tmp_path, {"run": {"steps": 3}}, tmp_path / "checkpoints" / "step-000001")
    assert (tmp_path / "config.yaml").read_text() == "run:\n  steps: 3\n"
    first, second = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert first["resumed_from"] is None and second["resumed_from"].endswith("step-000001")
    assert "torch" in first["versions"] and first["command"]


def test_the_command_is_what_a_shell_reads(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train/sft.py", "experiment=digits", "run.name=a b"])
    monkeypatch.setattr("sys.orig_argv", ["python", "/venv/bin/ernie", "sft", "experiment=digits", "run.name=a b"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert command() == "ernie sft experiment=digits 'run.name=a b'"
    monkeypatch.setattr("sys.orig_argv", ["python", "-m", "train.sft", "run.steps=3"])
    assert command() == "python -m train.sft run.steps=3"
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    several = "accelerate launch --multi_gpu --num_processes=4"
    rest = "-m train.sft experiment=digits 'run.name=a b'"
    assert command() == f"{several} --num_machines=1 {rest}"
    for name, value in (("LOCAL_WORLD_SIZE", "2"), ("MASTER_ADDR", "node-0"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    address = "--main_process_ip=node-0 --main_process_port=29500 --machine_rank=0"
    assert command() == f"{several} --num_machines=2 {address} {rest}"
    monkeypatch.setattr("sys.argv", ["/somewhere/train/rl.py", "experiment=zoom_rl"])
    assert command() == f"{several} --num_machines=2 {address} -m train.rl experiment=zoom_rl"
