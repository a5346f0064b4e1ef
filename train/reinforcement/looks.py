"""The prompts of a run before anything is sampled: what `ernie doctor rl` and `ernie preview rl` look at."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data.quarantine import Quarantine
from ernie_model.config import ErnieConfig
from ernie_model.inference.tools import ToolBox
from ernie_model.model import ErnieModel
from ernie_model.processor import Processor
from train.agents import open_toolbox
from train.config import check_heldout
from train.evaluation.questions import Question
from train.reinforcement.collect import Opened, open_question
from train.reinforcement.prompts import Prompts, check_reward, open_prompts, quarantine_of
from train.rl_config import RLConfig
from train.served import Served
from train.sources import open_parts


@dataclass(frozen=True)
class Looks:
    train: Prompts
    heldout: Prompts | None
    """As many as evaluations ask."""
    toolboxes: Mapping[tuple[str, ...], ToolBox]
    """By the tools of a question. They can be described, and not run: there are no weights."""
    processor: Processor
    quarantine: Quarantine
    """Records that cannot be read."""

    def open(self, question: Question) -> Opened:
        """Raises MediaError, ChatError: see `open_question`."""
        return open_question(question, self.toolboxes[question.tools], self.processor)


def open_looks(config: RLConfig, processor: Processor, architecture: ErnieConfig, *, max_bad: float) -> Looks:
    """
    Args:
        max_bad: the share of records that may be bad.

    Raises:
        UserError, DataError: whatever the run would refuse of data, rewards and tools.
    """
    parts = open_parts(config.data)
    quarantine = quarantine_of(parts, Path(config.run.folder), max_bad=max_bad)
    train = open_prompts(parts.train, config, processor, quarantine)
    limit = config.evaluate.max_examples or None
    heldout = None if parts.heldout is None else open_prompts(parts.heldout, config, processor, quarantine, limit=limit)
    asked = [*train.questions, *(() if heldout is None else heldout.questions)]
    check_reward(config, asked)
    check_heldout(config, heldout is not None)
    with torch.device("meta"):
        served = Served(ErnieModel(architecture), processor)
    toolboxes = {
        tools: open_toolbox(replace(config.agent, tools=list(tools)), served)
        for tools in dict.fromkeys(one.tools for one in asked)
    }
    return Looks(train, heldout, toolboxes, processor, quarantine)
