"""From YAML to the typed settings of train/config.py, and help with what was typed wrongly.

Merge order: the defaults of the schemas → the chosen file of each group (configs/<group>/<name>.yaml) →
configs/sft.yaml → configs/experiment/<name>.yaml → the command line. For example

    ernie sft experiment=digits optim.lr=1e-3

takes `lr: 1e-5` from `OptimConfig`, another value from experiment/digits.yaml, and at last 1e-3.

`to_typed` turns the result into plain dataclasses; nothing below the entry points sees OmegaConf.
"""

import dataclasses
import typing
from collections.abc import Iterator
from enum import Enum
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train.config import (
    ConvertConfig,
    DataConfig,
    FilesData,
    Schedule,
    SFTConfig,
    TaskData,
    TrainingConfig,
    UserError,
    check,
    suggestion,
)
from train.dpo_config import DPOConfig
from train.inference_config import (
    ChatConfig,
    CompareConfig,
    EvaluationConfig,
    ExportConfig,
    IndexConfig,
    PairsConfig,
    ServeConfig,
)
from train.rl_config import RLConfig

ENTRIES = {
    "sft": SFTConfig,
    "dpo": DPOConfig,
    "rl": RLConfig,
    "convert": ConvertConfig,
    "export": ExportConfig,
    "evaluate": EvaluationConfig,
    "pairs": PairsConfig,
    "compare": CompareConfig,
    "serve": ServeConfig,
    "chat": ChatConfig,
    "index": IndexConfig,
}
ALGORITHMS = tuple(entry for entry, schema in ENTRIES.items() if issubclass(schema, TrainingConfig))
DATA_SCHEMAS: dict[str, type[DataConfig]] = {"task": TaskData, "files": FilesData}
GROUPS = ("model", "data", "objective", "optim", "peft", "parallel", "tracker", "plan", "experiment")

# What may differ between a checkpoint and the run that continues it: everything else changes the numbers.
FREE_TO_CHANGE: tuple[str, ...] = (
    "run.name",
    "run.folder",
    "run.resume",
    "run.save_every",
    "run.keep",
    "run.log_every",
    "run.debug",
    "run.spike",
    "run.grace_s",
    "evaluate",
    "preview",
    "doctor",
    "plan",
    "tracker",
    "record",
    "parallel",
    "data.cache_gib",
    "data.cache_folder",
    "data.slow_s",
    "data.dead_s",
    "data.max_bad",
    "data.workers",
    "data.prefetch",
    "optim.max_skipped",
    "mismatch",
    "rollout.vllm",
    "rollout.max_idle",
    "rewards.workers",
    "model.name",
    "model.recompute",  # the same gradients to the last bit
    "model.offload_activations",
    "peft.merge",
    "data.accumulation",  # rows_per_update is compared instead: accumulation times ranks
)
ORDERED = ("optim.lr_scale", "peft.frozen")
"""Settings whose keys mean something else in another order: a later glob wins, adapters are added up one by one."""


def register(*entries: str) -> None:
    """Tell Hydra the schemas of these entries (none named: of all) and of data, which YAML files name in their
    `defaults:` list. What it has been told is left as it is."""
    store = ConfigStore.instance()
    for entry in entries or ENTRIES:
        if f"{entry}_schema.yaml" in store.repo:
            continue
        schema = ENTRIES[entry]
        node = OmegaConf.structured(schema)
        for key in open_keys(schema):
            if not OmegaConf.is_missing(node, key.partition(".")[0]):
                OmegaConf.set_struct(OmegaConf.select(node, key), False)  # Hydra refuses unknown keys everywhere else
        store.store(name=f"{entry}_schema", node=node)
    for kind, variant in DATA_SCHEMAS.items():
        if f"{kind}_schema.yaml" in store.repo.get("data", {}):
            continue
        node = OmegaConf.structured(variant)
        for key in open_keys(variant):
            OmegaConf.set_struct(OmegaConf.select(node, key), False)
        store.store(group="data", name=f"{kind}_schema", node=node)


Schema = TypeVar("Schema")


def to_typed(cfg: DictConfig, schema: type[Schema] = SFTConfig) -> Schema:
    """Leave OmegaConf behind.

    Raises:
        UserError: a value breaks a rule, a type is wrong, or a setting without a default was not given.
    """
    known = sorted(set(known_keys(schema)))
    free = tuple(f"{key}." for key in open_keys(schema))
    entry = next((name for name, one in ENTRIES.items() if one is schema), schema.__name__)
    for key in flatten(OmegaConf.to_container(cfg)):  # `+optim.leer=1` gets past OmegaConf and would do nothing
        check(
            key in known or key.startswith(free),
            f"{key} is not a setting of {entry}{suggestion(key, known)}",
        )
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(
            f"these settings have no default and were not given: {', '.join(missing)}. "
            f"Add them to the command line, for example {missing[0]}=..."
        )
    try:
        typed = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0]) from error
    except ValueError as error:  # a rule of settings that belong to ernie_model
        raise UserError(str(error)) from error
    assert isinstance(typed, schema)
    return typed


def training_settings(cfg: DictConfig) -> TrainingConfig:
    """Leave OmegaConf behind, whichever algorithm's settings these are (`program(..., also=...)`)."""
    entry = HydraConfig.get().job.config_name
    assert entry is not None
    typed = to_typed(cfg, ENTRIES[entry])
    assert isinstance(typed, TrainingConfig)
    return typed


def plain(config: Any) -> Any:
    """Dataclasses and enums to what JSON and YAML can hold."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Enum):
        return config.value
    if isinstance(config, dict):
        return {str(key): plain(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [plain(value) for value in config]
    return config


def from_plain(tree: dict[str, Any], schema: type[Schema]) -> Schema:
    """The other way: settings as a checkpoint has them."""
    typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), tree))
    assert isinstance(typed, schema)
    return typed


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` to `{"a.b": 1}`: keys as the user writes them."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that change the numbers and differ between two plain configurations: key → (old, new)."""
    free: list[str] = list(FREE_TO_CHANGE)
    if old.get("optim", {}).get("schedule") == Schedule.constant.value:
        free += ["run.steps", "run.epochs"]  # a constant learning rate doesn't depend on where the run ends
    old_flat, new_flat = flatten(old), flatten(new)
    if old_flat.get("data.kind") == "digits":  # what data.kind=task data.task=digits used to be called
        old_flat |= {"data.kind": "task", "data.task": "digits"}
    absent = object()
    out = {}
    for name in ORDERED:
        before, after = ([key for key in flat if key.startswith(f"{name}.")] for flat in (old_flat, new_flat))
        if before != after and sorted(before) == sorted(after):
            out[name] = tuple(", ".join(key.removeprefix(f"{name}.") for key in keys) for keys in (before, after))
    for key in sorted(old_flat.keys() | new_flat.keys()):
        if any(key == name or key.startswith(name + ".") for name in free):
            continue
        before, after = old_flat.get(key, absent), new_flat.get(key, absent)
        if before is absent and after is None:
            continue  # a setting that has been added since, and is off
        if before != after:
            out[key] = tuple("(absent)" if value is absent else value for value in (before, after))
    return out


# ------------------------------------------------------------------------------------------------- help with typos


def known_keys(schema: type) -> Iterator[str]:
    """Every key of a schema in dotted form, including those of the data sources."""
    return (key for key, _ in _typed_keys(schema))


def _typed_keys(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(schema)
    for f in dataclasses.fields(schema):
        kind = hints[f.name]
        variants = list(DATA_SCHEMAS.values()) if kind is DataConfig else [kind]
        yield prefix + f.name, kind
        for variant in variants:
            if dataclasses.is_dataclass(variant):
                yield from _typed_keys(typing.cast(type, variant), f"{prefix}{f.name}.")


def open_keys(schema: type) -> set[str]:
    """The keys of a schema whose own keys are the user's: `model.config`, `optim.lr_scale`."""
    keys = set()
    for key, kind in _typed_keys(schema):
        if dict in (typing.get_origin(kind), *map(typing.get_origin, typing.get_args(kind))):
            keys.add(key)
    return keys
