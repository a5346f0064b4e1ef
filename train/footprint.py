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

Not counted: the probabilities that attention keeps of segments of up to `LONGEST_KEPT` tokens on the CPU, what dropout
of adapters keeps, and that a frozen weight inside a layer that learns spares the keeping of its input.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ernie_model.config import ErnieConfig
from ernie_model.layers import Linear
from ernie_model.model import ErnieModel, Layer
from ernie_model.moe import Experts, MoE
from train.config import (
    ModelConfig,
    Precision,
    Recompute,
)
from train.logprobs import FEWEST_ROWS, chunk_size
from train.trained import MOMENT_BYTES

HEAP_GAPS = {Recompute.none: 1.3, Recompute.layers: 1.65, Recompute.layers_and_vision: 1.65}
"""What a CPU process takes for every byte that comes and goes, roughly. glibc (2.36) doesn't give a freed block to an
aligned request of the same size, and all of torch's are aligned: the heap gets gaps. Measured in docs/speed.md."""


class Footprint(NamedTuple):
    """Bytes on each rank."""

    weights: int
    """As they are held: frozen weights under adapters may be bfloat16."""
    gradients: int
    """In the dtype of their weights; a second copy where ranks exchange them."""
    moments: int
    """AdamW's."""
    peak: int
    """At the highest point of a step, all of the above included as far as it exists then."""
    process: int
    """The same as the process sees it: on the CPU with the gaps of the C library's heap."""

    @property
    def state(self) -> int:
        return self.weights + self.gradients + self.moments


class _Stage(NamedTuple):
    """A piece of the model that is computed in one go. Bytes."""

    kept: int
    """From its forward pass to its backward pass."""
    forward: int
    """Held at most while its forward pass runs, without what it leaves."""
    backward: int
    """Held at most while its backward pass runs, on top of what was kept."""
    gradients: int


def footprint(
    model: ErnieModel,
    settings: ModelConfig,
    *,
    max_tokens: int,
    max_patches: int | None,
    accumulation: int,
    ranks: int,
    device: torch.device,
) -> Footprint:
    """Of a step over one full row after another.

    Args:
        model: frozen and adapted as it will train; on the meta device will do.
        max_patches: of one row; None means as many as its tokens can stand for.
    """
    parameters = list(model.parameters())
    learned = [p for p in parameters if p.requires_grad]
    weights, gradients = (sum(p.numel() * p.element_size() for p in some) for some in (parameters, learned))
    moments = MOMENT_BYTES * sum(p.numel() for p in learned)
    patches = 0
    if model.vision is not None:
        patches = 4 * max_tokens if max_patches is None else min(max_patches, 4 * max_tokens)
    stages = _stages(model, settings, max_tokens, patches, device)
    exchanged = gradients if ranks > 1 else 0  # DDP's buckets
    held = weights + moments + exchanged
    # From the second row of an update on, all gradients exist all the time.
    top = _highest(stages, already=gradients if accumulation > 1 else None)
    peak = held + max(top, gradients)
    gaps = HEAP_GAPS[settings.recompute] if device.type == "cpu" else 1.0
    return Footprint(weights, gradients + exchanged, moments, peak, round(weights + gaps * (peak - weights)))


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


def _stages(model: ErnieModel, settings: ModelConfig, tokens: int, patches: int, device: torch.device) -> list[_Stage]:
    """In the order of the forward pass. Widths below are numbers per token (per patch in the vision tower)."""
    c, size = model.config, 2 if settings.precision is Precision.bf16 else 4
    media = patches // 4
    recomputes = settings.recompute is not Recompute.none
    offloads = settings.offload_activations and device.type != "cpu"
    stages = [_Stage(0, 0, 0, _gradients(model.embed_tokens))]  # its result is the first layer's input, counted there
    learns = False  # whether anything up to here does: what precedes all that learns keeps nothing
    if model.vision is not None and model.resampler is not None and patches:
        width, hidden = model.vision.config.hidden_size, model.vision.config.intermediate_size
        pixels = patches * model.vision.config.patch_dim * (4 if size == 4 else 4 + size)
        stages.append(_Stage(pixels, 0, 0, _gradients(model.vision.patch_embed)))
        block = patches * (10 * width + 2 * hidden)  # norms, q k v, rotated q k, attention, sums; before and after gelu
        work = patches * (2 * hidden + 2 * width)
        again = settings.recompute is Recompute.layers_and_vision
        for module in model.vision.blocks:
            learns = learns or _learns(module)
            entry = 0 if offloads else patches * width
            stages.append(_stage(module, size, block, work, learns, entry if again else None))
        merged = 4 * width
        learns = learns or _learns(model.resampler)
        # into and out of the tower's norm; before and after two gelus and a norm each; an image twice over; text width
        kept = media * (11 * merged + c.hidden_size)
        stages.append(_stage(model.resampler, size, kept, media * 4 * merged, learns, None))
    learns = learns or _learns(model.embed_tokens)
    for layer in model.layers:
        assert isinstance(layer, Layer)
        learns = learns or _learns(layer)
        kept, work = _of_layer(c, layer.mlp, tokens, media, low=size == 2)
        entry = 0 if offloads else tokens * c.hidden_size
        stages.append(_stage(layer, size, kept, work, learns, entry if recomputes else None))
    return [*stages, _head(model, size, tokens, device)]


def _stage(module: nn.Module, size: int, kept: int, work: int, learns: bool, entry: int | None) -> _Stage:
    """From numbers to bytes.

    Args:
        kept: numbers that its operators keep.
        work: numbers that its backward pass holds on top, at most.
        entry: numbers in its input, where that is kept and the rest is made again.
    """
    all_of_it = size * kept + _rounded(module, size)
    if not learns:
        return _Stage(0, all_of_it, 0, 0)
    if entry is None:
        return _Stage(all_of_it, all_of_it, size * work, _gradients(module))
    return _Stage(size * entry, all_of_it, all_of_it + size * work, _gradients(module))


def _of_layer(c: ErnieConfig, mlp: nn.Module, tokens: int, media: int, *, low: bool) -> tuple[int, int]:
    """(numbers kept, numbers at work in its backward pass) of a layer of the language model."""
    width = c.hidden_size
    # input and first norm, q k v, output before its projection; sum and second norm
    kept = tokens * (4 * width + 2 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim)
    if not isinstance(mlp, MoE):
        hidden = c.intermediate_size  # gate, up, product; then the gradients of all three, without the product
        return kept + tokens * 3 * hidden, tokens * (2 * hidden + 2 * width)
    text, vision = (tokens - media) * c.text_expert_width, media * c.vision_expert_width
    shared = c.num_shared_experts * c.text_expert_width
    # the routed rows: input, gate and up, product, result; the routers' input in float32
    kept += c.experts_per_token * (tokens * 2 * width + 3 * (text + vision))
    kept += tokens * (3 * shared + (2 * width if low else 0))
    work = c.experts_per_token * max(2 * tokens * width, 3 * (text + vision)) + tokens * 2 * width
    return kept, work


def _head(model: ErnieModel, size: int, tokens: int, device: torch.device) -> _Stage:
    """The final norm and the loss: both gradients are made in the forward pass, chunk by chunk of logits."""
    c = model.config
    hidden = 3 * size * tokens * c.hidden_size  # into the norm, out of it, the rows that are learned
    head = model.head_VD
    gradient = 4 * head.numel() if head.requires_grad else 0
    at_work = size * tokens * c.hidden_size + 2 * max(chunk_size(device), 4 * FEWEST_ROWS * c.vocab_size)
    if head.element_size() != size:
        at_work += size * head.numel()
    if size == 2:
        at_work += (size + 4) * head.numel() if gradient else 0  # a chunk's share of the gradient, and widened
    return _Stage(hidden, hidden + at_work + gradient, at_work, gradient)


def _gradients(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)


def _rounded(module: nn.Module, size: int) -> int:
    """Copies of wider weights in the dtype of the activations, which the backward pass needs again."""
    return sum(
        size * p.numel()
        for part in module.modules()
        if isinstance(part, Linear | Experts)
        for p in part.parameters(recurse=False)
        if p.element_size() > size
    )


def _learns(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
