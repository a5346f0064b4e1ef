"""What a sampler is worth, without a model: three ways to choose prompts, and what they give for the tokens they take.

    python -m train.reinforcement.simulate --output simulation.png --difficulty difficulty.png

A prompt is answered rightly with probability sigmoid(ability - difficulty), difficulties are normal, and the ability
grows by the same amount in every rollout, whoever draws. Answers get longer the harder a prompt is for the policy, and
wrong ones are half as long again. Drawn prompts go the way that `ernie rl` sends them: groups that are all right or all
wrong are left out, more rounds are asked until there are enough, and surplus groups wait for one rollout.

    uniform              epoch after epoch, no more prompts than are to be trained on; useless groups are left out
    filtered             the same, with more prompts and more rounds until the batch is full (DAPO)
    difficulty           ours; with rest_after=1 prompts rest after one group that is all right or all wrong

What counts is groups trained on for a million sampled tokens: sampling is most of the time of a run.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from train.chart import BLUE, GREEN, GREY, RED, Figure
from train.config import UserError, check
from train.reinforcement import difficulty_plot
from train.reinforcement.difficulty import DifficultySampler, PromptInfo
from train.reinforcement.groups import Outcome, Ticket
from train.rl_config import RolloutConfig, SamplerConfig, SamplerKind

SPREAD = 3.0
"""Standard deviation of difficulties, in logits."""
GROWTH = 0.008
"""Of the ability in a rollout, in logits."""
EASY_TOKENS, HARD_TOKENS = 200, 1000
"""Mean length of a right answer to a prompt that is always, or never, answered rightly."""
WRONG = 1.5
"""Times as long are wrong answers."""
LENGTHS = 0.4
"""Standard deviation of the logarithm of lengths."""
PARTS = 3
"""Of the run, in the table."""


@dataclass(frozen=True)
class Way:
    """One way to choose prompts."""

    name: str
    sampler: SamplerConfig
    max_rounds: int
    colour: str


WAYS = (
    Way("uniform", SamplerConfig(kind=SamplerKind.uniform, max_expansion=1.0), 1, GREY),
    Way("filtered", SamplerConfig(kind=SamplerKind.uniform), 4, BLUE),
    Way("difficulty", SamplerConfig(), 4, GREEN),
    Way("rest_after=1", SamplerConfig(rest_after=1), 4, RED),
)


@dataclass(frozen=True)
class World:
    """Prompts and a policy that answers them. What comes of a group depends on its number, prompt and rollout alone."""

    prompts: int
    attempts: int
    seed: int

    def difficulty(self) -> np.ndarray:
        return np.random.default_rng([self.seed, 0]).normal(0, SPREAD, self.prompts)

    def answer(self, ticket: Ticket, difficulty: float, rollout: int) -> tuple[Outcome, int]:
        """Which attempts are right, and how many tokens they took."""
        p = 1 / (1 + math.exp(difficulty - GROWTH * rollout))
        chance = np.random.default_rng([self.seed, 1, ticket.group, ticket.prompt])
        right = chance.random(self.attempts) < p
        mean = (EASY_TOKENS + (HARD_TOKENS - EASY_TOKENS) * (1 - p)) * np.where(right, 1.0, WRONG)
        tokens = mean * np.exp(chance.normal(-(LENGTHS**2) / 2, LENGTHS, self.attempts))
        accuracies = tuple(right.astype(float).tolist())
        return Outcome(group=ticket.group, prompt=ticket.prompt, accuracies=accuracies), int(np.rint(tokens).sum())


@dataclass(kw_only=True)
class Course:
    """What came of it, rollout by rollout."""

    asked: list[int] = field(default_factory=list)
    mixed: list[int] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    sampler: DifficultySampler
    """At the end."""

    def worth(self, part: slice = slice(None)) -> float:
        """Groups trained on for a million tokens."""
        return 1e6 * sum(self.trained[part]) / sum(self.tokens[part])


def run(way: Way, world: World, rollout: RolloutConfig, rollouts: int) -> Course:
    prompts = [PromptInfo(str(number)) for number in range(world.prompts)]
    sampler = DifficultySampler(prompts, way.sampler, attempts=world.attempts, seed=world.seed)
    difficulty, course = world.difficulty(), Course(sampler=sampler)
    waiting: list[tuple[int, int]] = []
    """Surplus mixed groups: rollout, group."""
    for number in range(rollouts):
        waiting = [one for one in waiting if one[0] >= number - rollout.max_lag]
        need = max(0, rollout.groups - len(waiting))
        tickets, told, tokens, rounds = sampler.pick(need), [], 0, 1
        while tickets:
            answers = [world.answer(ticket, difficulty[ticket.prompt], number) for ticket in tickets]
            told += [outcome for outcome, _ in answers]
            tokens += sum(taken for _, taken in answers)
            missing = need - sum(outcome.trainable for outcome in told)
            if missing <= 0 or rounds == way.max_rounds:
                break
            tickets, rounds = sampler.top_up(missing), rounds + 1
        waiting += [(number, outcome.group) for outcome in told if outcome.trainable]
        trained, waiting = waiting[: rollout.groups], waiting[rollout.groups :]
        sampler.update(told, trained=len(trained))
        course.asked.append(len(told))
        course.mixed.append(sum(outcome.trainable for outcome in told))
        course.trained.append(len(trained))
        course.tokens.append(tokens)
    return course


def table(courses: dict[str, list[Course]], rollouts: int, groups: int) -> Table:
    """Means over the seeds, and their standard deviation where there are several."""
    out = Table(title="groups trained on for a million sampled tokens", title_justify="left", box=box.SIMPLE_HEAD)
    out.caption = (
        "±: standard deviation between worlds; 0-99 ...: rollouts; mixed: of the groups\n"
        "asked; full: rollouts in which no group was missing; tokens: of a rollout"
    )
    out.caption_justify = "left"
    out.add_column("")
    cuts = [rollouts * part // PARTS for part in range(PARTS + 1)]
    for name in (
        "all",
        "±",
        *(f"{first}-{last - 1}" for first, last in zip(cuts, cuts[1:], strict=False)),
        "mixed",
        "full",
        "tokens",
    ):
        out.add_column(name, justify="right")
    for name, ways in courses.items():
        worths = [course.worth() for course in ways]
        parts = [
            np.mean([c.worth(slice(first, last)) for c in ways]) for first, last in zip(cuts, cuts[1:], strict=False)
        ]
        out.add_row(
            name,
            f"{np.mean(worths):.1f}",
            f"{np.std(worths, ddof=1):.1f}" if len(worths) > 1 else "",
            *(f"{part:.1f}" for part in parts),
            f"{np.mean([sum(c.mixed) / sum(c.asked) for c in ways]):.0%}",
            f"{np.mean([np.mean(np.array(c.trained) == groups) for c in ways]):.0%}",
            f"{np.mean([np.mean(c.tokens) for c in ways]):,.0f}",
        )
    return out


def draw(courses: dict[str, list[Course]], path: Path, about: str) -> None:
    """Two charts: groups for a million tokens, and mixed groups of those asked. Means over seeds and ten rollouts."""
    colours = {way.name: way.colour for way in WAYS}
    rollouts = len(next(iter(courses.values()))[0].asked)
    size = max(1, min(10, rollouts // 4))
    starts = range(0, rollouts - size + 1, size)
    worth = {
        name: [np.mean([c.worth(slice(at, at + size)) for c in some]).item() for at in starts]
        for name, some in courses.items()
    }
    mixed = {
        name: [
            np.mean([sum(c.mixed[at : at + size]) / max(1, sum(c.asked[at : at + size])) for c in some]).item()
            for at in starts
        ]
        for name, some in courses.items()
    }
    figure = Figure("which prompts are worth their tokens", about, columns=2, rows=1)
    middles = [at + size / 2 for at in starts]
    top = 1.1 * max(max(values) for values in worth.values())
    panels = (
        (figure.panel("groups trained on / million tokens", x=(0, rollouts), y=(0, top), under="rollouts"), worth),
        (figure.panel("mixed groups", x=(0, rollouts), y=(0, 1), under="rollouts", share=True), mixed),
    )
    for panel, values in panels:
        for name, ys in values.items():
            panel.line(middles, ys, colours[name], width=2)
        panel.legend([(name, colours[name]) for name in values])
    figure.save(path)


def simulate(
    *, prompts: int, rollouts: int, groups: int, attempts: int, seeds: Sequence[int]
) -> dict[str, list[Course]]:
    """Every way through the same worlds, by name."""
    rollout = RolloutConfig(groups=groups, updates=1, attempts=attempts)
    return {way.name: [run(way, World(prompts, attempts, seed), rollout, rollouts) for seed in seeds] for way in WAYS}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.reinforcement.simulate", description="Compare ways to choose prompts, without a model."
    )
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--rollouts", type=int, default=300)
    parser.add_argument("--groups", type=int, default=32, help="trained on in one rollout")
    parser.add_argument("--attempts", type=int, default=8, help="answers to each prompt")
    parser.add_argument("--seeds", type=int, default=3, help="worlds to average over")
    parser.add_argument("--output", type=Path, default=None, help="where to draw the curves, a .png")
    parser.add_argument(
        "--difficulty", type=Path, default=None, help="where to draw the first world as runs draw theirs"
    )
    given = parser.parse_args(arguments)
    for name, least in (("prompts", 1), ("rollouts", PARTS), ("seeds", 1)):
        check(getattr(given, name) >= least, f"--{name} is {getattr(given, name)}; it must be at least {least}.")
    courses = simulate(
        prompts=given.prompts,
        rollouts=given.rollouts,
        groups=given.groups,
        attempts=given.attempts,
        seeds=range(given.seeds),
    )
    Console().print(table(courses, given.rollouts, given.groups))
    if given.output is not None:
        about = f"{given.prompts} prompts, {given.groups} groups of {given.attempts} attempts, {given.seeds} seeds"
        draw(courses, given.output, about)
    if given.difficulty is not None:
        difficulty_plot.draw(courses["difficulty"][0].sampler, given.difficulty, "difficulty, simulated")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
