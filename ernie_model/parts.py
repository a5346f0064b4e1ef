"""The parts of the model by the names that settings use, and which part a parameter belongs to.

    layers.3.mlp.text.experts.gate_up_EFD   text_experts          layers.3.self_attn.q_proj.weight   attention
    layers.3.mlp.vision.router.weight_ED    router                vision.blocks.0.attn.qkv.weight    vision

Freezing, learning rates, adapters, gradient norms and memory tables all speak of these parts, so the map is here once.
Every parameter belongs to exactly one part.
"""

import re
from enum import Enum


class Part(Enum):
    EMBEDDINGS = "embeddings"
    """The input embedding and the language-model head, tied or not."""
    ATTENTION = "attention"
    """Query, key, value and output projections of the text layers."""
    DENSE = "dense"
    """The MLPs of the layers without experts."""
    SHARED = "shared"
    """The shared experts, which every token visits."""
    TEXT_EXPERTS = "text_experts"
    VISION_EXPERTS = "vision_experts"
    ROUTER = "router"
    """The routers of both pools."""
    NORMS = "norms"
    """The RMSNorms of the language model."""
    VISION = "vision"
    """The vision tower, its norms and biases included."""
    RESAMPLER = "resampler"
    """Between the vision tower and the language model, its norms and biases included."""


_PATTERNS = (
    (Part.VISION, r"vision\..*"),
    (Part.RESAMPLER, r"resampler\..*"),
    (Part.EMBEDDINGS, r"(embed_tokens|lm_head)\..*"),
    (Part.ATTENTION, r"layers\.\d+\.self_attn\..*"),
    (Part.ROUTER, r"layers\.\d+\.mlp\.(text|vision)\.router\..*"),
    (Part.TEXT_EXPERTS, r"layers\.\d+\.mlp\.text\.experts\..*"),
    (Part.VISION_EXPERTS, r"layers\.\d+\.mlp\.vision\.experts\..*"),
    (Part.SHARED, r"layers\.\d+\.mlp\.shared_experts\..*"),
    (Part.DENSE, r"layers\.\d+\.mlp\.(gate|up|down)_proj\..*"),
    (Part.NORMS, r"(layers\.\d+\.(input|post_attention)_layernorm|norm)\..*"),
)


def part_of(name: str) -> Part:
    """The part that a parameter, buffer or module of `ErnieModel` belongs to, by its dotted name.

    Raises:
        KeyError: no part knows the name; a new layer needs a line in this file.
    """
    for part, pattern in _PATTERNS:
        if re.fullmatch(pattern, name):
            return part
    raise KeyError(f"{name} belongs to no part of the model (ernie_model/parts.py).")


def only_media(name: str) -> bool:
    """Do only images and videos reach this parameter? Text leaves it without a gradient."""
    part = part_of(name)
    return part in (Part.VISION, Part.RESAMPLER, Part.VISION_EXPERTS) or (
        part is Part.ROUTER and ".mlp.vision." in name
    )
