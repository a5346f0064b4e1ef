"""`ernie sft` as people use it: a whole run, a killed one, and every way of getting it wrong."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.tasks import digits
from ernie_model.checkpoint import load_model
from ernie_model.processor import Processor
from tests.programs import Program
from train import checkpoint, sft

ROOT = Path(__file__).resolve().parents[2]
# Small and quick; everything else is the demo.
QUICK = [
    "experiment=digits",
    "tracker=none",
    "run.steps=6",
    "run.save_every=2",
    "optim.warmup_steps=2",
    "data.max_tokens=128",
    "evaluate.every=3",
    "evaluate.max_examples=6",
    "evaluate.sheet=4",
    "evaluate.max_new_tokens=2",
]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """Configs must be found from anywhere, and Hydra must leave nothing where it was started."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("ERNIE_DEBUG", raising=False)
    yield
    assert {path.name for path in (tmp_path / "here").iterdir()} <= {"runs"}


def ernie_sft(monkeypatch, *settings: str) -> int:
    """The exit code of `ernie sft SETTINGS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["ernie sft", *QUICK, *settings])
    try:
        sft.main()
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    return 0


def start(*settings: str) -> Program:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return Program(["-m", "train.sft", *QUICK, *settings], env=environment, stdout=pipe, stderr=pipe)


def records(folder: Path, key: str) -> dict[int, float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    found = [(line["step"], line[key]) for line in lines if key in line]
    assert len(found) == len(dict(found)), "a step was recorded twice"
    return dict(found)


def test_a_whole_run_from_a_users_own_file(tmp_path, monkeypatch, capfd):
    paths = digits.write_jsonl(tmp_path / "digits")
    folder = tmp_path / "run"
    own = ["data=files", f"data.path={paths['train']}", f"data.eval_path={paths['heldout']}"]
    assert ernie_sft(monkeypatch, *own, f"run.folder={folder}", "data.accumulation=2") == 0
    said = capfd.readouterr().out
    # the arithmetic before, the result after
    assert "3.56 M parameters, 942 k active per text token" in said
    assert "128 tokens per row x 2 rows x 1 rank = 256 tokens at most" in said
    assert "before training" in said and "after training" in said and "of 6" in said
    assert "rows      12 packed" in said and "left out" not in said
    # the record
    assert list(records(folder, "loss")) == [1, 2, 3, 4, 5, 6]
    assert list(records(folder, "eval_accuracy")) == [0, 3, 6]
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    *_, last = (line for line in lines if "loss" in line)
    for key in ("grad_norm", "lr", "accuracy", "tokens_per_s", "image_tokens_per_s", "patches_per_s", "step_s"):
        assert key in last, key
    for key in ("data_wait", "data_fill", "memory_gb", "eta_s", "mfu", "skipped"):
        assert key in last, key
    for key in ("router_vision_imbalance", "router_text_dead"):
        assert key in last, key
    start = json.loads((folder / "run.json").read_text())["starts"][0]
    assert start["command"] and start["versions"]["torch"] and "git" in start
    assert "accumulation: 2" in (folder / "config.yaml").read_text()
    # what remains: two checkpoints, the weights, the picture
    assert [path.name for path in checkpoint.complete(folder / "checkpoints")] == ["step-000004", "step-000006"]
    for weights in ("best", "export"):
        model, processor = load_model(folder / weights), Processor.from_pretrained(folder / weights)
        assert model.config == processor.config
    assert (folder / "answers.png").stat().st_size > 1000


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_models_of_the_family_without_eyes_train_too(tmp_path, monkeypatch, capfd, kind):
    """On text that is evaluated, then with adapters from the exported weights: the recipes of the text models."""
    path, run = tmp_path / "sums.jsonl", tmp_path / "run"
    pairs = [(f"{i} + 2 =", str(i + 2)) for i in range(60)]
    turns = [[{"role": "user", "content": ask}, {"role": "assistant", "content": answer}] for ask, answer in pairs]
    path.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    shape = "hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, head_dim: 8"
    shape += ", intermediate_size: 48, max_position_embeddings: 512, tie_word_embeddings: true"
    experts = "moe_num_experts: 4, moe_k: 2, moe_num_shared_experts: 1, moe_intermediate_size: 16"
    name, also, group = {
        "dense": ("ernie4_5", "", "ernie_4_5_0_3b"),
        "moe": ("ernie4_5_moe", f", {experts}, moe_layer_start_index: 1", "ernie_4_5_21b_a3b"),
    }[kind]
    text = ["data=files", f"data.path={path}", "data.eval_fraction=0.1", f"model={group}", "optim=ernie"]
    new = ["model.checkpoint=null", "model.processor=tiny", f"model.config={{model_type: {name}, {shape}{also}}}"]
    assert ernie_sft(monkeypatch, *text, *new, f"run.folder={run}") == 0
    assert list(records(run, "loss_text")) == [1, 2, 3, 4, 5, 6] == list(records(run, "mfu"))
    assert bool(records(run, "router_text_dead")) == (kind == "moe") and not records(run, "router_vision_dead")
    capfd.readouterr()
    base = [f"model.checkpoint={run / 'export'}", "peft=lora", "model.recompute=layers"]
    assert ernie_sft(monkeypatch, *text, *base, f"run.folder={tmp_path / 'two'}") == 0
    assert records(tmp_path / "two", "eval_nll")[0] == records(run, "eval_nll")[6]
    assert "no gradient ever reached" not in capfd.readouterr().out


def test_digits_from_memory_and_from_a_file_are_the_same_run(tmp_path, monkeypatch):
    paths = digits.write_jsonl(tmp_path / "digits")
    short = ["run.steps=3", "evaluate.every=0", "evaluate.sheet=0"]
    assert ernie_sft(monkeypatch, *short, f"run.folder={tmp_path / 'a'}") == 0
    own = ["data=files", f"data.path={paths['train']}", f"data.eval_path={paths['heldout']}"]
    assert ernie_sft(monkeypatch, *short, *own, f"run.folder={tmp_path / 'b'}") == 0
    assert records(tmp_path / "a", "loss") == records(tmp_path / "b", "loss")


def test_exported_weights_start_another_run_where_this_one_ended(tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    assert ernie_sft(monkeypatch, f"run.folder={first}") == 0
    again = ["model.config=null", f"model.checkpoint={first / 'export'}", "model.processor=null"]
    assert ernie_sft(monkeypatch, *again, f"run.folder={second}") == 0
    assert records(second, "eval_nll")[0] == records(first, "eval_nll")[6]


def test_bfloat16_and_activation_checkpointing_stay_near_float32(tmp_path, monkeypatch):
    short = ["run.steps=4", "evaluate.every=0", "evaluate.sheet=0"]
    assert ernie_sft(monkeypatch, *short, f"run.folder={tmp_path / 'fp32'}") == 0
    other = ["model.precision=bf16", "model.recompute=layers_and_vision"]
    assert ernie_sft(monkeypatch, *short, *other, f"run.folder={tmp_path / 'bf16'}") == 0
    fp32, bf16 = (list(records(tmp_path / name, "loss").values()) for name in ("fp32", "bf16"))
    # bfloat16 keeps 8 bits: 2^-8 = 0.4 % per rounding, over four layers and up to four updates
    assert bf16 != fp32 and bf16[0] == pytest.approx(fp32[0], rel=0.01) and bf16 == pytest.approx(fp32, rel=0.05)
    assert (tmp_path / "bf16" / "export" / "config.json").read_text().count('"float32"')  # master weights


def wait_for(path: Path, process: Program) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    """Uninterrupted = killed with SIGKILL + stopped with SIGTERM + finished: losses, accuracy, final weights."""
    longer = ["run.steps=40", "run.save_every=5", "evaluate.every=20", "evaluate.sheet=0", "data.accumulation=2"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert ernie_sft(monkeypatch, *longer, f"run.folder={whole}") == 0

    first = start(*longer, f"run.folder={broken}")
    wait_for(broken / "checkpoints" / "step-000005", first)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    reached = checkpoint.complete(broken / "checkpoints")[-1].name
    assert reached < "step-000040"

    second = start(*longer, f"run.folder={broken}")
    wait_for(broken / "checkpoints" / f"step-{int(reached[5:]) + 5:06d}", second)
    second.send_signal(signal.SIGTERM)
    said, errors = second.communicate(timeout=120)
    assert second.returncode == 0, errors
    assert f"resuming from {broken / 'checkpoints' / reached}: step {int(reached[5:])} of 40" in said
    assert "the same command goes on from there" in said

    assert ernie_sft(monkeypatch, *longer, f"run.folder={broken}") == 0
    assert records(broken, "loss") == records(whole, "loss")
    assert records(broken, "eval_nll") == records(whole, "eval_nll")
    for weights in ("export", "best"):
        ours, theirs = ((folder / weights / "model.safetensors").read_bytes() for folder in (broken, whole))
        assert ours == theirs
    assert len(json.loads((broken / "run.json").read_text())["starts"]) == 3


# ------------------------------------------------------------------------------------------------ getting it wrong


def refused(monkeypatch, capfd, *settings: str) -> str:
    """What `ernie sft SETTINGS` says when it refuses: one short message on stderr, no traceback, exit code 1."""
    capfd.readouterr()
    assert ernie_sft(monkeypatch, *settings) == 1
    said = capfd.readouterr().err
    assert "Traceback" not in said and said.startswith("error: ")
    return said


def test_a_second_run_in_the_same_folder_resumes_or_refuses(tmp_path, monkeypatch, capfd):
    here = f"run.folder={tmp_path / 'run'}"
    assert ernie_sft(monkeypatch, here) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.safetensors")}
    assert "run.resume is never" in refused(monkeypatch, capfd, here, "run.resume=never")
    said = refused(monkeypatch, capfd, here, "optim.lr=0.5", "data.lookahead=9")
    assert "optim.lr: 0.002 then, 0.5 now" in said and "data.lookahead: 64 then, 9 now" in said
    said = refused(monkeypatch, capfd, here, "data.accumulation=3")
    assert "rows_per_update (data.accumulation x processes): 1 then, 3 now" in said
    said = refused(monkeypatch, capfd, here, "run.steps=9")
    assert "run.steps: 6 then, 9 now" in said and f"model.checkpoint={tmp_path / 'run' / 'export'}" in said
    assert ernie_sft(monkeypatch, here) == 0  # finished already: nothing to train, nothing lost
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.safetensors")} == before


def test_a_typo_ends_before_anything_is_loaded(monkeypatch, capfd):
    assert "optim.leer is not a setting of sft; did you mean optim.lr?" in refused(monkeypatch, capfd, "optim.leer=1")
    assert not Path("runs").exists()


def test_a_run_that_is_already_longer_is_refused(tmp_path, monkeypatch, capfd):
    settings = [f"run.folder={tmp_path / 'run'}", "optim.schedule=constant"]
    assert ernie_sft(monkeypatch, *settings) == 0
    said = refused(monkeypatch, capfd, *settings, "run.steps=3")
    assert "run.steps=3" in said and "already at step 6" in said


def test_a_group_that_is_null(monkeypatch, capfd):
    assert "model= takes the name of a file in configs/" in refused(monkeypatch, capfd, "model=null")


def test_evaluations_without_anything_held_out_are_refused(tmp_path, monkeypatch, capfd):
    path = digits.write_jsonl(tmp_path)["train"]
    said = refused(monkeypatch, capfd, "data=files", f"data.path={path}", f"run.folder={tmp_path / 'run'}")
    assert "evaluate.every is 3, but no conversation is held out. Give data.eval_path or" in said


def test_held_out_conversations_that_are_all_too_long(monkeypatch, capfd):
    said = refused(monkeypatch, capfd, "data.max_patches=8")
    assert "none of the 6 held-out conversations can be used" in said and "data.max_patches=8" in said
    assert "7 of digits, at stage size" in said and "raise data.max_bad" in said  # the first to train on, and these


def test_a_damaged_checkpoint_is_never_gone_round_in_silence(tmp_path, monkeypatch, capfd, caplog):
    here, root = f"run.folder={tmp_path / 'run'}", tmp_path / "run" / "checkpoints"
    assert ernie_sft(monkeypatch, here) == 0
    whole = (tmp_path / "run" / "export" / "model.safetensors").read_bytes()
    newest = root / "step-000006" / checkpoint.shard_name(0)
    os.truncate(newest, 1000)
    capfd.readouterr()
    assert ernie_sft(monkeypatch, here) == 0  # the one before it is whole, and leads to the same weights
    assert "step 4 of 6" in capfd.readouterr().out
    assert "step-000006 is damaged (shard-00000.safetensors has 1,000 bytes, not" in caplog.text
    assert "going on from step-000004. Kept as step-000006.damaged." in caplog.text
    assert (tmp_path / "run" / "export" / "model.safetensors").read_bytes() == whole

    for path in root.glob("step-*"):
        os.truncate(path / checkpoint.shard_name(0), 1000)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    said = refused(monkeypatch, capfd, here)
    assert "no whole checkpoint to go on from" in said and "step-000006 is damaged" in said
    assert {path: path.read_bytes() for path in before} == before


def test_a_damaged_record_of_starts(tmp_path, monkeypatch, capfd):
    here = f"run.folder={tmp_path / 'run'}"
    assert ernie_sft(monkeypatch, here) == 0
    (tmp_path / "run" / "run.json").write_text("{")
    assert "run.json is damaged" in refused(monkeypatch, capfd, here)


def test_a_row_shorter_than_one_image(monkeypatch, capfd):
    said = refused(monkeypatch, capfd, "data.max_tokens=16")
    assert "more than a row holds (data.max_tokens=16)" in said and "digits-" in said


def test_a_checkpoint_or_processor_that_is_not_there(tmp_path, monkeypatch, capfd):
    (tmp_path / "empty").mkdir()
    said = refused(monkeypatch, capfd, f"model.checkpoint={tmp_path / 'empty'}")
    assert "model.checkpoint=" in said and "config.json" in said
    assert ernie_sft(monkeypatch, "run.steps=3", "evaluate.every=0", f"run.folder={tmp_path / 'run'}") == 0
    weights = f"model.checkpoint={tmp_path / 'run' / 'export'}"
    assert "model.processor=" in refused(monkeypatch, capfd, weights, f"model.processor={tmp_path / 'empty'}")


@pytest.mark.parametrize(
    "lines, expected",
    [
        ([], "holds no record"),
        (["{not json"], "bad.jsonl:1"),
        (['{"id": "a"}'], "bad.jsonl:1"),
        (['{"messages": [{"role": "user", "content": "hi"}]}'], "no token is trained"),
        (
            [
                '{"messages": [{"role": "user", "content": [{"type": "image", "image": "gone.png"}]},'
                ' {"role": "assistant", "content": "7"}]}'
            ],
            "gone.png",
        ),
    ],
)
def test_data_that_cannot_be_used(tmp_path, monkeypatch, capfd, lines, expected):
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    assert expected in refused(monkeypatch, capfd, "data=files", f"data.path={path}")


def test_a_bad_record_in_the_middle_is_left_out_or_ends_the_run_as_max_bad_says(tmp_path, monkeypatch, capfd):
    paths = digits.write_jsonl(tmp_path / "digits")
    lines = paths["train"].read_text().splitlines()[:40]
    lines[20] = '{"messages": 7}'
    paths["train"].write_text("\n".join(lines))
    settings = [
        "data=files",
        f"data.path={paths['train']}",
        "data.shuffle=false",
        "data.lookahead=1",
        "data.prefetch=0",
        "evaluate.every=0",
    ]
    here = f"run.folder={tmp_path / 'run'}"
    said = refused(monkeypatch, capfd, *settings, here, "run.steps=20", "data.max_bad=0")
    assert "train.jsonl:21" in said
    assert checkpoint.complete(tmp_path / "run" / "checkpoints")  # what was learned is kept

    assert ernie_sft(monkeypatch, *settings, here, "run.steps=20") == 0  # and may go on without that record
    (entry,) = (json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines())
    assert (entry["dataset"], entry["line"], entry["stage"]) == ("train.jsonl", 21, "format")


def test_a_full_disk_names_the_path_and_keeps_the_last_checkpoint(tmp_path, monkeypatch, capfd):
    real = checkpoint.write_pieces

    def full(path, pieces):
        if "step-000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, pieces)

    monkeypatch.setattr(checkpoint, "write_pieces", full)
    said = refused(monkeypatch, capfd, f"run.folder={tmp_path / 'run'}")
    assert "the disk is full" in said and "step-000004 needs" in said and "GB" in said
    assert [path.name for path in checkpoint.complete(tmp_path / "run" / "checkpoints")] == ["step-000002"]
    monkeypatch.setattr(checkpoint, "write_pieces", real)
    assert ernie_sft(monkeypatch, f"run.folder={tmp_path / 'run'}") == 0  # room again: it goes on
    assert list(records(tmp_path / "run", "loss")) == [1, 2, 3, 4, 5, 6]


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, capfd):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(monkeypatch, capfd, f"run.folder={tmp_path / 'file' / 'run'}")


def test_an_attempt_that_died_before_its_first_checkpoint_can_be_repeated(tmp_path, monkeypatch):
    here = f"run.folder={tmp_path / 'run'}"

    def broken(*arguments, **settings):
        raise RuntimeError("the power went out")

    monkeypatch.setattr(checkpoint, "save", broken)
    with pytest.raises(RuntimeError, match="the power went out"):  # what nobody expected keeps its traceback
        ernie_sft(monkeypatch, here)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path / "here")
    assert ernie_sft(monkeypatch, here) == 0
    assert list(records(tmp_path / "run", "loss")) == [1, 2, 3, 4, 5, 6]
