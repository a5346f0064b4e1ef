"""An evaluation from its questions to its results.

OUTPUT/evaluation.json   what was asked of which weights; written first
OUTPUT/answers.jsonl     one line for each attempt (asking.Answer)
OUTPUT/results.json      what the attempts are worth (results.py); written last
OUTPUT/answers.html      results and answers with their pictures, on one page
OUTPUT/answers.png       the pictures as a contact sheet, where there are any
OUTPUT/pictures/         what tools returned, and what trackers show
OUTPUT/metrics.jsonl     the record of the trackers (train/tracking.py), and trackers.json where it begins
OUTPUT/likelihoods.json  of the right answers
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from ernie_model.atomic import atomic_write
from ernie_model.inference.agent import Agent
from ernie_model.inference.image_index import Embedder, make_index
from ernie_model.inference.request import Generates
from train.agents import open_toolbox, sampling_params
from train.config import UserError
from train.contact_sheet import draw
from train.evaluation.asking import ANSWERS, PICTURES, Answer, ask_all, opened, write_in_order
from train.evaluation.likelihood import Likelihood, likelihoods
from train.evaluation.page import write_page
from train.evaluation.questions import NAMED, AskedTask, Asking
from train.evaluation.results import RESULTS, VERSION, overall, task_results, weights_hash
from train.evaluation.scoring import Scorer, open_scorer
from train.evaluation.shown import Shown, sheet_items, shown
from train.evaluation.terminal import endings_line, results_table
from train.inference_config import EvaluationConfig, IndexConfig
from train.served import Served
from train.tracking import Tracker, make_trackers

PAGE, SHEET = "answers.html", "answers.png"
LIKELIHOODS = "likelihoods.json"
LONGEST_CELL = 400
"""Characters of a text in the trackers' table; answers.jsonl has all of it."""

SAME_NUMBERS = (
    "checkpoint",
    "output",
    "name",
    "tracker",
    "engine",
    "concurrency",
    "pictures",
    "cpu",
    "pass_at",
    "revision",
    "rewards",
)
"""Settings that may differ when a broken off evaluation goes on: the weights' hash says what is evaluated."""


def agents_of(config: Asking, tasks: Sequence[AskedTask], served: Served, engine: Generates) -> dict[str, Agent]:
    """One for each task, with its tools.

    Raises:
        UserError: a tool that there isn't, or that cannot be opened; a sampling setting outside its range.
    """
    params = sampling_params(config.sampling)
    agents = {}
    for task in tasks:
        own = replace(config.agent, tools=list(task.questions[0].tools))
        if "image_search" in own.tools and own.index is None and task.write_index is not None:
            own.index = str(_index(task.write_index, Path(config.output) / f"index_{task.name}", served))
        agents[task.name] = Agent(engine, served.processor, open_toolbox(own, served), config.agent, params)
    return agents


def _index(write_pictures: Callable[[Path], None], folder: Path, served: Served) -> Path:
    """What image_search looks things up in: the task's own pictures, under the model that answers."""
    write_pictures(folder)
    make_index(folder, folder / ".ernie_index", Embedder(served.model, served.processor, IndexConfig.max_pixels))
    return folder / ".ernie_index"


def evaluate(
    config: EvaluationConfig,
    settings: dict[str, Any],
    tasks: Sequence[AskedTask],
    served: Served,
    agents: Mapping[str, Agent],
    console: Console,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Ask, score, write, show. Returns what results.json holds.

    Args:
        settings: `config` as JSON can hold it.
        agents: by task.
        about: versions and git state, for the record.

    Raises:
        UserError: an output folder that belongs to something else, or cannot be written.
    """
    folder = Path(config.output)
    weights = weights_hash(served.model)
    started = {
        "weights": weights,
        "questions": {task.name: task.fingerprint for task in tasks},
        "settings": {key: value for key, value in settings.items() if key not in SAME_NUMBERS},
    }
    begun, clock = time.strftime("%Y-%m-%dT%H:%M:%S%z"), time.monotonic()
    with ExitStack() as at_end:
        done, file = at_end.enter_context(opened(folder, started))
        trackers = [] if (folder / RESULTS).exists() else _start_trackers(config, settings, folder, at_end)
        forced = _likelihoods(config, tasks, served, folder, console)
        with open_scorer(config.rewards, tasks) as scorer:
            answers = answers_to(config, tasks, agents, done, file, scorer, console)
        by_task = {task.name: [one for one in answers if one.task == task.name] for task in tasks}
        results = {
            "version": VERSION,
            "checkpoint": config.checkpoint,
            "weights": weights,
            "tasks": {
                task.name: task_results(
                    task,
                    by_task[task.name],
                    forced.get(task.name),
                    attempts=config.attempts,
                    pass_at=config.pass_at,
                    right_at=config.right_at,
                    seed=config.seed,
                )
                for task in tasks
            },
            "overall": overall(by_task, right_at=config.right_at, seed=config.seed),
            "settings": settings,
            "run": {**about, "started": begun, "seconds": round(time.monotonic() - clock, 1)},
        }
        looked_at = {
            task.name: shown(task, by_task[task.name], most=config.pictures, right_at=config.right_at, folder=folder)
            for task in tasks
        }
        _write_to_look_at(config, folder, results, looked_at)
        _track(config, folder, results, looked_at, trackers)
        atomic_write(folder / RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    _tell(console, folder, results, answers, config)
    return results


def answers_to(
    config: Asking,
    tasks: Sequence[AskedTask],
    agents: Mapping[str, Agent],
    done: dict[tuple[str, str, int], Answer],
    file: TextIO,
    scorer: Scorer,
    console: Console,
) -> list[Answer]:
    """Every attempt at every question, in order; `done` and `file` are what `opened` gave."""
    folder = Path(config.output)
    total = config.attempts * sum(len(task.questions) for task in tasks)
    if done:
        console.print(f"going on   {len(done):,} of {total:,} answers are in {folder}")
    with _progress(console, "answers", total, len(done)) as advance, _kept(folder):
        answers = asyncio.run(
            ask_all(
                tasks,
                dict(agents),
                done,
                file,
                params=next(iter(agents.values())).params,
                attempts=config.attempts,
                seed=config.seed,
                concurrency=config.concurrency,
                folder=folder,
                scorer=scorer,
                told=lambda answer: advance(1),
            )
        )
    write_in_order(folder / ANSWERS, answers)
    reasons = Counter(one.unscored for one in answers if one.unscored)
    for reason, count in reasons.most_common(NAMED):
        console.print(Text(f"unscored  {count:,} of {total:,} answers: {reason}", style="yellow"))
    return answers


def _likelihoods(
    config: EvaluationConfig, tasks: Sequence[AskedTask], served: Served, folder: Path, console: Console
) -> dict[str, list[Likelihood | None]]:
    """Of each task's right answers; kept beside the answers, so that they are measured once."""
    if not config.likelihood:
        return {}
    path = folder / LIKELIHOODS
    if path.exists():
        kept = json.loads(path.read_text("utf-8"))
        return {task: [None if one is None else Likelihood(**one) for one in ones] for task, ones in kept.items()}
    found: dict[str, list[Likelihood | None]] = {}
    with _progress(console, "perplexity", sum(len(task.questions) for task in tasks), 0) as advance:
        for task in tasks:
            before = 0

            def done(count: int) -> None:
                nonlocal before
                advance(count - before)
                before = count

            found[task.name] = likelihoods(
                served.model, served.processor, task.questions, max_tokens=config.engine.step_tokens, done=done
            )
    plain = {task: [None if one is None else vars(one) for one in ones] for task, ones in found.items()}
    atomic_write(path, json.dumps(plain))
    return found


def _write_to_look_at(
    config: EvaluationConfig, folder: Path, results: Mapping[str, Any], looked_at: Mapping[str, Sequence[Shown]]
) -> None:
    if not config.pictures:
        return
    title = f"{config.name or folder.name}: {', '.join(results['tasks'])}"
    subtitle = f"{config.checkpoint}, weights {results['weights'][:12]}, seed {config.seed}"
    atomic_write(folder / PAGE, write_page(title, subtitle, results_table(results), looked_at))
    items = [item for ones in looked_at.values() for item in sheet_items(ones)]
    if items:
        whole = results["overall"]
        summary = "" if whole is None else f"score {100 * whole['score']['mean']:.1f} %; {len(items)} shown"
        draw(items, folder / SHEET, title, summary=summary)


@contextmanager
def _kept(folder: Path) -> Iterator[None]:
    """Ctrl-C: what is there already, and the way on. Of several that fail together, the first tells why."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise UserError(
            f"stopped. {folder / ANSWERS} keeps what was answered; the same command with output={folder} goes on."
        ) from error
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


def _start_trackers(
    config: EvaluationConfig, settings: dict[str, Any], folder: Path, at_end: ExitStack
) -> list[Tracker]:
    """Before anything is asked, so that one which cannot start says so now. What an earlier process of this evaluation
    recorded is forgotten (`Tracker.mark`)."""
    record = folder / "trackers.json"
    marks = json.loads(record.read_text("utf-8")) if record.exists() else {}
    trackers = make_trackers(config.tracker.names, config.tracker.project)
    for tracker in trackers:
        tracker.start(config.name or folder.name, settings, folder, marks.get(tracker.name))
        at_end.callback(tracker.finish)
        marks.setdefault(tracker.name, tracker.mark())
    atomic_write(record, json.dumps(marks, indent=1))
    return trackers


def _track(
    config: EvaluationConfig,
    folder: Path,
    results: Mapping[str, Any],
    looked_at: Mapping[str, Sequence[Shown]],
    trackers: Sequence[Tracker],
) -> None:
    """Numbers, contact sheet and a table of answers with their pictures."""
    if not trackers:
        return
    columns = ("picture", "task", "score", "question", "right answer", "answer", "thought", "calls", "ended", "id")
    rows = []
    (folder / PICTURES).mkdir(exist_ok=True)
    for task, ones in looked_at.items():
        for number, one in enumerate(ones):
            path = None
            if one.picture is not None:
                path = folder / PICTURES / f"{task}-{number:03d}.png"
                one.picture.save(path)
            answer = one.answer
            calls = "\n".join(f"{call['name']}({call['arguments']})" for call in answer.calls)
            words = (one.question, answer.expected, answer.answer, answer.reasoning, calls)
            cut = (word if len(word) <= LONGEST_CELL else f"{word[:LONGEST_CELL]} ..." for word in words)
            rows.append((path, task, answer.score, *cut, answer.status, answer.id))
    for tracker in trackers:
        tracker.log(_metrics(results), 0)
        if (folder / SHEET).exists() and config.pictures:
            tracker.log_image("answers", folder / SHEET, 0)
        if rows:
            tracker.log_table("evaluation", columns, rows, 0)


def _metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """Under the names of charts: eval_digits_score, ... What repeats another, or has no meaning here, is left out."""
    named: dict[str, float] = {}
    for task, one in results["tasks"].items():
        score, likelihood = one["score"], one["likelihood"]
        values = {
            "score": score and score["mean"],
            "score_low": score and score["low"],
            "score_high": score and score["high"],
            "accuracy": one["accuracy"]["mean"] if one["accuracy"] != score else None,
            **{f"pass_at_{k}": value and value["mean"] for k, value in one["pass_at"].items() if k != "1"},
            "perplexity": likelihood and likelihood["perplexity"],
            "tokens": one["tokens"],
            "truncated": one["truncated"],
            "tool_use": one["tool_use"] if one["calls"] else None,
            "tool_success": one["tool_success"],
        }
        named |= {f"eval_{task}_{name}": float(value) for name, value in values.items() if value is not None}
    if results["overall"] is not None:
        named["eval_score"] = results["overall"]["score"]["mean"]
    return named


def _tell(
    console: Console, folder: Path, results: Mapping[str, Any], answers: Sequence[Answer], config: EvaluationConfig
) -> None:
    console.print(results_table(results))
    if ended := endings_line(results["tasks"]):
        console.print(Text(f"not answered to the end   {ended}"))
    failed = [one for one in answers if one.failed]
    for one in failed[:3]:
        console.print(Text(f"failed    {one.task} {one.id}: {one.error}", style="red"))
    console.print(Text(f"written   {folder / RESULTS}"), soft_wrap=True)
    if config.pictures:
        console.print(Text(f"page      {folder / PAGE}"), soft_wrap=True)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(answers)} answers failed and have no score (see {folder / ANSWERS}). The same "
            "command asks just these again."
        )


@contextmanager
def _progress(console: Console, what: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A bar in a terminal; elsewhere a line for every tenth. Gives a function that is told how many more are done."""
    if console.is_terminal:
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total, completed=done)
            yield lambda count: bar.advance(task, count)
        return
    count = done

    def advance(more: int) -> None:
        nonlocal count
        before, count = count, count + more
        if count * 10 // max(total, 1) > before * 10 // max(total, 1):
            console.print(f"{what:<13} {count:,}/{total:,}", highlight=False)

    yield advance
