"""Questions to groups of scored attempts: one rollout's asking.

Every attempt of a group has a seed that follows from the run's seed, the group's number and the attempt's; prompts are
encoded once for all attempts of a group, and their keys and values are computed once by an engine that shares prefixes.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from data.errors import Refusal, Stage
from ernie_model.images import MediaError
from ernie_model.inference.agent import Agent, Episode, Status
from ernie_model.inference.request import Prompt, RequestError, SamplingParams
from ernie_model.inference.tools import ToolBox
from ernie_model.processor import Encoded, Processor
from train.evaluation.asking import to_attempt, tools_of
from train.evaluation.questions import Question
from train.reinforcement.engines import RolloutEngine
from train.reinforcement.groups import Group, Scored, Ticket
from train.reinforcement.scoring import RewardPool
from train.reinforcement.stopping import never, unless


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One ticket with what it takes to ask it."""

    ticket: Ticket
    question: Question
    seeds: Sequence[int]
    """Of its attempts."""


@dataclass(frozen=True)
class Opened:
    """A question as the model gets it."""

    chat: list[dict]
    tools: list[dict]
    encoded: Encoded
    prompt: Prompt


def open_question(question: Question, toolbox: ToolBox, processor: Processor) -> Opened:
    """Raises MediaError, ChatError: pictures that cannot be read, messages that cannot be honoured."""
    chat = question.asked.to_chat(question.media.open)
    tools = tools_of(question, toolbox)
    encoded = processor.encode(chat, tools=tools, thinking=question.thinking, add_generation_prompt=True)
    return Opened(chat, tools, encoded, Prompt.of(encoded))


async def collect(
    asked: Sequence[Asked],
    engine: RolloutEngine,
    agents: Mapping[tuple[str, ...], Agent],
    pool: RewardPool,
    processor: Processor,
    params: SamplingParams,
    *,
    version: int,
    stop: Callable[[], bool] = never,
    told: Callable[[int], None] = lambda done: None,
    scored: Callable[[float], None] = lambda seconds: None,
) -> list[Group]:
    """Groups in the order of `asked`. All ranks call it together, also with nothing to ask.

    Args:
        agents: by the tools of a question.
        version: of the weights, for a group of which nothing was sampled.
        params: `max_new_tokens` and `seed` are each attempt's own.
        stop: asked now and then; all is given up when it says so.
        told: how many attempts are done, as they end.
        scored: seconds from the end of the last attempt until all have their scores.

    Raises:
        Interrupted: `stop` said so before all was scored. Other ranks may not have been interrupted.
    """
    scoring: list[asyncio.Task[Scored]] = []
    done = 0

    async def score(question: Question, episode: Episode) -> Scored:
        return Scored(episode=episode, scores=await pool.score(question, to_attempt(episode)))

    async def attempt(one: Asked, prompt: asyncio.Task[Opened], seed: int) -> asyncio.Task[Scored]:
        nonlocal done
        question, agent = one.question, agents[one.question.tools]
        own = replace(params, max_new_tokens=question.max_new_tokens, seed=seed)
        try:
            opened = await prompt
            episode = await agent.run(
                opened.chat, tools=opened.tools, params=own, thinking=question.thinking, prompt=opened.prompt
            )
        except (RequestError, MediaError, ValueError) as error:
            episode = Episode([], [], [], status=Status.FAILED, error=str(error))
        done += 1
        told(done)
        task = asyncio.ensure_future(score(question, episode))
        scoring.append(task)
        return task

    async def opening(question: Question) -> Opened:
        return await asyncio.to_thread(open_question, question, agents[question.tools].toolbox, processor)

    prompts = [asyncio.ensure_future(opening(one.question)) for one in asked]
    attempts = [attempt(one, prompt, seed) for one, prompt in zip(asked, prompts, strict=True) for seed in one.seeds]
    left = await engine.together(attempts, stop)
    begin = time.perf_counter()
    done_ones = iter(await unless(stop, left))
    scored(time.perf_counter() - begin)
    groups = []
    for one, prompt in zip(asked, prompts, strict=True):
        attempts = pool.compared([next(done_ones) for _ in one.seeds])
        versions = [of_token for done in attempts for of_token in done.episode.versions if of_token >= 0]
        error = prompt.exception()
        refused = None if error is None else _refusal(one.question, error)
        oldest = min(versions, default=version)
        groups.append(Group(ticket=one.ticket, version=oldest, attempts=attempts, refused=refused))
    return groups


def _refusal(question: Question, error: BaseException) -> Refusal:
    source = question.conversation.source
    file, line = (None, None) if source is None else (source.file, source.line)
    stage = Stage.MEDIA if isinstance(error, MediaError) else Stage.ENCODE
    return Refusal(question.id, question.task, file, line, stage, f"{question.conversation.name}: {error}")
