"""Accuracy on held-out conversations: by hand, and against real decoding."""

import dataclasses

import pytest
import torch

from ernie_model.context import Packed
from tests.train import small
from train.heldout import answer, exact, in_rows, prompt_length
from train.policy import on_device
from train.score import wilson


@pytest.mark.parametrize(
    "correct, total, low, high",
    [  # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_as_published(correct, total, low, high):
    assert wilson(correct, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_of_nothing_is_everything():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 12)[0] == 0 and wilson(12, 12)[1] == 1


def test_exact_needs_every_learned_token_of_a_segment():
    """Learned tokens are marked w; x is right.   . w w | . w w | w      . x x | . x . | x"""
    row = small.row(small.example(0, 4, learned=2), small.example(1, 4, learned=2), small.example(2, 3, learned=1))
    learned = (row.weight_T != 0).nonzero()[:, 0].tolist()
    assert learned == [1, 2, 5, 6, 9]
    correct_T = torch.zeros(11, dtype=torch.bool)
    correct_T[[1, 2, 5, 9]] = True
    assert exact(correct_T, row).tolist() == [True, False, True]


def test_prompt_ends_where_the_last_answer_begins():
    """weight_T   0 1 1 0 0 1 1 0: targets 2, 3 and 6, 7 are learned, so the last prompt has 6 tokens."""
    weight_T = torch.tensor([0, 1, 1, 0, 0, 1, 1, 0.0])
    assert prompt_length(dataclasses.replace(small.example(0, 8), weight_T=weight_T)) == 6


def test_greedy_decoding_agrees_with_teacher_forcing():
    """Make each model's own greedy answer the right one: then, and only then, every segment is exact."""
    policy = small.policy(seed=3)
    questions = [small.example(seed, 8, image=seed % 2 == 0, learned=3) for seed in range(4)]
    answers = answer(policy.model, questions, stop_id=2, max_new_tokens=3)
    taught = []
    for question, ids in zip(questions, answers, strict=True):
        start = prompt_length(question)
        token_T = question.token_T.clone()
        token_T[start : start + len(ids)] = ids
        taught.append(
            dataclasses.replace(question, token_T=token_T, target_T=torch.cat([token_T[1:], token_T.new_zeros(1)]))
        )
    assert all(len(ids) == 3 for ids in answers), "choose another seed: an answer met the stop token"
    row, row_R = on_device(small.row(*taught), torch.device("cpu"))
    assert exact(policy(row, row_R).correct_T, row).all()
    # ... and a changed last token is noticed
    spoiled = dataclasses.replace(row, target_T=row.target_T.clone())
    spoiled.target_T[row_R[-1]] = (spoiled.target_T[row_R[-1]] + 1) % 50
    assert exact(policy(spoiled, row_R).correct_T, spoiled).tolist() == [True, True, True, False]


def test_answers_do_not_depend_on_who_shares_the_row_and_stop_at_the_stop_token():
    model = small.policy(seed=3).model
    questions = [small.example(seed, 6 + seed, image=seed % 2 == 0) for seed in range(4)]
    together = answer(model, questions, stop_id=-1, max_new_tokens=5)
    apart = [answer(model, [question], stop_id=-1, max_new_tokens=5)[0] for question in questions]
    assert [ids.tolist() for ids in together] == [ids.tolist() for ids in apart]
    stop = together[0][2].item()
    first = together[0].tolist().index(stop)
    assert answer(model, questions[:1], stop_id=stop, max_new_tokens=5)[0].tolist() == together[0][:first].tolist()


def test_decoding_is_the_argmax_of_the_full_forward():
    model = small.policy(seed=3).model
    question = small.example(5, 9)
    ids = answer(model, [question], stop_id=-1, max_new_tokens=1)[0]
    token_T = question.token_T[: prompt_length(question)]
    hidden_TD = model(token_T, question.position_3T[:, : len(token_T)], Packed([len(token_T)])).hidden_TD
    assert ids.tolist() == [(hidden_TD[-1] @ model.head_VD.T).argmax().item()]


def test_a_sheet_is_answered_in_rows_that_fit():
    """Prompts of 4, 4, 9 and 4 tokens and 2 new ones each, in rows of 12: two fit, the long one stands alone."""
    examples = [small.example(seed, length) for seed, length in enumerate((7, 7, 12, 7))]
    assert [prompt_length(example) for example in examples] == [4, 4, 9, 4]
    rows = in_rows(examples, max_tokens=12, max_new_tokens=2)
    assert [[example.id for example in row] for row in rows] == [["0", "1"], ["2"], ["3"]]
    assert len(in_rows(examples, max_tokens=1, max_new_tokens=2)) == 4


def test_media_behind_the_last_answer_do_not_belong_to_its_prompt():
    """A conversation may end with a user's turn that shows another image."""
    model = small.policy(seed=3).model
    first, second = small.example(0, 8, image=True), small.example(1, 6, image=True, learned=0)
    assert first.patch_PX is not None and second.patch_PX is not None
    token_T = torch.cat([first.token_T, second.token_T])
    longer = dataclasses.replace(
        first,
        token_T=token_T,
        weight_T=torch.cat([first.weight_T, torch.zeros(6)]),
        grids=first.grids + second.grids,
        patch_PX=torch.cat([first.patch_PX, second.patch_PX]),
    )
    assert prompt_length(longer) == prompt_length(first)
    expected = answer(model, [first], stop_id=-1, max_new_tokens=3)[0]
    assert answer(model, [longer], stop_id=-1, max_new_tokens=3)[0].tolist() == expected.tolist()


def test_an_answer_holds_no_placeholder():
    """An untrained model may well prefer one; but there is no picture to put in its place."""
    model = small.policy(seed=3).model
    question = small.example(0, 8, image=True)
    with torch.no_grad():
        free = answer(model, [question], stop_id=-1, max_new_tokens=1)[0]
        for placeholder in model.config.placeholder_token_ids:  # as large as the favourite, and then larger
            model.embed_tokens.weight[placeholder] = 2 * model.embed_tokens.weight[free[0]]
    assert answer(model, [question], stop_id=-1, max_new_tokens=3)[0][0] == free[0]
