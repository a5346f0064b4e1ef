"""How probable a model finds the right answers: no decoding, a few rows of packed conversations.

    question + right answer | question + right answer | ...      one forward pass: log p of each token of the answers

The right answer is what the assistant wrote in the record (all its turns from where the question ends, tool calls among
them), or `answer` where it wrote nothing. `exact` says that every token of it is the most likely one: just then greedy
decoding writes this answer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from data.encode import Example, encode
from data.pack import collate
from ernie_model.model import ErnieModel
from ernie_model.processor import Processor
from train.evaluation.questions import Question
from train.heldout import exact
from train.policy import Policy, on_device


@dataclass(frozen=True)
class Likelihood:
    """Of one right answer."""

    logprob: float
    """Natural logarithm, summed over its tokens, the closing `<|end_of_sentence|>` among them."""
    num_tokens: int
    exact: bool


@torch.no_grad()
def likelihoods(
    model: ErnieModel,
    processor: Processor,
    questions: Sequence[Question],
    *,
    max_tokens: int,
    done: Callable[[int], None] = lambda count: None,
) -> list[Likelihood | None]:
    """One for each question; None where the record has no right answer in words.

    Args:
        max_tokens: of a row; a longer question is a row of its own.
        done: told how many questions have been measured.

    Raises:
        DataError, MediaError: a record that cannot be shown to the model.
    """
    found: list[Likelihood | None] = [None] * len(questions)
    policy = Policy(model).eval()
    for row in _rows(questions, processor, max_tokens):
        batch, row_R = on_device(collate([example for _, example in row]), model.head_VD.device)
        output = policy(batch, row_R)
        exact_S = exact(output.correct_T, batch).tolist()
        learned_T = batch.weight_T != 0
        ends = torch.tensor(batch.lengths).cumsum(0).tolist()
        for (place, _), end, length, is_exact in zip(row, ends, batch.lengths, exact_S, strict=True):
            part = slice(end - length, end)
            logprob = output.logprob_T[part][learned_T[part]].double().sum().item()
            found[place] = Likelihood(logprob, int(learned_T[part].sum()), is_exact)
        done(row[-1][0] + 1)
    return found


def _rows(questions: Sequence[Question], processor: Processor, max_tokens: int) -> Iterator[list[tuple[int, Example]]]:
    """(number of the question, example) of as many questions as a row holds, in order."""
    row: list[tuple[int, Example]] = []
    used = 0
    for place, question in enumerate(questions):
        target = question.target
        if target is None:
            continue
        example = encode(target, processor, media=question.media)
        if row and used + example.num_tokens > max_tokens:
            yield row
            row, used = [], 0
        row.append((place, example))
        used += example.num_tokens
    if row:
        yield row
