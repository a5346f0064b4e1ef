"""Files and folders that appear whole or not at all.

    with atomic_folder("runs/7/step-100") as folder:      write what you like into `folder`
        ...                                               success: fsync, then one rename
                                                          error or kill: "step-100" never appears

Everything is written beside its destination under a name that starts with a dot and ends in `.partial`, on the same
file system, so that the last act is one rename. A process that is killed leaves at most such a partial folder behind:
no reader picks it up, and it is safe to delete.
"""

import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # linux/fcntl.h: paths are relative to the working directory


class FolderExistsError(FileExistsError):
    """The destination already holds something, and nobody said that it may be replaced."""


@contextmanager
def atomic_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends well, and disappears when it does not.

    With `overwrite`, an existing folder is swapped with the new one in a single step where the kernel and the file
    system can (Linux, renameat2), so a kill leaves the old folder or the new one. Elsewhere the old folder is first
    renamed to `.{name}.{id}.previous`; a kill exactly between the two renames leaves it there, whole.

    Raises:
        FolderExistsError: `path` is a non-empty folder and `overwrite` is False (checked before anything is written).
        NotADirectoryError: `path` is a file.
    """
    path = Path(os.path.realpath(path))  # through symbolic links: they keep pointing at the new content
    _refuse_existing(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}.partial"
    temporary.mkdir()
    try:
        yield temporary
        _fsync_tree(temporary)
        _refuse_existing(path, overwrite)  # somebody may have written it meanwhile
        _move_into_place(temporary, path)
    finally:
        # After a success the name is gone, or it holds the folder that was replaced.
        shutil.rmtree(temporary, ignore_errors=True)
    _fsync(path.parent)


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write a file so that a reader finds the old content or the new, never a part of either. Text is UTF-8."""
    path = Path(os.path.realpath(path))  # through symbolic links: they keep pointing at the new content
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}.partial"
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _fsync(path.parent)


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; choose another name for the folder, or delete the file.")
    if not overwrite and path.is_dir() and any(path.iterdir()):
        raise FolderExistsError(f"{path} already exists and is not empty; choose another folder, or pass overwrite.")


def _move_into_place(temporary: Path, path: Path) -> None:
    if not path.exists() or not any(path.iterdir()):
        os.replace(temporary, path)  # rename(2) replaces an empty folder
        return
    if _exchange(temporary, path):
        return  # `temporary` now names the old folder
    previous = temporary.with_suffix(".previous")
    os.rename(path, previous)
    try:
        os.rename(temporary, path)
    except BaseException:
        os.rename(previous, path)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or a C library without it
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):  # the file system cannot
        return False
    raise OSError(code, os.strerror(code), str(b))


def _fsync_tree(folder: Path) -> None:
    """Every file, then every folder from the inside out: a rename must not reach the disk before what it names."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            _fsync(Path(root) / name)
        _fsync(Path(root))


def _fsync(path: Path) -> None:
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
