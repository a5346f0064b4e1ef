"""A group of attempts becomes one example whose attempts share the prompt."""

import pytest
import torch

from data.batch import Role
from data.pack import collate
from ernie_model.inference.agent import Episode
from ernie_model.inference.request import MediaItem
from ernie_model.rope import position_ids
from tests.tiny import DENSE, tiny_processor
from train.reinforcement.examples import StreamError, encode_group, with_advantages

IDS = tiny_processor().tokenizer
IMAGE = DENSE.image_token_id


def episode(prompt: list[int], *turns: tuple[list[int], list[int]], media: list[MediaItem] | None = None) -> Episode:
    """Turns are (what was sampled, what a tool answered)."""
    made = Episode(list(prompt), media or [], [], num_prompt_tokens=len(prompt))
    made.sampled, made.logprobs, made.versions = [False] * len(prompt), [0.0] * len(prompt), [-1] * len(prompt)
    for wrote, observed in turns:
        made.token_ids += wrote + observed
        made.sampled += [True] * len(wrote) + [False] * len(observed)
        made.logprobs += [-0.5 * (i + 1) for i in range(len(wrote))] + [0.0] * len(observed)
        made.versions += [3] * len(wrote) + [-1] * len(observed)
    return made


def encoded(episodes, learned=None, **limits):
    limits = {"max_tokens": 64, "max_patches": None} | limits
    return encode_group(episodes, learned or [True] * len(episodes), DENSE, id="q", dataset="set", **limits)


def test_by_hand():
    """prompt 1 2 3; attempts: 7 8, and 4 [5 6] 9 with an observation in brackets."""
    ((example, held),) = encoded([episode([1, 2, 3], ([7, 8], [])), episode([1, 2, 3], ([4], [5, 6]), ([9], []))])
    assert held == [0, 1]
    assert example.lengths == (2, 3, 5) and example.stems == (-1, 0, 0)
    assert example.roles == (Role.PROMPT, Role.ATTEMPT, Role.ATTEMPT)
    #                                   prompt  attempt 0  attempt 1
    assert example.token_T.tolist() == [1, 2, 3, 7, 8, 3, 4, 5, 6, 9]
    assert example.target_T.tolist() == [2, 3, 7, 8, 0, 4, 5, 6, 9, 0]
    assert example.weight_T.tolist() == [0, 0, 1, 1, 0, 1, 0, 0, 1, 0]
    assert example.position_3T[0].tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]
    assert example.engine_logprob_T.tolist() == [0, 0, -0.5, -1, 0, -0.5, 0, 0, -0.5, 0]
    spread = with_advantages(example, [2.0, -1.0])
    assert spread.advantage_T.tolist() == [0, 0, 2, 2, 0, -1, 0, 0, -1, 0]
    row = collate([spread, spread])
    assert row.records == (0, 0, 0, 1, 1, 1) and row.stems == (-1, 0, 0, -1, 3, 3)
    assert row.advantage_T.tolist() == 2 * spread.advantage_T.tolist()


def test_experts_lie_with_their_tokens_and_are_unknown_where_an_attempt_tells_none():
    """Token t visited expert t of its attempt; the prompt's are those of the first."""
    first, silent, last = (episode([1, 2, 3], ([7] * n, [])) for n in (2, 1, 3))
    first.experts = [torch.arange(4, dtype=torch.int16).view(-1, 1, 1)]
    last.experts = [torch.arange(10, 13, dtype=torch.int16).view(-1, 1, 1), torch.full((2, 1, 1), 9).to(torch.int16)]
    ((example, _),) = encoded([first, silent, last])
    assert example.lengths == (2, 3, 2, 4) and example.expert_TLK is not None
    assert example.expert_TLK.flatten().tolist() == [0, 1, 2, 3, -1, -1, -1, 12, 9, 9, -1]
    ((example, _),) = encoded([silent, episode([1, 2, 3], ([8], []))])
    assert example.expert_TLK is None


def test_an_attempt_that_is_not_learned_stays_with_weight_0():
    ((example, _),) = encoded([episode([1, 2], ([7], [])), episode([1, 2], ([8], []))], [True, False])
    assert example.weight_T.tolist() == [0, 1, 0, 0, 0] and example.lengths == (1, 2, 2)


def test_pictures_of_the_prompt_come_first_and_those_of_tools_in_the_order_of_attempts():
    grid = (1, 4, 2)  # two tokens, which share a place in time
    items = [MediaItem(grid, torch.full((8, 3), float(i))) for i in range(3)]
    prompt = [1, IMAGE, IMAGE, 2]
    first = episode(prompt, ([5], [IMAGE, IMAGE, 6]), ([7], []), media=[items[0], items[1]])
    other = episode(prompt, ([8], []), media=[items[0]])
    last = episode(prompt, ([5], [IMAGE, IMAGE, 6]), ([9], []), media=[items[0], items[2]])
    ((example, _),) = encoded([first, other, last])
    assert example.grids == (grid,) * 3
    assert example.patch_PX[::8, 0].tolist() == [0, 1, 2]
    alone = position_ids(torch.tensor(last.token_ids), [grid, grid], DENSE)
    begins = sum(example.lengths[:3])
    assert torch.equal(example.position_3T[:, begins:], alone[:, 3:])
    # The prompt's picture and one of a tool fit in a row, a third does not; nor do two of one attempt.
    parts = encoded([first, other, last], max_patches=16)
    assert [held for _, held in parts] == [[0, 1], [2]] and [example.num_patches for example, _ in parts] == [16, 16]
    parts = encoded([first, other, last], max_patches=15)
    assert [held for _, held in parts] == [[1]]


def test_attempts_that_do_not_fit_in_a_row_together_repeat_the_prompt():
    made = [episode([1, 2, 3], ([7] * 4, [])) for _ in range(3)]
    parts = encoded(made, max_tokens=12)  # prompt 2, attempts 5 each
    assert [held for _, held in parts] == [[0, 1], [2]]
    assert all(example.token_T[:2].tolist() == [1, 2] for example, _ in parts)
    assert encoded(made, max_tokens=6) == []  # none fits at all


@pytest.mark.parametrize("field, value", [("logprobs", [0.0]), ("versions", [-1] * 5), ("token_ids", [1, 9, 3, 7, 8])])
def test_streams_that_do_not_fit_the_tokens_are_refused(field, value):
    good, bad = (episode([1, 2, 3], ([7, 8], [])) for _ in range(2))
    setattr(bad, field, value)
    with pytest.raises(StreamError):
        encoded([good, bad])
