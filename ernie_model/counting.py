"""How many parameters a configuration describes, in total and per token, without allocating any.

The model is built on the meta device, so the numbers cannot drift from the code.
"""

from dataclasses import dataclass

import torch

from ernie_model.config import ErnieConfig
from ernie_model.model import ErnieModel


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Numbers of parameters; the correction biases, which are not trained by gradients, are included."""

    total: int
    """Everything in the checkpoint; a tied embedding counts once."""
    active_text: int
    """What one text token is multiplied by: attention, norms, dense and shared MLPs, text routers, K text experts per
    sparse layer, the head. Of an untied embedding, one row."""
    active_vision: int
    """The same for one image or video token in the language model, which visits the vision pool. Its features cost
    `vision_tower` per patch and `resampler` per token on top. 0 in a text-only model."""
    embedding: int
    """The input embedding, which is the head as well when the two are tied."""
    text_experts: int
    vision_experts: int
    """All routed experts of a pool, without routers and shared experts."""
    vision_tower: int
    resampler: int


def count_parameters(config: ErnieConfig) -> ParameterCount:
    with torch.device("meta"):
        model = ErnieModel(config)
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}

    def of(*parts: str, start: str = "") -> int:
        return sum(n for name, n in sizes.items() if name.startswith(start) and all(part in name for part in parts))

    text, vision = of(".mlp.text.experts."), of(".mlp.vision.experts.")
    tower, resampler = of(start="vision."), of(start="resampler.")
    embedding, total = of(start="embed_tokens."), sum(sizes.values())
    everywhere = total - text - vision - of(".router.") - tower - resampler
    if not config.tie_word_embeddings:
        everywhere -= embedding - config.hidden_size
    share = config.experts_per_token / config.num_experts if config.num_experts else 0.0
    return ParameterCount(
        total=total,
        active_text=everywhere + of(".mlp.text.router.") + round(text * share),
        active_vision=everywhere + of(".mlp.vision.router.") + round(vision * share) if config.vision else 0,
        embedding=embedding,
        text_experts=text,
        vision_experts=vision,
        vision_tower=tower,
        resampler=resampler,
    )
