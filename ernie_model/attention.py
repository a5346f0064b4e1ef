"""Grouped-query attention of the text layers. Which keys a query sees is the context's business.

Shape letters:  T tokens   D model width   N query heads   G key/value heads   H head width
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from ernie_model.config import ErnieConfig
from ernie_model.layers import Linear
from ernie_model.rope import Grid, Rotation, rotate_text


class Context(Protocol):
    """The seam between training and decoding, and between one process and several that share a row: `Packed` segments,
    a key/value cache, or a `SharedRow` (sequence_parallel.py)."""

    @property
    def cuts(self) -> Sequence[int]:
        """The row lies on as many ranks as there are parts, tokens cuts[p] to cuts[p + 1] on one; (0, T) when alone."""
        ...

    @property
    def part(self) -> int:
        """Which of them is here."""
        ...

    def attend(self, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor) -> Tensor:
        """What the tokens that are here see."""
        ...

    def media(self, grids: Sequence[Grid]) -> Sequence[Grid]:
        """Of the row's images and videos, those whose features are computed here."""
        ...

    def deliver(self, feature_MD: Tensor, grids: Sequence[Grid], media_P: Sequence[int]) -> Tensor:
        """Features of `media(grids)` -> those of the placeholders that are here.

        Args:
            media_P: placeholders in each part.
        """
        ...


class Attention(nn.Module):
    """softmax(q k^T / sqrt(H)) v with rotary positions; query heads n*N/G .. share key/value head n (reference 2.7)."""

    def __init__(self, config: ErnieConfig):
        super().__init__()
        self.head_dim = config.head_dim
        width, queries = config.hidden_size, config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(width, queries, bias=config.use_bias)
        self.k_proj = Linear(width, keys, bias=config.use_bias)
        self.v_proj = Linear(width, keys, bias=config.use_bias)
        self.o_proj = Linear(queries, width, bias=config.use_bias)

    def forward(self, x_TD: Tensor, rotation: Rotation, context: Context) -> Tensor:
        q_TNH = rotate_text(self.q_proj(x_TD).unflatten(-1, (-1, self.head_dim)), rotation)
        k_TGH = rotate_text(self.k_proj(x_TD).unflatten(-1, (-1, self.head_dim)), rotation)
        v_TGH = self.v_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        return self.o_proj(context.attend(q_TNH, k_TGH, v_TGH).flatten(1))
