"""Where the batches of training come from: a mixture of datasets, encoded and packed.

    config.data ──► Parts(train, heldout) ──► Encoder ──► PackedStream ──► next_step(): this rank's micro-batches
                                                 '──► Quarantine: run.folder/quarantine.jsonl

The work is in data/; this file turns settings into those parts.
"""

from collections.abc import Iterator, Sized
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

from data import fit, mixture
from data.conversation import Learns
from data.corrupt import Corrupt, Corruption
from data.dataset import SetSpec
from data.encoder import Encoder
from data.fit import Rules
from data.loader import BackgroundStream, PackedStream
from data.mixture import Mixture, Parts, Share, open_mixture
from data.order import Key
from data.quarantine import Quarantine
from ernie_model.config import ErnieConfig
from ernie_model.flops import forward_flops
from ernie_model.processor import Processor
from train.config import (
    DataConfig,
    FilesData,
    SetConfig,
    TaskData,
    TrainingConfig,
)
from train.dpo_config import DPOConfig
from train.loop import Source
from train.objectives import dpo

OF_A_SET = ("path", "format", "columns", "split", "subset", "media_root", "limit")
"""Settings of a set that its errors may name."""


class Told(Protocol):
    """How far a source has come (`StreamReport`)."""

    def metrics(self) -> dict[str, float]: ...
    def line(self) -> str: ...


class TrainSource(Source, Protocol):
    """What batches are drawn from: packed records, or attempts at prompts."""

    @property
    def report(self) -> Told: ...

    def close(self) -> None: ...


class TrainData(TrainSource, Protocol):
    """The same before the run begins."""

    def describe(self) -> str:
        """What it is made of, for people."""
        ...

    def count_steps(self, epochs: float) -> int:
        """Updates that go through all of it so many times."""
        ...


class Data(NamedTuple):
    train: TrainData
    heldout: Sized | None
    quarantine: Quarantine
    names: tuple[str, ...]
    """Of the datasets that are trained on, as `PackedBatch.datasets` has them."""

    @property
    def packed(self) -> PackedStream:
        """What is trained on, where it is packed records."""
        assert isinstance(self.train, PackedStream)
        return self.train

    @property
    def encoder(self) -> Encoder:
        """Of these records."""
        return self.packed.encoder

    @property
    def heldout_encoder(self) -> Encoder | None:
        """Of records that are held out."""
        assert self.heldout is None or isinstance(self.heldout, Encoder)
        return self.heldout


def open_parts(config: DataConfig, learns: Learns = Learns.CONVERSATIONS) -> Parts:
    """Raises DataError: files missing or empty, settings that contradict each other."""
    if isinstance(config, TaskData):
        spec = SetSpec(task=config.task, limit=config.limit)
        return open_mixture({config.task: Share(spec=spec)}, seed=config.seed, learns=learns)
    assert isinstance(config, FilesData)
    ratio = {mixture.Modality(name): parts for name, parts in config.modality_ratio.items()}
    return open_mixture(
        {name: _share(name, one, config) for name, one in _sets(config).items()},
        mix=mixture.Mix(config.mix.value),
        stop=mixture.Stop(config.stop.value),
        modality_ratio=ratio or None,
        eval_set=None
        if config.eval_path is None
        else SetSpec(
            path=config.eval_path,
            keys={"path": "data.eval_path"},
            format=config.format,
            columns=config.columns,
            media_root=config.media_root,
            fetch=config.fetch,
        ),
        eval_fraction=config.eval_fraction,
        seed=config.seed,
        block_size=config.shuffle_block,
        learns=learns,
    )


def _sets(config: FilesData) -> dict[str, SetConfig]:
    """`path` alone is a mixture of one, which is called after its file."""
    if config.sets:
        return config.sets
    assert config.path is not None
    one = SetConfig(
        path=config.path,
        format=config.format,
        columns=config.columns,
        split=config.split,
        subset=config.subset,
        limit=config.limit,
        streaming=config.streaming,
    )
    return {Path(config.path).name: one}


def _share(name: str, one: SetConfig, config: FilesData) -> Share:
    own = [field for field in OF_A_SET if field != "media_root" or one.media_root] if config.sets else []
    spec = SetSpec(
        path=one.path,
        keys={field: f"data.sets.{name}.{field}" for field in own},
        task=one.task,
        format=one.format,
        columns=one.columns,
        split=one.split,
        subset=one.subset,
        limit=one.limit,
        streaming=one.streaming,
        media_root=one.media_root or config.media_root,
        fetch=config.fetch if one.fetch is None else one.fetch,
    )
    modality = None if one.modality is None else mixture.Modality(one.modality.value)
    return Share(spec=spec, weight=one.weight, modality=modality)


def rules_of(config: TrainingConfig) -> Rules:
    """How records become examples under these settings."""
    data = config.data
    rules = Rules(
        max_tokens=data.max_tokens,
        max_patches=data.max_patches,
        too_long=fit.TooLong(data.too_long.value),
        min_image_pixels=data.min_image_pixels,
    )
    if not isinstance(config, DPOConfig):
        return rules
    objective = config.objective
    if dpo.is_unpaired(objective):
        return replace(rules, learns=Learns.LABELLED, mismatched=dpo.needs_mismatched(objective))
    corruption = None
    if dpo.needs_corrupted(objective):
        corruption = Corruption(
            kind=Corrupt(objective.mdpo_corrupt.value), keep_min=objective.mdpo_keep[0], keep_max=objective.mdpo_keep[1]
        )
    return replace(rules, learns=Learns.PAIRS, corruption=corruption, scored=objective.offset_alpha > 0)


class SomeOf(Mixture):
    """`count` conversations of a mixture without streams, evenly over it, so that every set has its share."""

    def __init__(self, whole: Mixture, count: int):
        super().__init__(whole.sets, mix=whole.mix, stop=whole.stop)
        self.count = count

    @property
    def num_records(self) -> int:
        return min(self.count, super().num_records or 0)

    def keys(self) -> Iterator[Key]:
        total = super().num_records or 0
        chosen = {place * total // self.num_records for place in range(self.num_records)}
        return (key for place, key in enumerate(super().keys()) if place in chosen)


def build_data(
    config: DataConfig,
    processor: Processor,
    *,
    rank: int,
    world: int,
    folder: Path | None = None,
    max_heldout: int = 0,
    rules: Rules,
) -> Data:
    """Open both parts and measure the first record of each set, so that settings which fit no record fail at once.

    `folder` is where quarantine.jsonl lies; None keeps refused records in memory. `rules` are `rules_of` the run.

    Raises:
        DataError, MediaError: what is wrong with which file or record.
    """
    parts = open_parts(config, rules.learns)
    heldout = parts.heldout
    if heldout is not None and max_heldout:
        heldout = SomeOf(heldout, max_heldout)
    known = (parts.train.num_records or 0) + (0 if heldout is None else len(heldout))
    quarantine = Quarantine(folder, max_bad=config.max_bad, num_records=known)

    def encoder(part: Mixture) -> Encoder:
        return Encoder(
            part,
            processor,
            rules,
            quarantine=quarantine,
            cache_bytes=int(config.cache_gib * 2**30),
            cache_folder=None if config.cache_folder is None else Path(config.cache_folder),
            workers=config.workers,
            slow_s=config.slow_s,
            dead_s=config.dead_s,
        )

    stream = PackedStream(
        encoder(parts.train),
        seed=config.seed,
        accumulation=config.accumulation,
        rank=rank,
        world=world,
        lookahead=config.lookahead,
        shuffle=config.shuffle,
        patch_cost=patch_cost(processor.config),
    )
    held = None if heldout is None else encoder(heldout)
    for part in (stream.encoder, held):
        if part is not None:
            for index in range(len(part.dataset.sets)):
                part.size(Key(index, 0))
    return Data(stream, held, quarantine, tuple(one.name for one in parts.train.sets))


def patch_cost(config: ErnieConfig) -> float:
    """Operations that an image takes for each of its patches, those of its tokens apart, over those of a text token."""
    if config.vision is None:
        return 0.0
    text, side = 512, 32  # a conversation and an image of usual size: the scores of attention grow with both
    tokens = text + side * side // 4
    plain = sum(forward_flops(config, lengths=(text,), learned=0).values())
    both = sum(forward_flops(config, lengths=(tokens,), grids=((1, side, side),), learned=0).values())
    return (both - plain * tokens / text) / (side * side) / (plain / text)


def ahead(stream: PackedStream, prefetch: int) -> PackedStream | BackgroundStream:
    """The stream, packed by a thread `prefetch` updates before its batches are needed. Start after loading a state."""
    return BackgroundStream(stream, depth=prefetch) if prefetch else stream
