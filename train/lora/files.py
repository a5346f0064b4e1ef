"""An adapter as a folder in peft's own format, under transformers' names, so that both can load it.

    ours                          adapter_model.safetensors, after base_model.model.(model.language_model.)
    layers.0.self_attn.q_proj     layers.0.self_attn.q_proj.lora_A.weight (L, I)   .lora_B.weight (O, L)
    layers.1.mlp.vision.experts   layers.1.mlp.vision_moe.experts
        gate_up_EFD                   .base_layer.lora_A.weight (E*L, D)   .base_layer.lora_B.weight (F, L*E)
        down_EDF                      .lora_A.weight            (E*L, F)   .lora_B.weight            (D, L*E)

peft wraps the two tensors of one expert module one inside the other, gate_up first; that is what `base_layer` says.
Note the order inside the merged dimension: expert by expert in A, rank by rank in B.

Shape letters:  L rank   I inputs   O outputs   E experts   D model width   F expert width
Source: reference 5.4.
"""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ernie_model.atomic import atomic_write
from ernie_model.config import ErnieConfig
from ernie_model.hub import module_names
from ernie_model.model import ErnieModel
from train.config import UserError
from train.lora.layers import Factors
from train.parallel.fragments import whole_shape
from train.values import Values

if TYPE_CHECKING:
    from train.lora.adapt import Adapters

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# What a LoRA folder may ask for that changes its meaning, and that is not implemented: absent, or one of these.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": ([], None),
    "layer_replication": ([], None),
    "trainable_token_indices": ([], None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "alora_invocation_tokens": ([], None),
    "arrow_config": (None,),
    "velora_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}
# With transformers 5, peft takes these modules of a text mixture of experts for experts of older files, wherever they
# are, and drops their adapters in silence. Named as parameters they are left alone; their tensors are the same.
TAKEN_FOR_EXPERTS = (".gate_proj", ".up_proj", ".down_proj")


class Stored(NamedTuple):
    """An adapter folder, read: factors by the name of our tensor that they change."""

    factors: dict[str, Factors]
    alphas: dict[str, float]
    rslora: bool
    dora: bool


class Keys(NamedTuple):
    """Where the factors of one tensor lie in the file."""

    A: str
    B: str
    magnitude: str
    target: str
    """What adapter_config.json calls it: a module, or a parameter of the experts."""
    is_parameter: bool


def keys_by_tensor(config: ErnieConfig) -> dict[str, Keys]:
    """Every tensor of ours that peft could adapt in transformers' model, and its keys there."""
    found = {}
    for ours, theirs in module_names(config).items():
        owner, _, attribute = theirs.rpartition(".")
        if attribute == "weight" and config.model_type == "ernie4_5_moe" and owner.endswith(TAKEN_FOR_EXPERTS):
            found[ours] = _keys(owner, theirs, is_parameter=True)
        elif attribute == "weight":
            found[ours] = _keys(owner, owner, is_parameter=False)
        elif attribute == "gate_up_proj":
            found[ours] = _keys(f"{owner}.base_layer", theirs, is_parameter=True)
        elif attribute == "down_proj":
            found[ours] = _keys(owner, theirs, is_parameter=True)
    return found


def _keys(path: str, target: str, *, is_parameter: bool) -> Keys:
    start = f"{PREFIX}{path}."
    return Keys(f"{start}lora_A.weight", f"{start}lora_B.weight", f"{start}lora_magnitude_vector", target, is_parameter)


# ------------------------------------------------------------------------------------------------------------ writing


def write_adapter(folder: Path, adapters: "Adapters", values: Values) -> None:
    """adapter_config.json and adapter_model.safetensors of the trained adapter, into an existing folder.

    Args:
        values: of its tensors, whole.
    """
    keys = keys_by_tensor(adapters.model.config)
    tensors: dict[str, Tensor] = {}
    for site in adapters.sites[adapters.config.name]:
        for tensor, factors in adapters.own(site.module, values=values).items():
            A, B = to_peft(factors)
            tensors[keys[tensor].A], tensors[keys[tensor].B] = A, B
            if factors.magnitude_O is not None:
                tensors[keys[tensor].magnitude] = factors.magnitude_O
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(whole, folder / WEIGHTS, metadata={"format": "pt"})
    said = peft_config(adapters).to_dict()  # peft keeps targets as sets, whose order changes from run to run
    atomic_write(folder / CONFIG, json.dumps(said, indent=2, sort_keys=True, default=sorted) + "\n")


def to_peft(factors: Factors) -> tuple[Tensor, Tensor]:
    """A and B as peft stores them: matrices, also for experts."""
    A, B = factors.A, factors.B
    return (A, B) if A.ndim == 2 else (A.flatten(0, 1), B.permute(1, 2, 0).flatten(1))


def from_peft(A: Tensor, B: Tensor, experts: int | None) -> tuple[Tensor, Tensor]:
    """The other way; `experts` is None for a single matrix."""
    if experts is None:
        return A, B
    return A.unflatten(0, (experts, -1)), B.unflatten(1, (-1, experts)).permute(2, 0, 1)


def peft_config(adapters: "Adapters") -> LoraConfig:
    """The settings as peft says them about transformers' model."""
    config, keys = adapters.config, keys_by_tensor(adapters.model.config)
    targets: dict[str, tuple[int, float]] = {}
    modules, parameters = [], []
    for site in adapters.sites[adapters.config.name]:
        for tensor in adapters.own(site.module):
            targets[keys[tensor].target] = (site.rank, site.alpha)
            (parameters if keys[tensor].is_parameter else modules).append(keys[tensor].target)
    everything = [name.rpartition(".")[0] for name in module_names(adapters.model.config).values()]
    return LoraConfig(
        base_model_name_or_path=adapters.base,
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] a float is fine: scale = alpha / r
        # A pattern is a regular expression; the layers of a part are one pattern.
        rank_pattern={_any_layer(name): rank for name, (rank, _) in targets.items() if rank != config.rank},
        alpha_pattern={_any_layer(name): alpha for name, (_, alpha) in targets.items() if alpha != config.alpha},
        target_modules=shortest(modules, everything),
        target_parameters=parameters,
        use_rslora=config.rslora,
        use_dora=config.dora,
        lora_dropout=config.dropout,
        inference_mode=True,
        task_type="CAUSAL_LM",
    )


def _any_layer(name: str) -> str:
    return re.sub(r"\d+", r"\\d+", name.replace(".", r"\."))


def shortest(targets: Iterable[str], everything: Iterable[str]) -> list[str]:
    """The targets by their last word where it means nothing else in the model, as people write them; else in full."""
    targets = set(targets)
    paths = {".".join(words[: n + 1]) for name in everything for words in [name.split(".")] for n in range(len(words))}
    others = {path.rpartition(".")[2] for path in paths - targets}
    return sorted({last if (last := name.rpartition(".")[2]) not in others else name for name in targets})


# ------------------------------------------------------------------------------------------------------------ reading


def read_adapter(folder: Path, model: ErnieModel, key: str) -> Stored:
    """A LoRA folder of peft, ours or anybody's.

    Args:
        model: says which shapes are expected.
        key: the setting that named the folder, for errors.

    Raises:
        UserError: the folder is not there, damaged, of another method, or does not fit the model.
    """
    where = f"{key}={folder}"
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{where} cannot be read as an adapter ({error}). It must be a folder with {CONFIG} and {WEIGHTS}."
        ) from error
    for name, allowed in PLAIN.items():
        if name in config and config[name] not in allowed:
            raise UserError(f"{where}: {CONFIG} says {name}={config[name]!r}, which is not plain LoRA and is not read.")
    shapes = {name.replace(".base_layer.", "."): whole_shape(value) for name, value in model.named_parameters()}
    factors, alphas = {}, {}
    left = set(tensors)
    for ours, keys in keys_by_tensor(model.config).items():
        if keys.A not in tensors and keys.B not in tensors:
            continue
        if keys.A not in tensors or keys.B not in tensors:
            raise UserError(f"{where}: one of {keys.A} and {keys.B} is missing in {WEIGHTS}.")
        rank, alpha = _of(config, keys.target)
        A, B = tensors[keys.A], tensors[keys.B]
        left -= {keys.A, keys.B, keys.magnitude}
        *experts, outputs, inputs = shapes[ours]
        count = experts[0] if experts else 1
        if (tuple(A.shape), tuple(B.shape)) != ((count * rank, inputs), (outputs, rank * count)):
            raise UserError(
                f"{where}: {keys.A} is {tuple(A.shape)} and its lora_B is {tuple(B.shape)}; this model and rank {rank} "
                f"need {(count * rank, inputs)} and {(outputs, rank * count)}. It is of another model, or damaged."
            )
        A, B = from_peft(A, B, experts[0] if experts else None)
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        magnitude = tensors.get(keys.magnitude)
        if config.get("use_dora") and (magnitude is None or magnitude.shape != (outputs,)):
            raise UserError(f"{where}: use_dora needs {keys.magnitude} of {outputs} numbers in {WEIGHTS}.")
        factors[ours], alphas[ours] = Factors(A, B, scale, magnitude), alpha
    if left:
        raise UserError(
            f"{where}: {len(left)} tensors of {WEIGHTS} adapt nothing that is known here; for example {min(left)}."
        )
    return Stored(factors, alphas, bool(config.get("use_rslora")), bool(config.get("use_dora")))


def _of(config: dict[str, Any], target: str) -> tuple[int, float]:
    """Rank and alpha of one target, by peft's rule: a pattern matches the end of a name from a dot on."""

    def lookup(patterns: dict[str, Any] | None, default: Any) -> Any:
        for name in (target, target.removesuffix(".weight")):  # a Linear may be named as a module or by its weight
            for pattern, value in (patterns or {}).items():
                if re.match(rf"(.*\.)?({pattern})$", name):
                    return value
        return default

    return int(lookup(config.get("rank_pattern"), config["r"])), float(
        lookup(config.get("alpha_pattern"), config["lora_alpha"])
    )
