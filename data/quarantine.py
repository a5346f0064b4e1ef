"""Quarantine: records that cannot be trained on are left out, written down, and counted; too many of them end the run.

    quarantine.jsonl
      {"id": "sign-17", "dataset": "photos", "file": "photos.jsonl", "line": 17, "stage": "media", "reason": "..."}

Each record stands there once, however often and on however many ranks it is met: whoever adds a line holds the file's
lock, and looks first at what others have added. So all processes that share the folder also share the count.
"""

import fcntl
import json
import os
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from data.errors import DataError, Refusal, Stage

FILE = "quarantine.jsonl"
TOLERATED = 10
"""Refused records that are always tolerated (unless `max_bad` is 0): a share of a small dataset would be none."""
EXAMPLES = 5

Identity = tuple[str, str | None, int | None, str]


class TooManyBadError(DataError):
    """More records were refused than `data.max_bad` allows."""


class Quarantine:
    """The refused records of one run.

    `folder` is where the file lies; None keeps them in memory. `max_bad` is the share of the `num_records` records that
    may be refused; 0 tolerates none. Safe for threads and processes.
    """

    def __init__(self, folder: Path | None = None, *, max_bad: float = 0.001, num_records: int = 0):
        self.path = None if folder is None else folder / FILE
        self.max_bad = max_bad
        self.num_records = num_records
        """Records there are; of streams, which have no length, those seen so far."""
        self._refusals: dict[Identity, Refusal] = {}
        self._read_until = 0  # bytes of the file that are known here
        self._lock = threading.RLock()  # training and evaluation add from different threads

    @staticmethod
    def start_anew(folder: Path) -> None:
        """Forget what an earlier attempt refused: its data may have been mended."""
        (folder / FILE).unlink(missing_ok=True)

    def add(self, refusal: Refusal) -> None:
        """Write it down, unless it is known. Raises TooManyBadError when there are now more than are tolerated."""
        with self._lock:
            if _identity(refusal) in self._refusals:
                return
            self._record([refusal])
        if len(self) > self.tolerated:
            raise TooManyBadError(self.summary())

    @property
    def tolerated(self) -> int:
        return max(TOLERATED, int(self.max_bad * self.num_records)) if self.max_bad else 0

    def __len__(self) -> int:
        return len(self._refusals)

    @property
    def refusals(self) -> Sequence[Refusal]:
        return tuple(self._refusals.values())

    def summary(self) -> str:
        """Counts by dataset and stage, the first examples, and the way out."""
        counts = Counter((refusal.dataset, refusal.stage.value) for refusal in self._refusals.values())
        bad = f"{len(self)} record{'s' * (len(self) != 1)}"
        lines = [f"{bad} cannot be trained on; data.max_bad={self.max_bad:g} tolerates {self.tolerated}."]
        lines += [f"  {count} of {dataset}, at stage {stage}" for (dataset, stage), count in counts.most_common()]
        lines.append("The first of them:")
        lines += [f"  {refusal.reason}" for refusal in self.refusals[:EXAMPLES]]
        if self.path is not None:
            lines.append(f"All of them: {self.path}")
        lines.append("Mend or remove these records, or raise data.max_bad (the share that may be left out).")
        return "\n".join(lines)

    def state_dict(self) -> list[dict[str, Any]]:
        """JSON-able."""
        with self._lock:
            return [to_json(refusal) for refusal in self._refusals.values()]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Also writes what the file, perhaps a new one, does not have yet."""
        with self._lock:
            self._record([from_json(entry) for entry in state])

    def _record(self, refusals: Sequence[Refusal]) -> None:
        if self.path is None:
            self._refusals |= {_identity(refusal): refusal for refusal in refusals}
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                self._read_new(file)
                new = [refusal for refusal in refusals if _identity(refusal) not in self._refusals]
                lines = "".join(json.dumps(to_json(refusal), ensure_ascii=False) + "\n" for refusal in new)
                file.write(lines.encode("utf-8", "backslashreplace"))
                file.flush()
                self._read_until = file.tell()
                self._refusals |= {_identity(refusal): refusal for refusal in new}
        except OSError as error:
            raise DataError(f"{self.path} cannot be written ({error.strerror}). Choose another run.folder.") from error

    def _read_new(self, file: BinaryIO) -> None:
        """What was there before, or other ranks have added. A last line without its end was cut off by a kill: drop."""
        file.seek(self._read_until)
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.ftruncate(file.fileno(), self._read_until + whole)
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                refusal = from_json(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{self.path}: line {number} is damaged ({error}). Remove it; the record will be refused again."
                ) from error
            self._refusals[_identity(refusal)] = refusal
        file.seek(0, os.SEEK_END)


def _identity(refusal: Refusal) -> Identity:
    return refusal.dataset, refusal.file, refusal.line, refusal.id


def to_json(refusal: Refusal) -> dict[str, Any]:
    return {**vars(refusal), "stage": refusal.stage.value}


def from_json(entry: dict[str, Any]) -> Refusal:
    return Refusal(**{**entry, "stage": Stage(entry["stage"])})
