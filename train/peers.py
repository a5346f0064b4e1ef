"""Ranks hear of each other: whoever fails tells all, and whoever falls silent is missed.

    rank 0   ♥  ♥  ♥  waits in a collective ─────────── hears ── says it ── exit code 1
    rank 1   ♥  ♥  raises: writes its traceback ── exit code 1
    rank 2   ♥  killed: writes nothing; its machine no longer knows it, or no ♥ comes for SILENT_S

A collective waits for a rank that is missing, up to parallel.timeout_s. So a thread of each rank writes a beat every
BEAT_S and looks at those of the others, in the store through which the ranks found each other; it never waits for one.
What happened is said once on every machine, before anything that follows from it.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
import xxhash
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

BEAT_S = 2.0
SILENT_S = 40.0
"""After so long without a beat a rank counts as dead. Longer than any call that holds Python's lock."""
LEAVE_S = 10.0
"""What a rank is given to come out of its work and close its trackers; one that waits in a collective cannot."""
TROUBLE, LEFT, STOP = "trouble", "left", "stop"
FAILED = " failed:\n"
GO_ON = "This run ends; the same command goes on from the last checkpoint."


def trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


class Process(NamedTuple):
    """A process as its machine knows it."""

    host: str
    machine: str
    """This boot of it, and the name space of process numbers; empty where the system doesn't tell."""
    pid: str
    began: str
    """Tells it from a later process with the same number."""

    @classmethod
    def this(cls) -> "Process":
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            machine = f"{boot}/{os.readlink('/proc/self/ns/pid')}"
        except OSError:  # not Linux
            machine = ""
        pid = str(os.getpid())
        _, began = _stat(pid)
        return cls(socket.gethostname(), machine, pid, began)

    def has_ended(self, *, seen_from: "Process") -> bool:
        """Known only on its own machine; False elsewhere. One that nobody has waited for (Z) has ended too."""
        if not self.machine or self.machine != seen_from.machine:
            return False
        state, began = _stat(self.pid)
        return state in ("", "Z", "X") or began != self.began


def _stat(pid: str) -> tuple[str, str]:
    """State and starting time of a process of this machine; ("", "") when there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name before it may have spaces
    except OSError:
        return "", ""
    return fields[0], fields[19]


class Peers:
    """`with Peers(describe) as peers:` around a run, and `peers.watch()` once the ranks have found each other.

    Alone it does nothing. It is the innermost of what surrounds a run, so that the others hear of an error before this
    rank begins to close its files and trackers.

    Args:
        describe: what the user is told about an error.
    """

    def __init__(
        self,
        describe: Callable[[BaseException], str] = trace,
        *,
        beat_s: float = BEAT_S,
        silent_s: float = SILENT_S,
        leave_s: float = LEAVE_S,
    ):
        self.describe, self.beat_s, self.silent_s, self.leave_s = describe, beat_s, silent_s, leave_s
        self.store: PrefixStore | None = None
        self.store_is_gone = False
        self.me = Process.this()
        self.over = threading.Event()  # this run has ended well
        self.heard = threading.Event()  # something happened to another rank
        self.asked: Callable[[], bool] = lambda: False  # has somebody asked this rank to end its work in order?
        self.stopping = False  # or any other rank, a beat or two ago
        self.saying = threading.Lock()
        self.thread: threading.Thread | None = None

    def watch(self) -> None:
        """Begin to look after the others."""
        if not self._connect():
            return
        # Where NCCL gives up, it ends the process from its own thread, by SIGABRT.
        faulthandler.enable(file=2)
        self.beats: list[tuple[str, float]] = [("", time.monotonic())] * self.world
        self.reached = time.monotonic()
        self.thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self.thread.start()

    def __enter__(self) -> "Peers":
        return self

    def __exit__(self, kind: object, error: BaseException | None, where: object) -> None:
        if error is None:
            self._leave()
        elif self._connect():
            self._fail(error)
            raise SystemExit(1) from error

    def _connect(self) -> bool:
        """False where this process is the only one."""
        if self.store is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
            # A clone has a connection of its own: what the main thread waits for must not keep this one waiting.
            self.store = PrefixStore("peers", _get_default_store().clone())  # pyright: ignore[reportAttributeAccessIssue]
        return self.store is not None

    # ---------------------------------------------------------------------------------------------- the main thread

    def _leave(self) -> None:
        self.over.set()
        if self.thread is not None:
            self.thread.join()
            self._go(wait_s=self.leave_s)

    def _go(self, *, wait_s: float) -> None:
        """Write that this rank goes. Rank 0, which may keep the store, lets the others read what is there."""
        if self.store_is_gone:
            return
        end = time.monotonic() + wait_s
        with suppress(RuntimeError):
            self._write(LEFT)
            while self.rank == 0 and time.monotonic() < end and not all(b.startswith(LEFT) for b in self._read()):
                time.sleep(min(0.1, self.beat_s))

    def _fail(self, error: BaseException) -> None:
        if follows_from_a_loss(error) and self.thread is not None:
            self.heard.wait(self.silent_s + 2 * self.beat_s)  # who was lost shows soon
            if self.heard.is_set():
                return  # and has been said
        text = self.describe(error)
        if "Traceback" in text:
            text = f"rank {self.rank} on {self.me.host}{FAILED}{text}"
        with suppress(RuntimeError):
            self._say(self._tell(text))
        self._say(text)
        self._go(wait_s=3 * self.beat_s)

    # --------------------------------------------------------------------------------------------------- the thread

    def _watch(self) -> None:
        # A machine that loses its power closes no connection; then a look does not return.
        looks = ThreadPoolExecutor(1, "look")
        count = 0
        while not self.over.wait(self.beat_s if count else 0):
            count += 1
            try:
                trouble = looks.submit(self._look, str(count)).result(self.silent_s)
            except TimeoutError:
                trouble = self._no_store()
            if trouble is None:
                continue
            if not self.store_is_gone:
                with suppress(RuntimeError):  # other machines would learn it by the silence
                    trouble = self._tell(trouble)
            self._say(trouble)
            if "imed out" in trouble:  # nobody died: where everyone stands tells what they wait for
                faulthandler.dump_traceback(file=2)
            self.heard.set()
            end = time.monotonic() + self.leave_s
            self._go(wait_s=3 * self.beat_s)
            time.sleep(max(0.0, end - time.monotonic()))
            if not self.over.is_set():
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(1)
        looks.shutdown()

    def _look(self, count: str) -> str | None:
        """Write this rank's beat; what happened to another one, or None."""
        assert self.store is not None
        # In this order: a rank writes that it left, or failed, before it ends.
        beats = [beat for beat, _ in self.beats]
        ended = [rank for rank, b in enumerate(beats) if b and process_of(b).has_ended(seen_from=self.me)]
        try:
            self._write(count)
            if self.store.check([TROUBLE]):
                return self.store.get(TROUBLE).decode()
            if self.asked():
                self.store.set(STOP, "")
            self.stopping = self.store.check([STOP])
            beats = self._read()
        except RuntimeError:
            # At a good end the rank that keeps the store may be the first to go; this one is about to.
            away = time.monotonic() - self.reached
            if ended and away > 2 * self.beat_s:
                self.store_is_gone = True
                return self._lost(ended[0])
            return self._no_store() if away > self.silent_s / 4 else None
        self.reached = now = time.monotonic()
        for rank, beat in enumerate(beats):
            if beat != self.beats[rank][0]:
                self.beats[rank] = (beat, now)
            if rank == self.rank or beat.startswith(LEFT):
                continue
            if rank in ended:
                return self._lost(rank)
            if now - self.beats[rank][1] > self.silent_s:
                where = f" on {process_of(beat).host}" if beat else ""
                return (
                    f"rank {rank}{where} has given no sign of life for {self.silent_s:g} seconds: its machine is down "
                    f"or out of reach, or the process is stuck. {GO_ON}"
                )
        return None

    def _read(self) -> list[str]:
        """The last beat of every rank; empty for one that is still on its way here."""
        assert self.store is not None
        names = [f"beat {rank}" for rank in range(self.world)]
        if self.store.check(names):
            return [value.decode() for value in self.store.multi_get(names)]
        return [self.store.get(name).decode() if self.store.check([name]) else "" for name in names]

    def _write(self, count: str) -> None:
        assert self.store is not None
        self.store.set(f"beat {self.rank}", "\t".join([count, *self.me]))

    def _lost(self, rank: int) -> str:
        process = process_of(self.beats[rank][0])
        return (
            f"rank {rank} on {process.host} (process {process.pid}) has ended without a word: it was killed, perhaps "
            f"for lack of memory, or crashed. {GO_ON}"
        )

    def _no_store(self) -> str:
        self.store_is_gone = True
        address = os.environ.get("MASTER_ADDR", "rank 0")
        return (
            f"rank {self.rank} on {self.me.host} cannot reach the store at {address}, where the ranks meet: rank 0, or "
            f"the launcher or machine it is on, has ended. {GO_ON}"
        )

    # ------------------------------------------------------------------------------------------------- both of them

    def _tell(self, text: str) -> str:
        """All ranks; returns what was told first, this or another rank's."""
        assert self.store is not None
        return self.store.compare_set(TROUBLE, "", text).decode()

    def _say(self, text: str) -> None:
        """Once on each machine, whichever rank it is about: all may meet the same bad record."""
        # Both threads may have it to say: the second goes on only when it has been said. Not for ever: the first may
        # wait for a store whose machine has gone.
        alone = self.saying.acquire(timeout=self.leave_s)
        try:
            if self._first_to_say(text.partition(FAILED)[2] or text):
                os.write(2, f"{text}\n".encode())  # one write, so that the lines of several ranks don't mingle
        finally:
            if alone:
                self.saying.release()

    def _first_to_say(self, text: str) -> bool:
        if self.store_is_gone:
            return True
        assert self.store is not None
        name = f"said {xxhash.xxh3_64_hexdigest(text.encode())} {self.me.machine or self.me.host}"
        try:
            return self.store.add(name, 1) == 1
        except RuntimeError:
            return True


def process_of(beat: str) -> Process:
    return Process(*beat.split("\t")[1:])


def follows_from_a_loss(error: BaseException) -> bool:
    """Is this what a collective says when another rank has gone? Nobody has to be gone for one to take too long."""
    text = str(error)
    lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text)
    return lost and "imed out" not in text
