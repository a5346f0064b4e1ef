"""Packing changes nothing: a row of several conversations equals the same conversations run alone, gradients included.

Float64, so that a leak of one token into another's softmax cannot hide behind rounding.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ernie_model.model import ErnieModel
from tests.parity.reference import (
    MOE_SHAPE,
    VL_SHAPE,
    Conversation,
    load_ours,
    make_conversations,
    make_reference,
    pack,
    target,
)

ROWS = {
    "text": (MOE_SHAPE, ((13,), (5,), (5,), (30,), (1,), (9,))),
    "media": (VL_SHAPE, (*VL_SHAPE.rows, (2, (1, 4, 6), 2), (3, (6, 2, 4), 1))),
}


def run(model: ErnieModel, conversations: list[Conversation]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and the gradients of the *sum* of losses."""
    model.zero_grad()
    logit_TV = F.linear(model(**pack(conversations, model)).hidden_TD, model.head_VD)
    target_T = torch.cat([target(c) for c in conversations])
    F.cross_entropy(logit_TV, target_T, ignore_index=-100, reduction="sum").backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return logit_TV.detach(), grads


@pytest.mark.parametrize("kind", ROWS)
def test_packed_equals_apart(kind: str, tmp_path: Path):
    shape, rows = ROWS[kind]
    torch.set_num_threads(1)
    model = load_ours(make_reference(shape), tmp_path, dtype=torch.float64)
    conversations = make_conversations(rows, seed=7)

    together, together_grads = run(model, conversations)

    apart = [run(model, [c]) for c in conversations]
    torch.testing.assert_close(together, torch.cat([logits for logits, _ in apart]), rtol=0, atol=1e-10)
    for name, grad in together_grads.items():
        summed = torch.stack([grads[name] for _, grads in apart]).sum(0)
        torch.testing.assert_close(grad, summed, rtol=0, atol=1e-10 * max(1.0, summed.abs().max().item()), msg=name)


def test_a_changed_conversation_changes_only_itself(tmp_path: Path):
    shape, rows = ROWS["media"]
    model = load_ours(make_reference(shape), tmp_path, dtype=torch.float64)
    conversations = make_conversations(rows, seed=7)
    before, _ = run(model, conversations)
    other = make_conversations(rows, seed=8)
    changed, _ = run(model, [other[0], *conversations[1:]])
    first = len(conversations[0].token)
    assert (before - changed)[1:first].abs().max() > 0.1
    torch.testing.assert_close(before[first:], changed[first:], rtol=0, atol=1e-10)
