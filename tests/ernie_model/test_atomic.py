"""Folders and files that appear whole or not at all, also when the process is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import ernie_model.atomic as atomic
from ernie_model.atomic import FolderExistsError, atomic_folder, atomic_write


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_when_the_block_ends(tmp_path: Path):
    with atomic_folder(tmp_path / "deep" / "made") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
        assert not (tmp_path / "deep" / "made").exists()
    assert (tmp_path / "deep" / "made" / "sub" / "a").read_text() == "1"
    assert names(tmp_path / "deep") == ["made"]


def test_an_error_leaves_nothing(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "made") as folder:
        (folder / "a").write_text("1")
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_an_error_leaves_the_old_folder(tmp_path: Path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "old").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "made", overwrite=True) as folder:
        (folder / "new").write_text("new")
        raise ZeroDivisionError
    assert names(tmp_path) == ["made"] and names(tmp_path / "made") == ["old"]


def test_only_an_empty_folder_is_replaced_unasked(tmp_path: Path):
    (tmp_path / "made").mkdir()
    with atomic_folder(tmp_path / "made") as folder:
        (folder / "a").write_text("1")
    with pytest.raises(FolderExistsError, match="already exists and is not empty.*overwrite"):
        with atomic_folder(tmp_path / "made"):
            pytest.fail("the block must not run")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"), atomic_folder(tmp_path / "file", overwrite=True):
        pass
    assert names(tmp_path) == ["file", "made"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_overwrite_replaces_the_whole_folder(tmp_path: Path, monkeypatch, can_exchange: bool):
    if not can_exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    for name in ("first", "second"):
        with atomic_folder(tmp_path / "made", overwrite=True) as folder:
            (folder / name).write_text(name)
    assert names(tmp_path) == ["made"] and names(tmp_path / "made") == ["second"]


def test_a_symbolic_link_keeps_pointing_at_the_new_content(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").write_text("")
    (tmp_path / "link").symlink_to("real")
    with atomic_folder(tmp_path / "link", overwrite=True) as folder:
        (folder / "new").write_text("")
    assert names(tmp_path) == ["link", "real"] and names(tmp_path / "link") == ["new"]


def test_files_reach_the_disk_before_the_name_does(tmp_path: Path, monkeypatch):
    done: list[str] = []
    fsync, rename = atomic._fsync, os.replace
    monkeypatch.setattr(atomic, "_fsync", lambda path: (done.append(Path(path).name), fsync(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), rename(a, b)))
    with atomic_folder(tmp_path / "made") as folder:
        (folder / "weights").write_text("1")
    assert done == ["weights", folder.name, "rename", tmp_path.name]


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch):
    atomic_write(tmp_path / "sub" / "file", "old é")
    assert (tmp_path / "sub" / "file").read_bytes() == "old é".encode()
    atomic_write(tmp_path / "sub" / "file", b"new")
    assert (tmp_path / "sub" / "file").read_bytes() == b"new"
    monkeypatch.setattr(os, "replace", lambda a, b: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        atomic_write(tmp_path / "sub" / "file", b"newer")
    assert names(tmp_path / "sub") == ["file"] and (tmp_path / "sub" / "file").read_bytes() == b"new"


KILLED = """
import os, shutil, signal, sys
import ernie_model.atomic as atomic

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

moment = sys.argv[2]
if moment == "before rename":
    atomic._move_into_place = die
if moment == "after rename":
    shutil.rmtree = die
with atomic.atomic_folder(sys.argv[1], overwrite=True) as folder:
    for name in ("a", "b"):
        (folder / name).write_text("new")
        if moment == "writing":
            die()
"""


@pytest.mark.parametrize(
    "moment, found", [("writing", "old"), ("before rename", "old"), ("after rename", "new"), ("never", "new")]
)
def test_a_killed_process_leaves_the_old_folder_or_the_new(tmp_path: Path, moment: str, found: str):
    (tmp_path / "made").mkdir()
    for name in ("a", "b"):
        (tmp_path / "made" / name).write_text("old")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "made"), moment]
    code = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(Path(atomic.__file__).parents[1])}).returncode
    assert code == (0 if moment == "never" else -signal.SIGKILL)
    assert [(tmp_path / "made" / name).read_text() for name in ("a", "b")] == [found, found]
    rest = [name for name in names(tmp_path) if name != "made"]
    assert all(name.startswith(".") and name.endswith(".partial") for name in rest)
