"""What is said of a set of pairs, and of labelled answers."""

import pytest

from data.batch import Role
from data.conversation import Learns
from data.dataset import SetSpec
from data.fit import Rules
from data.mixture import Share, open_mixture
from data.prepare import check_record
from data.records import write_jsonl
from tests.tiny import tiny_processor
from train.checks.findings import Level
from train.checks.records import Statistics, describe, judge_answers

PROCESSOR = tiny_processor()


def looked_at(tmp_path, learns, records) -> Statistics:
    path = str(write_jsonl(tmp_path / "set.jsonl", records))
    mixture = open_mixture({"set": Share(spec=SetSpec(path=path))}, learns=learns).train
    found = Statistics("set")
    for key in mixture.keys():
        one = check_record(mixture, key, PROCESSOR, Rules(max_tokens=256, learns=learns))
        found.add(key, one)
    return found


def labelled(*labels):
    return [{"prompt": "?", "completion": "yes, yes", "label": label} for label in labels]


@pytest.mark.parametrize(
    "labels, level, words",
    [
        ((True, False, True), Level.OK, "2 answers are wanted and 1 are not"),
        ((True, True), Level.WARNING, "2 answers are wanted and 0 are not: without both kinds"),
        ((False,), Level.WARNING, "0 answers are wanted and 1 are not: without both kinds"),
    ],
)
def test_both_kinds_of_labels_are_needed(tmp_path, labels, level, words):
    found = looked_at(tmp_path, Learns.LABELLED, labelled(*labels))
    (finding,) = judge_answers(found)
    assert finding.level is level and words in finding.text


def test_pairs_whose_scores_say_otherwise_are_counted(tmp_path):
    pair = {"prompt": "?", "chosen": "yes, yes", "rejected": "no"}
    scores = [(3, 1), (1, 1), (1, 2), (None, 4)]
    records = [{**pair, "score_chosen": chosen, "score_rejected": rejected} for chosen, rejected in scores]
    found = looked_at(tmp_path, Learns.PAIRS, records)

    (finding,) = judge_answers(found)
    assert finding.level is Level.WARNING and "in 2 of 3 pairs with scores" in finding.text
    assert judge_answers(looked_at(tmp_path, Learns.PAIRS, records[:1])) == []
    longer, shorter = found.answers[Role.CHOSEN], found.answers[Role.REJECTED]
    assert len(longer) == len(shorter) == 4 and min(longer) > max(shorter) >= 2
    told = "\n".join(describe(found))
    assert f"trained tokens of chosen answers: median {longer[0]}" in told
    assert f"trained tokens of rejected answers: median {shorter[0]}" in told
    assert found.trained.tolist() == [sum(both) for both in zip(longer, shorter, strict=True)]


def test_answers_that_were_cut_off_are_counted(tmp_path):
    texts = [("yes, it is reddish.", "yes, it is redd"), ("a", "a and b"), ("yes", "no"), ("it is red", "it is blue")]
    records = [{"prompt": "?", "chosen": chosen, "rejected": rejected} for chosen, rejected in texts]
    (finding,) = judge_answers(looked_at(tmp_path, Learns.PAIRS, records))
    assert finding.level is Level.WARNING and "in 2 of 4 pairs, one answer is the beginning" in finding.text


def test_conversations_have_no_answers_to_judge(tmp_path):
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]
    found = looked_at(tmp_path, Learns.CONVERSATIONS, [{"messages": messages}])
    assert judge_answers(found) == [] and not found.answers and "answers" not in "".join(describe(found))
