"""Attempts at questions to preference records: a right and a wrong answer to the same question.

    OUTPUT/evaluation.json   what was asked of which weights; written first
    OUTPUT/answers.jsonl     one line for each attempt (asking.Answer)
    OUTPUT/pairs.jsonl       {"prompt", "chosen", "rejected", "score_chosen", "score_rejected", "answer", "reward", ...}
      or labelled.jsonl      {"messages", "label", "answer", "reward", "extra"}
    OUTPUT/TASK_media/       pictures and videos that the records name
    OUTPUT/summary.json      how many questions were answered rightly, wrongly, both; how many records that gave

Attempts with the same text are one answer. Of a question's right answers, and of its wrong ones, those come first that
were written most often, then those that the model thought likelier: the mistake to reject is the one it would repeat.
Attempts that did not end or are empty, or whose reward could not tell, are no answers.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data.conversation import Conversation, Message, Pair, Part, is_empty, thinks
from data.convert import MediaCopy, with_media
from data.formats import messages
from ernie_model.atomic import atomic_write
from ernie_model.inference.agent import Agent, Status
from train.config import UserError
from train.evaluation.asking import ANSWERS, Answer, opened
from train.evaluation.evaluation import answers_to
from train.evaluation.questions import AskedTask, Question
from train.evaluation.results import is_right, weights_hash
from train.evaluation.scoring import Scorer, open_scorer
from train.evaluation.terminal import share
from train.inference_config import Form, PairsConfig
from train.rewards.base import Attempt
from train.served import Served

RECORDS = {Form.pairs: "pairs.jsonl", Form.labelled: "labelled.jsonl"}
SUMMARY = "summary.json"
SAME_ANSWERS = (
    "checkpoint",
    "output",
    "engine",
    "concurrency",
    "cpu",
    "revision",
    "rewards",
    "form",
    "per_question",
    "right_at",
    "wrong_at",
    "use_answer",
)
"""Settings that may differ when a folder is gone on with: other records are made of the same answers."""


@dataclass(frozen=True)
class Said:
    """One answer to a question, however many attempts wrote it."""

    messages: tuple[Message, ...]
    score: float
    attempts: int
    """That wrote it; 0: the question's own right answer."""
    logprob: float
    """Of its likeliest attempt."""


@dataclass(frozen=True)
class Judged:
    """One question's attempts."""

    question: Question
    right: tuple[Said, ...]
    wrong: tuple[Said, ...]
    """Both in the order of choice."""
    counts: Counter[str]
    """Attempts by verdict."""

    @property
    def kind(self) -> str:
        """Of the question: what its attempts were."""
        if self.right and self.wrong:
            return "both"
        return "all_right" if self.right else "all_wrong" if self.wrong else "neither"


def judge(question: Question, answers: Iterable[Answer], *, right_at: float, wrong_at: float | None) -> Judged:
    """What a question's attempts are worth."""
    counts: Counter[str] = Counter()
    by_text: dict[tuple[str, str], list[Answer]] = defaultdict(list)
    for one in answers:
        verdict = _verdict(one, right_at, wrong_at)
        counts[verdict] += 1
        if verdict in ("right", "wrong"):
            by_text[one.reasoning, one.answer].append(one)
    said = {"right": [], "wrong": []}
    for (reasoning, text), ones in by_text.items():
        score = ones[0].score
        assert score is not None
        logprob = max(one.logprob for one in ones)
        verdict = _verdict(ones[0], right_at, wrong_at)
        said[verdict].append(Said((_message(text, reasoning),), score, len(ones), logprob))
    right, wrong = (tuple(sorted(said[kind], key=lambda one: (-one.attempts, -one.logprob))) for kind in said)
    return Judged(question, right, wrong, counts)


def _verdict(answer: Answer, right_at: float, wrong_at: float | None) -> str:
    if answer.failed:
        return "failed"
    if answer.status != Status.ANSWERED.value:
        return "unfinished"
    if is_empty((_message(answer.answer, answer.reasoning),)):
        return "empty"
    if answer.score is None:
        return "unscored"
    if is_right(answer.score, right_at):
        return "right"
    return "wrong" if wrong_at is None or answer.score <= wrong_at + 1e-9 else "between"


def _message(text: str, reasoning: str) -> Message:
    return Message(role="assistant", parts=(Part.of_text(text),) if text else (), reasoning=reasoning or None)


def own_answer(question: Question, right_at: float, scorer: Scorer) -> Said | None:
    """The question's right answer as the assistant would write it; None where there is none that its reward takes."""
    target = question.target
    if target is None:
        return None
    written = target.messages[len(question.asked.messages) :]
    score = scorer.score_now(question, Attempt(answer=written[-1].text, text=written[-1].text)).value
    return Said(written, score, 0, 0.0) if score is not None and is_right(score, right_at) else None


def records_of(judged: Judged, config: PairsConfig, scorer: Scorer) -> Iterator[Conversation | Pair]:
    """The records of one question, media as the question has them; `extra` says how they came about.

    Pairs set the first right answer against one wrong answer after the other, then the second right one. An answer that
    begins with a thought is to another generation prompt than one without, so the two make no pair.
    """
    question, right, wrong = judged.question, judged.right, judged.wrong
    if not right and wrong and config.use_answer and (own := own_answer(question, config.right_at, scorer)):
        right = (own,)
    about = {
        **question.asked.extra,
        **({"reward_options": question.options} if question.options else {}),
        "task": question.task,
        "question": question.id,
        "attempts": dict(judged.counts),
    }
    prompt = replace(question.asked, answer=question.expected or None, reward=question.reward_name)
    if config.form is Form.labelled:
        for label, ones in ((True, right), (False, wrong)):
            for number, one in enumerate(ones[: config.per_question], 1):
                yield replace(
                    prompt,
                    id=f"{question.task}/{question.id}/{'right' if label else 'wrong'}/{number}",
                    messages=(*prompt.messages, *one.messages),
                    label=label,
                    extra={**about, "score": one.score, "written": one.attempts},
                )
        return
    couples = [(a, b) for a in right for b in wrong if thinks(a.messages) == thinks(b.messages)]
    for number, (chosen, rejected) in enumerate(couples[: config.per_question], 1):
        written = {"chosen_written": chosen.attempts, "rejected_written": rejected.attempts}
        id = f"{question.task}/{question.id}/{number}"
        yield Pair(
            prompt=replace(prompt, id=id, extra={**about, **written}),
            chosen=chosen.messages,
            rejected=rejected.messages,
            chosen_score=chosen.score,
            rejected_score=rejected.score,
        )


def make_pairs(
    config: PairsConfig,
    settings: Mapping[str, Any],
    tasks: Sequence[AskedTask],
    served: Served,
    agents: Mapping[str, Agent],
    console: Console,
) -> dict[str, Any]:
    """Ask, judge, write. Returns what summary.json holds.

    Args:
        settings: `config` as JSON can hold it.
        agents: by task.

    Raises:
        UserError: there is nothing to learn from; an output folder that belongs to something else.
    """
    folder, weights = Path(config.output), weights_hash(served.model)
    started = {
        "program": "pairs",
        "weights": weights,
        "questions": {task.name: task.fingerprint for task in tasks},
        "settings": {key: value for key, value in settings.items() if key not in SAME_ANSWERS},
    }
    with opened(folder, started) as (done, file), open_scorer(config.rewards, tasks) as scorer:
        answers = answers_to(config, tasks, agents, done, file, scorer, console)
        by_question: dict[tuple[str, str], list[Answer]] = defaultdict(list)
        for one in answers:
            by_question[one.task, one.id].append(one)
        lines: list[str] = []
        summary: dict[str, Any] = {
            "version": 1,
            "checkpoint": config.checkpoint,
            "weights": weights,
            "form": config.form.value,
            "tasks": {},
            "settings": dict(settings),
        }
        for task in tasks:
            judged = [
                judge(one, by_question[task.name, one.id], right_at=config.right_at, wrong_at=config.wrong_at)
                for one in task.questions
            ]
            records = [list(records_of(one, config, scorer)) for one in judged]
            media = MediaCopy(task.questions[0].media, folder / f"{task.name}_media")
            for record in (record for ones in records for record in ones):
                line = messages.write(with_media(record, media.copied))
                lines.append(json.dumps(line, ensure_ascii=False) + "\n")
            summary["tasks"][task.name] = _summary(judged, records)
        console.print(summary_table(summary))
        failed = [one for one in answers if one.failed]
        for one in failed[:3]:
            console.print(Text(f"failed    {one.task} {one.id}: {one.error}", style="red"))
        refuse_nothing(summary, config)
        atomic_write(folder / RECORDS[config.form], "".join(lines))
        atomic_write(folder / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    gave, questions = (sum(one[key] for one in summary["tasks"].values()) for key in ("gave", "questions"))
    console.print(Text(f"gave      {gave:,} of {questions:,} questions gave {len(lines):,} records"))
    console.print(Text(f"written   {folder / RECORDS[config.form]}"), soft_wrap=True)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(answers)} answers failed (see {folder / ANSWERS}). The same command asks just "
            "these again."
        )
    return summary


KINDS = ("both", "all_right", "all_wrong", "neither")
VERDICTS = ("right", "wrong", "between", "empty", "unfinished", "unscored", "failed")


def _summary(judged: Sequence[Judged], records: Sequence[Sequence[Conversation | Pair]]) -> dict[str, Any]:
    """Of one task."""
    counts: Counter[str] = sum((one.counts for one in judged), Counter())
    kinds = Counter(one.kind for one in judged)
    return {
        "questions": len(judged),
        **{kind: kinds[kind] for kind in KINDS},
        "attempts": {verdict: counts[verdict] for verdict in VERDICTS},
        "gave": sum(bool(ones) for ones in records),
        "records": sum(map(len, records)),
        "wanted": sum(isinstance(one, Conversation) and one.label is True for ones in records for one in ones),
    }


def summary_table(summary: Mapping[str, Any]) -> Table:
    """One row for each task: its questions by what their attempts were, and what became of them."""
    tasks: Mapping[str, Any] = summary["tasks"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    lost = [key for key in VERDICTS[2:] if any(one["attempts"][key] for one in tasks.values())]
    labelled = summary["form"] == Form.labelled.value
    columns = ("questions", "attempts right", "both", "all right", "all wrong", *lost, summary["form"])
    for name in (*columns, *(("wanted",) if labelled else ())):
        table.add_column(name, justify="right", no_wrap=True)
    for name, one in tasks.items():
        attempts = one["attempts"]
        table.add_row(
            Text(name, style="bold"),
            f"{one['questions']:,}",
            share(attempts["right"] / sum(attempts.values())),
            *(f"{one[kind]:,}" for kind in KINDS[:3]),
            *(f"{attempts[key]:,}" for key in lost),
            f"{one['records']:,}",
            *((f"{one['wanted']:,}",) if labelled else ()),
        )
    return table


def refuse_nothing(summary: Mapping[str, Any], config: PairsConfig) -> None:
    """Raises UserError: no record, or labelled answers of one kind alone; with the numbers and a way out."""
    tasks = summary["tasks"].values()
    total = {key: sum(one[key] for one in tasks) for key in ("questions", *KINDS, "records", "wanted")}
    attempts = {key: sum(one["attempts"][key] for one in tasks) for key in VERDICTS}
    of_all = f"of {sum(attempts.values()):,} attempts at {total['questions']:,} questions"
    if config.form is Form.labelled and 0 < total["wanted"] < total["records"]:
        return
    if config.form is Form.pairs and total["records"]:
        return
    if not attempts["right"] and not attempts["wrong"]:
        lost = ", ".join(f"{count:,} {key}" for key, count in attempts.items() if count)
        raise UserError(f"none {of_all} can be judged: {lost}. {ANSWERS} in {config.output} has them all.")
    if not attempts["wrong"]:
        raise UserError(
            f"none {of_all} is wrong ({attempts['right']:,} are right): there is nothing to learn from. Ask harder "
            "questions, or raise sampling.temperature or attempts."
        )
    if not attempts["right"]:
        way_out = "use_answer=true takes each question's own answer as the right one"
        if config.use_answer:
            way_out = (
                "and no question has an answer of its own that its reward takes and that begins with a thought where "
                "the attempts do"
            )
        raise UserError(f"none {of_all} is right ({attempts['wrong']:,} are wrong); {way_out}.")
    if total["both"]:
        raise UserError(
            f"right and wrong answers to a question never both begin with a thought, or both without one, {of_all}: "
            "they are not to the same prompt. Raise attempts."
        )
    raise UserError(
        f"no question has both right and wrong attempts: {total['all_right']:,} are all right, {total['all_wrong']:,} "
        f"all wrong, {of_all}. Raise attempts or sampling.temperature, or set use_answer=true."
    )


def refuse_tools(tasks: Sequence[AskedTask]) -> None:
    """Raises UserError: an answer of several turns is more than its last one, which is all that is kept here."""
    for task in tasks:
        if tools := task.questions[0].tools:
            raise UserError(
                f"{task.name} is answered with {', '.join(tools)}; pairs are made of answers of one turn. Leave "
                f"{task.name} out of tasks, or set per_task.{task.name}.tools=[]."
            )
