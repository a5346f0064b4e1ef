"""Floating-point operations of a packed row, counted from the architecture: what a step has to compute.

    forward_flops(config, lengths=(812, 204), grids=((1, 34, 46),), learned=120)  ->  {Part: operations}
    training_flops(forward, {Part.ATTENTION, ...})                                ->  one number

A product of an (a, b) and a (b, c) matrix is 2·a·b·c operations; element-wise work is left out. Counted is what the
*architecture* asks for: K experts per token (not E), causal attention inside segments and to their stems (not T²), the
head on the rows that are learned, the vision tower on its patches. Activation checkpointing, padding inside kernels
and the second router that a mixed row also multiplies are costs of an implementation and don't count, so the share of
the peak (MFU) falls when they grow.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from ernie_model.config import ErnieConfig
from ernie_model.parts import Part
from ernie_model.rope import Grid, num_media_tokens

SCORES = "attention scores"
"""Products of queries, keys and values, which have no weights; the vision tower's are in `VISION_SCORES`."""
VISION_SCORES = "vision attention scores"

Flops = Mapping[Part | str, float]


def forward_flops(
    config: ErnieConfig,
    *,
    lengths: Sequence[int],
    stems: Sequence[int] = (),
    grids: Sequence[Grid] = (),
    learned: int | None = None,
) -> dict[Part | str, float]:
    """Operations of one forward pass over a packed row, by part of the model.

    Args:
        lengths: tokens of each segment.
        stems: of each segment, the one it sees as a whole, or -1; empty: none does.
        grids: (frames, rows, columns) in patches of each image and video.
        learned: rows that pass through the head; None means all.
    """
    c = config
    tokens = sum(lengths)
    media = sum(num_media_tokens(grid) for grid in grids)
    # Start and end tokens visit the vision pool as well (reference 2.9).
    vision_tokens = media + 2 * len(grids) if c.vision_expert_width else 0
    sparse, dense = len(c.sparse_layers), c.num_hidden_layers - len(c.sparse_layers)
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim

    macs: dict[Part | str, float] = defaultdict(float)
    macs[Part.ATTENTION] = c.num_hidden_layers * tokens * c.hidden_size * 2 * (queries + keys)
    seen = sum(length * (length + 1) // 2 for length in lengths)  # (query, key) pairs under the causal mask
    seen += sum(length * lengths[stem] for length, stem in zip(lengths, stems, strict=False) if stem >= 0)
    macs[SCORES] = c.num_hidden_layers * seen * 2 * queries
    macs[Part.DENSE] = dense * tokens * 3 * c.hidden_size * c.intermediate_size
    macs[Part.SHARED] = sparse * tokens * 3 * c.hidden_size * c.num_shared_experts * c.text_expert_width
    macs[Part.ROUTER] = sparse * tokens * c.hidden_size * c.num_experts
    expert = sparse * c.experts_per_token * 3 * c.hidden_size
    macs[Part.TEXT_EXPERTS] = expert * (tokens - vision_tokens) * c.text_expert_width
    macs[Part.VISION_EXPERTS] = expert * vision_tokens * c.vision_expert_width
    macs[Part.EMBEDDINGS] = (tokens if learned is None else learned) * c.hidden_size * c.vocab_size
    if c.vision is not None and grids:
        v = c.vision
        patches = sum(frames * rows * columns for frames, rows, columns in grids)
        per_patch = v.patch_dim * v.hidden_size + v.depth * (
            4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size
        )
        macs[Part.VISION] = patches * per_patch
        pairs = sum(frames * (rows * columns) ** 2 for frames, rows, columns in grids)  # each frame on its own
        macs[VISION_SCORES] = v.depth * pairs * 2 * v.hidden_size
        merged = v.hidden_size * v.spatial_merge_size**2
        after_spatial = patches // v.spatial_merge_size**2
        macs[Part.RESAMPLER] = after_spatial * 2 * merged**2 + media * (3 * merged**2 + merged * c.hidden_size)
    return {part: 2 * count for part, count in macs.items() if count}


def training_flops(forward: Flops, trained: Collection[Part], *, adapted: Collection[Part] = ()) -> float:
    """Operations of forward and backward together.

    The backward pass multiplies once more for the gradient of the activations, where something before them learns, and
    once more for the gradient of the weights, where they learn. So a part costs 1 (frozen and nothing before it
    learns), 2 or 3 times its forward; attention scores, which have two activations and no weights, 1 or 3 times.

    Args:
        trained: parts whose own weights learn.
        adapted: parts whose weights are frozen beside adapters that learn; the adapters' own products are not counted.
    """
    learning = {*trained, *adapted}
    vision = Part.VISION in learning
    language = bool(learning)  # vision and resampler learn through it
    # Is the gradient of this part's activations needed?
    passes_back = {Part.VISION: vision, VISION_SCORES: vision, Part.RESAMPLER: vision or Part.RESAMPLER in adapted}
    total = 0.0
    for part, count in forward.items():
        back = passes_back.get(part, language)
        weightless = part in (SCORES, VISION_SCORES)
        learns = part in trained
        total += count * (1 + (2 if weightless else 1) * back + (learns and not weightless))
    return total
