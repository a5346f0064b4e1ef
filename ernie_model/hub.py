"""Names and shapes in a Hugging Face checkpoint <-> names in this model. One table, used in both directions.

    stored tensor                                    ours
    model.layers.3.mlp.experts.7.up_proj.weight  ->  layers.3.mlp.text.experts.gate_up_EFD[7, F:]
    model.layers.3.mlp.gate.weight (D, E), VL    ->  layers.3.mlp.text.router.weight_ED, transposed
    model.layers.3.mlp.moe_statics....bias[1]    ->  layers.3.mlp.vision.router.correction_bias_E

A `Piece` is one such arrow: (part of) a stored tensor is (part of) one of ours. `hub_pieces` lists the arrows of the
layout the public repositories use; it is what we write. `module_pieces` lists those of transformers' modules in memory
(`save_pretrained(save_original_format=False)`); we only read it. The two never use one name for different things, so
a reader can follow both at once, tensor by tensor.

What differs between the public text and vision-language repositories (reference 5.1, traps 7.6 and 7.7):

                         text                     vision-language
    router weight        (E, D)                   (D, E), the vision pool's as `gate.weight_1`
    correction bias      (1, E)                   (2, E): row 0 text, row 1 vision
    experts              0..E-1                   0..E-1 text, E..2E-1 vision (narrower)
    vision tower         -                        `vision_model.*`, but transformers writes `model.vision_model.*`

Shape letters:  D model width   E experts of a pool   F expert width
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ernie_model.config import ErnieConfig

Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class Piece:
    """(Part of) the stored tensor `stored` is (part of) our tensor `ours`."""

    stored: str
    ours: str
    index: Index = ()
    """Which part of ours; () is all of it."""
    transpose: bool = False
    """The stored matrix is ours with rows and columns swapped."""
    row: int | None = None
    """The stored tensor has one more dimension in front, and this is our row of it."""
    num_rows: int = 0

    def view(self, ours: Tensor, index: Index | None = None) -> Tensor:
        """The part of our tensor this piece is about, turned the way it is stored.

        Args:
            index: where that part lies in a tensor that is itself a part; None: in the whole one.
        """
        index = self.index if index is None else index
        return self.turn(ours[index] if index else ours)

    def turn(self, part: Tensor) -> Tensor:
        return part.t() if self.transpose else part

    def stored_shape(self, ours: Tensor) -> tuple[int, ...]:
        shape = tuple(self.view(ours).shape)
        return shape if self.row is None else (self.num_rows, *shape)


def hub_pieces(config: ErnieConfig) -> Iterator[Piece]:
    """Every arrow of the public layout, layer by layer. Pieces of one stored tensor follow each other."""
    is_vl = config.vision is not None
    yield Piece("model.embed_tokens.weight", "embed_tokens.weight")
    for layer in range(config.num_hidden_layers):
        hub, ours = f"model.layers.{layer}.", f"layers.{layer}."
        yield from _attention_and_norms(config, hub, ours)
        if layer not in config.sparse_layers:
            yield from _dense_mlp(config, hub, ours)
            continue
        hub, ours = hub + "mlp.", ours + "mlp."
        for pool_index, (pool, width) in enumerate(_pools(config)):
            suffix = "" if pool_index == 0 else "_1"
            yield Piece(f"{hub}gate.weight{suffix}", f"{ours}{pool}.router.weight_ED", transpose=is_vl)
            for expert in range(config.num_experts):
                theirs = f"{hub}experts.{pool_index * config.num_experts + expert}."
                gate_up, down = f"{ours}{pool}.experts.gate_up_EFD", f"{ours}{pool}.experts.down_EDF"
                yield Piece(f"{theirs}gate_proj.weight", gate_up, (expert, slice(0, width)))
                yield Piece(f"{theirs}up_proj.weight", gate_up, (expert, slice(width, 2 * width)))
                yield Piece(f"{theirs}down_proj.weight", down, (expert,))
        for row, (pool, _) in enumerate(_pools(config)):
            yield Piece(
                f"{hub}moe_statics.e_score_correction_bias",
                f"{ours}{pool}.router.correction_bias_E",
                row=row,
                num_rows=len(_pools(config)),
            )
        yield from _shared_experts(config, hub, ours)
    yield Piece("model.norm.weight", "norm.weight")
    if is_vl:
        yield from _vision("vision_model.", config)
        yield from _resampler("model.resampler_model.", first="0", second="2", norm="3")
    if not config.tie_word_embeddings:
        yield Piece("lm_head.weight", "lm_head.weight")


def module_pieces(config: ErnieConfig) -> Iterator[Piece]:
    """The arrows of transformers' modules in memory: stacked experts, gates as (E, D), one bias per pool."""
    is_vl = config.vision is not None
    model = "model.language_model." if is_vl else "model."
    yield Piece(f"{model}embed_tokens.weight", "embed_tokens.weight")
    for layer in range(config.num_hidden_layers):
        hub, ours = f"{model}layers.{layer}.", f"layers.{layer}."
        yield from _attention_and_norms(config, hub, ours)
        if layer not in config.sparse_layers:
            yield from _dense_mlp(config, hub, ours)
            continue
        hub, ours = hub + "mlp.", ours + "mlp."
        for pool, _ in _pools(config):
            theirs = f"{hub}{pool}_moe." if is_vl else hub
            bias = f"{ours}{pool}.router.correction_bias_E"
            yield Piece(f"{theirs}gate.weight", f"{ours}{pool}.router.weight_ED")
            yield Piece(f"{theirs}gate.moe_statics.e_score_correction_bias", bias, row=0, num_rows=1)
            yield Piece(f"{theirs}experts.gate_up_proj", f"{ours}{pool}.experts.gate_up_EFD")
            yield Piece(f"{theirs}experts.down_proj", f"{ours}{pool}.experts.down_EDF")
        yield from _shared_experts(config, hub, ours)
    yield Piece(f"{model}norm.weight", "norm.weight")
    if is_vl:
        yield from _vision("model.vision_tower.", config)
        yield from _resampler("model.resampler_model.", first="fc1", second="fc2", norm="ln")
    if not config.tie_word_embeddings:
        yield Piece("lm_head.weight", "lm_head.weight")


def module_names(config: ErnieConfig) -> dict[str, str]:
    """Our name -> transformers' name in memory, of every tensor that has the same shape there. Adapters speak of these.

    layers.1.mlp.vision.experts.down_EDF  ->  model.language_model.layers.1.mlp.vision_moe.experts.down_proj
    """
    return {piece.ours: piece.stored for piece in module_pieces(config) if piece.row is None}


def pieces_by_stored_name(config: ErnieConfig) -> dict[str, list[Piece]]:
    """Every name a checkpoint of this model may use, in either layout and with either vision prefix."""
    table: dict[str, list[Piece]] = {}

    def add(pieces: Iterable[Piece]) -> None:
        new: dict[str, list[Piece]] = {}
        for piece in pieces:
            new.setdefault(piece.stored, []).append(piece)
        for name, group in new.items():
            assert table.setdefault(name, group) == group, f"{name} means two things"

    add(hub_pieces(config))
    add(module_pieces(config))
    if config.vision is not None:  # transformers' save_pretrained (reference 5.2)
        add(_vision("model.vision_model.", config))
    return table


def _pools(config: ErnieConfig) -> tuple[tuple[str, int], ...]:
    """(name, expert width) of each pool, in the order of the rows of the merged bias."""
    text = ("text", config.text_expert_width)
    return (text,) if config.vision is None else (text, ("vision", config.vision_expert_width))


def _linear(hub: str, ours: str, *, bias: bool) -> Iterator[Piece]:
    yield Piece(f"{hub}.weight", f"{ours}.weight")
    if bias:
        yield Piece(f"{hub}.bias", f"{ours}.bias")


def _attention_and_norms(config: ErnieConfig, hub: str, ours: str) -> Iterator[Piece]:
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield from _linear(hub + name, ours + name, bias=False)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield from _linear(f"{hub}self_attn.{name}", f"{ours}self_attn.{name}", bias=config.use_bias)


def _dense_mlp(config: ErnieConfig, hub: str, ours: str) -> Iterator[Piece]:
    for name in ("gate_proj", "up_proj", "down_proj"):
        yield from _linear(f"{hub}mlp.{name}", f"{ours}mlp.{name}", bias=config.use_bias)


def _shared_experts(config: ErnieConfig, hub: str, ours: str) -> Iterator[Piece]:
    if config.num_shared_experts:
        for name in ("gate_proj", "up_proj", "down_proj"):
            yield from _linear(f"{hub}shared_experts.{name}", f"{ours}shared_experts.{name}", bias=config.use_bias)


def _vision(hub: str, config: ErnieConfig) -> Iterator[Piece]:
    assert config.vision is not None
    yield Piece(f"{hub}patch_embed.proj.weight", "vision.patch_embed.weight")
    for block in range(config.vision.depth):
        for name in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            yield from _linear(f"{hub}blocks.{block}.{name}", f"vision.blocks.{block}.{name}", bias=True)
    yield from _linear(f"{hub}ln", "vision.ln", bias=True)


def _resampler(hub: str, *, first: str, second: str, norm: str) -> Iterator[Piece]:
    for stage in ("spatial_linear", "temporal_linear"):
        for theirs, name in ((first, "fc1"), (second, "fc2"), (norm, "ln")):
            yield from _linear(f"{hub}{stage}.{theirs}", f"resampler.{stage}.{name}", bias=True)
    yield from _linear(f"{hub}mlp", "resampler.mlp", bias=True)
    yield Piece(f"{hub}after_norm.weight", "resampler.after_norm.weight")


def hub_tensors(config: ErnieConfig) -> dict[str, list[Piece]]:
    """The tensors of the public layout in the order we write them, each with the pieces it is made of."""
    table: dict[str, list[Piece]] = {}
    for piece in hub_pieces(config):
        table.setdefault(piece.stored, []).append(piece)
    return table


Read = Callable[[str, Index], Tensor]
"""Part of one of our tensors, by name."""


def assemble(
    pieces: list[Piece], ours: Mapping[str, Tensor], dtype: torch.dtype | None = None, read: Read | None = None
) -> Tensor:
    """One stored tensor, contiguous; a view of our memory where nothing has to move.

    Args:
        read: where the values come from, when they are not those in `ours` (a merged adapter).
    """
    parts = [
        piece.view(ours[piece.ours]) if read is None else piece.turn(read(piece.ours, piece.index)) for piece in pieces
    ]
    whole = parts[0] if pieces[0].row is None else torch.stack(parts)
    return (whole if dtype is None else whole.to(dtype)).contiguous()
