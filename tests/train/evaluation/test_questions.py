"""From tasks and files to questions: what is asked, and everything that is refused before a model is opened."""

import dataclasses

import pytest

from data.errors import DataError
from data.tasks import TASKS
from train.config import UserError
from train.evaluation.questions import check_fits, evenly, open_tasks
from train.inference_config import EvaluationConfig


def opened(*tasks: str, **settings):
    return open_tasks(EvaluationConfig(checkpoint="x", tasks=list(tasks), **settings))


def test_a_task_of_the_suite():
    (task,) = opened("digits", limit=5)
    conversations = TASKS["digits"].conversations("heldout", 0)
    assert [one.id for one in task.questions] == [conversations[i * len(conversations) // 5].id for i in range(5)]
    one = task.questions[0]
    assert one.reward_name == "exact" and one.expected == conversations[0].answer
    assert [message.role for message in one.asked.messages] == ["user"]
    assert one.max_new_tokens == TASKS["digits"].max_new_tokens
    assert opened("digits", limit=5)[0].fingerprint == task.fingerprint != opened("digits", limit=6)[0].fingerprint


def test_what_is_held_out_follows_from_the_seed_of_the_task_and_not_from_that_of_sampling():
    first = opened("digits", limit=50)[0]
    assert opened("digits", limit=50, seed=5)[0].fingerprint == first.fingerprint
    assert opened("digits", limit=50, task_seed=5)[0].fingerprint != first.fingerprint
    train = {one.id for one in TASKS["digits"].conversations("train", 0)}
    assert not train & {one.id for one in opened("digits")[0].questions}


def test_every_bundled_task_can_be_scored():
    for name in TASKS:
        (task,) = opened(name, limit=3)
        assert task.rewards and all(one.target is not None for one in task.questions)


def test_files_of_several_formats(write):
    messages = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    alpaca = {"instruction": "2+2?", "input": "", "output": "4"}
    prompt = {"prompt": "2+2?", "solution": "4"}
    for number, record in enumerate((messages, alpaca, prompt)):
        (task,) = opened(write([record], f"file{number}.jsonl"), reward="number")
        (one,) = task.questions
        assert task.name == f"file{number}"
        assert one.expected == "4" and one.asked.messages[-1].text == "2+2?"
        assert one.target.messages[-1].text == "4"


def test_only_the_answer_is_learned_in_what_is_measured(write):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    record = {"messages": [{"role": role, "content": text} for role, text in turns], "reward": "exact"}
    one = opened(write([record]))[0].questions[0]
    assert [message.text for message in one.asked.messages] == ["a", "b", "c"] and one.expected == "d"
    assert [message.trained_weight for message in one.target.messages] == [0, 0, 0, 1]


def test_rewards_come_from_the_task_the_record_or_the_default_in_this_order(write):
    path = write([{"prompt": "a", "answer": "1", "reward": "number"}, {"prompt": "b", "answer": "2"}])
    names = [one.reward_name for one in opened(path, reward="exact")[0].questions]
    assert names == ["number", "exact"]
    forced = opened(path, per_task={"mine": {"reward": "anls", "reward_options": {"threshold": 0.7}}})[0]
    assert forced.rewards == ("anls",) and forced.questions[0].options == {"threshold": 0.7}


def test_options_of_records_are_used(write):
    record = {"prompt": "a", "answer": "100", "reward": "number", "reward_options": {"tolerance": 0.1}}
    one = opened(write([record]))[0].questions[0]
    assert one.options == {"tolerance": 0.1}


@pytest.mark.parametrize(
    "records, settings, error",
    [
        (
            [{"prompt": "a", "reward": "exact"}],
            {},
            "1 of 1 questions cannot be scored:.* has no right answer.*`answer`",
        ),
        ([{"prompt": "a", "answer": "b"}], {}, "names no reward.*reward=exact, per_task.mine.reward=exact"),
        ([{"prompt": "a", "answer": "b", "reward": "exakt"}], {}, "there is no reward 'exakt'; did you mean exact"),
        ([{"prompt": "a", "answer": "b"}], {"reward": "exakt"}, "there is no reward 'exakt'; did you mean exact"),
        ([{"prompt": "a", "answer": "b"}], {"reward": "python:no.such"}, "cannot be imported"),
        ([{"prompt": "a", "answer": "many", "reward": "number"}], {}, "number cannot read the right answer 'many'"),
        (
            [{"prompt": "a", "answer": "1", "reward": "number", "reward_options": {"tolerence": 1}}],
            {},
            "has no option 'tolerence'; did you mean tolerance",
        ),
        (
            [{"prompt": "a", "answer": "1", "reward": "number", "reward_options": {"tolerance": "much"}}],
            {},
            "reward number does not take tolerance='much'",
        ),
        ([{"prompt": "a", "answer": "b", "reward": "exact"}, {"prompt": 5}], {}, "1 records cannot be read.*:2: "),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], {}, "cannot be read.*is a pair"),
        ([], {}, "mine.jsonl"),
        ([{"prompt": "a", "answer": "b"}], {"per_task": {"mien": {}}}, "per_task.mien is for none .*did you mean mine"),
    ],
)
def test_files_that_cannot_be_asked(write, records, settings, error):
    with pytest.raises((UserError, DataError), match=f"(?s){error}"):
        opened(write(records), **settings)


def test_names_that_are_none(write, tmp_path):
    with pytest.raises(UserError, match="there is no task 'digit'; did you mean digits"):
        opened("digit")
    with pytest.raises(DataError, match="tasks .*nothing.jsonl"):
        opened(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(UserError, match="tasks has two of the name 'digits'"):
        opened("digits", "digits")
    with pytest.raises(UserError, match="per_task.digits.media_root is for files"):
        opened("digits", per_task={"digits": {"media_root": "x"}})


def test_a_split_without_questions(monkeypatch):
    empty = dataclasses.replace(TASKS["digits"], conversations=lambda split, seed: [])
    monkeypatch.setitem(TASKS, "digits", empty)
    with pytest.raises(UserError, match="tasks=digits has no question in split=heldout"):
        opened("digits")


def test_pictures_and_seeing_tools_are_nothing_for_a_text_model(write):
    check_fits(opened("digits", limit=1), text_model=False)
    with pytest.raises(UserError, match="of digits shows an image, but the checkpoint is a text model"):
        check_fits(opened("digits", limit=1), text_model=True)
    path = write([{"prompt": "a", "answer": "b", "reward": "exact"}])
    check_fits(opened(path), text_model=True)
    tools = {"mine": {"tools": ["image_zoom_in_tool"]}}
    with pytest.raises(UserError, match="has the tool image_zoom_in_tool, which returns images, but the checkpoint is"):
        check_fits(opened(path, per_task=tools), text_model=True)


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"tasks": []}, "tasks is empty; for example"),
        ({"attempts": 4}, "attempts is 4 and sampling.temperature 0, which would write the same answer each time"),
        ({"pass_at": [2]}, "pass_at has 2; it must lie in 1..attempts, which is 1"),
        ({"limit": 0}, "limit is 0"),
        ({"right_at": 0}, "right_at is 0"),
        ({"concurrency": 5000}, "concurrency is 5000; it must lie in 1..1088"),
        ({"per_task": {"digits": {"rewrd": "exact"}}}, "per_task.digits.rewrd is not a setting .*did you mean reward"),
        ({"per_task": {"digits": {"limit": "few"}}}, "per_task.digits.limit: Value 'few'"),
        ({"per_task": {"digits": {"limit": 0}}}, "per_task.digits.limit is 0"),
        ({"per_task": {"digits": "exact"}}, "per_task.digits is exact; it must be like"),
    ],
)
def test_settings_that_contradict(settings, error):
    with pytest.raises(UserError, match=error):
        EvaluationConfig(checkpoint="x", **{"tasks": ["digits"], **settings})


def test_evenly():
    assert evenly(range(10), 4) == [0, 2, 5, 7] and evenly(range(3), 9) == [0, 1, 2] == evenly(range(3), None)
