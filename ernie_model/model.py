"""ERNIE-4.5 and ERNIE-4.5-VL: one packed row of tokens and pixels in, hidden states out.

What is unusual about this family:
- Two expert pools. Image and video tokens have their own router and their own, narrower experts; attention, norms and
  shared experts serve both. Which pool a token visits follows from its id, here, so no caller can forget it.
- Three positions per token; height and width alternate over the rotary frequencies (rope.py).
- Pixels are merged 2x2 in space and 2 in time before they become tokens (resampler.py).
- The head is applied outside (`head_VD`), because (T, V) logits should never exist whole.

Shape letters:  T tokens   D model width   V vocabulary   P patches   X numbers in a patch   M media tokens
Source: reference section 2.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ernie_model.attention import Attention, Context
from ernie_model.config import ErnieConfig
from ernie_model.layers import Linear, RMSNorm, SwiGLU, cast, touch
from ernie_model.moe import Experts, MoE, Pools, Router, RouterStats, check_replay
from ernie_model.recompute import Runner, keep_activations
from ernie_model.resampler import Resampler
from ernie_model.rope import Grid, Rotation, check_grid, num_media_tokens, text_rotation
from ernie_model.vision import VisionTower


class ModelOutput(NamedTuple):
    hidden_TD: Tensor
    """After the final norm; `hidden_TD @ model.head_VD.T` are the logits."""
    router: RouterStats | None
    """One leading dimension for the sparse layers; None in a dense model, and where it was not asked for."""
    expert_LTK: Tensor | None = None
    """The experts that every token visited in the sparse layers, if asked for; vision experts come after the text
    experts."""
    chosen_LTK: Tensor | None = None
    """Those that routers would have chosen, where they were asked for and others replayed."""


class Layer(nn.Module):
    """h + Attention(norm(h)), then h + MLP(norm(h)) or h + MoE(norm(h))."""

    def __init__(self, config: ErnieConfig, index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MoE | SwiGLU
        if index in config.sparse_layers:
            self.mlp = MoE(config)
        else:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=config.use_bias)

    def forward(
        self, x_TD: Tensor, rotation: Rotation, context: Context, pools: Pools
    ) -> tuple[Tensor, RouterStats | None]:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), rotation, context)
        normed_TD = self.post_attention_layernorm(x_TD)
        if isinstance(self.mlp, MoE):
            y_TD, stats = self.mlp(normed_TD, pools)
        else:
            y_TD, stats = self.mlp(normed_TD), None
        return x_TD + y_TD, stats


class ErnieModel(nn.Module):
    """The whole family; see `ErnieConfig`.

    `compute_dtype`: dtype of the activations; None means the dtype of the weights. With float32 weights and
    `compute_dtype=torch.bfloat16` the forward rounds exactly as a bfloat16 model does while updates stay in float32.
    """

    exact = False
    """Each token is computed alike, to the last bit, whatever stands beside it (exact.py)."""

    def __init__(self, config: ErnieConfig, *, compute_dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.run_layer: Runner = keep_activations  # the seam: what layers keep for the backward pass (recompute.py)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        self.vision = VisionTower(config.vision) if config.vision is not None else None
        self.resampler = Resampler(config) if config.vision is not None else None
        self.init_weights()

    @property
    def activation_dtype(self) -> torch.dtype:
        return self.compute_dtype or self.norm.weight.dtype  # the norm, because it is never quantised

    @property
    def head_VD(self) -> Tensor:
        """Weight of the language-model head: the embedding when the two are tied."""
        return self.head.weight

    @property
    def head(self) -> nn.Linear | nn.Embedding:
        """The module that has it."""
        return self.embed_tokens if self.lm_head is None else self.lm_head

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """(T, V) in the dtype of `hidden_TD`, also of a quantised head (inference/quantize.py). Training has chunks."""
        if self.lm_head is not None:
            return self.lm_head(hidden_TD)
        if isinstance(self.embed_tokens, nn.Embedding):
            return F.linear(hidden_TD, cast(self.embed_tokens.weight, hidden_TD))
        return self.embed_tokens.project(hidden_TD)

    def init_weights(self) -> None:
        """Matrices from a normal distribution with `initializer_range`, norms 1, biases 0."""
        std = self.config.initializer_range
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Experts):
                nn.init.normal_(module.gate_up_EFD, std=std)
                nn.init.normal_(module.down_EDF, std=std)
            elif isinstance(module, Router):
                nn.init.normal_(module.weight_ED, std=std)

    def set_dtype(self, dtype: torch.dtype) -> "ErnieModel":
        """Convert the weights, except the routers: they stay float32 (float64 when the model becomes float64)."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for module in self.modules():
            # One by one: `self.to(bfloat16)` first and the routers back afterwards would have rounded them.
            own = wide if isinstance(module, Router) else dtype
            module._apply(lambda t, own=own: t.to(own) if t.is_floating_point() else t, recurse=False)
        return self

    def forward(
        self,
        token_T: Tensor,
        position_3T: Tensor,
        context: Context,
        *,
        patch_PX: Tensor | None = None,
        grids: Sequence[Grid] = (),
        feature_MD: Tensor | None = None,
        join: bool = False,
        token_ids: Sequence[int] | None = None,
        stats: bool = True,
        experts: bool = False,
        replay_TLK: Tensor | None = None,
    ) -> ModelOutput:
        """Run one packed row.

        Args:
            token_T: int64 ids.
            position_3T: int64 positions (time, height, width) of every token, from `rope.position_ids`.
            context: `Packed(lengths)` for training and prompts. If it is a `SharedRow`, what comes out is of this
                rank's tokens alone, though ids, positions and grids are those of the whole row.
            patch_PX: pixels of `context.media(grids)`, that is of all images and videos unless ranks share the row, in
                order of appearance, patches in merge-block order.
            grids: (frames, rows, columns) of all images and videos, in patches.
            feature_MD: instead of pixels and grids, what `media_features` made of them: a row for each placeholder, so
                that a row of tokens may begin or end inside an image.
            join: use every weight, also what only images and videos reach: another rank does, in a row of its own.
            token_ids: `token_T` once more, on the host: then nothing waits for a device. For a row on one rank.
            stats: count what the routers did.
            experts: report which experts every token visited.
            replay_TLK: int16, the experts that the tokens of the whole row must visit in the sparse layers, numbered as
                `expert_LTK`; a token with -1 throughout a layer chooses there by itself. See `MoE.choose`.

        Raises:
            ValueError: pixels, grids and placeholders disagree; a replay that this row cannot have.
        """
        here = slice(context.cuts[context.part], context.cuts[context.part + 1])
        x_TD = self.embed_tokens(token_T[here])
        x_TD = x_TD.to(self.compute_dtype) if self.compute_dtype is not None else x_TD
        given = None if feature_MD is None else feature_MD.shape[0]
        pools, media_T, media_P = self._pools(token_T, token_ids, grids, given, context)
        replays = self._replays(replay_TLK, token_T.shape[0], here, pools.vision_T)
        pools = pools._replace(
            join=join,
            stats=stats,
            visited=[] if experts else None,
            chosen=[] if experts and replay_TLK is not None else None,
        )
        if grids and feature_MD is None:
            feature_MD = context.deliver(self._compute_media(patch_PX, context.media(grids), x_TD), grids, media_P)
        if feature_MD is not None:
            x_TD = x_TD.index_copy(0, media_T.nonzero()[:, 0], feature_MD)  # placeholders in order (reference 2.4)
        elif patch_PX is not None:
            raise ValueError(f"{patch_PX.shape[0]} patches came without grids.")
        elif join and self.vision is not None:
            x_TD = touch(x_TD, self._features_of_nothing(x_TD))
        rotation = text_rotation(position_3T[:, here], self.config, dtype=x_TD.dtype)
        counted: list[RouterStats] = []
        for index, layer in enumerate(self.layers):
            own = pools._replace(replay_TK=replays[index]) if index in replays else pools
            x_TD, layer_stats = self.run_layer(layer, x_TD, rotation, context, own)
            if layer_stats is not None:
                counted.append(layer_stats)
        return ModelOutput(
            self.norm(x_TD),
            RouterStats.stack(counted) if counted else None,
            torch.stack(pools.visited) if pools.visited else None,
            torch.stack(pools.chosen) if pools.chosen else None,
        )

    def _replays(self, replay_TLK: Tensor | None, tokens: int, here: slice, vision_T: Tensor) -> dict[int, Tensor]:
        """Of each sparse layer, by its index, for the tokens that are here."""
        if replay_TLK is None:
            return {}
        config = self.config
        needed = (tokens, len(config.sparse_layers), config.experts_per_token)
        if tuple(replay_TLK.shape) != needed:
            raise ValueError(f"experts to replay come as {tuple(replay_TLK.shape)}; this row has (T, L, K) = {needed}.")
        replay_TLK = replay_TLK[here]
        check_replay(replay_TLK, vision_T, config.num_experts)
        return dict(zip(config.sparse_layers, replay_TLK.unbind(1), strict=True))

    def media_features(self, patch_PX: Tensor, grids: Sequence[Grid]) -> Tensor:
        """(M, D): what the vision tower and the resampler make of whole images and videos, one row a placeholder.

        Raises:
            ValueError: a text-only model, or pixels and grids disagree.
        """
        if self.vision is None:
            raise ValueError(f"{len(grids)} images or videos were given to a text-only model.")
        for grid in grids:
            check_grid(grid)
        return self._compute_media(patch_PX, grids, self._like())

    def _like(self) -> Tensor:
        """(0, D) activations: their dtype and device."""
        return self.norm.weight.new_zeros(0, self.config.hidden_size, dtype=self.activation_dtype)

    def _pools(
        self,
        token_T: Tensor,
        token_ids: Sequence[int] | None,
        grids: Sequence[Grid],
        features: int | None,
        context: Context,
    ) -> tuple[Pools, Tensor, list[int]]:
        """The expert-pool map (reference 2.9, trap 7.4), and which rows are placeholders; of the tokens that are here.

        Vision tokens are placeholders and start/end tokens. A row whose placeholders and grids, or features that were
        given, disagree is refused.
        Also returns the number of placeholders in each part of the row.
        """
        parts = [slice(*ends) for ends in itertools.pairwise(context.cuts)]
        here = parts[context.part]
        kinds = self.config.vision_pool_token_ids, self.config.placeholder_token_ids
        if token_ids is not None and set(kinds[0]).isdisjoint(token_ids):
            vision_T = media_T = torch.zeros_like(token_T, dtype=torch.bool)
        else:
            vision_T, media_T = (_is_one_of(token_T, ids) for ids in kinds)
        if self.vision is None:
            if grids or features:
                raise ValueError("images or videos were given to a text-only model.")
            return Pools(vision_T[here], 0), media_T[here], [0] * len(parts)
        # Every layer needs the size of both pools on the host.
        if token_ids is not None:
            vision_P, media_P = ([sum(map(set(ids).__contains__, token_ids))] for ids in kinds)
        else:  # the only wait for the device in a forward
            vision_P, media_P = torch.stack(
                [torch.stack([x_T[part].sum() for part in parts]) for x_T in (vision_T, media_T)]
            ).tolist()
        found = sum(media_P)
        if features is not None:
            if found != features:
                raise ValueError(f"the row has {found} placeholder tokens, but {features} media features were given.")
            return Pools(vision_T[here], vision_P[context.part]), media_T[here], media_P
        for grid in grids:
            check_grid(grid)
        expected = sum(num_media_tokens(grid) for grid in grids)
        if found != expected:
            raise ValueError(
                f"the row has {found} placeholder tokens, but its {len(grids)} images and videos need {expected}."
            )
        return Pools(vision_T[here], vision_P[context.part]), media_T[here], media_P

    def _compute_media(self, patch_PX: Tensor | None, grids: Sequence[Grid], like: Tensor) -> Tensor:
        """(M, D): the features of these images and videos, in the dtype of `like`."""
        patches, found = sum(t * h * w for t, h, w in grids), 0 if patch_PX is None else patch_PX.shape[0]
        if found != patches:
            raise ValueError(f"the grids describe {patches} patches, but {found} were given.")
        if patch_PX is None or not grids:
            # All of the row's are computed on other ranks, which meet this one in the backward pass: take part in it.
            return self._features_of_nothing(like)
        return self._features(patch_PX.to(like.dtype), grids)

    def _features_of_nothing(self, like: Tensor) -> Tensor:
        """(0, D), with a graph that leads to every weight of the vision tower and the resampler."""
        assert self.vision is not None
        return self._features(like.new_zeros(4, self.vision.config.patch_dim), [(1, 2, 2)])[:0]

    def _features(self, patch_PX: Tensor, grids: Sequence[Grid]) -> Tensor:
        """(M, D): what the vision tower and the resampler make of pixels."""
        assert self.vision is not None and self.resampler is not None
        return self.resampler(self.vision(patch_PX, grids), grids)


def _is_one_of(token_T: Tensor, ids: Sequence[int]) -> Tensor:
    if not ids:
        return torch.zeros_like(token_T, dtype=torch.bool)
    return (token_T[:, None] == torch.tensor(ids, device=token_T.device)).any(-1)
