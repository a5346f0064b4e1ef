"""What people look at in a run of reinforcement learning. Everything is in the run folder:

    rollouts.jsonl         attempts of some rollouts, one a line (train/reinforcement/recorded.py), and rollouts/ their
                           pictures
    learned.jsonl          of these, when an update learned from them: advantage, and by how much engine and trainer
                           disagreed about every token
    zero_gradient.jsonl    of every logged update, where attempts and tokens went (train/reinforcement/zero_gradient.py)
    rollouts.html          the first two as a page (train/reinforcement/rollouts_page.py)
    curves.png ...         the run's numbers (train/reinforcement/curves.py), and the sampler's figures

A run that goes on from a checkpoint drops the lines of what will be done again, so each is there once.

Shape letters:  T tokens
"""

import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.batch import PackedBatch, Role
from ernie_model.atomic import atomic_write
from ernie_model.processor import Processor
from train.checkpoint import everyones
from train.ledger import drop_after
from train.loop import Beside
from train.policy import PolicyOutput
from train.reinforcement import curves, difficulty_plot
from train.reinforcement.difficulty import DifficultySampler
from train.reinforcement.groups import Summary
from train.reinforcement.prompts import Prompts
from train.reinforcement.recorded import Place, key_of, lines_of, to_line
from train.reinforcement.rollouts_page import evenly, table_of, write_page
from train.reinforcement.source import KINDS, Rollout, kind_of
from train.reinforcement.time_split import time_line, time_metrics
from train.reinforcement.zero_gradient import Asked, Taught, asked_of, entry, fates_of, off, table_text
from train.rl_config import RLConfig
from train.tracking import Tracker

ROLLOUTS, LEARNED, ZERO, PAGE = "rollouts.jsonl", "learned.jsonl", "zero_gradient.jsonl", "rollouts.html"

_ROLLOUT = re.compile(r'"rollout":(\d+)')
logger = logging.getLogger(__name__)


class Record(Beside):
    """Of one rank; the main rank writes.

    Args:
        rollouts, step: rollouts and updates that the run has done already; what is written of later ones is dropped.
    """

    def __init__(
        self,
        config: RLConfig,
        prompts: Prompts,
        sampler: DifficultySampler,
        processor: Processor,
        folder: Path,
        *,
        main: bool,
        rollouts: int,
        step: int,
    ):
        self.config, self.prompts, self.sampler, self.processor = config, prompts, sampler, processor
        self.folder, self.main = folder, main
        self._asked: Asked | None = None
        self._said: set[str] = set()
        """What was found to be off, and told."""
        self._wanted: dict[tuple[str, str], list[dict[str, Any]]] = {}
        """Recorded attempts that no update has learned from yet, by question and key: the same tokens may have been
        written several times."""
        self._rows: list[list[tuple[int, int, dict[str, Any]]]] = []
        """Of each row of the update that is to come, those in it."""
        self._learning: list[tuple[dict[str, Any], Tensor, Tensor]] = []
        """Which attempt, log p_old - log p_engine of its tokens (T,), its advantage (1,): of the last update."""
        self._step = step
        self._taught: Taught | None = None
        self._times: dict[str, float] = {}
        """Metrics of the last logged update."""
        self._failed = False
        self._due: int | None = None
        """A rollout that the trackers have not been shown."""
        if main:
            folder.mkdir(parents=True, exist_ok=True)
            drop_after(folder / ROLLOUTS, rollouts - 1, "rollout")
            for name in (LEARNED, ZERO):
                drop_after(folder / name, step)
            learned = {(one["group"], one["attempt"]) for one in read_lines(folder / LEARNED)}
            self._want(read_lines(folder / ROLLOUTS), learned)
        self._wanted = everyones(self._wanted)[0]
        self._forget(rollouts)

    # ------------------------------------------------------------------------------------------------- of a rollout

    def told(self, rollout: Rollout) -> None:
        """All ranks together."""
        self._write_learned()
        config = self.config.rollout
        held = {group: attempts for of_rank in everyones(dict(rollout.held)) for group, attempts in of_rank.items()}
        accepted = set(rollout.accepted)
        fates = {
            one.outcome.group: fates_of(
                one,
                usable=one.outcome.group in rollout.usable,
                accepted=one.outcome.group in accepted,
                waiting=one.outcome.group in rollout.waiting,
                held=held.get(one.outcome.group, frozenset()),
                mask_truncated=config.mask_truncated,
            )
            for one in rollout.summaries
        }
        self._asked = asked_of(
            rollout.number,
            rollout.summaries,
            list(fates.values()),
            from_queue=len(accepted - fates.keys()),
            stale=rollout.stale,
        )
        self._forget(rollout.number)
        every = self.config.record.every
        if every and rollout.number % every == 0:
            self._write(rollout, fates)

    def _forget(self, rollout: int) -> None:
        """Attempts that no update will learn from any more: the queue keeps nothing for so long."""
        oldest = rollout - self.config.rollout.max_lag - 1
        self._keep_wanted(lambda where: where["rollout"] >= oldest)

    def _keep_wanted(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        left = {key: [where for where in ones if keep(where)] for key, ones in self._wanted.items()}
        self._wanted = {key: ones for key, ones in left.items() if ones}

    def _write(self, rollout: Rollout, fates: Mapping[int, Sequence[str]]) -> None:
        chosen = choose(rollout.summaries, self.config.record.groups)
        kinds = {one.outcome.group: kind_of(one) for one in rollout.summaries}
        domains = {one.outcome.group: one.domain for one in rollout.summaries}
        own = [
            line
            for group in rollout.groups
            if (number := group.ticket.group) in chosen
            for line in lines_of(
                group,
                self.prompts.questions[group.ticket.prompt],
                Place(rollout=rollout.number, step=self._step, domain=domains[number], kind=kinds[number]),
                fates[number],
                rollout.advantages.get(number),
                self.processor,
                self.folder,
            )
        ]
        lines = sorted(
            (line for of_rank in everyones(own) for line in of_rank), key=lambda one: (one["group"], one["attempt"])
        )
        self._want(lines, set())
        self._due = rollout.number
        for line in lines:
            self._put(ROLLOUTS, line)

    def _want(self, lines: Sequence[Mapping[str, Any]], learned: set[tuple[int, int]]) -> None:
        for one in lines:
            if one["fate"] in ("learned", "waiting") and (one["group"], one["attempt"]) not in learned:
                where = {name: one[name] for name in ("rollout", "group", "attempt")}
                self._wanted.setdefault((one["id"], one["key"]), []).append(where)

    # ------------------------------------------------------------------------------------------------- of an update

    def before(self, microbatches: Sequence[PackedBatch]) -> None:
        self._write_learned()
        self._step += 1
        taken: Counter[tuple[str, str]] = Counter()
        self._rows = [self._find(batch, taken) for batch in microbatches] if self._wanted else []

    def _find(self, batch: PackedBatch, taken: Counter[tuple[str, str]]) -> list[tuple[int, int, dict[str, Any]]]:
        """The recorded attempts in a row: first token, tokens, which it is. `taken`: how many rows before have."""
        found, start = [], 0
        for segment, tokens in enumerate(batch.lengths):
            if batch.roles and batch.roles[segment] is Role.ATTEMPT:
                dataset = batch.datasets[segment] if batch.datasets else ""
                key = f"{dataset}/{batch.ids[segment]}", key_of(batch.token_T[start : start + tokens].tolist())
                if taken[key] < len(left := self._wanted.get(key, ())):
                    found.append((start, tokens, left[taken[key]]))
                    taken[key] += 1
            start += tokens
        return found

    def terms(self, batch: PackedBatch, output: PolicyOutput) -> float:
        for start, tokens, where in self._rows.pop(0) if self._rows else ():
            own = slice(start, start + tokens - 1)  # behind its last token nothing is the attempt's
            old_T = output.logprob_T.detach() if batch.old_logprob_T is None else batch.old_logprob_T
            assert batch.engine_logprob_T is not None and batch.advantage_T is not None
            sampled_T = batch.weight_T[own] != 0
            gap_T = torch.where(sampled_T, old_T[own].float() - batch.engine_logprob_T[own], torch.nan)
            self._learning.append((where, gap_T, batch.advantage_T[own][sampled_T][:1]))
        return 0.0

    def _write_learned(self) -> None:
        """What the last update learned from. All ranks together; while none of what is recorded is waited for, nothing
        is asked of the others."""
        if not self._wanted:
            return
        own = []
        for where, gap_T, advantage_1 in self._learning:
            gaps = [None if math.isnan(gap) else round(gap, 4) for gap in gap_T.tolist()]
            advantage = round(float(advantage_1[0]), 6) if len(advantage_1) else None
            own.append({"step": self._step, **where, "advantage": advantage, "gaps": gaps})
        self._learning = []
        lines = [line for of_rank in everyones(own) for line in of_rank]
        done = {(line["group"], line["attempt"]) for line in lines}
        self._keep_wanted(lambda where: (where["group"], where["attempt"]) not in done)
        for line in sorted(lines, key=lambda one: (one["group"], one["attempt"])):
            self._put(LEARNED, line)

    def metrics(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """What else there is to report of a logged update."""
        rollout = self.config.rollout
        self._taught = Taught.of(metrics, rollout.groups // rollout.updates * rollout.attempts)
        self._put(ZERO, entry(step, self._asked, self._taught))
        found = time_metrics(metrics, rollout.updates)
        self._times = {**metrics, **found} if found else {}
        for part in (self._asked, self._taught):
            found |= {} if part is None else part.metrics()
        return found

    def notes(self, step: int) -> list[str]:
        """For whoever watches, after `metrics`: where gradients go, now and then, and at once when something is off."""
        found = off(self._asked, self._taught)
        new = [words for name, words in found.items() if name not in self._said]
        self._said = set(found)  # what comes back is told again
        every = self.config.record.zero_gradient_every
        if not new and not (every and step % every == 0):
            return []
        head = f"where gradients go{': ' if new else ''}{'; '.join(new)}"
        times = [time_line(self._times)] if self._times else []
        return ["\n".join([head, table_text(self._asked, self._taught), *times])]

    def show(self, step: int, trackers: Sequence[Tracker], *, last: bool = False) -> list[str]:
        """The page, the tables and the curves, where they are due; what was written. What cannot be drawn (a full disk)
        is said once and costs a picture, never the run."""
        if not self.main:
            return []
        try:
            return self._show(step, trackers, last=last)
        except Exception as error:
            if not self._failed:
                logger.warning(
                    "step %d: the record of rollouts cannot be drawn: %s: %s", step, type(error).__name__, error
                )
            self._failed = True
            return []

    def _show(self, step: int, trackers: Sequence[Tracker], *, last: bool) -> list[str]:
        every = self.config.record.plots_every
        written = []
        if self._due is not None or last:
            recorded = recorded_rollouts(self.folder / ROLLOUTS)
            if recorded:
                atomic_write(self.folder / PAGE, self._page(recorded))
                written.append(PAGE)
            if self._due is not None and (rows := read_lines(self.folder / ROLLOUTS, {self._due})):
                columns, cells = table_of(rows, self.config.record.attempts, self.folder)
                for tracker in trackers:
                    tracker.log_table("rollouts", columns, cells, step)
            self._due = None
        if last or (every and step % every == 0):
            updates = curves.history(self.folder)
            if any("rollout" in one for one in updates):
                curves.draw(updates, path := self.folder / curves.FILE, f"{self.config.run.name}, step {step}")
                written.append(curves.FILE)
                for tracker in trackers:
                    tracker.log_image("curves", path, step)
            if self.sampler.history:
                difficulty_plot.log(self.sampler, self.folder, trackers, step)
                written.append(difficulty_plot.FILE)
        return written

    def finish(self, step: int, trackers: Sequence[Tracker]) -> list[str]:
        """After the last update, on all ranks: lines for the console."""
        self._write_learned()
        written = self.show(step, trackers, last=True)
        lines = [time_line(self._times)] if self._times else []
        if PAGE in written:
            lines.append(f"rollouts  {self.folder / PAGE}   (what was asked and answered, token by token)")
        drawn = [str(self.folder / name) for name in written if name.endswith(".png")]
        return lines + ([f"curves    {', '.join(drawn)}"] if drawn else [])

    def _page(self, recorded: Sequence[int]) -> str:
        shown = set(evenly(recorded, self.config.record.rollouts))
        return write_page(
            f"{self.config.run.name}: rollouts",
            read_lines(self.folder / ROLLOUTS, shown),
            read_lines(self.folder / LEARNED, shown),
            read_lines(self.folder / ZERO, shown),
            curves.rewards_of(curves.history(self.folder)),
            folder=self.folder,
            attempts=self.config.record.attempts,
            recorded=len(recorded),
            band=self.config.objective.bounds,
        )

    # --------------------------------------------------------------------------------------------------- saving it

    def state_dict(self) -> dict[str, Any]:
        """JSON-able. All ranks ask together; what was written so far is on the disk."""
        self._write_learned()
        if self.main:
            for name in (ROLLOUTS, LEARNED, ZERO):
                with (self.folder / name).open("a") as file:
                    os.fsync(file.fileno())
        asked = None if self._asked is None else asdict(self._asked)
        return {"asked": asked, "due": self._due, "said": sorted(self._said)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._asked = None if state["asked"] is None else Asked(**state["asked"])
        self._due, self._said = state["due"], set(state["said"])

    def _put(self, name: str, line: Mapping[str, Any]) -> None:
        if self.main:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(to_line(line))


def read_lines(path: Path, rollouts: AbstractSet[int] | None = None) -> list[dict[str, Any]]:
    """Of these rollouts; None: of all."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if rollouts is None or _rollout_of(line) in rollouts]


def recorded_rollouts(path: Path) -> list[int]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as lines:
        return sorted({number for line in lines if (number := _rollout_of(line)) is not None})


def _rollout_of(line: str) -> int | None:
    """Lines are long, and most are not read: the number stands near their beginning."""
    found = _ROLLOUT.search(line, 0, 100)
    return None if found is None else int(found[1])


def choose(summaries: Sequence[Summary], most: int) -> set[int]:
    """Groups to record: some whose attempts differ, and some of every other kind; earlier ones first."""
    of_kind = {kind: [one.outcome.group for one in summaries if kind_of(one) == kind] for kind in KINDS}
    chosen: list[int] = []
    while len(chosen) < most and any(of_kind.values()):
        # mixed, right, mixed, wrong, mixed, ...: the mixed ones are what is learned from
        for kind in KINDS[1:]:
            for name in ("mixed", kind):
                if of_kind[name]:
                    chosen.append(of_kind[name].pop(0))
    return set(chosen[:most])
