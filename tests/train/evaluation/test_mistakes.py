"""Preference records of written answers: which are chosen, by hand; resumed, refused, read back."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from data import formats
from data.conversation import Conversation, Judged, Learns, Media, Pair
from data.dataset import RecordDataset, SetSpec, open_set
from data.fit import Rules, fit
from data.formats import preference
from data.media import MediaFolder
from data.records import open_records
from data.tasks import TASKS
from tests.ernie_model.inference.scripted import ScriptedEngine
from train.compose import plain
from train.config import UserError
from train.evaluation.evaluation import agents_of
from train.evaluation.mistakes import judge, make_pairs, refuse_tools
from train.evaluation.questions import open_tasks
from train.inference_config import Form, PairsConfig, RewardLimits, SamplingConfig


@pytest.fixture
def make(served, tmp_path):
    """Make records of what `reply` writes; gives the summary and the records' file."""

    def make(tasks: list[str], reply, **settings):
        settings.setdefault("output", str(tmp_path / "out"))
        settings.setdefault("sampling", SamplingConfig(max_new_tokens=64, temperature=1.0))
        settings.setdefault("concurrency", 1)
        config = PairsConfig(checkpoint="tiny", tasks=tasks, **settings)
        asked = open_tasks(config)
        make.engine = ScriptedEngine(served.processor.tokenizer, reply)
        agents = agents_of(config, asked, served, make.engine)
        summary = make_pairs(config, plain(config), asked, served, agents, Console(quiet=True))
        name = "pairs.jsonl" if config.form is Form.pairs else "labelled.jsonl"
        return summary, Path(config.output) / name

    return make


def in_turn(*replies: str):
    """The attempts at every question, one after the other."""
    seen: dict[tuple, int] = {}

    def reply(prompt) -> str:
        number = seen.get(prompt.token_ids, 0)
        seen[prompt.token_ids] = number + 1
        return replies[number % len(replies)]

    return reply


@pytest.fixture
def one_sum(write) -> str:
    return write([{"id": "q", "prompt": "2 + 3 = ?", "completion": "It is 5.", "answer": "5", "reward": "number"}])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(path: Path) -> list[tuple[str, str]]:
    return [(one["chosen"][0]["content"], one["rejected"][0]["content"]) for one in lines(path)]


def pairs_in(path: Path) -> list[Pair]:
    """The file, read back."""
    return [pair for record in open_records(str(path)) if isinstance(pair := preference.read(record), Pair)]


def test_the_most_frequent_answers_come_first_and_equal_texts_are_one(make, one_sum):
    """Eight attempts: right 5 (twice), 5.0 (once); wrong 7 (three times), 4 (twice)."""
    replies = in_turn("5.0", "7", "5", "4", "7", "5", "7", "4")
    summary, path = make([one_sum], replies)
    assert texts(path) == [("5", "7")]
    assert summary["tasks"]["mine"] == {
        "questions": 1,
        **{"both": 1, "all_right": 0, "all_wrong": 0, "neither": 0},
        "attempts": {"right": 3, "wrong": 5, "between": 0, "empty": 0, "unfinished": 0, "unscored": 0, "failed": 0},
        **{"gave": 1, "records": 1, "wanted": 0},
    }
    assert lines(path)[0]["extra"] == {
        **{"task": "mine", "question": "q", "attempts": {"right": 3, "wrong": 5}},
        **{"chosen_written": 2, "rejected_written": 3},
    }
    pair = preference.read(open_records(str(path))[0])
    assert (
        isinstance(pair, Pair) and pair.scores == (1, 0) and (pair.prompt.answer, pair.prompt.reward) == ("5", "number")
    )
    # The same answers give other records without being asked again.
    _, path = make([one_sum], (), per_question=3)
    assert texts(path) == [("5", "7"), ("5", "4"), ("5.0", "7")] and not make.engine.prompts
    assert [one["id"] for one in lines(path)] == ["mine/q/1", "mine/q/2", "mine/q/3"]
    _, path = make([one_sum], (), per_question=9)
    assert len(texts(path)) == len(set(texts(path))) == 4


def test_of_equally_frequent_answers_the_likelier_comes_first(make, one_sum, tmp_path):
    """Every token of the script has log-probability -0.5, so the shorter text is the likelier one."""
    _, path = make([one_sum], in_turn("5", "9 it must be", "8", "7 perhaps"), attempts=4, per_question=3)
    assert [wrong for _, wrong in texts(path)] == ["8", "7 perhaps", "9 it must be"]


def test_answers_between_right_and_wrong_are_left_out(make, write):
    record = {"id": "q", "prompt": "Name?", "answer": "abcdefghij", "reward": "edit_distance"}
    replies = ("abcdefghij", "abcdefghix", "abxxxxxxxx", "abcdefghij")
    summary, path = make([write([record])], in_turn(*replies), attempts=4, wrong_at=0.5)
    assert texts(path) == [("abcdefghij", "abxxxxxxxx")]
    assert summary["tasks"]["mine"]["attempts"]["between"] == 1
    _, path = make([write([record])], (), attempts=4, right_at=0.9, wrong_at=None, per_question=4)
    assert set(texts(path)) == {(right, "abxxxxxxxx") for right in ("abcdefghij", "abcdefghix")}


def test_attempts_that_do_not_end_are_no_answers(make, one_sum):
    """A limit of tokens cuts the long one, which is wrong as far as it goes."""
    sampling = SamplingConfig(max_new_tokens=8, temperature=1.0)
    with pytest.raises(
        UserError, match=r"none of 2 attempts at 1 questions is wrong \(1 are right\): there is nothing"
    ):
        make([one_sum], in_turn("5", "777 " * 50), attempts=2, sampling=sampling)


@pytest.mark.parametrize(
    "replies, settings, error",
    [
        (("5",), {}, r"none of 8 attempts at 1 questions is wrong \(8 are right\): there is nothing to learn from."),
        (("5",), {"form": Form.labelled}, r"is wrong \(8 are right\): there is nothing to learn from. Ask harder"),
        (("4",), {}, r"none of 8 attempts at 1 questions is right \(8 are wrong\); use_answer=true takes"),
        (("777 " * 50,), {}, r"none of 8 attempts at 1 questions can be judged: 8 unfinished. answers.jsonl in"),
    ],
)
def test_nothing_to_learn_from_is_refused_with_the_numbers(make, one_sum, tmp_path, replies, settings, error):
    with pytest.raises(UserError, match=error):
        make([one_sum], in_turn(*replies), **settings)
    assert not (tmp_path / "out" / "pairs.jsonl").exists()


def test_questions_that_are_all_right_or_all_wrong_give_no_pair(make, sums, adds):
    """Sums of 10 or more are always wrong, the others always right."""
    wrong = lambda prompt: adds(prompt) if len(adds(prompt)) == 1 else "0"  # noqa: E731
    with pytest.raises(UserError, match="no question has both right and wrong attempts: 9 are all right, 3 all wrong"):
        make([sums], wrong, attempts=2)


def test_the_questions_own_answer_may_be_the_right_one(make, one_sum, write):
    summary, path = make([one_sum], in_turn("4"), use_answer=True, attempts=1)
    assert texts(path) == [("It is 5.", "4")] and summary["tasks"]["mine"]["all_wrong"] == 1
    assert lines(path)[0]["extra"]["chosen_written"] == 0
    # An answer of the record that its own reward does not take is not taken either.
    false = write([{"id": "q", "prompt": "2 + 3 = ?", "completion": "It is 6.", "answer": "5", "reward": "number"}])
    with pytest.raises(UserError, match="is right .*no question has an answer of its own that its reward takes"):
        make([false], in_turn("4"), use_answer=True, output=f"{path.parent}2")


def test_a_reward_that_hangs_takes_no_answer_of_the_models_or_of_the_questions(make, write, tmp_path):
    own = "python:tests.train.reinforcement.own_rewards.hangs_when_right"
    asked = write([{"id": "q", "prompt": "2 + 3 = ?", "answer": "5", "reward": own}])
    limits = RewardLimits(time_s=1.0)
    with pytest.raises(UserError, match="none of 2 attempts .* no question has an answer of its own that its reward"):
        make([asked], in_turn("5", "4"), use_answer=True, attempts=2, rewards=limits)
    wrote = lines(tmp_path / "out/answers.jsonl")
    assert [one["score"] for one in wrote] == [None, 0.0] and "took longer than 1 s" in wrote[0]["unscored"]


def test_labelled_answers_read_back_as_they_were(make, one_sum):
    summary, path = make([one_sum], in_turn("5", "4", "6", "6"), form=Form.labelled, per_question=2)
    records = [labelled(record) for record in open_records(str(path))]
    assert [(one.messages[-1].text, one.label) for one in records] == [("5", True), ("6", False), ("4", False)]
    assert summary["tasks"]["mine"]["wanted"] == 1 and summary["tasks"]["mine"]["records"] == 3
    assert all(one.answer == "5" and one.reward == "number" for one in records)


def labelled(record) -> Conversation:
    found = formats.recognise(record, None).read(record, None)
    assert isinstance(found, Conversation)
    return found


def picture_of(conversation: Conversation) -> Media:
    media = conversation.messages[0].parts[0].media
    assert media is not None
    return media


def test_pictures_of_a_task_and_of_a_file_lie_beside_the_records(make, write, picture, served):
    """The pair shows what the question showed: of a task in memory, and of a file's folder."""
    content = [{"type": "image", "image": picture.name}, {"type": "text", "text": "What colour?"}]
    ask = {"id": "a", "messages": [{"role": "user", "content": content}], "answer": "blue", "reward": "exact"}
    summary, path = make(["digits", write([ask])], in_turn(*"0123456789", "blue"), attempts=11, limit=2)
    assert summary["tasks"]["digits"]["records"] == 2 and summary["tasks"]["mine"]["records"] == 1
    records = pairs_in(path)
    media = open_set("pairs", SetSpec(path=str(path)), learns=Learns.PAIRS).train.media
    first, *_, last = records
    shown = media.open_image(picture_of(first.prompt))
    train = {one.id: one for one in TASKS["digits"].conversations("train", 0)}
    asked = train[first.prompt.extra["question"]]
    assert shown.tobytes() == MediaFolder(None).open_image(picture_of(asked)).tobytes()
    assert first.chosen[0].text == asked.answer != first.rejected[0].text
    assert media.open_image(picture_of(last.prompt)).getpixel((0, 0)) == (0x33, 0x66, 0x99)
    heldout = {one.id for one in TASKS["digits"].conversations("heldout", 0)}
    assert not heldout & {pair.prompt.extra["question"] for pair in records}


def test_a_thought_is_part_of_the_answer(make, write, tmp_path):
    record = {"id": "q", "prompt": "2 + 3 = ?", "answer": "5", "reward": "number"}
    sampling = SamplingConfig(max_new_tokens=64, temperature=1.0, thinking=True)
    replies = in_turn("2, 3.</think>5", "two and three</think>4", "a</think>4")
    _, path = make([write([record])], replies, attempts=3, sampling=sampling, per_question=2)
    pairs = pairs_in(path)
    assert [pair.rejected[0].reasoning for pair in pairs] == ["a", "two and three"]
    assert all(pair.chosen[0].reasoning == "2, 3." and pair.chosen[0].text == "5" for pair in pairs)


def test_an_answer_with_a_thought_makes_no_pair_with_one_without(make, write, tmp_path):
    """Their generation prompts differ, and the encoder of pairs refuses them."""
    record = {"id": "q", "prompt": "2 + 3 = ?", "completion": "5", "answer": "5", "reward": "number"}
    sampling = SamplingConfig(max_new_tokens=64, temperature=1.0, thinking=True)
    thought, plain = "2, 3.</think>", "</think>"
    with pytest.raises(UserError, match="never both begin with a thought, .* of 2 attempts at 1 questions"):
        make([write([record])], in_turn(f"{thought}5", f"{plain}4"), attempts=2, sampling=sampling)
    with pytest.raises(
        UserError, match="no question has an answer .* that begins with a thought where the attempts do"
    ):
        use = dict(attempts=1, use_answer=True, output=str(tmp_path / "own"))
        make([write([record])], in_turn(f"{thought}4"), sampling=sampling, **use)
    replies = in_turn(f"{thought}5", f"{plain}4", f"{plain}4", f"{thought}7")
    _, path = make([write([record])], replies, attempts=4, sampling=sampling, output=str(tmp_path / "four"))
    assert texts(path) == [("5", "7")]


def test_empty_answers_are_left_out_as_the_encoder_of_pairs_refuses_them(make, one_sum):
    summary, path = make([one_sum], in_turn("5", "", "", "4"), attempts=4)
    assert texts(path) == [("5", "4")] and summary["tasks"]["mine"]["attempts"]["empty"] == 2


def test_every_record_can_be_learned_from(make, write, picture, served):
    """What the data layer makes of the files: one example of a pair for each line, and of a labelled answer."""
    content = [{"type": "image", "image": picture.name}, {"type": "text", "text": "What colour?"}]
    ask = {"id": "a", "messages": [{"role": "user", "content": content}], "answer": "blue", "reward": "exact"}
    for form, learns in ((Form.pairs, Learns.PAIRS), (Form.labelled, Learns.LABELLED)):
        _, path = make([write([ask])], in_turn("blue", "red", ""), attempts=3, form=form)
        dataset = open_set("records", SetSpec(path=str(path)), learns=learns).train
        assert isinstance(dataset, RecordDataset)
        items = [dataset[number] for number in range(len(dataset))]
        assert len(items) == len(lines(path)) == (1 if learns is Learns.PAIRS else 2)
        for item in items:
            item = Judged(conversation=item) if isinstance(item, Conversation) else item
            example = fit(item, served.processor, dataset.media, Rules(max_tokens=512, learns=learns)).example
            assert len(example.lengths) == (3 if learns is Learns.PAIRS else 2)


def test_what_was_broken_off_goes_on_and_gives_the_same(make, sums, adds, tmp_path):
    wrong = lambda prompt: in_memory(prompt, adds)  # noqa: E731
    memory.clear()
    _, whole = make([sums], wrong, attempts=2, output=str(tmp_path / "whole"))
    text = whole.read_text()
    answers = whole.with_name("answers.jsonl")
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:10]) + '{"task": "su')
    whole.unlink()
    memory.clear()
    make([sums], wrong, attempts=2, output=str(tmp_path / "whole"))
    assert len(make.engine.prompts) == 14 and whole.read_text() == text
    with pytest.raises(UserError, match="(?s)holds other answers.*settings.seed: 0 then, 1 now"):
        make([sums], wrong, attempts=2, output=str(tmp_path / "whole"), seed=1)


memory: dict = {}


def in_memory(prompt, adds) -> str:
    """Right the first time, wrong the second."""
    memory[prompt.token_ids] = memory.get(prompt.token_ids, 0) + 1
    return adds(prompt) if memory[prompt.token_ids] == 1 else "99"


def test_tasks_with_tools_are_refused(served):
    tasks = open_tasks(PairsConfig(checkpoint="x", tasks=["zoom"], limit=1))
    with pytest.raises(UserError, match=r"zoom is answered with image_zoom_in_tool; .* per_task.zoom.tools=\[\]"):
        refuse_tools(tasks)
    refuse_tools(open_tasks(PairsConfig(checkpoint="x", tasks=["digits"], limit=1)))


def test_failed_attempts_are_neither_right_nor_wrong(served):
    (task,) = open_tasks(PairsConfig(checkpoint="x", tasks=["digits"], limit=1))
    assert judge(task.questions[0], [], right_at=1.0, wrong_at=None).kind == "neither"


@pytest.mark.parametrize(
    "settings, error",
    [
        (
            {"attempts": 1},
            "attempts is 1, and one answer is not both right and wrong. Raise attempts, or",
        ),
        ({"per_question": 0}, "per_question is 0; it must be at least 1."),
        ({"wrong_at": 1.0}, "wrong_at is 1.0; it must be at least 0 and less than right_at, which is 1.0."),
        ({"sampling": SamplingConfig(temperature=0.0)}, "attempts is 8 and sampling.temperature 0"),
        ({"tasks": []}, "tasks is empty"),
    ],
)
def test_settings_that_contradict_each_other(settings, error):
    with pytest.raises(UserError, match=error):
        PairsConfig(checkpoint="x", **({"tasks": ["digits"]} | settings))
