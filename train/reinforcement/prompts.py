"""What the policy is asked: every record as a question with its reward, by number.

A record is a question as `ernie evaluate` asks it (train/evaluation/questions.py): a conversation that ends before the
assistant's turn, or is cut there, with the right answer and the reward that compares. All are looked at before the
first rollout: one that no reward can score is refused then, one that cannot be read goes into the quarantine. Pictures
are opened when they are asked about; one that cannot be puts its record into the quarantine as well.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.conversation import Conversation
from data.errors import DataError, RefusedError
from data.formats import messages
from data.mixture import Mixture, Parts
from data.quarantine import Quarantine
from data.tasks import TASKS
from data.tasks.base import Task
from ernie_model.processor import Processor
from train.config import DataConfig, FilesData, TaskData, UserError
from train.evaluation.questions import AskedTask, Question, check_fits, evenly, questions_of
from train.inference_config import AskedConfig
from train.reinforcement.difficulty import PromptInfo
from train.rl_config import RLConfig

TIER = "difficulty"
"""In a record: how hard it is, 0 (easy) to 4, where that is known beforehand."""


@dataclass(frozen=True)
class Prompts:
    questions: Sequence[Question]
    name: str

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def infos(self) -> list[PromptInfo]:
        """What the sampler knows of each."""
        return [
            PromptInfo(id=f"{one.task}/{one.id}", domain=one.domain or one.task, tier=_tier(one.conversation))
            for one in self.questions
        ]

    @property
    def fingerprint(self) -> str:
        """Of what is asked and what is right."""
        digest = hashlib.blake2b(digest_size=16)
        for one in self.questions:
            record = messages.write(replace(one.conversation, id=""))
            digest.update(
                json.dumps([one.id, record, one.expected, one.reward_name, one.options], sort_keys=True).encode()
            )
        return digest.hexdigest()


def _tier(conversation: Conversation) -> int | None:
    tier = conversation.extra.get(TIER)
    return tier if isinstance(tier, int) and 0 <= tier <= 4 else None


def _tasks(config: DataConfig) -> Callable[[str], Task | None]:
    """Name of a set -> the task that it is made by."""
    names: dict[str, str | None] = {}
    if isinstance(config, TaskData):
        names[config.task] = config.task
    elif isinstance(config, FilesData):
        names = {name: one.task for name, one in config.sets.items()}
    return lambda name: TASKS.get(names.get(name) or "")


def quarantine_of(parts: Parts, folder: Path, *, max_bad: float) -> Quarantine:
    """For the records of training and held-out data together."""
    known = sum(part.num_records or 0 for part in parts if part is not None)
    return Quarantine(folder, max_bad=max_bad, num_records=known)


def check_reward(config: RLConfig, questions: Sequence[Question]) -> None:
    """Raises UserError: `reward` is for records that name none, and there are none."""
    named = dict.fromkeys(one.reward_name for one in questions)
    if config.reward is not None and config.reward not in named:
        raise UserError(
            f"reward={config.reward} is for records that name none, and all name their own ({', '.join(named)}), so it "
            "would never be asked. Leave it out, or take `reward` out of the records; something to be weighed beside "
            "what is right is a part of its own (rewards.weights)."
        )


def open_prompts(
    mixture: Mixture, config: RLConfig, processor: Processor, quarantine: Quarantine, *, limit: int | None = None
) -> Prompts:
    """Every record of the mixture that can be read, in the order of `Mixture.keys`.

    Args:
        quarantine: gets the others. Every rank has the same ones.
        limit: so many of them, evenly over all; None: all.

    Raises:
        DataError, UserError: a stream; more bad records than data.max_bad tolerates, or records that cannot be scored;
            pictures for a text model.
    """
    if mixture.streaming:
        raise DataError(
            f"{mixture.name} is streaming, and reinforcement learning asks prompts again by how hard they are, so it "
            "must be able to look them up. Set data.streaming=false."
        )
    tasks = []
    task_of = _tasks(config.data)
    for one in mixture.sets:
        conversations = []
        for number in range(len(one.dataset)):  # type: ignore[arg-type]
            try:
                item = one.dataset[number]
            except RefusedError as error:
                quarantine.add(error.refusal)
                continue
            assert isinstance(item, Conversation)
            conversations.append(item)
        questions = questions_of(one.name, conversations, one.dataset.media, config, AskedConfig(), task_of(one.name))
        tasks.append(AskedTask(one.name, questions, ""))
    check_fits(tasks, text_model=processor.config.vision is None)
    questions = [one for task in tasks for one in task.questions]
    if not questions:
        raise UserError(f"{mixture.name} holds no prompt.")
    return Prompts(evenly(questions, limit), mixture.name)
