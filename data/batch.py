"""The packed batch: the one shape in which SFT, DPO and RL meet the model.

Several conversations ("segments") lie end to end in one row of T tokens: no padding and no batch dimension.

    token_T     <s> What ? 7 </s>  <s> And ? 3 </s>
    target_T    What ? 7 </s> -    And ? 3 </s> -        the token that follows, inside the same segment
    weight_T     0   0 1  1   0     0  0 1  1   0        0 on prompts, media, and the last token of a segment
    lengths     (5, 5)

Every `*_T` stream is about *predicting that row's target*.

A record may be several segments. Two answers to one prompt share its tokens: the prompt's segment is the *stem* of
theirs, which see it as well as themselves, and not each other. Each branch repeats the last token of the prompt, at its
position, so that the first word of either answer is predicted from there, and every row still has one target:

    token_T     <s> Which digit ? Assistant  :  7 </s>   :  1 </s>         one pair
    target_T     -  -     -     -     -      7 </s> -    1 </s> -
    lengths     (5, 3, 3)     stems  (-1, 0, 0)     roles  (prompt, chosen, rejected)     records  (0, 0, 0)
    position     0  1     2     3     4      5  6  7     5  6  7

Shape letters:  T tokens   S segments   I images and videos   P patches   X numbers in a patch   L sparse layers
                K experts per token
"""

import dataclasses
import itertools
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class Role(Enum):
    """What a segment is to the record it comes from."""

    WHOLE = "whole"
    """A conversation."""
    PROMPT = "prompt"
    """What the answers of the record have in common, without its last token; the stem of theirs."""
    CHOSEN = "chosen"
    REJECTED = "rejected"
    CORRUPTED = "corrupted"
    """Prompt and chosen answer of a pair once more, whole, with pictures that were made hard to read."""
    WANTED = "wanted"
    """An answer without another to compare with, labelled good,"""
    UNWANTED = "unwanted"
    """or bad."""
    MISMATCHED = "mismatched"
    """Another record's answer to this one's prompt."""
    ATTEMPT = "attempt"
    """What the model itself wrote, and what tools answered, after a prompt (reinforcement learning)."""


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    token_T: Tensor  # int64
    target_T: Tensor  # int64; 0 where weight_T is 0 and no token follows
    weight_T: Tensor  # float32
    position_3T: Tensor  # int64, rows time, height, width; a segment starts at 0, or where its stem ends
    lengths: tuple[int, ...]
    """Tokens of each segment, in order; they add up to T. Plain ints, so that reading them never waits for a GPU."""
    grids: tuple[tuple[int, int, int], ...] = ()
    """(frames, rows, columns) in patches of every image (1 frame) and video, in the order they appear in the row."""
    patch_PX: Tensor | None = None  # float32; the patches of all items, end to end, in merge-block order
    ids: tuple[str, ...] = ()
    """Which record each segment came from."""
    datasets: tuple[str, ...] = ()
    """Which dataset each segment came from, by the name that settings give it."""
    stems: tuple[int, ...] = ()
    """Of each segment, the earlier one whose tokens it sees too, or -1; stems have none. Empty: no segment has one."""
    roles: tuple[Role, ...] = ()
    """What each segment is to its record. Empty: each is a whole conversation."""
    records: tuple[int, ...] = ()
    """0, 0, 0, 1, ...: the record of each segment, counted within the row. Empty: each is one."""
    scores: tuple[float, ...] = ()
    """How good each answer was found to be, where its record says so, and nan. Empty: none says so."""
    waited: tuple[int, ...] = ()
    """How many rollouts ago each attempt was sampled, when others were learned from; 0 in the last one. Empty: all were
    sampled in the last one."""
    ref_logprob_T: Tensor | None = None  # float32, log p(target_T[t]) of the reference model; 0 where weight_T is 0
    old_logprob_T: Tensor | None = None
    """float32, log p(target_T[t]) of the policy that the row was sampled with, as the trainer computes it; 0 where
    weight_T is 0. None in reinforcement learning: of the policy as it is in this very update."""
    engine_logprob_T: Tensor | None = None
    """float32, the same as whoever sampled the target computed it then; nan where it is not known."""
    advantage_T: Tensor | None = None  # float32, how much better than expected the attempt of target_T[t] was
    expert_TLK: Tensor | None = None
    """int16: the experts that token t was sent to in every sparse layer when it was sampled, or -1; of the router's
    replay. Vision experts come after the text experts."""

    @property
    def num_tokens(self) -> int:
        return self.token_T.shape[0]

    @property
    def num_segments(self) -> int:
        return len(self.lengths)

    @property
    def record_segments(self) -> list[range]:
        """The segments of each record, which lie side by side: records (0, 0, 0, 1) -> [range(0, 3), range(3, 4)]."""
        counts = [len(list(of)) for _, of in itertools.groupby(self.records or range(self.num_segments))]
        starts = itertools.accumulate(counts, initial=0)
        return [range(start, start + count) for start, count in zip(starts, counts, strict=False)]

    @property
    def is_filler(self) -> bool:
        """A row of no conversation (`data.pack.filler`)."""
        return self.ids == ("",)

    @property
    def segment_T(self) -> Tensor:
        """int64, 0..S-1: which segment each token belongs to."""
        lengths = torch.tensor(self.lengths, device=self.token_T.device)
        index = torch.arange(len(self.lengths), device=self.token_T.device)
        return torch.repeat_interleave(index, lengths, output_size=self.num_tokens)

    def to(self, device: torch.device | str) -> "PackedBatch":
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)
