"""Put adapters into a model, and everything that is different about a model with adapters.

    adapt(model, config, seed)     freeze, adapt the chosen parts, read the adapters that are loaded   ->  Adapters
    adapters.tensors()             what a checkpoint holds: the trained adapter; `rests_on` says on which weights
    adapters.merged(values)        W + scale * B A, part by part, so that a merged export never holds a second model

Adapters live inside the model: after `adapt`, training, evaluation and generation run as they are.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from rich.table import Table
from torch import Tensor, nn

from ernie_model.expert_parallel import shard_of
from ernie_model.hub import Index, Read
from ernie_model.layers import Linear
from ernie_model.model import ErnieModel
from ernie_model.moe import Experts
from ernie_model.parts import Part, part_of
from ernie_model.processor import Processor
from train.adapter_gate import check_adapter, check_merged
from train.build import human
from train.checkpoint import all_or_none, fingerprint, here, shared_folder
from train.config import (
    TARGETS,
    PeftConfig,
    UserError,
)
from train.lora.files import Stored, keys_by_tensor, read_adapter, write_adapter
from train.lora.layers import Factors, LoraExperts, LoraLinear, effective_rows
from train.parallel.fragments import whole_shape
from train.parallel.partition import is_part
from train.run import export
from train.values import Values, values_of

LANGUAGE = (Part.ATTENTION, Part.DENSE, Part.SHARED, Part.TEXT_EXPERTS, Part.VISION_EXPERTS)
EXPERTS = (Part.TEXT_EXPERTS, Part.VISION_EXPERTS)


class Site(NamedTuple):
    """One module that gets an adapter."""

    module: str
    part: Part
    rank: int
    alpha: float


class Covered(NamedTuple):
    """One line of the table that a run prints before it starts."""

    part: Part
    modules: int
    rank: int
    alpha: float
    parameters: int


def adapt(model: ErnieModel, config: PeftConfig, *, seed: int, base: str | None = None) -> "Adapters":
    """Freeze the model and give it adapters. Values of the new one come from `seed` or from `config.init_from`.

    Args:
        base: what the frozen weights are called, for adapter_config.json: model.checkpoint.

    Raises:
        UserError: a part without modules; an adapter folder that does not fit the model or the settings.
    """
    model.requires_grad_(False)
    if config.dora and any(is_part(parameter) for parameter in model.parameters()):
        raise UserError(
            "peft.dora=true measures whole rows of the weights beside it, which parallel.zero=3 has cut up. Use "
            "parallel.zero=2, or peft.dora=false."
        )
    sites = find_sites(model, config)
    frozen = {name: read_adapter(Path(folder), model, f"peft.frozen.{name}") for name, folder in config.frozen.items()}
    for name, stored in frozen.items():
        if stored.dora:
            raise UserError(
                f"peft.frozen.{name}={config.frozen[name]} is DoRA, which cannot act beside another adapter."
            )
        _inject(model, name, _sites_of(stored), rslora=stored.rslora, dora=stored.dora, dropout=0.0)
    with torch.random.fork_rng(devices=[]):  # every rank draws the same values, and nobody else's numbers move
        torch.manual_seed(seed)
        _inject(model, config.name, sites, rslora=config.rslora, dora=config.dora, dropout=config.dropout)
    _keep_frozen_weights_narrow(model)
    places = {name: _sites_of(stored) for name, stored in frozen.items()} | {config.name: sites}
    adapters = Adapters(model, config, places, base)
    for name, stored in frozen.items():
        adapters.put(name, stored, f"peft.frozen.{name}={config.frozen[name]}")
        check_adapter(Path(config.frozen[name]), adapters, name)
    if config.init_from is not None:
        stored = read_adapter(Path(config.init_from), model, "peft.init_from")
        adapters.put(config.name, stored, f"peft.init_from={config.init_from}")
        check_adapter(Path(config.init_from), adapters)
    return adapters


def find_sites(model: ErnieModel, config: PeftConfig) -> list[Site]:
    """Every Linear and every stack of experts of the chosen parts, in the model's order.

    Raises:
        UserError: a part that this model does not have.
    """
    by_part: dict[Part, list[str]] = {Part(name): [] for name in TARGETS}
    for name, module in model.named_modules():
        if isinstance(module, Linear | Experts) and (part := part_of(f"{name}.weight")) in by_part:
            by_part[part].append(name)
    here = [part.value for part, modules in by_part.items() if modules]
    chosen = [Part(name) for name in config.targets or [p.value for p in LANGUAGE if by_part[p]]]
    for key, named in (("targets", config.targets or []), ("ranks", config.ranks), ("alphas", config.alphas)):
        for name in named:
            if not by_part[Part(name)]:
                raise UserError(
                    f"peft.{key} names {name}, but this model has no such modules. It has: {', '.join(here)}."
                )
            if Part(name) not in chosen:
                raise UserError(
                    f"peft.{key} names {name}, which is not among peft.targets. Add it there, or leave it out."
                )
    keys = keys_by_tensor(model.config)
    for key, value in (("dora", config.dora), ("dropout", config.dropout)):
        # In peft's file they are parameters, and for parameters peft has neither.
        refused = [p for p in chosen if p in EXPERTS or any(keys[f"{n}.weight"].is_parameter for n in by_part[p])]
        if value and refused:
            raise UserError(
                f"peft.{key}={value} cannot be used on {', '.join(part.value for part in refused)}: peft has it for "
                f"single modules only, so nobody could load the adapter. Leave these parts out of peft.targets, or do "
                f"not set peft.{key}."
            )
    return [
        Site(name, part, config.ranks.get(part.value, config.rank), config.alphas.get(part.value, config.alpha))
        for part in chosen
        for name in by_part[part]
    ]


def _sites_of(stored: Stored) -> list[Site]:
    sites = {}
    for tensor, factors in stored.factors.items():
        module = tensor.rpartition(".")[0]
        sites[module] = Site(module, part_of(tensor), factors.A.shape[-2], stored.alphas[tensor])
    return list(sites.values())


def _inject(model: ErnieModel, name: str, sites: list[Site], *, rslora: bool, dora: bool, dropout: float) -> None:
    """Let peft replace the modules; the two kinds of layers are registered with it."""
    # peft takes a model with a config for one of transformers' and would rename targets; a bare module has none.
    holder = nn.Module()
    holder.model = model
    config = LoraConfig(
        target_modules="|".join(re.escape(f"model.{site.module}") for site in sites),
        rank_pattern={re.escape(site.module): site.rank for site in sites},
        alpha_pattern={re.escape(site.module): site.alpha for site in sites},
        use_rslora=rslora,
        use_dora=dora,
        lora_dropout=dropout,
    )
    config._register_custom_module({Linear: LoraLinear, Experts: LoraExperts})
    inject_adapter_in_model(config, holder, name)


def _keep_frozen_weights_narrow(model: ErnieModel) -> None:
    """A frozen weight is only read in the dtype it is computed in, so that is how it is kept. Routers stay wide."""
    if (dtype := model.compute_dtype) is None:
        return
    for name, parameter in model.named_parameters():
        if ".lora_" not in name and part_of(name) is not Part.ROUTER:
            parameter.data = parameter.data.to(dtype)


class Adapters:
    """The adapters of one model: which layers have them, their values, and the weights they amount to."""

    def __init__(self, model: ErnieModel, config: PeftConfig, sites: dict[str, list[Site]], base: str | None):
        """`sites` of every adapter, by its name."""
        self.model, self.config, self.sites, self.base = model, config, sites, base
        self.layers: dict[str, LoraLinear | LoraExperts] = {
            name: module for name, module in model.named_modules() if isinstance(module, LoraLinear | LoraExperts)
        }
        self._rests_on: str | None = None
        active = [*config.frozen, config.name]
        for layer in self.layers.values():
            layer.set_adapter(active)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(_belongs_to(name, self.config.name))

    def coverage(self) -> list[Covered]:
        """What is adapted, part by part."""
        rows: dict[Part, Covered] = {}
        for site in self.sites[self.config.name]:
            layer = self.layers[site.module]
            own = [p for name, p in layer.named_parameters() if _belongs_to(name, self.config.name)]
            count = sum(math.prod(whole_shape(p)) for p in own)
            before = rows.get(site.part, Covered(site.part, 0, site.rank, site.alpha, 0))
            rows[site.part] = before._replace(modules=before.modules + 1, parameters=before.parameters + count)
        return list(rows.values())

    def table(self) -> Table:
        """`coverage` for the terminal."""
        table = Table("adapters of", "modules", "rank", "alpha", "parameters")
        for part, modules, rank, alpha, parameters in self.coverage():
            table.add_row(part.value, str(modules), str(rank), f"{alpha:g}", human(parameters))
        return table

    # ------------------------------------------------------------------------------------------------------- weights

    def own(self, module: str, name: str | None = None, values: Values | None = None) -> dict[str, Factors]:
        """One adapter's factors of one module (the trained one's), by the full name of the tensor they change.

        Args:
            values: where they are read, if not from what this rank holds of them.
        """
        layer, name = self.layers[module], name or self.config.name
        read = None if values is None else _within(module, values)
        return {
            f"{module}.{tensor}": _detached(layer.factors_of(name, tensor, read=read))
            for tensor in layer.TENSORS
            if name in layer.adapters_of(tensor)
        }

    def merged(self, values: Values) -> Values:
        """The model as if it had never been adapted, with W plus what all adapters add in the place of W.

        Args:
            values: of all tensors of the adapted model.
        """
        tensors = {
            name.replace(".base_layer.", "."): tensor for name, tensor in values.tensors.items() if ".lora_" not in name
        }

        def merged(tensor: str, index: Index) -> Tensor:
            module, _, attribute = tensor.rpartition(".")
            if (layer := self.layers.get(module)) is None:
                return values.read(tensor, index)
            weight = values.read(f"{module}.base_layer.{attribute}", index)
            read = _within(module, values)
            factors = [layer.factors_of(name, attribute, index, read) for name in layer.adapters_of(attribute)]
            if not factors:
                return weight
            return effective_rows(weight, factors, dtype=torch.promote_types(weight.dtype, factors[0].A.dtype))

        return Values(tensors, merged)

    def factors(self, tensor: str) -> list[Factors]:
        """What the active adapters add to a tensor; nothing for most."""
        module, _, attribute = tensor.rpartition(".")
        layer = self.layers.get(module)
        return [] if layer is None else [_detached(one) for one in layer.factors(attribute).values()]

    def base_tensor(self, tensor: str) -> Tensor:
        """W itself, of which this rank may hold some experts, or (`whole`) nothing that can be seen from outside."""
        module, _, attribute = tensor.rpartition(".")
        return getattr(self.base_module(module), attribute)

    def base_module(self, module: str) -> nn.Module:
        return self.layers[module].get_base_layer() if module in self.layers else self.model.get_submodule(module)

    @contextmanager
    def without_trained(self) -> Iterator[None]:
        """Inside, the adapter that trains does nothing; those of `peft.frozen` go on acting."""
        # Not peft's set_adapter, which would also say which of them train.
        for layer in self.layers.values():
            layer._active_adapter = [*self.config.frozen]
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer._active_adapter = [*self.config.frozen, self.config.name]

    def put(self, name: str, stored: Stored, where: str) -> None:
        """Copy an adapter from a folder into the layers of the adapter `name`.

        Raises:
            UserError: the folder adapts other tensors, or in another way, than the settings say.
        """
        mine = {tensor: one for site in self.sites[name] for tensor, one in self.own(site.module, name).items()}
        if differing := sorted(mine.keys() ^ stored.factors.keys()):
            raise UserError(
                f"{where} adapts {len(stored.factors)} tensors and the settings ask for {len(mine)}; one that only one "
                f"of them has: {differing[0]}. Set peft.targets to what the folder has."
            )
        for tensor, new in stored.factors.items():
            old = mine[tensor]
            pairs = [("rank", old.A.shape[-2], new.A.shape[-2]), ("scale (alpha, rank, rslora)", old.scale, new.scale)]
            pairs.append(("DoRA", old.magnitude_O is not None, new.magnitude_O is not None))
            for what, ours, theirs in pairs:
                if ours != theirs:
                    raise UserError(
                        f"{where} has {what} {theirs} at {tensor}, and the settings make it {ours}. Set peft.rank, "
                        "peft.alpha, peft.rslora and peft.dora to what the folder's adapter_config.json says."
                    )
            part: slice | tuple[()] = ()
            if new.A.ndim == 3:  # this rank's experts
                part = shard_of(self.base_tensor(tensor)).part_of(new.A.shape[0])
            with torch.no_grad():
                old.A.copy_(new.A[part])
                old.B.copy_(new.B[part])
                if old.magnitude_O is not None and new.magnitude_O is not None:
                    old.magnitude_O.copy_(new.magnitude_O)

    # --------------------------------------------------------------------------------------------------------- files

    @contextmanager
    def whole(self, folder: Path, name: str, optimizer: Any = None) -> Iterator[Values]:
        """See `Weights.whole`."""
        everything = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        with values_of(everything, optimizer, folder, name) as values:
            yield self.merged(values)

    def publish(self, run_folder: Path, name: str, processor: Processor, optimizer: Any = None) -> list[Path]:
        """The adapter as `adapter` or `NAME_adapter`, and with peft.merge the merged weights as NAME.

        Each folder appears only after the gate has passed what is in it, on every rank.

        Raises:
            AdapterError: what was written is not what was trained.
            UserError: the disk is full, or the folder cannot be written.
        """
        folder = run_folder / ("adapter" if name == "export" else f"{name}_adapter")
        with values_of(self.tensors(), optimizer, run_folder, folder.name) as values:
            needed = values.num_bytes
            with shared_folder(folder, needed) as temporary:
                main = here()[0] == 0
                all_or_none(folder, needed, lambda: write_adapter(temporary, self, values) if main else None)
                all_or_none(folder, needed, lambda: check_adapter(temporary, self))
        if not self.config.merge:
            return [folder]
        with self.whole(run_folder, name, optimizer) as merged:
            export(
                run_folder / name,
                self.model.config,
                merged,
                processor,
                lambda written: check_merged(written, self) and None,
            )
        return [folder, run_folder / name]

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """The trained adapter under the model's names."""
        return {name: p for name, p in self.model.named_parameters() if _belongs_to(name, self.config.name)}

    def rests_on(self) -> str:
        """A number that changes when a frozen weight changes. All ranks ask together."""
        if self._rests_on is None:  # every frozen weight is read for it
            own = self.tensors().keys()
            frozen = {name: value for name, value in self.model.state_dict(keep_vars=True).items() if name not in own}
            self._rests_on = fingerprint(frozen)
        return self._rests_on


def _within(module: str, values: Values) -> Read:
    return lambda name, index: values.read(f"{module}.{name}", index)


def _detached(factors: Factors) -> Factors:
    magnitude = None if factors.magnitude_O is None else factors.magnitude_O.detach()
    return Factors(factors.A.detach(), factors.B.detach(), factors.scale, magnitude)


def _belongs_to(parameter: str, adapter: str) -> bool:
    """Is this parameter of that adapter? `...q_proj.lora_A.default.weight`, `...experts.lora_down_B_EDL.default`."""
    return re.search(rf"\.?lora_\w+\.{re.escape(adapter)}(\.weight)?$", parameter) is not None
