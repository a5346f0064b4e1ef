"""What trains, and at what rate: from the keys of `optim.freeze` and `optim.lr_scale` to parameters.

    freeze: [vision]                          a part of the model (ernie_model/parts.py)
    lr_scale:
      router: 0.01                            a part: its learning rate is optim.lr * 0.01
      layers.0.*: 0.5                         a glob over parameter names; * crosses dots
      layers.0.mlp.shared_experts.*: 0.2      a later glob wins over an earlier one, and any glob over a part

Freezing wins over every rate. A frozen parameter has requires_grad=False: no gradient, no optimizer state, and what
only leads to frozen parameters (the vision tower, usually) keeps no activations.

A glob that matches nothing is an error, and so is a word that is no part. A part that this model lacks is only told:
the recipe of the family must fit its text models too.
"""

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from ernie_model.parts import Part, part_of
from train.config import OptimConfig, UserError
from train.parallel.partition import shape_of

MOMENT_BYTES = 8
"""AdamW's two float32 moments of one parameter."""
PARTS = {part.value: part for part in Part}
ADAPTER = "lora_"
"""In the name of every parameter of an adapter; the rest of the name is that of the module it adapts."""


def freeze(model: nn.Module, config: OptimConfig, *, random: bool = False) -> list[str]:
    """Stop the parameters that `optim.freeze` names from training. Never starts one.

    Args:
        random: the weights come from no checkpoint, so that freezing them is hardly what was meant.

    Returns:
        Notes: keys of `optim.freeze` and `optim.lr_scale` that name a part this model lacks; random weights that stay.

    Raises:
        UserError: a key matches nothing; an adapter would be frozen; nothing is left to train.
    """
    named = dict(model.named_parameters())
    notes = []
    for setting, keys in (("optim.freeze", config.freeze), ("optim.lr_scale", config.lr_scale)):
        lacking = [key for key in keys if not _match(setting, key, named)]
        if lacking:
            notes.append(f"{setting} names {', '.join(lacking)}, which this model does not have.")
    adapted = any(ADAPTER in name for name in named)
    stopped: list[str] = []
    for key in config.freeze:
        for name in _match("optim.freeze", key, named):
            if named[name].requires_grad:
                stopped.append(name)
            if ADAPTER in name and named[name].requires_grad:
                raise UserError(
                    f"optim.freeze has {key}, but an adapter trains there ({name}). Drop {key} from optim.freeze, or "
                    "from peft.targets."
                )
            named[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise UserError(f"optim.freeze={config.freeze} leaves nothing to train. Drop a key.")
    if random and adapted:
        notes.append(
            "model.checkpoint is null, so adapters train beside random weights that stay random. Set model.checkpoint, "
            "or peft=none."
        )
    elif random and stopped:
        parts = ", ".join(dict.fromkeys(part_of(name).value for name in stopped))
        count = sum(shape_of(named[name]).numel() for name in stopped)
        notes.append(
            f"model.checkpoint is null, so weights start random, and optim.freeze={config.freeze} keeps {count:,} of "
            f"them random ({parts}). Set model.checkpoint, or optim.freeze=[] (optim=adamw)."
        )
    return notes


def lr_scales(model: nn.Module, config: OptimConfig) -> dict[str, float]:
    """What the learning rate of each trained parameter is multiplied by.

    Block i of the vision tower gets vision_layer_decay ** (depth - 1 - i) on top, and the patch embedding below block 0
    one factor more; the norm above the last block gets none.

    Raises:
        UserError: a key of `optim.lr_scale` matches nothing.
    """
    named = dict(model.named_parameters())
    scale = dict.fromkeys(named, 1.0)
    for key in sorted(config.lr_scale, key=lambda key: key not in PARTS):  # parts first, then globs in their order
        scale |= dict.fromkeys(_match("optim.lr_scale", key, named), config.lr_scale[key])
    depth = 1 + max((block for name in named if (block := _block(name)) is not None), default=-1)
    for name in named:
        if (block := _block(name)) is not None:
            scale[name] *= config.vision_layer_decay ** (depth - 1 - block)
    return {name: scale[name] for name, parameter in named.items() if parameter.requires_grad}


def _block(name: str) -> int | None:
    """How high in the vision tower: its block, -1 for the patch embedding, None for everything that does not decay."""
    if name.startswith("vision.patch_embed."):
        return -1
    return int(name.split(".")[2]) if name.startswith("vision.blocks.") else None


def _match(setting: str, key: str, names: Iterable[str]) -> list[str]:
    """The parameters a key stands for; none where it is a part that the model lacks."""
    names = list(names)
    if key in PARTS:
        return [name for name in names if part_of(name) is PARTS[key]]
    if found := [name for name in names if fnmatchcase(name, key)]:
        return found
    near = difflib.get_close_matches(key, [*PARTS, *names], n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    raise UserError(
        f"{setting} has the key {key}, which matches no parameter{hint} A key is a part ({', '.join(PARTS)}) or a glob "
        "over parameter names, for example layers.0.*"
    )


# ------------------------------------------------------------------------------------------------------- the table


class PartRow(NamedTuple):
    """One part of the model, adapters counted with the part they adapt."""

    part: Part
    parameters: int
    trained: int
    lr: tuple[float, float] | None
    """Lowest and highest learning rate at the peak of the schedule; None where nothing trains."""
    decayed: int
    """Trained parameters that weight decay pulls at."""

    @property
    def optimizer_bytes(self) -> int:
        return MOMENT_BYTES * self.trained


def trained_parts(model: nn.Module, config: OptimConfig) -> list[PartRow]:
    """What `ernie sft` will train, by part, after `freeze`. A model on the meta device will do."""
    scale = lr_scales(model, config)
    rows = []
    for part in Part:
        named = [(name, p) for name, p in model.named_parameters() if part_of(name) is part]
        learning = [(name, p) for name, p in named if name in scale]
        rates = [config.lr * scale[name] for name, _ in learning]
        rows.append(
            PartRow(
                part=part,
                parameters=sum(shape_of(p).numel() for _, p in named),
                trained=sum(shape_of(p).numel() for _, p in learning),
                lr=(min(rates), max(rates)) if rates else None,
                decayed=sum(shape_of(p).numel() for name, p in learning if decays(name, p)),
            )
        )
    return [row for row in rows if row.parameters]


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Matrices decay; norms, biases and the embedding do not.

    Decay pulls a weight towards zero. A norm's neutral value is 1, and a bias or the embedding of a rare token gets
    little gradient to push back with. An embedding that is tied to the head counts as an embedding; an untied head is a
    matrix and decays. Routers are matrices too.
    """
    return len(shape_of(parameter)) >= 2 and "embed_tokens" not in name
