"""How well a model answers held-out conversations.

    measure   one pass over packed batches with the right answers in place; a conversation counts as correct when every
              token the assistant should write is the most likely one. That is exactly when greedy decoding would write
              the whole answer, so no decoding is needed for the number.
    answer    real greedy decoding, for people to look at.

Shape letters:  T tokens   S segments   D model width   V vocabulary
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from PIL import Image
from torch import Tensor, nn

from data.batch import PackedBatch
from data.conversation import PartKind
from data.encode import Example
from data.encoder import Encoder
from data.errors import DataError
from data.loader import eval_batches
from data.order import Key
from data.pack import filler
from ernie_model.context import Packed
from ernie_model.model import ErnieModel
from ernie_model.processor import Processor
from ernie_model.rope import num_media_tokens, position_ids
from train import score
from train.config import EvaluateConfig
from train.contact_sheet import SheetItem, draw
from train.loop import all_sum
from train.parallel.layout import Layout
from train.parallel.partition import whole
from train.parallel.rows import same_batches
from train.policy import on_device


@dataclass(frozen=True)
class Score(score.Score):
    correct: int
    """Conversations answered exactly."""
    total: int
    nll: float
    """Mean negative log-likelihood per target token."""

    HEADER: ClassVar[tuple[str, ...]] = (
        "held-out conversations",
        "right",
        "accuracy",
        "95 % interval",
        "loss per token",
    )

    @property
    def right(self) -> int:
        return self.correct

    def metrics(self) -> dict[str, float]:
        return self.accuracy_metrics() | {"eval_correct": float(self.correct), "eval_nll": self.nll}

    def line(self) -> str:
        return (
            f"held out {self.correct}/{self.total} right = {self.accuracy:.1%} "
            f"(95 % interval {self.interval_text}), loss {self.nll:.3f}"
        )

    def cells(self) -> tuple[str, ...]:
        return f"{self.correct} of {self.total}", f"{self.accuracy:.1%}", self.interval_text, f"{self.nll:.3f}"


@torch.no_grad()
def measure(policy: nn.Module, heldout: Encoder, accelerator: Accelerator, layout: Layout | None = None) -> Score:
    """Teacher-forced exact match. All ranks share the work and get the same score.

    Pass the bare policy, not the wrapped one: ranks may have different numbers of rows.
    Where a forward pass takes all ranks, one without a row runs one that counts for nothing.
    """
    was_training = policy.training
    policy.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)  # correct, total, nll, weight
    layout = layout or Layout(rank=accelerator.process_index, world=accelerator.num_processes)
    batches = eval_batches(heldout, rank=layout.data_rank, world=layout.data_world)
    for batch in same_batches(batches, layout, accelerator.device):
        if batch is None and not layout.joint:  # other ranks have one more row than this one
            continue
        batch, row_R = on_device(batch or filler(0), accelerator.device, layout.sequence_group)
        output = policy(batch, row_R, join=layout.joint)
        if batch.is_filler:
            continue
        sums[0] += exact(output.correct_T, batch).sum()
        sums[1] += batch.num_segments
        sums[2] -= (output.logprob_T * batch.weight_T).sum()
        sums[3] += batch.weight_T.sum()
    policy.train(was_training)
    correct, total, nll, weight = (all_sum(accelerator, sums) / layout.sequence).tolist()
    if not total:
        raise DataError(
            f"none of the {len(heldout)} held-out conversations can be used (data.max_tokens={heldout.max_tokens}, "
            f"data.max_patches={heldout.max_patches}).\n{heldout.quarantine.summary()}"
        )
    return Score(int(correct), int(total), nll / max(weight, 1e-9))


def exact(correct_T: Tensor, batch: PackedBatch) -> Tensor:
    """bool (S,): segments in which every learned target is the most likely token.

    weight_T    0 1 1 | 0 1 1
    correct_T   . x x | . x .      → True, False
    """
    wrong_T = (batch.weight_T != 0) & ~correct_T
    wrong_S = torch.zeros(batch.num_segments, device=wrong_T.device).index_add(0, batch.segment_T, wrong_T.float())
    return wrong_S == 0


@torch.no_grad()
def answer(
    model: ErnieModel,
    examples: Sequence[Example],
    *,
    stop_id: int,
    max_new_tokens: int,
    agreed: Callable[[Tensor], Tensor] = lambda next_S: next_S,
) -> list[Tensor]:
    """Greedy answers to the last thing each example should learn to write; token ids without the stop token.

    The prompt is everything before the first token of the last learned stretch. All examples lie in one packed row,
    which is run again for every new token: simple, and quick enough for a page of short answers.

    Args:
        agreed: makes the next tokens equal on all ranks, where they run the model together.
    """
    device = model.head_VD.device
    was_training = model.training
    model.eval()
    media_ids = torch.tensor(model.config.placeholder_token_ids, dtype=torch.int64)
    examples = [prompt_of(example, media_ids) for example in examples]
    prompts = [example.token_T for example in examples]
    answers: list[list[int]] = [[] for _ in examples]
    open_ = list(range(len(examples)))
    for _ in range(max_new_tokens):
        if not open_:
            break
        rows = [torch.cat([prompts[i], torch.tensor(answers[i], dtype=torch.int64)]) for i in open_]
        positions = [position_ids(row, examples[i].grids, model.config) for i, row in zip(open_, rows, strict=True)]
        patches = [patch for i in open_ if (patch := examples[i].patch_PX) is not None]
        lengths = [len(row) for row in rows]
        output = model(
            torch.cat(rows).to(device),
            torch.cat(positions, dim=1).to(device),
            Packed(lengths),
            patch_PX=torch.cat(patches).to(device) if patches else None,
            grids=[grid for i in open_ for grid in examples[i].grids],
        )
        last_S = torch.tensor(lengths, device=device).cumsum(0) - 1
        with whole(model.head):
            logit_SV = output.hidden_TD[last_S] @ model.head_VD.to(output.hidden_TD.dtype).T
        # no picture stands behind a placeholder that the model itself would write
        next_S = agreed(logit_SV.index_fill(1, media_ids.to(device), -math.inf).argmax(-1)).tolist()
        for i, token in zip(open_, next_S, strict=True):
            if token != stop_id:
                answers[i].append(token)
        open_ = [i for i, token in zip(open_, next_S, strict=True) if token != stop_id]
    model.train(was_training)
    return [torch.tensor(ids, dtype=torch.int64) for ids in answers]


def prompt_of(example: Example, media_ids: Tensor) -> Example:
    """The tokens before the last learned stretch, with the images and videos that have their placeholders there."""
    token_T = example.token_T[: prompt_length(example)]
    room = int(torch.isin(token_T, media_ids).sum())
    grids = []
    for grid in example.grids:
        room -= num_media_tokens(grid)
        if room < 0:
            break
        grids.append(grid)
    patches = sum(frames * rows * columns for frames, rows, columns in grids)
    patch_PX = example.patch_PX[:patches] if grids and example.patch_PX is not None else None
    return dataclasses.replace(example, token_T=token_T, grids=tuple(grids), patch_PX=patch_PX)


def prompt_length(example: Example) -> int:
    """Tokens before the last learned stretch: weight_T = 0 0 1 1 0 0 1 1 0 → 7."""
    learned = example.weight_T.nonzero()[:, 0].tolist()
    first = learned[-1]
    while first - 1 in learned:
        first -= 1
    return first + 1  # weights belong to targets, which lie one token further on


def draw_answers(
    path: Path,
    title: str,
    model: ErnieModel,
    processor: Processor,
    heldout: Encoder,
    config: EvaluateConfig,
    *,
    together: Accelerator | None = None,
    conversation: Callable[[Example], Example] = lambda example: example,
) -> bool:
    """Draw the first `config.sheet` held-out images with the model's own answers. False when there are none.

    Args:
        conversation: of a record that has several answers, prompt and right answer alone.
        together: a forward pass takes all ranks (`Layout.joint`), and all of them call this; the main one draws.
    """
    items = sheet_items(
        model,
        processor,
        heldout,
        config.sheet,
        stop_id=processor.end_id,
        max_new_tokens=config.max_new_tokens,
        # Equal to a rounding is not enough: a rank that stopped earlier would leave the others waiting.
        agreed=broadcast if together is not None else lambda next_S: next_S,
        conversation=conversation,
    )
    if items and (together is None or together.is_main_process):
        draw(items, path, title)
    return bool(items)


def sheet_items(
    model: ErnieModel,
    processor: Processor,
    heldout: Encoder,
    count: int,
    *,
    stop_id: int,
    max_new_tokens: int,
    agreed: Callable[[Tensor], Tensor],
    conversation: Callable[[Example], Example],
) -> list[SheetItem]:
    """The first `count` held-out conversations with an image, answered by the model itself."""
    chosen: list[tuple[Image.Image, Example]] = []
    for key in heldout.keys():
        if len(chosen) == count:
            break
        if heldout.size(key) is None or (example := heldout.example(key)) is None:  # in the quarantine
            continue
        if (image := first_image(heldout, key)) is not None:
            chosen.append((image, conversation(example)))
    answers: list[Tensor] = []
    for examples in in_rows([example for _, example in chosen], heldout.max_tokens, max_new_tokens):
        answers += answer(model, examples, stop_id=stop_id, max_new_tokens=max_new_tokens, agreed=agreed)
    items = []
    for (image, example), ids in zip(chosen, answers, strict=True):
        start = prompt_length(example)
        length = int(example.weight_T[start - 1 :].nonzero()[-1]) + 1
        expected = example.token_T[start : start + length]
        expected = expected[expected != stop_id]
        items.append(
            SheetItem(
                image=image,
                expected=processor.decode(expected.tolist()).strip(),
                answer=processor.decode(ids.tolist()).strip(),
                correct=torch.equal(expected, ids),
            )
        )
    return items


def in_rows(examples: Sequence[Example], max_tokens: int, max_new_tokens: int) -> list[list[Example]]:
    """The examples, in order, in groups that fit in a row of `max_tokens` with their answers (or stand alone)."""
    rows: list[list[Example]] = []
    used = 0
    for example in examples:
        size = prompt_length(example) + max_new_tokens
        if not rows or used + size > max_tokens:
            rows.append([])
            used = 0
        rows[-1].append(example)
        used += size
    return rows


def first_image(heldout: Encoder, key: Key) -> Image.Image | None:
    dataset = heldout.dataset
    for part in dataset[key].parts:
        if part.kind is PartKind.IMAGE and part.media is not None:
            return dataset.media(key).open_image(part.media)
    return None
