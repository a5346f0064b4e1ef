"""What a training step will hold in memory, before the first one is taken.

    bytes    │            ╱‾‾╲___  gradients come          held: weights, AdamW's moments
             │        ╱‾‾╱       ╲___╱╲                    kept: of every stage, from its forward to its backward pass
             │    ╱‾‾╱                 ╲___                at work: of the one stage that is being computed
             │___╱                         ╲___
             └──────────────────────────────────►
              forward:   embed  vision  resampler  layers  head
              backward:  head  layers  resampler  vision  embed

The step is walked stage by stage, and its highest point is the estimate. It is a sum of tensors: what CUDA's allocator
calls allocated memory, and on the CPU what torch asks the C library for (docs/speed.md compares it with measurements).
What a layout of several ranks leaves of the weights on each is arithmetic of its own (train/shares.py).

Not counted: the probabilities that attention keeps of segments of up to `LONGEST_KEPT` tokens on the CPU, what dropout
of adapters keeps, and that a frozen weight inside a layer that learns spares the keeping of its input.
"""

from collections.abc import Sequence
from enum import Enum, auto
from typing import NamedTuple

import torch
from torch import nn

from ernie_model.config import ErnieConfig
from ernie_model.model import ErnieModel, Layer
from ernie_model.moe import MoE
from train.config import (
    ModelConfig,
    ParallelConfig,
    Precision,
    Recompute,
)
from train.logprobs import FEWEST_ROWS, chunk_size
from train.shares import MASTER_BYTES, MAX_LIVE_BYTES, Shares, Weights, weights_of

HEAP_GAPS = {Recompute.none: 1.3, Recompute.layers: 1.65, Recompute.layers_and_vision: 1.65}
"""What a CPU process takes for every byte that comes and goes, roughly. glibc (2.36) doesn't give a freed block to an
aligned request of the same size, and all of torch's are aligned: the heap gets gaps. Measured in docs/speed.md."""


class Footprint(NamedTuple):
    """Bytes on each rank; on its device, but for `host`."""

    weights: int
    """As they are held: frozen weights under adapters may be bfloat16."""
    gradients: int
    """In the dtype of their weights; with the copies that ranks need to exchange them."""
    optimizer: int
    """AdamW's moments, and ZeRO's float32 copy of the weights."""
    buckets: int
    """DeepSpeed's, for what travels."""
    gathered: int
    """Weights of other ranks that are here while a layer is computed (zero=3)."""
    activations: int
    """The rest of the highest point: what layers kept, and what is being computed."""
    logits: int
    """Of those, one chunk of them, twice."""
    peak: int
    """At the highest point of a step, all of the above included as far as it exists then."""
    host: int
    """In host memory: what is offloaded."""
    process: int
    """The peak as the process sees it: on the CPU with the gaps of the C library's heap."""

    @property
    def state(self) -> int:
        return self.weights + self.gradients + self.optimizer


class Kind(Enum):
    """What a piece of the model computes."""

    EMBEDDING = auto()
    PATCHES = auto()
    BLOCK = auto()
    RESAMPLER = auto()
    DENSE = auto()
    SPARSE = auto()
    HEAD = auto()


class Piece(NamedTuple):
    """Computed in one go."""

    kind: Kind
    weights: tuple[Weights, ...]
    learns: bool
    """It, or anything before it: what precedes all that learns keeps nothing."""


class Room(NamedTuple):
    """What one rank computes in a row, and with how many rows in an update."""

    tokens: int
    patches: int
    accumulation: int
    imbalance: float = 1.0
    """Rows that the busiest rank's experts receive, over the mean, with parallel.expert > 1."""


class _Stage(NamedTuple):
    """A piece of the model at work. Bytes."""

    kept: int
    """From its forward pass to its backward pass."""
    forward: int
    """Held at most while its forward pass runs, without what it leaves."""
    backward: int
    """Held at most while its backward pass runs, on top of what was kept."""
    gradients: int
    """That stay when it is over."""


def footprint(
    model: ErnieModel,
    settings: ModelConfig,
    *,
    max_tokens: int,
    max_patches: int | None,
    accumulation: int,
    parallel: ParallelConfig,
    ranks: int,
    device: torch.device,
) -> Footprint:
    """Of a step over one full row after another.

    Args:
        model: frozen and adapted as it will train; on the meta device will do.
        max_patches: of one row; None means as many as its tokens can stand for.
    """
    patches = 0
    if model.vision is not None:
        patches = 4 * max_tokens if max_patches is None else min(max_patches, 4 * max_tokens)
    tokens, patches = (-(-size // parallel.sequence) for size in (max_tokens, patches))
    room = Room(tokens, patches, accumulation)
    return footprint_of(pieces_of(model), model.config, settings, room, Shares(parallel, ranks), device)


def pieces_of(model: ErnieModel) -> list[Piece]:
    """In the order of the forward pass."""
    modules: list[tuple[Kind, str, nn.Module]] = [(Kind.EMBEDDING, "embed_tokens", model.embed_tokens)]
    if model.vision is not None and model.resampler is not None:
        modules.append((Kind.PATCHES, "vision.patch_embed", model.vision.patch_embed))
        modules += [(Kind.BLOCK, f"vision.blocks.{i}", block) for i, block in enumerate(model.vision.blocks)]
        modules.append((Kind.RESAMPLER, "resampler", model.resampler))
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        modules.append((Kind.SPARSE if isinstance(layer.mlp, MoE) else Kind.DENSE, f"layers.{i}", layer))
    pieces, tower, language = [], False, False
    for kind, name, module in modules:
        weights = weights_of(module, name)
        own = any(w.trained for w in weights)
        if kind in (Kind.PATCHES, Kind.BLOCK, Kind.RESAMPLER):
            tower = tower or own
        language = language or own
        # The vision tower does not come after the embedding; what follows comes after both.
        pieces.append(Piece(kind, weights, tower if kind in (Kind.BLOCK, Kind.RESAMPLER) else language))
    rest = weights_of(model.norm, "norm") + (() if model.vision is None else weights_of(model.vision.ln, "vision.ln"))
    head = () if model.lm_head is None else weights_of(model.lm_head, "lm_head")
    return [*pieces, Piece(Kind.HEAD, head + rest, True)]


def footprint_of(
    pieces: Sequence[Piece],
    config: ErnieConfig,
    settings: ModelConfig,
    room: Room,
    shares: Shares,
    device: torch.device,
) -> Footprint:
    """The same from the pieces, for many layouts of one model."""
    parallel = shares.parallel
    everything = [w for piece in pieces for w in piece.weights]
    weights, gradients, exchanged, optimizer = (
        sum(map(count, everything)) for count in (shares.weights, shares.gradients, shares.exchanged, shares.optimizer)
    )
    if parallel.zero == 2 and room.accumulation > 1:
        exchanged += gradients  # what the rows before have left, beside what this one makes
    host = 0
    if parallel.offload_optimizer:  # and the gradients that go with it, in float32
        host += optimizer + sum(MASTER_BYTES * shares.part(w) for w in everything if w.trained)
        optimizer = 0
        if parallel.zero >= 2:
            gradients = exchanged = 0
    if parallel.offload_weights:
        host, weights = host + weights, 0
    buckets, gathered = _buckets(everything, shares), _gathered(pieces, shares)
    # Under ZeRO-3 one buffer holds this rank's gradients; else, from the second row of an update on, all exist.
    early = gradients if parallel.zero == 3 or room.accumulation > 1 else None
    lasting, passing = exchanged + buckets, 0
    if parallel.zero in (1, 2):  # DeepSpeed makes room when the first gradient comes, which is after the head's work
        lasting, passing = 0, exchanged + buckets
        if parallel.zero == 2 and early is None:
            passing += gradients
    held = weights + optimizer + gathered + lasting
    stages = [_stage(piece, pieces, config, settings, room, shares, device) for piece in pieces]
    *before, head = stages
    top = _highest([*(stage._replace(backward=stage.backward + passing) for stage in before), head], already=early)
    kept = exchanged if parallel.zero == 1 else 0
    peak = held + max(top, gradients + kept + _flattened(everything, shares))
    gaps = HEAP_GAPS[settings.recompute] if device.type == "cpu" else 1.0
    return Footprint(
        weights=weights,
        gradients=gradients + exchanged,
        optimizer=optimizer,
        buckets=buckets,
        gathered=gathered,
        activations=max(0, peak - weights - optimizer - gathered - gradients - exchanged - buckets),
        logits=2 * max(chunk_size(device), 4 * FEWEST_ROWS * config.vocab_size),
        peak=peak,
        host=host,
        process=round(weights + gaps * (peak - weights)) + (host if device.type == "cpu" else 0),
    )


def _buckets(everything: Sequence[Weights], shares: Shares) -> int:
    """DeepSpeed's buffers for what travels; two, where one fills while the other is under way."""
    parallel = shares.parallel
    trained = [w for w in everything if w.trained]
    if parallel.zero == 0 or not trained:
        return 0
    one = round(parallel.bucket_mb * 1e6)
    largest = max(w.size * shares.local(w._replace(count=w.largest)) for w in trained)
    # A parameter that lies in the shares of several ranks is copied once more as it is sent.
    return one * (2 if parallel.overlap and parallel.zero < 3 else 1) + max(one, largest)


def _gathered(pieces: Sequence[Piece], shares: Shares) -> int:
    """Weights of the largest piece, and what DeepSpeed leaves of the others for when they come by again."""
    of_piece = [sum(map(shares.gathered, piece.weights)) for piece in pieces]
    largest = max(of_piece)
    return largest + min(sum(of_piece) - largest, MAX_LIVE_BYTES)


def _flattened(everything: Sequence[Weights], shares: Shares) -> int:
    """The float32 gradient of one parameter group, which ZeRO lays out flat before it updates: of the largest one."""
    if shares.parallel.zero == 0 or shares.parallel.offload_optimizer:
        return 0
    trained = [w for w in everything if w.trained]
    experts, others = (sum(shares.part(w) for w in trained if w.expert is kind) for kind in (True, False))
    return MASTER_BYTES * max(experts, others)


def _highest(stages: Sequence[_Stage], already: int | None) -> int:
    """The highest point of forward and backward.

    Args:
        already: gradients that are there from the start; None where each appears in its stage's backward pass.
    """
    kept, top = 0, 0
    for stage in stages:
        top = max(top, kept + stage.forward + (already or 0))
        kept += stage.kept
    made = 0
    for stage in reversed(stages):
        made += stage.gradients
        top = max(top, kept + stage.backward + (made if already is None else already))
        kept -= stage.kept
    return top


def _stage(
    piece: Piece,
    pieces: Sequence[Piece],
    config: ErnieConfig,
    settings: ModelConfig,
    room: Room,
    shares: Shares,
    device: torch.device,
) -> _Stage:
    """Widths below are numbers per token (per patch in the vision tower)."""
    size = 2 if settings.precision is Precision.bf16 else 4
    gradients = _gradients(piece, shares)
    if piece.kind is Kind.EMBEDDING:
        # Its result is the first layer's input, counted there.
        return _Stage(0, 0, gradients.passing, gradients.staying)
    if piece.kind is Kind.HEAD:
        tied = not any(w.product for w in piece.weights)
        head = pieces[0].weights[0] if tied else next(w for w in piece.weights if w.product)
        return _head(config, head, size, room.tokens, device)
    recomputed = settings.recompute is not Recompute.none
    if piece.kind in (Kind.DENSE, Kind.SPARSE):
        kept, work = _of_layer(config, piece.kind, room, shares.parallel.expert > 1, low=size == 2)
        entry = room.tokens * config.hidden_size
    else:
        assert config.vision is not None
        width, hidden, patches = config.vision.hidden_size, config.vision.intermediate_size, room.patches
        if piece.kind is Kind.PATCHES:
            pixels = patches * config.vision.patch_dim * (4 if size == 4 else 4 + size)
            return _Stage(pixels, 0, gradients.passing, gradients.staying)
        if piece.kind is Kind.BLOCK:
            recomputed = settings.recompute is Recompute.layers_and_vision
            # norms, q k v, rotated q k, attention, sums; before and after gelu
            kept, work, entry = patches * (10 * width + 2 * hidden), patches * (2 * hidden + 2 * width), patches * width
        else:
            recomputed, merged, media = False, 4 * width, patches // 4
            # into and out of the tower's norm; before and after two gelus and a norm each; an image twice over; width
            kept, work, entry = media * (11 * merged + config.hidden_size), media * 4 * merged, 0
    all_of_it = size * kept + sum(size * shares.local(w) for w in piece.weights if w.product and w.size > size)
    # Gathered weights outlive their release: autograd keeps a transposed view of them. Of wider ones, the rounded copy.
    all_of_it += sum(shares.gathered(w) for w in piece.weights if w.product and w.size == size)
    if not piece.learns:
        return _Stage(0, all_of_it, 0, 0)
    if not recomputed:
        return _Stage(all_of_it, all_of_it, size * work + gradients.passing, gradients.staying)
    offloaded = settings.offload_activations and device.type != "cpu"
    again = all_of_it + size * work + gradients.passing
    return _Stage(0 if offloaded else size * entry, all_of_it, again, gradients.staying)


class _Gradients(NamedTuple):
    staying: int
    passing: int
    """Until they have been added up over the ranks."""


def _gradients(piece: Piece, shares: Shares) -> _Gradients:
    whole = sum(w.size * shares.local(w) for w in piece.weights if w.trained)
    return _Gradients(0, whole) if shares.parallel.zero >= 2 else _Gradients(whole, 0)


def _of_layer(c: ErnieConfig, kind: Kind, room: Room, spread: bool, *, low: bool) -> tuple[int, int]:
    """(numbers kept, numbers at work in its backward pass) of a layer of the language model."""
    width, tokens = c.hidden_size, room.tokens
    # input and first norm, q k v, output before its projection; sum and second norm
    kept = tokens * (4 * width + 2 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim)
    if kind is Kind.DENSE:
        hidden = c.intermediate_size  # gate, up, product; then the gradients of all three, without the product
        return kept + tokens * 3 * hidden, tokens * (2 * hidden + 2 * width)
    media = room.patches // 4
    shared = c.num_shared_experts * c.text_expert_width
    kept += tokens * (3 * shared + (2 * width if low else 0))  # the routers' input in float32
    # the routed rows: input, gate and up, product, result
    rows = c.experts_per_token * tokens * width
    inside = c.experts_per_token * 3 * ((tokens - media) * c.text_expert_width + media * c.vision_expert_width)
    if not spread:
        return kept + 2 * rows + inside, max(2 * rows, inside) + tokens * 2 * width
    received, inside = round(room.imbalance * rows), round(room.imbalance * inside)
    # what is sent and what comes lie side by side while they travel
    return kept + rows + received + inside, max(rows + received, inside) + received + tokens * 2 * width


def _head(c: ErnieConfig, head: Weights, size: int, tokens: int, device: torch.device) -> _Stage:
    """The final norm and the loss: both gradients are made in the forward pass, chunk by chunk of logits."""
    hidden = 3 * size * tokens * c.hidden_size  # into the norm, out of it, the rows that are learned
    gradient = MASTER_BYTES * head.count if head.trained else 0
    at_work = size * tokens * c.hidden_size + 2 * max(chunk_size(device), 4 * FEWEST_ROWS * c.vocab_size)
    if head.size != size:
        at_work += size * head.count
    if size == 2:
        at_work += (size + 4) * head.count if gradient else 0  # a chunk's share of the gradient, and widened
    return _Stage(hidden, hidden + at_work + gradient, at_work, gradient)
