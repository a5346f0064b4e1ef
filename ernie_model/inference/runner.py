"""Tensors of the engine: one step of many requests through the model, over pages of keys and values.

    engine (host)                                   runner (device)
    which requests, which pages   ── Row, Row ──►   ids, positions, features -> ErnieModel over a KVCache -> head
    sampling, stopping            ◄── logits ───    of the rows that want them

A step mixes rows of all kinds: whole prompts, chunks of prompts that may begin or end inside an image, and the last
token of every answer that is being written. The expert-pool map follows from the ids inside the model, so a chunk's
edge cannot part a placeholder from its experts.

Shape letters:  T tokens of the step   S rows of logits   V vocabulary   D model width   M media tokens
                L sparse layers   K experts per token
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ernie_model.config import ErnieConfig
from ernie_model.inference.kernels import answering
from ernie_model.inference.kv_cache import KVCache, PagedCache, Span, page_bytes
from ernie_model.inference.request import MediaItem
from ernie_model.layers import wide
from ernie_model.model import ErnieModel
from ernie_model.rope import num_media_tokens


@dataclass(frozen=True, eq=False)
class Row:
    """One request's tokens in this step."""

    token_ids: Sequence[int]
    """To compute now: a chunk of the prompt, or the last sampled token."""
    position_3T: Tensor  # (3, n) int64
    start: int
    """Tokens of this request already in the cache, which is the index of token_ids[0]."""
    pages: Sequence[int]
    """The page of tokens [i * page_tokens, (i + 1) * page_tokens); covers start + n."""
    features: Sequence[Tensor] = field(default=())
    """(m, D) each: media features of the placeholders among token_ids, in order."""
    num_logits: int = 1
    """Of how many of the last tokens; 0 for a chunk of a prompt that is not the last."""
    experts: bool = False


@dataclass(frozen=True, eq=False)
class StepOutput:
    logit_SV: Tensor
    """float32 (float64 for a float64 model); rows' logits end to end."""
    experts: list[Tensor | None]
    """(n, L, K) int16 for each row that asked; vision experts come after the text experts."""


class Runner:
    """
    Args:
        model: stays what it is; its weights may change between steps (`weights_changed`).
        num_pages: pages of the cache, `page_bytes` each.
        max_rows: rows of a step at most.
    """

    def __init__(self, model: ErnieModel, *, num_pages: int, page_tokens: int, max_rows: int):
        self.model, self.max_rows = model, max_rows
        self.dtype, self.device = model.activation_dtype, model.norm.weight.device
        self._answering = self._kernels(model)
        self.cache = PagedCache(
            model.config, num_pages=num_pages, page_tokens=page_tokens, dtype=self.dtype, device=self.device
        )

    @staticmethod
    def page_bytes(config: ErnieConfig, dtype: torch.dtype, page_tokens: int) -> int:
        """Bytes of one page: 2 * layers * key/value heads * head width * bytes of the dtype * tokens."""
        return page_bytes(config, dtype, page_tokens)

    @torch.no_grad()
    def media_features(self, media: Sequence[MediaItem]) -> list[Tensor]:
        """(m, D) of every image and video, on the model's device.

        Raises:
            ValueError: the model is text-only, or pixels and grid disagree.
        """
        if not media:
            return []
        patch_PX = torch.cat([item.patch_PX for item in media]).to(self.device)
        grids = [item.grid for item in media]
        feature_MD = self._answering.media_features(patch_PX, grids)
        return list(feature_MD.split([num_media_tokens(grid) for grid in grids]))

    def run(self, rows: Sequence[Row]) -> StepOutput:
        """One forward pass over all rows; what it computes of them is in the cache afterwards.

        Raises:
            ValueError: features and placeholders disagree.
        """
        assert 0 < len(rows) <= self.max_rows
        context = KVCache(self.cache, [Span(row.start, len(row.token_ids), row.pages) for row in rows])
        placed = [rows[i] for i in context.order]
        features = [feature for row in placed for feature in row.features]
        with torch.inference_mode():
            token_ids = [token for row in placed for token in row.token_ids]
            out = self._answering(
                torch.tensor(token_ids, device=self.device),
                torch.cat([row.position_3T for row in placed], dim=1).to(self.device),
                context,
                feature_MD=torch.cat(features).to(self.device) if features else self._no_features,
                token_ids=token_ids,
                join=self._joins,
                stats=False,
                experts=any(row.experts for row in rows),
            )
            begin, at = {}, 0
            for i, row in zip(context.order, placed, strict=True):
                begin[i], at = at, at + len(row.token_ids)
            ends = [begin[i] + len(row.token_ids) for i, row in enumerate(rows)]
            wanted = [t for end, row in zip(ends, rows, strict=True) for t in range(end - row.num_logits, end)]
            hidden_SD = out.hidden_TD.index_select(0, torch.tensor(wanted, dtype=torch.int64, device=self.device))
        with torch.no_grad():  # not in inference mode: whoever samples may change the logits in place
            logit_SV = wide(self._logits(hidden_SD))
        return StepOutput(
            logit_SV, [self._experts(out.expert_LTK, row, end) for row, end in zip(rows, ends, strict=True)]
        )

    @staticmethod
    def _experts(expert_LTK: Tensor | None, row: Row, end: int) -> Tensor | None:
        if expert_LTK is None or not row.experts:
            return None
        return expert_LTK[:, end - len(row.token_ids) : end].transpose(0, 1).to(torch.int16)

    def weights_changed(self) -> None:
        """What was derived from the weights is made anew."""
        self._answering = self._kernels(self.model)

    # A subclass may run a model that lies on several ranks.

    def _kernels(self, model: ErnieModel) -> ErnieModel:
        """What computes: the model, or the same weights in faster modules."""
        return model if model.exact else answering(model)

    def _logits(self, hidden_SD: Tensor) -> Tensor:
        return self._answering.logits(hidden_SD)

    @property
    def _joins(self) -> bool:
        """See `ErnieModel.forward`."""
        return False

    @property
    def _no_features(self) -> Tensor | None:
        """Of a step without images."""
        return None
