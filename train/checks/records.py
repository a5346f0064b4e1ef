"""Every record of the data, as training would read, measure and decode it, in several processes.

    keys ──► pool of processes ──► Checked: sizes, or why it is refused
              check_record               │
                                         ├──► quarantine.jsonl, as the run would write it
                                         └──► Statistics: lengths, trained share, images, answers, packing

Pictures are decoded in full, so that a file that was cut short is found now. What is kept of a record is a few numbers.
"""

import itertools
import multiprocessing
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.batch import Role
from data.dataset import StreamDataset
from data.errors import Refusal
from data.fit import Rules
from data.mixture import Mixture
from data.order import Key
from data.pack import Packer, Sized
from data.prepare import Checked, check_possible, check_record
from data.quarantine import Quarantine
from ernie_model.processor import Processor
from train.checks.findings import Finding, ok, problem, warning
from train.config import DataConfig
from train.memory import keep_freed_memory

CHUNK = 16
"""Records handed to a process at a time."""
WORTH_PROCESSES = 256
"""Fewer records are gone through here: starting a process takes seconds."""
LONGEST = 5
NAMED = 10
"""Refused records that are told one by one; all of them are in quarantine.jsonl."""
POOR_FILL = 0.85
POOR_SHARE = 0.01


@dataclass
class Statistics:
    """The usable records of one part of the data, in the order of the sets."""

    name: str
    keys: list[Key] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int, int, int]] = field(default_factory=list)
    """tokens, trained tokens, patches, images and videos"""
    answers: dict[Role, list[int]] = field(default_factory=dict)
    """Learned tokens of each answer of pairs, and of labelled ones."""
    cut: int = 0
    """Pairs of which one answer is the beginning of the other."""
    score_gaps: list[float] = field(default_factory=list)
    """Of the pairs whose answers have scores: the chosen one's less the rejected one's."""
    refusals: list[Refusal] = field(default_factory=list)
    is_whole: bool = True
    """False for a stream, of which only the beginning was looked at."""

    def add(self, key: Key, one: Checked) -> None:
        if one.refusal is not None:
            self.refusals.append(one.refusal)
            return
        self.keys.append(key)
        self.ids.append(one.id)
        self.sizes.append((one.tokens, one.trained, one.patches, one.images + one.videos))
        for role, learned in one.answers:
            self.answers.setdefault(role, []).append(learned)
        self.cut += one.is_cut
        if one.score_gap is not None:
            self.score_gaps.append(one.score_gap)

    def column(self, index: int) -> np.ndarray:
        return np.array(self.sizes, dtype=np.int64).reshape(-1, 4)[:, index]

    @property
    def tokens(self) -> np.ndarray:
        return self.column(0)

    @property
    def trained(self) -> np.ndarray:
        return self.column(1)

    @property
    def patches(self) -> np.ndarray:
        return self.column(2)

    @property
    def media(self) -> np.ndarray:
        return self.column(3)


# ------------------------------------------------------------------------------------------------- going through them


def check_records(
    mixture: Mixture,
    processor: Processor,
    rules: Rules,
    quarantine: Quarantine,
    *,
    name: str,
    processes: int,
    stream_records: int,
    progress: bool = True,
) -> Statistics:
    """Look at every record (of a stream, at the first `stream_records`). Refused ones go into the quarantine."""
    found = Statistics(name, is_whole=not mixture.streaming)
    keys = list(all_keys(mixture, stream_records))
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    check_possible(mixture, rules)
    with Progress(*columns, transient=True, disable=not progress) as bar, ExitStack() as at_end:
        results: Iterator[Checked]
        if processes == 1 or len(keys) < WORTH_PROCESSES:
            results = (check_record(mixture, key, processor, rules) for key in keys)
        else:
            # `spawn`: a forked child of a process in which torch runs threads may hang.
            context = multiprocessing.get_context("spawn")
            pool = at_end.enter_context(context.Pool(processes, _start, (mixture, processor, rules)))
            results = pool.imap(_check, keys, CHUNK)
        for key, one in zip(bar.track(keys, description=name), results, strict=True):
            if one.refusal is not None:
                quarantine.add(one.refusal)
            found.add(key, one)
    return found


def all_keys(mixture: Mixture, stream_records: int) -> Iterator[Key]:
    for index, one in enumerate(mixture.sets):
        if not isinstance(one.dataset, StreamDataset):
            yield from (Key(index, number) for number in range(len(one.dataset)))
            continue
        for block in itertools.count():
            length = one.dataset.block_length(block)
            start = block * one.dataset.block_size
            yield from (Key(index, number) for number in range(start, min(start + length, stream_records)))
            if length < one.dataset.block_size or start + length >= stream_records:
                break


_work: tuple[Mixture, Processor, Rules]


def _start(mixture: Mixture, processor: Processor, rules: Rules) -> None:
    """In a process of the pool, once."""
    global _work
    torch.set_num_threads(1)  # the processes share the cores already
    keep_freed_memory()  # every picture takes the megabytes that the last one had
    _work = mixture, processor, rules


def _check(key: Key) -> Checked:
    mixture, processor, rules = _work
    return check_record(mixture, key, processor, rules)


# ------------------------------------------------------------------------------------------------------ what it means


def judge(found: Statistics, quarantine: Quarantine, config: DataConfig) -> list[Finding]:
    told = [f"{len(found.ids):,} records of {found.name} can be trained on"]
    if not found.is_whole:
        told.append("(a stream: only its beginning was looked at)")
    findings = [ok(" ".join(told))] if found.ids else [problem(f"no record of {found.name} can be trained on.")]
    if found.refusals:
        findings += refused(found.refusals, quarantine, config)
    if twice := duplicates(found):
        named = ", ".join(twice[:LONGEST]) + (", ..." if len(twice) > LONGEST else "")
        findings.append(
            warning(
                f"{found.name} uses ids more than once: {len(twice)} of them ({named}). Is the data in there twice? "
                "Reports could not tell these records apart; give each its own id, or none."
            )
        )
    findings += judge_answers(found)
    if found.ids:
        share = found.trained.sum() / found.tokens.sum()
        if share < POOR_SHARE:
            findings.append(
                warning(
                    f"only {share:.2%} of the tokens are trained: nearly all of the work goes into prompts and images. "
                    "Smaller images (data.too_long=shrink_images), or more questions per image, use it better."
                )
            )
    return findings


def judge_answers(found: Statistics) -> list[Finding]:
    """Of labelled answers, whether there are both kinds; of pairs, whether they are whole and the right way round."""
    findings = []
    counts = {role: len(found.answers.get(role, ())) for role in (Role.WANTED, Role.UNWANTED)}
    if any(counts.values()):
        text = f"{counts[Role.WANTED]:,} answers are wanted and {counts[Role.UNWANTED]:,} are not"
        way_out = "without both kinds there is nothing to tell apart. Is the label read right (data.columns)?"
        findings.append(ok(text) if all(counts.values()) else warning(f"{text}: {way_out}"))
    if found.cut:
        findings.append(
            warning(
                f"in {found.cut:,} of {len(found.ids):,} pairs, one answer is the beginning of the other: it "
                "teaches when to stop, and little else. Was it cut off?"
            )
        )
    backwards = sum(gap <= 0 for gap in found.score_gaps)
    if backwards:
        findings.append(
            warning(
                f"in {backwards:,} of {len(found.score_gaps):,} pairs with scores, the chosen answer has no higher one "
                "than the rejected. Are they the right way round?"
            )
        )
    return findings


def duplicates(found: Statistics) -> list[str]:
    """Ids that several records of one set have."""
    ids: defaultdict[int, list[str]] = defaultdict(list)
    for key, id in zip(found.keys, found.ids, strict=True):
        ids[key.set].append(id)
    return [id for of_set in ids.values() for id, count in Counter(of_set).items() if count > 1]


def refused(refusals: Sequence[Refusal], quarantine: Quarantine, config: DataConfig) -> list[Finding]:
    """`refusals`: of one part of the data; the quarantine has those of all, against which the limit is."""
    tolerated = Quarantine(max_bad=config.max_bad, num_records=quarantine.num_records).tolerated
    mark = problem if len(quarantine) > tolerated else warning
    counts = Counter(refusal.stage.value for refusal in refusals)
    stages = ", ".join(f"{count} at stage {stage}" for stage, count in counts.most_common())
    findings = [mark(f"{refusal.stage.value}: {refusal.reason}") for refusal in refusals[:NAMED]]
    rest = f"; all of them are in {quarantine.path}" if quarantine.path else ""
    if len(quarantine) > tolerated:
        way_out = f"more than data.max_bad={config.max_bad:g} tolerates ({tolerated}), so training would stop. Mend or "
        way_out += "remove them, or raise data.max_bad"
    else:
        way_out = f"data.max_bad={config.max_bad:g} tolerates {tolerated}; training would leave them out"
    return [*findings, mark(f"{len(refusals)} records are refused ({stages}): {way_out}{rest}.")]


def rows_of(found: Statistics, mixture: Mixture, config: DataConfig) -> list[list[int]]:
    """The rows that one epoch packs into, in the order of training: indices into the statistics."""
    index = {key: number for number, key in enumerate(found.keys)}
    if found.is_whole:
        draws = [index[key] for key in one_epoch(mixture, config) if key in index]
    else:
        draws = list(range(len(found.keys)))
    waiting = iter(draws)

    def draw() -> Sized[int] | None:
        number = next(waiting, None)
        if number is None:
            return None
        tokens, _, patches, _ = found.sizes[number]
        return Sized(number, tokens, patches)

    packer = Packer(draw, max_tokens=config.max_tokens, max_patches=config.max_patches, lookahead=config.lookahead)
    rows = []
    while row := packer.next_row():
        rows.append([sized.item for sized in row])
    return rows


def one_epoch(mixture: Mixture, config: DataConfig) -> Iterator[Key]:
    order = mixture.order(seed=config.seed, shuffle=config.shuffle)
    while order.epochs() < 1:
        yield order.draw()


def judge_packing(fill: float, num_rows: int, steps: int, config: DataConfig) -> list[Finding]:
    """`steps`: updates of one epoch on one process."""
    text = f"an epoch is {num_rows:,} x {config.max_tokens:,} tokens, {fill:.1%} filled; on one process that makes "
    text += f"{steps:,} x {config.accumulation} (updates x data.accumulation)"
    if fill < POOR_FILL and num_rows > 1:
        way_out = "A larger data.max_tokens or data.lookahead fills them better"
        return [warning(f"{text}. The rest of every row is computed for nothing. {way_out}.")]
    return [ok(text)]


def describe(found: Statistics) -> Iterator[str]:
    """Lines of text: histograms, and the longest records by name."""
    yield from histogram("tokens per record", found.tokens)
    share = 100 * found.trained / found.tokens
    yield from histogram("trained tokens per record, %", share, edges=(0, 1, 2, 5, 10, 20, 50, 100))
    for role, learned in found.answers.items():
        yield next(histogram(f"trained tokens of {role.value} answers", np.array(learned)))
    if found.media.any():
        yield from histogram("images and videos per record", found.media)
        yield from histogram("patches per record", found.patches)
    yield "longest records"
    for number in np.argsort(-found.tokens, kind="stable")[:LONGEST]:
        yield f"    {found.tokens[number]:>8,}  {found.ids[number]}"


def histogram(title: str, values: np.ndarray, edges: Sequence[float] | None = None, width: int = 40) -> Iterator[str]:
    """Text bars; without `edges`, each bin is twice as wide as the one before.

    tokens per record: median 31, mean 31.4, at most 33
        16 to 31   ████████████████████████ 1,102
        32 to 63   ███████                    335
    """
    mean, middle, most = values.mean(), np.median(values), values.max()
    yield f"{title}: median {middle:.4g}, mean {mean:.4g}, at most {most:.4g}"
    if edges is None:
        edges = [0, 1, *(2**power for power in range(1, 40))]
        edges = edges[: int(np.searchsorted(edges, most, side="right")) + 1]
    counts, _ = np.histogram(values, bins=np.array(edges, dtype=float))
    whole = np.issubdtype(values.dtype, np.integer)
    rows = []
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        last = high - 1 if whole else high
        rows.append((f"{low:,}" if low == last else f"{low:,} to {last:,}", int(count)))
    while rows and not rows[0][1]:
        rows.pop(0)
    while rows and not rows[-1][1]:
        rows.pop()
    if len(rows) == 1:  # the line above says it all
        return
    label_width = max(len(label) for label, _ in rows)
    for label, count in rows:
        bar = "█" * (round(width * count / counts.max()) or (1 if count else 0))
        yield f"    {label:>{label_width}}  {bar} {count:,}"


def quarantine_for(folder: Path, num_records: int) -> Quarantine:
    """The file that the run would write, without its limit: here every bad record shall be named."""
    return Quarantine(folder, max_bad=1.0, num_records=num_records)
