"""What holds for every task: fixed by the seed, splits that share nothing, checkable answers, the same as files."""

import hashlib
import importlib
import subprocess
import sys
import zlib
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from data.conversation import Conversation
from data.dataset import RecordDataset, SetSpec, open_set, open_task
from data.encode import encode
from data.tasks import SPLITS, TASKS, Split, question_of
from data.tasks import __main__ as command
from data.tasks.base import Item, drawn, side
from train.rewards.base import Attempt
from train.rewards.registry import REWARDS

pytest.importorskip("sklearn.datasets")

FEW = 60
"""Conversations of a drawn task, to be quick; more begin with the same ones."""


@cache
def conversations(name: str, split: Split, seed: int = 0) -> list[Conversation]:
    module = importlib.import_module(f"data.tasks.{name}")
    if not hasattr(module, "draw"):
        return TASKS[name].conversations(split, seed)
    return drawn(name, {split: FEW}, module.draw)(split, seed)


def media(some: list[Conversation]) -> set[bytes]:
    """Digests of the pictures and clips that are asked about (not of those that tools return)."""
    parts = (part for one in some for part in one.messages[0].parts)
    return {hashlib.sha256(part.media).digest() for part in parts if isinstance(part.media, bytes)}


def test_naming_the_tasks_imports_nothing_that_only_drawing_needs():
    heavy = "sklearn", "matplotlib", "av", "torch"
    code = f"import sys, data.tasks; print([name for name in {heavy} if name in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


@pytest.mark.parametrize("name", TASKS)
def test_the_splits_share_neither_picture_nor_question(name):
    train, heldout = (conversations(name, split) for split in SPLITS)
    assert len(media(train)) == len(train) and len(media(heldout)) == len(heldout)  # each picture once
    assert not media(train) & media(heldout)
    assert not {one.id for one in train} & {one.id for one in heldout}


@pytest.mark.parametrize(
    "name", ["grounding", "counting", "charts", "documents", "zoom", "cards", "places", "locate", "video", "circuits"]
)
def test_no_question_is_asked_twice_or_on_both_sides(name):
    """By its key, which two pictures on different paper may share; nothing is rendered, so many are looked at."""
    module = importlib.import_module(f"data.tasks.{name}")
    stand_in = conversations("digits", "train")[0]

    def keys(split: Split, count: int) -> list[str]:
        kept: list[str] = []

        def draw(rng, split, seed):
            item = module.draw(rng, split, seed)
            return Item(item.key, lambda id: kept.append(item.key) or stand_in)

        drawn(name, {split: count}, draw)(split, 0)
        return kept

    train, heldout = keys("train", 1200), keys("heldout", 200)
    assert len(set(train)) == 1200 and len(set(heldout)) == 200
    assert not set(train) & set(heldout)


@pytest.mark.parametrize("name", TASKS)
def test_more_of_a_task_begin_with_the_same(name, monkeypatch):
    """So that `conversations` above stands for the task, and data.limit for a smaller one."""
    module = importlib.import_module(f"data.tasks.{name}")
    if hasattr(module, "draw"):
        begin = [one.render("x") for one in _items(name, module.draw, 3)]
        same = [replace(one, id="x") for one in conversations(name, "train")[:3]]
        assert begin == same


def _items(name, draw, count):
    """By hand: the stream of the split's random numbers, without what is on the other side."""
    rng = np.random.default_rng([0, zlib.crc32(name.encode()), 0])
    while count:
        item = draw(rng, "train", 0)
        if side(f"{name} {item.key}", 0) == "train":
            count -= 1
            yield item


@pytest.mark.parametrize("name", TASKS)
def test_the_seed_fixes_everything(name):
    again = conversations.__wrapped__(name, "heldout", 0)
    assert again == conversations(name, "heldout")
    other = conversations(name, "heldout", 1)
    assert len(media(other) & media(again)) < len(again) * 0.4  # of the digits, a fifth is the same by chance


@pytest.mark.parametrize("name", TASKS)
def test_a_program_can_check_the_answers(name):
    for split in SPLITS:
        for one in conversations(name, split)[:FEW]:
            assert one.answer and one.reward and one.extra["domain"]
            assert isinstance(one.extra.get("reward_options", {}), dict)
            assert one.messages[-1].role == "assistant" and one.messages[-1].text
            assert question_of(one).messages[-1].role == "user"
            assert {tool["function"]["name"] for tool in one.tools} == set(TASKS[name].tools)
            reward, options = REWARDS[one.reward], one.extra.get("reward_options", {})
            assert reward(Attempt(answer=one.messages[-1].text), one.answer, **options) == 1
            assert reward(Attempt(answer="I do not know."), one.answer, **options) == 0


@pytest.mark.parametrize("name", TASKS)
def test_no_answer_is_most_of_a_domain(name):
    """Or else a model that never looks would seem to know it."""
    domains: dict[str, list[str]] = {}
    for one in conversations(name, "heldout"):
        domains.setdefault(one.extra["domain"], []).append(one.answer or "")
    for domain, answers in domains.items():
        assert max(map(answers.count, set(answers))) <= max(3, 0.5 * len(answers)), domain


@pytest.mark.parametrize("name", TASKS)
def test_answers_fit_in_what_the_task_allows(name, real_processor):
    for one in conversations(name, "train")[:12]:
        for index, message in enumerate(one.messages):
            if message.role == "assistant":
                until = replace(one, messages=one.messages[: index + 1])
                example = encode(until, real_processor, every_turn=True)
                before = encode_length(replace(one, messages=one.messages[:index]), real_processor)
                assert int((example.weight_T != 0).sum()) - before <= TASKS[name].max_new_tokens


def encode_length(one: Conversation, processor) -> int:
    """Tokens learned in a conversation that may hold none."""
    if not any(message.role == "assistant" for message in one.messages):
        return 0
    return int((encode(one, processor, every_turn=True).weight_T != 0).sum())


@pytest.mark.parametrize("name", TASKS)
def test_files_hold_the_same(name, tmp_path, real_processor):
    few = replace(TASKS[name], conversations=lambda split, seed: conversations(name, split, seed)[:3])
    paths = few.write_jsonl(tmp_path)
    for split, path in paths.items():
        read = open_set(split, SetSpec(path=str(path))).train
        assert isinstance(read, RecordDataset) and len(read) == 3
        for mine, index in zip(conversations(name, split), range(3), strict=False):
            theirs = read[index]
            for what in ("id", "answer", "reward", "extra", "tools"):
                assert getattr(mine, what) == getattr(theirs, what)
            a, b = encode(mine, real_processor), encode(theirs, real_processor, media=read.media)
            assert torch.equal(a.token_T, b.token_T)
            assert a.patch_PX is not None and b.patch_PX is not None and torch.equal(a.patch_PX, b.patch_PX)


def test_limit_keeps_the_first_and_leaves_the_held_out_part_whole():
    splits = open_task("few", "digits", 0, limit=7)
    assert [one.id for one in splits.train] == [one.id for one in conversations("digits", "train")[:7]]
    assert splits.heldout is not None and len(splits.heldout) == len(conversations("digits", "heldout"))


def test_a_key_has_one_side_and_a_fifth_is_held_out():
    sides = [side(str(number), seed=3) for number in range(5000)]
    assert sides == [side(str(number), seed=3) for number in range(5000)]
    assert 900 < sides.count("heldout") < 1100  # 1000, and 3.5 standard deviations of 28
    assert sides != [side(str(number), seed=4) for number in range(5000)]


def test_the_command_lists_and_writes_and_overwrites_nothing(tmp_path, capsys):
    assert command.main([]) == 0
    said = capsys.readouterr().out
    assert all(task.description in said for task in TASKS.values())
    assert command.main(["digits", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "heldout.jsonl").exists()
    for place in ("out", "out/train.jsonl"):
        with pytest.raises(SystemExit):
            command.main(["digits", str(tmp_path / place)])
        assert "nothing is overwritten" in capsys.readouterr().err
