"""Python programs that start in a tenth of a second instead of four: forks of a process that has imported everything.

    Program(["-m", "train.sft", "run.steps=4"], cwd=..., env=..., stdout=...)

is `subprocess.Popen([sys.executable, "-m", "train.sft", "run.steps=4"], ...)`, with a pid, an exit code, signals and
pipes of its own; `run` is `subprocess.run`.

    pytest ── a nursery: `python -m tests.programs`, imports what every command of `ernie` does, and waits
                 └─ a keeper: waits for the program and tells its exit code
                      └─ the program: environment, folder, arguments, files and random numbers as a start gives them

What a fork can't show needs `subprocess`: what the imports themselves read or do (variables, time, memory), what a
launcher starts, and `/proc/PID/cmdline`. Strings hash alike in all programs of a nursery, so ranks come from two: an
order of a set that differs between ranks still shows.
"""

import atexit
import contextlib
import faulthandler
import functools
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
MESSAGE = 200_000
"""Bytes of what a nursery is told, at most; the kernel's limit for one message is little more."""
WORD = struct.Struct("i")


class Asked(NamedTuple):
    """What a program is started with."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str


class Program(subprocess.Popen[str]):
    """`python ARGUMENTS`, forked from a nursery.

    Args:
        nursery: which one; programs of one hash strings alike.
        stdin, stdout, stderr, cwd, env: as of `subprocess.Popen`. Pipes are of text.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        nursery: int = 0,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
    ):
        self._link = nursery_of(nursery % 2)
        super().__init__(
            [sys.executable, *arguments], stdin=stdin, stdout=stdout, stderr=stderr, cwd=cwd, env=env, text=True
        )

    # Popen's own three places where it starts a process and asks for its end.
    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *others) -> None:
        _, _, _, *pipes = others[:9]  # startupinfo, creationflags, shell, and both ends of each pipe
        given, taken = (pipes[0], pipes[3], pipes[5]), [0, 1, 2]
        files = [std if end == -1 else end for end, std in zip(given, taken, strict=True)]
        self._told, told = os.pipe()
        try:
            asked = Asked(args[1:], dict(os.environ if env is None else env), str(cwd or os.getcwd()))
            message = json.dumps(asked).encode()
            assert len(message) < MESSAGE, f"a program is started with {len(message)} bytes of words and environment"
            socket.send_fds(self._link, [message], [*files, told])
        finally:
            os.close(told)
            self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]
        self.pid = self._hear()
        self._child_created = True

    def _hear(self) -> int:
        said = os.read(self._told, WORD.size)
        if len(said) < WORD.size:
            raise RuntimeError("a nursery of programs has ended; what it said is above")
        return WORD.unpack(said)[0]

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if wait_flags & os.WNOHANG and not select.select([self._told], [], [], 0)[0]:
            return 0, 0
        status = self._hear()
        os.close(self._told)
        return self.pid, status

    def _internal_poll(self, _deadstate: int | None = None, **_) -> int | None:
        if self.returncode is None and self._waitpid_lock.acquire(False):  # type: ignore[attr-defined]
            try:
                if self.returncode is None:
                    pid, status = self._try_wait(os.WNOHANG)
                    if pid:
                        self._handle_exitstatus(status)  # type: ignore[attr-defined]
            finally:
                self._waitpid_lock.release()  # type: ignore[attr-defined]
        return self.returncode


def run(
    arguments: Sequence[str],
    *,
    timeout: float,
    input: str | None = None,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` to its end, with what it printed.

    Raises:
        subprocess.TimeoutExpired: it ran for longer than `timeout` seconds, and was killed.
    """
    pipe = subprocess.PIPE
    with Program(arguments, stdin=pipe, stdout=pipe, stderr=pipe, cwd=cwd, env=env) as program:
        try:
            out, error = program.communicate(input, timeout)
        except BaseException:
            program.kill()
            raise
    return subprocess.CompletedProcess(program.args, program.returncode, out, error)


@functools.cache
def nursery_of(number: int) -> socket.socket:
    """How to ask the nursery of this number, which ends when this process does."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHASHSEED")}
    command = [sys.executable, "-m", "tests.programs", str(there.fileno())]
    null = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=ROOT, env=clean, stdin=null, stdout=null, pass_fds=[there.fileno()])
    there.close()
    atexit.register(end, process, here)
    return here


def end(nursery: subprocess.Popen[bytes], link: socket.socket) -> None:
    link.close()
    try:
        nursery.wait(2)
    except subprocess.TimeoutExpired:  # a fork of this process holds the link
        nursery.kill()
        nursery.wait()


# ------------------------------------------------------------------------------------------------------ the nursery


def import_everything() -> None:
    """All that the commands of `ernie` import, but none of the modules that are run; and DeepSpeed, with the compiler
    that ZeRO loads and doesn't use, which takes as long again."""
    from train.cli import COMMANDS

    for module in ("deepspeed", "torch._inductor.compile_fx"):
        importlib.import_module(module)
    entries = ["train.cli", *(module for module, _ in COMMANDS.values())]
    for module in entries:
        importlib.import_module(module)
    for module in entries:  # or runpy would warn that it runs what was imported
        del sys.modules[module]
        delattr(sys.modules["train"], module.removeprefix("train."))


def wait_for_programs(link: socket.socket) -> tuple[Asked, list[int]] | None:
    """Fork at every message. Returns in each program, with what it was started with and its files; and with None when
    the process that asks has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which ends this one
    while True:
        message, files, _, _ = socket.recv_fds(link, MESSAGE, 4)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass  # keepers that have ended
        if not message:
            return None
        if os.fork() == 0:
            link.close()
            if keep(*files):
                return Asked(*json.loads(message)), files[:3]
        for file in files:
            os.close(file)


def keep(stdin: int, stdout: int, stderr: int, tell: int) -> bool:
    """Fork the program, and tell its pid and then its status. True in the program."""
    pid = os.fork()
    if pid == 0:
        os.close(tell)
        return True
    for file in (stdin, stdout, stderr):  # or whoever reads the program's pipes would wait for this process
        os.close(file)
    os.write(tell, WORD.pack(pid))
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):
        os.write(tell, WORD.pack(status))
    os._exit(0)


def become(asked: Asked, files: Sequence[int], path: Sequence[str]) -> None:
    """Run the program as `python ARGUMENTS` would.

    Args:
        path: what follows the program's folder and PYTHONPATH in `sys.path`.
    """
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(asked.environment)
    os.chdir(asked.folder)
    if os.environ.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()

    kind, what, *words = asked.arguments
    sys.orig_argv = [sys.executable, *asked.arguments]
    given = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [asked.folder if kind == "-m" else "", *given, *path]
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    if kind == "-m":
        sys.argv = [what, *words]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *words]
        exec(compile(what, "<string>", "exec"), main.__dict__)
    else:
        raise AssertionError(f"a nursery runs `-m MODULE` and `-c TEXT`; asked for {kind!r}")


if __name__ == "__main__":
    behind = sys.path[1:]  # without the folder of this process; PYTHONPATH is not set
    import_everything()
    gc.freeze()
    if started := wait_for_programs(socket.socket(fileno=int(sys.argv[1]))):
        become(*started, behind)
