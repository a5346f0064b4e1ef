"""Which records a run saw, step by step, and which of them went wrong.

    RUN_FOLDER/
      data/rank-0.jsonl     {"step": 4711, "rows": [["a-17", "a-3"], ["b-8"]]}          every update; one file per rank
      nonfinite.jsonl       {"step": 12, "records": ["a-3"], "gradients": {...}, ...}   updates that were left out
      spikes.jsonl          {"step": 80, "loss": 9.1, "records": [["b-8", 11.2], ...]}  losses far above the last ones

Every rank writes its own rows, so that no update waits for another rank's names; the rows of an update lie in their
order on that rank. A start that goes on from a checkpoint drops the lines of the updates that will be done again.

Shape letters:  T tokens   S segments
"""

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor

from data.batch import PackedBatch
from ernie_model.parts import part_of

WINDOW = 64
"""Losses that a new one is compared with."""
LEAST = 16
"""Before there are as many, nothing is called a spike: the first losses of a run fall steeply."""


class Segment(NamedTuple):
    """One record of an update: a conversation, a pair with all its answers."""

    record: str
    loss: float
    """Mean negative log-likelihood of its target tokens; 0 where it has none."""


class Evidence:
    """What one update leaves behind for whoever must find out which record went wrong.

    Stays on the device, and costs a few bytes per token; the host asks for it only after something did go wrong.
    """

    def __init__(self):
        self.rows: list[tuple[list[str], list[int], Tensor, Tensor]] = []
        """Names of the records, tokens of each, logprob_T, weight_T."""
        self.gradients: dict[str, list[int]] = {}
        """By part of the model: [parameters whose gradient is not finite, parameters with a gradient]."""

    def add(self, batch: PackedBatch, logprob_T: Tensor) -> None:
        lengths = [sum(batch.lengths[segment] for segment in segments) for segments in batch.record_segments]
        self.rows.append((names(batch), lengths, logprob_T.detach(), batch.weight_T))

    def blame(self, finite: Mapping[str, bool]) -> None:
        """Args:
        finite: is the gradient of a parameter finite, by its name.
        """
        for name, fine in finite.items():
            counts = self.gradients.setdefault(part_of(bare(name)).value, [0, 0])
            counts[0] += not fine
            counts[1] += 1
        self.gradients = {part: counts for part, counts in self.gradients.items() if counts[0]}

    def segments(self) -> list[Segment]:
        """Waits for the device."""
        out = []
        for records, lengths, logprob_T, weight_T in self.rows:
            # Rows that are not learned may hold anything: 0 * nan would be nan.
            nll_T = torch.where(weight_T == 0, 0.0, -logprob_T.double() * weight_T.double()).cpu()
            sums = [
                (nll.sum(), w.sum()) for nll, w in zip(nll_T.split(lengths), weight_T.cpu().split(lengths), strict=True)
            ]
            losses = [float(nll / weight.clamp(min=1e-9)) for nll, weight in sums]
            out += [Segment(*both) for both in zip(records, losses, strict=True)]
        return out


def names(batch: PackedBatch) -> list[str]:
    """DATASET/ID of every record; the id alone where there is no mixture."""
    datasets = batch.datasets or ("",) * len(batch.ids)
    of_segments = [f"{dataset}/{id_}" if dataset else id_ for dataset, id_ in zip(datasets, batch.ids, strict=True)]
    return [of_segments[segments[0]] for segments in batch.record_segments]


def bare(name: str) -> str:
    """A parameter's name in ErnieModel, without the names of what wraps it (DDP, the policy)."""
    return name.removeprefix("module.").removeprefix("model.")


def nonfinite_entry(step: int, metrics: dict[str, float], evidence: Evidence, segments: Sequence[Segment]) -> dict:
    """One line of nonfinite.jsonl, from the segments of all ranks.

    `records` are those with a loss that is not finite. When every loss was finite the gradient went wrong on its way
    back, and any record may have done it: then `suspects` holds all of them.
    """
    bad = [segment.record for segment in segments if not math.isfinite(segment.loss)]
    entry: dict[str, Any] = {"step": step, "loss": number(metrics["loss"]), "grad_norm": number(metrics["grad_norm"])}
    entry["records"] = bad
    if not bad:
        entry["suspects"] = [segment.record for segment in segments]
    return entry | {"gradients": evidence.gradients}


def spike_entry(step: int, loss: float, usual: float, segments: Sequence[Segment], most: int = 16) -> dict:
    """One line of spikes.jsonl: the `most` records with the highest loss, from all ranks."""
    worst = sorted(segments, key=lambda segment: -segment.loss)[:most]
    return {"step": step, "loss": loss, "usual": usual, "records": [list(segment) for segment in worst]}


def is_spike(loss: float, recent: Sequence[float], factor: float) -> bool:
    """loss > median + factor * MAD, where MAD is the median of |x - median|; False before `LEAST` losses are known.

    recent 1 2 3 4 9, factor 2:  median 3, distances 2 1 0 1 6, MAD 1  →  a spike is more than 5
    """
    if len(recent) < LEAST:
        return False
    median = statistics.median(recent)
    return loss > median + factor * statistics.median(abs(x - median) for x in recent)


def number(value: float) -> float | str:
    """JSON has no nan and no inf."""
    return value if math.isfinite(value) else str(value)


class Ledger:
    """The three files. Every rank has one; only the main rank writes what concerns all.

    Args:
        step: what is written about later updates will be done again, and is dropped.
    """

    def __init__(self, folder: Path, *, step: int, rank: int = 0, ranks: int = 1):
        self.folder = folder
        (folder / "data").mkdir(parents=True, exist_ok=True)
        mine = folder / "data" / f"rank-{rank}.jsonl"
        stale = [mine]
        if rank == 0:
            others = {path for path in (folder / "data").glob("rank-*.jsonl")}
            others -= {folder / "data" / f"rank-{other}.jsonl" for other in range(ranks)}  # they drop their own
            stale += [*others, folder / "nonfinite.jsonl", folder / "spikes.jsonl"]
        for path in stale:
            drop_after(path, step)
        self.file: TextIO = mine.open("a", encoding="utf-8")

    def saw(self, step: int, microbatches: Sequence[PackedBatch]) -> None:
        line = {"step": step, "rows": [names(batch) for batch in microbatches]}
        self.file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.file.flush()

    def write(self, file: str, entry: dict[str, Any]) -> None:
        with (self.folder / file).open("a", encoding="utf-8") as out:
            out.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def sync(self) -> None:
        """Before a checkpoint: it must not know of updates that this file lost in a power cut."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def drop_after(path: Path, last: int, key: str = "step") -> None:
    """Cut a file of lines with growing numbers `key` after those of `last`, and a line that a kill tore in two."""
    if not path.exists():
        return
    end = 0
    with path.open("rb") as file:
        for line in file:
            try:
                if not line.endswith(b"\n") or json.loads(line)[key] > last:
                    break
            except ValueError:
                break
            end += len(line)
    with path.open("r+b") as file:
        file.truncate(end)
