"""Questions to attempts: through the agent, many at once, each written down as it ends.

    OUTPUT/evaluation.json    what is asked of which weights, written first
    OUTPUT/answers.jsonl      one line for each attempt, as they end; in order when all have
    OUTPUT/pictures/          what tools returned, for the page

An evaluation that was broken off finds its lines again, and asks what is left. That gives what one in a single piece
would have given: an attempt's seed follows from the question and its number alone. An attempt that failed (the engine,
not the model) counts as not asked.
"""

import asyncio
import fcntl
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from ernie_model.atomic import atomic_write
from ernie_model.images import MediaError
from ernie_model.inference.agent import Agent, Episode, Status
from ernie_model.inference.request import EngineFull, RequestError, SamplingParams
from ernie_model.inference.tools import ToolBox
from train.compose import flatten
from train.config import UserError
from train.evaluation.questions import AskedTask, Question
from train.evaluation.scoring import Scorer
from train.rewards.base import Attempt
from train.tracking import cut

ANSWERS, STARTED, PICTURES = "answers.jsonl", "evaluation.json", "pictures"
MAX_PICTURES = 500
"""Files that tools' pictures are kept in."""
RETRY_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One attempt: a line of answers.jsonl."""

    task: str
    id: str
    attempt: int
    """From 0."""
    domain: str
    reward: str
    score: float | None
    expected: str
    answer: str
    """What the reward looked at: the content of the last turn."""
    reasoning: str
    """Of the last turn."""
    text: str
    """All that was sampled, turn after turn, special tokens included."""
    calls: list[dict[str, Any]]
    """{"name", "arguments", "failed", "images"} in order; images: how many the tool returned."""
    status: str
    """`agent.Status`."""
    error: str | None
    tokens: int
    """Sampled, of all turns."""
    prompt_tokens: int
    turns: int
    logprob: float
    """Of the sampled tokens, summed, under the distribution that was sampled from."""
    seed: int
    pictures: list[str]
    """What tools returned, as paths in the output folder."""
    unscored: str | None = None
    """Why an attempt that did not fail has no score."""

    @property
    def key(self) -> tuple[str, str, int]:
        return self.task, self.id, self.attempt

    @property
    def failed(self) -> bool:
        return self.status == Status.FAILED.value


@contextmanager
def opened(folder: Path, started: dict[str, Any]) -> Iterator[tuple[dict[tuple[str, str, int], Answer], TextIO]]:
    """The answers that an output folder holds already, and its answers.jsonl to append to.

    Args:
        started: all that decides the numbers; a folder is gone on with only when it was begun with the same.

    Raises:
        UserError: the folder cannot be written, holds other answers, or another process writes into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"output={folder} cannot be written ({error.strerror}). Choose another folder.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is writing into output={folder}. Choose another folder.") from error
        _same_evaluation(folder, started)
        path = folder / ANSWERS
        cut(path, 2**62)  # to whole lines: a killed process may have left half of one
        done = {one.key: one for one in read_answers(path) if not one.failed} if path.exists() else {}
        with path.open("a", encoding="utf-8") as file:
            yield done, file


def _same_evaluation(folder: Path, started: dict[str, Any]) -> None:
    path = folder / STARTED
    if path.exists():
        try:
            before = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}). Bring it back, or choose another output=.") from error
        before, now = flatten(before), flatten(json.loads(json.dumps(started)))
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        if changed:
            lines = "\n".join(f"  {key}: {before.get(key)} then, {now.get(key)} now" for key in changed)
            raise UserError(
                f"output={folder} holds other answers, and nothing is overwritten:\n{lines}\n"
                "Choose another output=, or restore what differs to go on with those."
            )
    elif (folder / ANSWERS).exists():
        raise UserError(f"output={folder} has answers but no {STARTED}, so whose they are is not known.")
    else:
        atomic_write(path, json.dumps(started, indent=1) + "\n")


def read_answers(path: Path) -> list[Answer]:
    """Raises UserError: a line that is not an answer."""
    answers = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                answers.append(Answer(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise UserError(f"{path}:{number} is not an answer ({error}). Choose another output=.") from error
    return answers


async def ask_all(
    tasks: Sequence[AskedTask],
    agents: dict[str, Agent],
    done: dict[tuple[str, str, int], Answer],
    file: TextIO,
    *,
    params: SamplingParams,
    attempts: int,
    seed: int,
    concurrency: int,
    folder: Path,
    scorer: Scorer,
    told: Callable[[Answer], None] = lambda answer: None,
) -> list[Answer]:
    """All answers, in the order of the questions; those that were `done` already are taken as they are.

    Args:
        agents: by task.
        file: answers.jsonl; a line is added for each attempt that ends.
        params: `max_new_tokens` and `seed` are each question's own.
        told: hears of each attempt that ends.
    """
    wanted = [(task.name, one, number) for task in tasks for one in task.questions for number in range(attempts)]
    left = iter([job for job in wanted if (job[0], job[1].id, job[2]) not in done])
    answers = dict(done)
    kept = sum(len(one.pictures) for one in done.values())

    async def work() -> None:
        nonlocal kept
        for name, question, number in left:
            answer, images = await _ask(agents[name], question, number, params, seed, scorer)
            if images and kept < MAX_PICTURES:
                answer = _with_pictures(answer, images, folder)
                kept += len(images)
            answers[answer.key] = answer
            file.write(_line(answer))
            file.flush()
            told(answer)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(work())
    return [answers[task, question.id, number] for task, question, number in wanted]


def write_in_order(path: Path, answers: Iterable[Answer]) -> None:
    """The same lines, in an order that does not depend on which ended first."""
    atomic_write(path, "".join(map(_line, answers)))


def _line(answer: Answer) -> str:
    return json.dumps(asdict(answer), ensure_ascii=False) + "\n"


async def _ask(
    agent: Agent, question: Question, number: int, params: SamplingParams, seed: int, scorer: Scorer
) -> tuple[Answer, list[Any]]:
    """One attempt, and the pictures that its tools returned."""
    own_seed = attempt_seed(seed, question.task, question.id, number)
    own = replace(params, max_new_tokens=question.max_new_tokens, seed=own_seed)
    episode, problem = Episode([], [], []), None
    try:
        chat = await asyncio.to_thread(question.asked.to_chat, question.media.open)
        while True:
            try:
                tools = tools_of(question, agent.toolbox)
                episode = await agent.run(chat, tools=tools, params=own, thinking=question.thinking)
                break
            except EngineFull:
                await asyncio.sleep(RETRY_S)
    except (RequestError, MediaError, ValueError) as error:  # this question cannot be asked; the others can
        problem = str(error)
    attempt = to_attempt(episode)
    failed = problem is not None or episode.status is Status.FAILED
    score, unscored = (None, None) if failed else await scorer.score(question, attempt)
    answer = Answer(
        task=question.task,
        id=question.id,
        attempt=number,
        domain=question.domain,
        reward=question.reward_name,
        score=score,
        expected=question.expected,
        answer=attempt.answer,
        reasoning=attempt.reasoning,
        text=attempt.text,
        calls=[dict(call) for call in attempt.calls],
        status=episode.status.value,
        error=problem or episode.error,
        tokens=attempt.num_tokens,
        prompt_tokens=episode.num_prompt_tokens,
        turns=len(episode.turns),
        logprob=round(sum(episode.logprobs), 4),  # further digits depend on who shared the batch
        seed=own_seed,
        pictures=[],
        unscored=unscored,
    )
    return answer, [image for turn in episode.turns for result in turn.results for image in result.images]


def tools_of(question: Question, toolbox: ToolBox) -> list[dict[str, Any]]:
    """Definitions that the question is asked with: its own, and the agent's others."""
    given = [dict(tool) for tool in question.conversation.tools]
    names = {tool.get("function", tool).get("name") for tool in given}
    return given + [tool for tool in toolbox.definitions() if tool["function"]["name"] not in names]


def attempt_seed(seed: int, task: str, id: str, attempt: int) -> int:
    """Of one attempt's sampling, whatever else is asked: 0 ... 2^63 - 1."""
    digest = hashlib.blake2b(json.dumps([seed, task, id, attempt]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def to_attempt(episode: Episode) -> Attempt:
    """What the rewards see of an episode."""
    calls = []
    for turn in episode.turns:
        for place, call in enumerate(turn.calls):
            result = turn.results[place] if place < len(turn.results) else None
            calls.append(
                {
                    "name": call.name,
                    "arguments": call.arguments,
                    "failed": result is None or result.error,
                    "images": 0 if result is None or result.error else len(result.images),
                }
            )
        if not turn.calls and turn.problem is not None:
            calls.append({"name": "", "arguments": "", "failed": True, "images": 0})
    # Whoever waited in line until the time was over, in the first turn or a later one, has not answered wrongly.
    waited = episode.status is Status.TIMEOUT and not any(episode.sampled[-1:])
    failed = episode.status is Status.FAILED or waited
    return Attempt(
        answer=episode.answer,
        text="".join(turn.text for turn in episode.turns),
        turns=tuple(turn.text for turn in episode.turns),
        reasoning=episode.reasoning,
        num_calls=len(calls),
        num_failed_calls=sum(call["failed"] for call in calls),
        num_tokens=episode.num_sampled,
        token_ids=tuple(token for token, sampled in zip(episode.token_ids, episode.sampled, strict=True) if sampled),
        finished=episode.finished,
        calls=tuple(calls),
        problem=(episode.error or "the engine could not go on") if failed else None,
    )


def _with_pictures(answer: Answer, images: Sequence[Any], folder: Path) -> Answer:
    digest = hashlib.blake2b(json.dumps(answer.key).encode(), digest_size=6).hexdigest()
    (folder / PICTURES).mkdir(exist_ok=True)
    paths = []
    for number, image in enumerate(images):
        path = f"{PICTURES}/{digest}-{number}.png"
        image.convert("RGB").save(folder / path)
        paths.append(path)
    return replace(answer, pictures=paths)
