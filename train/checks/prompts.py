"""Every prompt of reinforcement learning, as a rollout would ask it: read, decoded, encoded, measured."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ernie_model.chat import ChatError
from ernie_model.images import MediaError
from train.checks.findings import Finding, ok, problem, warning
from train.evaluation.questions import Question
from train.reinforcement.looks import Looks
from train.rl_config import RLConfig

NAMED = 10
"""Prompts that are told one by one."""


@dataclass
class Measured:
    """The prompts that can be asked, and why others cannot."""

    tokens: list[int] = field(default_factory=list)
    patches: list[int] = field(default_factory=list)
    media: list[int] = field(default_factory=list)
    short_of_room: int = 0
    """Prompts after which an answer of the length that is allowed may not fit."""
    strangers: Counter[str] = field(default_factory=Counter)
    """Tools that records offer and nobody runs: how many records."""
    refused: list[str] = field(default_factory=list)


def measure(questions: Sequence[Question], looks: Looks, config: RLConfig) -> Measured:
    found = Measured()
    limit, max_patches = config.agent.max_tokens, config.data.max_patches
    for one in questions:
        try:
            opened = looks.open(one)
        except (MediaError, ChatError, ValueError, OSError) as error:
            found.refused.append(f"{one.conversation.name}: {error}")
            continue
        tokens = len(opened.encoded.token_T)
        patches = sum(t * h * w for t, h, w in opened.encoded.grids)
        if tokens >= limit:
            found.refused.append(
                f"{one.conversation.name} has {tokens} tokens, and agent.max_tokens={limit} is for prompt and answer"
            )
            continue
        if max_patches is not None and patches > max_patches:
            found.refused.append(f"{one.conversation.name} has {patches} patches, more than data.max_patches")
            continue
        found.tokens.append(tokens)
        found.patches.append(patches)
        found.media.append(len(opened.encoded.grids))
        found.short_of_room += tokens + one.max_new_tokens > limit
        run = {tool["function"]["name"] for tool in looks.toolboxes[one.tools].definitions()}
        offered = {str(tool.get("function", tool).get("name")) for tool in one.conversation.tools}
        found.strangers.update(offered - run)
    return found


def judge(found: Measured, name: str) -> list[Finding]:
    """`name`: of the part of the data."""
    asked = len(found.tokens)
    findings = [ok(f"{asked:,} prompts of {name} can be asked")]
    if not asked:
        findings = [problem(f"no prompt of {name} can be asked.")]
    if found.refused:
        more = f"; and {len(found.refused) - NAMED:,} more" if len(found.refused) > NAMED else ""
        findings += [problem(reason) for reason in found.refused[:NAMED]]
        findings.append(
            problem(
                f"{len(found.refused):,} prompts of {name} cannot be asked{more}: each time one is drawn, its attempts "
                "fail and teach nothing, and pictures that cannot be read count towards data.max_bad. Mend them or "
                "take them out of the data; longer ones fit with more agent.max_tokens and data.max_tokens, or with "
                "smaller pictures."
            )
        )
    if found.short_of_room:
        findings.append(
            warning(
                f"after {found.short_of_room:,} of {asked:,} prompts of {name}, agent.max_tokens leaves less room than "
                "an answer may take (sampling.max_new_tokens): long answers are cut off, and count as wrong."
            )
        )
    for tool, records in found.strangers.most_common():
        findings.append(
            warning(
                f"{records:,} prompts of {name} offer the tool {tool}, which agent.tools does not have: an attempt "
                "ends when it is called. To have it run, add it: agent.tools=[python:module.function]."
            )
        )
    return findings


def describe(found: Measured) -> list[str]:
    """Numbers of the prompts, a line each."""
    lines = []
    columns = {"tokens per prompt": found.tokens, "images and videos": found.media, "patches per prompt": found.patches}
    for label, values in columns.items():
        if any(values):
            lines.append(f"{label}: median {np.median(values):,.0f}, mean {np.mean(values):,.1f}, most {max(values):,}")
    return lines


def describe_rollouts(prompts: int, config: RLConfig) -> str:
    rollout = config.rollout
    rounds = -(-prompts // rollout.groups)
    return (
        f"a rollout learns from {rollout.groups} prompts with {rollout.attempts} attempts each, in {rollout.updates} "
        f"updates; {rounds:,} rollouts ({rounds * rollout.updates:,} updates) learn from as many groups as there are "
        "prompts"
    )
