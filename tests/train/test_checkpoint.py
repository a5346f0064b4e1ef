"""Training state: written whole or not at all, and enough to go on as if nothing had happened."""

import errno
import json
import random
import resource
import shutil
import subprocess
from collections import namedtuple

import numpy as np
import pytest
import torch

from tests.train import small
from train import checkpoint
from train.config import UserError
from train.loop import train_step
from train.objectives.sft import SFT
from train.weights import AllWeights

SHARD = checkpoint.shard_name(0)
ROWS = [[small.row(small.example(10 * step, 9, image=True), small.example(10 * step + 1, 7))] for step in range(6)]


def steps(policy, optimizer, rows) -> list[float]:
    step = dict(accelerator=small.accelerator(), max_grad_norm=1.0)
    return [train_step(small.updates(policy, optimizer), SFT, row, **step)["loss"] for row in rows]


def save(root, step, policy, optimizer, keep=2, **state):
    return checkpoint.save(
        root,
        step,
        weights=AllWeights(policy.model),
        optimizer=optimizer,
        state=state,
        keep=keep,
    ).path


@pytest.fixture
def trained():
    policy = small.policy()
    optimizer = small.optimizer(policy, lr=1e-2)
    steps(policy, optimizer, ROWS[:1])
    return policy, optimizer


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    policy = small.policy()
    optimizer = small.optimizer(policy, lr=1e-2)
    losses = steps(policy, optimizer, ROWS[:3])
    path = save(tmp_path, 3, policy, optimizer)
    losses += steps(policy, optimizer, ROWS[3:])

    other = small.policy(seed=1)  # other weights: everything must come from the checkpoint
    other_optimizer = small.optimizer(other, lr=1e-2)
    checkpoint.load(path, weights=AllWeights(other.model), optimizer=other_optimizer)
    assert steps(other, other_optimizer, ROWS[3:]) == losses[3:]
    for name, value in policy.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_random_generators_continue(tmp_path, trained):
    random.gauss(0, 1), np.random.standard_normal()  # both keep a second number in hand
    path = save(tmp_path, 1, *trained)

    def draw():
        return [torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.standard_normal(3).tolist()]

    expected = draw()
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    checkpoint.load_generators(path, rank=0)
    assert draw() == expected


def test_only_the_newest_stay(tmp_path, trained):
    for step in (1, 2, 10):
        save(tmp_path, step, *trained, keep=2)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-000002", "step-000010"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000010"]  # nothing left behind


@pytest.mark.parametrize(
    "damage", ["no state.json", "a short file", "a missing file", "state.json cut off", "still partial"]
)
def test_a_damaged_checkpoint_is_not_picked_up(tmp_path, trained, damage):
    good = save(tmp_path, 1, *trained)
    bad = save(tmp_path, 2, *trained)
    state, weights = bad / checkpoint.STATE, bad / SHARD
    if damage == "no state.json":
        state.unlink()
    elif damage == "a short file":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "a missing file":
        weights.unlink()
    elif damage == "state.json cut off":
        state.write_text(state.read_text()[:-5])
    else:
        bad.rename(tmp_path / ".step-000002.0123.partial")
    assert checkpoint.complete(tmp_path) == [good]
    if bad.exists():
        with pytest.raises(UserError, match="step-000002 is not a complete checkpoint"):
            checkpoint.read_state(bad)


def test_what_a_killed_process_left_is_swept_away(tmp_path, trained):
    good = save(tmp_path, 1, *trained)
    for name in (".step-000002.0123.partial", ".step-000001.deleted"):
        shutil.copytree(good, tmp_path / name)
    checkpoint.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_a_full_disk_halfway_leaves_the_last_checkpoint(tmp_path, trained, monkeypatch):
    good = save(tmp_path, 1, *trained)

    def full(path, pieces):
        path.write_bytes(bytes(100))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_pieces", full)
    with pytest.raises(UserError, match=r"the disk is full: .*step-000002 needs .* GB .*earlier checkpoints are whole"):
        save(tmp_path, 2, *trained)
    assert checkpoint.complete(tmp_path) == [good]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1 MB, with a checkpoint of step 1's room to spare or not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root may mount")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_really_fills_up_while_it_is_written(small_disk, trained, monkeypatch):
    good = save(small_disk / "run", 1, *trained)
    needed = sum(path.stat().st_size for path in good.iterdir())
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - needed // 2))
    with pytest.raises(UserError, match="the disk is full"):  # seen beforehand
        save(small_disk / "run", 2, *trained)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 10**12))  # somebody else was quicker
    with pytest.raises(UserError, match="the disk is full"):
        save(small_disk / "run", 2, *trained)
    assert checkpoint.newest_undamaged(small_disk / "run") == (good, {})
    assert [path.name for path in (small_disk / "run").iterdir()] == ["step-000001"]
    filler.unlink()
    assert checkpoint.damage(save(small_disk / "run", 2, *trained)) is None


def test_a_file_longer_than_the_system_allows(tmp_path, trained):
    good = save(tmp_path, 1, *trained)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))  # ulimit -f; the model is longer
    try:
        with pytest.raises(UserError, match=r"step-000002 cannot be written \(.*earlier checkpoints are whole"):
            save(tmp_path, 2, *trained)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert checkpoint.newest_undamaged(tmp_path) == (good, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(tmp_path, trained, monkeypatch):
    save(tmp_path, 1, *trained)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 10, 10))
    monkeypatch.setattr(checkpoint, "write_pieces", lambda *arguments: pytest.fail("wrote to a full disk"))
    with pytest.raises(UserError, match="the disk is full"):
        save(tmp_path, 2, *trained)


def refused(path, error: Exception) -> None:
    def write() -> None:
        raise error

    checkpoint.all_or_none(path, 1, write)


def test_rust_errors_about_a_full_disk_are_understood(tmp_path):
    from safetensors import SafetensorError

    text = 'Error while serializing: I/O error: Os { code: 28, kind: StorageFull, message: "No space left on device" }'
    with pytest.raises(UserError, match="the disk is full"):
        refused(tmp_path / "x", SafetensorError(text))
    with pytest.raises(SafetensorError):
        refused(tmp_path / "x", SafetensorError("something else"))


@pytest.mark.parametrize("rust", [False, True])
def test_a_file_that_the_system_refuses_is_named(tmp_path, rust):
    """EFBIG: `ulimit -f`, or a file system with a largest file."""
    from safetensors import SafetensorError

    text = "Error while serializing: I/O error: File too large (os error 27)"
    error = SafetensorError(text) if rust else OSError(errno.EFBIG, "File too large")
    with pytest.raises(UserError, match=r"x cannot be written \(.*File too large.*earlier checkpoints are whole"):
        refused(tmp_path / "x", error)


def test_state_is_kept_and_before_the_first_update_there_is_none(tmp_path, trained):
    policy, _ = trained
    optimizer = small.optimizer(policy, lr=1e-2)
    before = save(tmp_path, 0, policy, optimizer)
    assert all(name.endswith("/weight") for name in checkpoint.pieces_of(before).stored)
    steps(policy, optimizer, [[small.row(small.example(1, 7))]])  # no image
    path = save(tmp_path, 1, policy, optimizer, loop={"step": 1})
    assert checkpoint.read_state(path)["loop"] == {"step": 1}
    moments = {name for name in checkpoint.pieces_of(path).stored if not name.endswith("/weight")}
    assert {"norm.weight/exp_avg", "vision.ln.weight/exp_avg"} <= moments
    again = small.optimizer(policy, lr=1e-2)
    checkpoint.load(path, weights=AllWeights(policy.model), optimizer=again)
    assert again.state.keys() == optimizer.state.keys()


def test_another_version_is_refused_and_not_called_damaged(tmp_path, trained):
    path = save(tmp_path, 1, *trained)
    state = json.loads((path / checkpoint.STATE).read_text())
    del state[checkpoint.CHECKSUM]
    for other in (state | {"format": 1}, json.loads(checkpoint._sealed(state | {"format": 99}))):
        (path / checkpoint.STATE).write_text(json.dumps(other))
        with pytest.raises(UserError, match=f"checkpoint format {other['format']}; this version reads 3"):
            checkpoint.newest_undamaged(tmp_path)


def flip(path, at: float = 0.5) -> None:
    """Change one bit of one byte in the middle of a file, as a bad disk does."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", [SHARD, checkpoint.RANDOM, checkpoint.STATE])
def test_one_bit_is_enough(tmp_path, trained, file):
    good = save(tmp_path, 1, *trained)
    bad = save(tmp_path, 2, *trained, source={"position": 12345})
    assert checkpoint.newest_undamaged(tmp_path) == (bad, {})
    flip(bad / file)
    found, problems = checkpoint.newest_undamaged(tmp_path)
    assert found == good and list(problems) == [bad] and file in problems[bad]


def test_every_number_in_state_is_under_the_checksum(tmp_path, trained):
    """Bits of a digit that leave valid JSON with another value."""
    path = save(tmp_path, 1, *trained, source={"position": 12345})
    text = (path / checkpoint.STATE).read_text()
    (path / checkpoint.STATE).write_text(text.replace("12345", "12344"))
    assert "state.json cannot be read" in (checkpoint.damage(path) or "")
    (path / checkpoint.STATE).write_text(json.dumps(json.loads(text)))  # formatted anew, and the same
    assert checkpoint.damage(path) is None


def test_what_is_set_aside_counts_no_more(tmp_path, trained):
    good, bad = save(tmp_path, 1, *trained), save(tmp_path, 2, *trained)
    aside = checkpoint.set_aside(bad)
    assert checkpoint.candidates(tmp_path) == [good] and aside.name == "step-000002.damaged"
    for step in (2, 3, 4):
        save(tmp_path, step, *trained)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-000003", "step-000004"]
    assert aside.is_dir()


def test_what_was_written_is_told(tmp_path, trained):
    policy, optimizer = trained
    done = checkpoint.save(
        tmp_path,
        1,
        weights=AllWeights(policy.model),
        optimizer=optimizer,
        state={},
        keep=1,
    )
    files = (SHARD, checkpoint.RANDOM)
    assert done.num_bytes == sum((done.path / file).stat().st_size for file in files) and done.seconds > 0
