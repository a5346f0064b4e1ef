"""Answers that share their prompt in a row give the loss and the gradients of rows of their own, in float64."""

import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from data.encode import Example
from ernie_model.config import ErnieConfig, PositionAfterVideo
from ernie_model.model import ErnieModel
from ernie_model.recompute import recompute
from ernie_model.rope import num_media_tokens, position_ids
from tests.train import small
from train.efficiency import Work
from train.policy import Policy, on_device
from train.telemetry import Probe, choices

IMAGE, WIDE, VIDEO = (1, 2, 4), (1, 4, 8), (12, 2, 2)  # 2, 8 and 6 tokens, these at 6 moments
Piece = int | tuple[int, int, int]
"""So many words, or an image or video."""


def whole(*pieces: Piece, learned: int, seed: int, config: ErnieConfig = small.CONFIG) -> Example:
    """A conversation of `pieces`, whose last `learned` targets count, each differently."""
    generator, tokens, grids = torch.Generator().manual_seed(seed), [], []
    for piece in pieces:
        if isinstance(piece, int):
            tokens += torch.randint(3, 40, (piece,), generator=generator).tolist()
        else:
            start, place, end = (44, 43, 45) if piece[0] > 1 else (41, 40, 42)
            tokens += [start, *[place] * num_media_tokens(piece), end]
            grids.append(piece)
    token_T = torch.tensor(tokens)
    weight_T = torch.zeros(len(tokens))
    weight_T[-1 - learned : -1] = torch.rand(learned, generator=generator) + 0.5
    patches = sum(frames * rows * columns for frames, rows, columns in grids)
    return Example(
        id=f"{seed}",
        token_T=token_T,
        target_T=torch.cat([token_T[1:], token_T.new_zeros(1)]),
        weight_T=weight_T,
        position_3T=position_ids(token_T, grids, config),
        grids=tuple(grids),
        patch_PX=torch.randn(patches, 588, generator=generator) if patches else None,
    )


class Record(NamedTuple):
    wholes: list[Example]
    prompt: int
    items: int = 0


def record(prompt: list[Piece], *answers: list[Piece], seed: int = 0, config: ErnieConfig = small.CONFIG) -> Record:
    """Conversations that begin with `prompt`. An answer's last words are learned, all but one of them."""
    first = whole(*prompt, 1, learned=0, seed=seed, config=config)
    count, wholes = first.num_tokens, []
    for number, answer in enumerate(answers):
        assert isinstance(answer[-1], int)
        other = whole(*prompt, 1, *answer, learned=answer[-1] - 1, seed=seed + 1000 * (number + 1), config=config)
        token_T = torch.cat([first.token_T, other.token_T[count:]])
        patch_PX = other.patch_PX
        if patch_PX is not None and first.patch_PX is not None:
            patch_PX = torch.cat([first.patch_PX, patch_PX[len(first.patch_PX) :]])
        target_T = torch.cat([token_T[1:], token_T.new_zeros(1)])
        wholes.append(dataclasses.replace(other, token_T=token_T, target_T=target_T, patch_PX=patch_PX))
    return Record(wholes, count, len(first.grids))


class Case(NamedTuple):
    records: list[Record]
    config: ErnieConfig = small.CONFIG
    recompute: bool = False


LAST = small.CONFIG.replace(position_after_video=PositionAfterVideo.LAST)
CASES = {
    "text": Case([record([9], [4], [7])]),
    "the same first words": Case([record([1], [2], [2])]),
    "an image in the prompt": Case([record([3, WIDE, 4], [5], [3])]),
    "an image at the end of the prompt's words": Case([record([WIDE], [5], [3])]),
    "different images in the answers": Case([record([6], [2, IMAGE, 4], [1, WIDE, 3])]),
    "images everywhere, and an answer without": Case([record([2, IMAGE, 3], [1, WIDE, 4], [6])]),
    "after a long video": Case([record([2, VIDEO, 3], [4], [6])]),
    "after a long video, by its last frame": Case([record([2, VIDEO, 3], [4], [6], config=LAST)], LAST),
    "one answer, and four": Case([record([5], [4], seed=1), record([7, IMAGE, 1], [3], [4], [5], [3], seed=2)]),
    "pairs and whole conversations": Case([
        record([3, WIDE, 4], [5], [3], seed=3),
        record([], [9], seed=4),
        record([12], [3], [8], seed=5),
        record([], [2, IMAGE, 4], seed=6),
        record([2, VIDEO, 3], [2, IMAGE, 3], [6], seed=7),
    ]),
    "recomputed": Case([record([3, WIDE, 4], [5], [3]), record([4], [6], [4], seed=8)], recompute=True),
}  # fmt: skip


def build(case: Case) -> Policy:
    torch.manual_seed(0)
    policy = Policy(ErnieModel(case.config).set_dtype(torch.float64)).train()
    if case.recompute:
        policy.model.run_layer = recompute
    return policy


def answers_of(policy: Policy, *examples: Example) -> tuple[list[Tensor], Tensor | None]:
    """The log-probabilities of every answer in one row, and the pixels they come from."""
    batch = small.in_double(small.row(*examples))
    if batch.patch_PX is not None:
        batch.patch_PX.requires_grad_()
    logprob_T = policy(*on_device(batch, torch.device("cpu"))).logprob_T * batch.weight_T
    learned = zip(logprob_T.split(batch.lengths), batch.weight_T.split(batch.lengths), strict=True)
    return [logprob[weight > 0] for logprob, weight in learned if weight.any()], batch.patch_PX


def loss_of(answers: list[Tensor]) -> Tensor:
    """Neither linear in the log-probabilities nor a sum over answers."""
    sums = torch.stack([answer.sum() for answer in answers])
    return sums.dot(torch.linspace(1, 2, len(sums), dtype=sums.dtype)) + sum(
        (answer.exp() * answer).sum() for answer in answers
    ) + torch.sigmoid(0.3 * (sums[1:] - sums[:-1])).sum()  # fmt: skip


def as_record(record: Record) -> Example:
    return small.branches(*record.wholes, prompt=record.prompt, items=record.items)


@pytest.mark.parametrize("case", CASES)
def test_one_row_equals_rows_of_their_own(case):
    case = CASES[case]
    shared, apart = build(case), build(case)
    examples = [as_record(r) if len(r.wholes) > 1 or r.prompt > 1 else r.wholes[0] for r in case.records]
    mine, pixels = answers_of(shared, *examples)
    theirs, their_pixels = [], []
    for record in case.records:
        for conversation in record.wholes:
            (answer,), patch_PX = answers_of(apart, conversation)
            theirs.append(answer)
            their_pixels.append(patch_PX)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    losses = [loss_of(answers) for answers in (mine, theirs)]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-10)
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(shared.named_parameters(), apart.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-10, msg=name)
    if pixels is None:
        return
    # every copy of a prompt's image adds to the gradient of the one
    expected, left = [], iter(their_pixels)
    for record in case.records:
        grads = [next(left) for _ in record.wholes]
        grads = [torch.zeros(0, 588, dtype=torch.float64) if x is None else x.grad for x in grads]
        common = sum(frames * rows * columns for frames, rows, columns in record.wholes[0].grids[: record.items])
        expected += [sum(grad[:common] for grad in grads), *(grad[common:] for grad in grads)]
    assert pixels.grad is not None and pixels.grad.abs().max() > 1e-4
    torch.testing.assert_close(pixels.grad, torch.cat(expected), rtol=0, atol=1e-10)


def test_the_slope_along_a_random_direction_is_that_of_finite_differences():
    """Central differences of a smooth loss, step 1e-5: the error is 1e-10 times a third derivative. Routers, whose
    choices jump, stay as they are."""
    case = CASES["images everywhere, and an answer without"]
    policy = build(case)
    examples = [as_record(record) for record in case.records]
    loss_of(answers_of(policy, *examples)[0]).backward()
    moved = [p for name, p in policy.named_parameters() if p.grad is not None and "router" not in name]
    torch.manual_seed(1)
    directions = [torch.randn_like(p) / p.numel() ** 0.5 for p in moved]
    slope = sum((p.grad * d).sum() for p, d in zip(moved, directions, strict=True) if p.grad is not None)
    values = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            for p, direction in zip(moved, directions, strict=True):
                p += step * direction
            values.append(loss_of(answers_of(policy, *examples)[0]).item())
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(slope), rel=1e-6)


def test_work_and_choices_know_of_stems(tmp_path):
    """Operations by hand: of (10, 5, 8) tokens, two segments of which see 10 more. And a probe that is read again."""
    policy = Policy(ErnieModel(small.CONFIG)).eval()
    pair = small.row(as_record(CASES["text"].records[0]))
    assert pair.lengths == (9, 5, 8) and pair.stems == (-1, 0, 0)
    work = Work(policy.model, small.CONFIG, torch.device("cpu"))
    scores = [work.of(row) for row in (pair, dataclasses.replace(pair, stems=()))]
    assert scores[0] - scores[1] == 3 * 2 * 2 * 9 * (5 + 8) * (16 + 16)  # layers, products of queries and of values
    chosen_LTK = choices(policy.model, pair)
    Probe(pair, chosen_LTK).save(tmp_path / "probe.safetensors")
    probe = Probe.load(tmp_path / "probe.safetensors")
    assert probe.batch.stems == pair.stems and not probe.drift(policy.model)[0].any()
    alone = [choices(policy.model, small.row(w)) for w in CASES["text"].records[0].wholes]
    together = torch.cat([chosen_LTK[:, :9], chosen_LTK[:, 9:14]], dim=1)
    assert torch.equal(together, alone[0])
    assert torch.equal(torch.cat([chosen_LTK[:, :9], chosen_LTK[:, 14:]], dim=1), alone[1])
