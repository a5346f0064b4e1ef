"""A Python process of its own that answers calls, one at a time, and can be killed.

    here                                         there:  python -m ernie_model.worker MODULE ...
    Worker("some.module", "a", "b")
      start  ────────────────────────────────►   serve(connection, "a", "b") of some.module
      hello  ◄────────────────────────────────   the first thing it sends
    worker.call(message, time_s)
             ────────────────────────────────►   connection.recv()
             ◄────────────────────────────────   connection.send(answer)
      late, or nobody waits any longer: TimeoutError; who gets it kills the process

All that it starts is in its session and dies with it, and it dies with the program that started it, however that ends.
What it prints goes to stderr. Ctrl-C in the terminal does not reach it.
"""

import importlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.connection import Pipe as pipe
from typing import Any

STDERR = 2
LOOK_S = 0.1
"""How often a call looks whether anybody still waits for it."""


class Worker:
    """
    Args:
        module: with a function `serve(connection, *arguments)`. It is never imported here.
        environment: variables beside those of this process.
    """

    def __init__(self, module: str, *arguments: str, environment: Mapping[str, str] | None = None):
        ours, theirs = pipe()
        self._popen = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, module, str(theirs.fileno()), str(os.getpid()), *arguments],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=STDERR,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | dict(environment or {}),
            start_new_session=True,
        )
        theirs.close()
        self._pipe = ours
        self._end = weakref.finalize(self, _kill, self._popen)  # at the latest when the program ends

    @property
    def alive(self) -> bool:
        # Not `poll`: until `kill`, its number is kept from other processes.
        look = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return self._popen.returncode is None and os.waitid(os.P_PID, self._popen.pid, look) is None

    def hello(self, time_s: float) -> Any:
        """What it sends before it is called. Raises what `call` does."""
        return self._answer(time_s, None)

    def call(self, message: Any, time_s: float, given_up: threading.Event | None = None) -> Any:
        """
        Raises:
            TimeoutError: the time is over, or `given_up` is set. A late answer would be taken for that of the next
                call, so kill it.
            EOFError, OSError: it has ended.
        """
        self._pipe.send(message)
        return self._answer(time_s, given_up)

    def _answer(self, time_s: float, given_up: threading.Event | None) -> Any:
        end = time.monotonic() + time_s
        while not self._pipe.poll(max(0.0, min(LOOK_S, end - time.monotonic()))):
            if time.monotonic() >= end or (given_up is not None and given_up.is_set()):
                raise TimeoutError
        return self._pipe.recv()

    def end(self) -> None:
        """From any thread: the process and all it started are killed. A call that waits for it raises EOFError."""
        self._end()

    def kill(self) -> None:
        """`end`, for the thread that calls it."""
        self._end()
        self._pipe.close()

    def how_it_ended(self) -> str:
        """ "" where it was killed, else like " (exit code 3)"."""
        code = self._popen.returncode
        return "" if code is None or code == -signal.SIGKILL else f" (exit code {code})"


def _kill(process: "subprocess.Popen[bytes]") -> None:
    # Also where it has ended by itself: what it started may still be there.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def limit_memory(gib: float) -> None:
    """What this process may take beyond what it has (Linux); MemoryError beyond it."""
    with open("/proc/self/statm") as file:
        has = int(file.read().split()[0]) * resource.getpagesize()
    limit = has + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _end_with_parent(parent: int) -> None:
    """What hangs would outlive a program that was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    module, descriptor, parent, *arguments = sys.argv[1:]
    _end_with_parent(int(parent))
    importlib.import_module(module).serve(Connection(int(descriptor)), *arguments)
