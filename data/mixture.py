"""Mixtures: several datasets that are trained on as one.

    sets                    records   weight        mix=sample: by weight        mix=concat: all of them
      photos   image           900      3           A A B A ...                  A B A A ...
      chats    text          5,000      1           an epoch ends with the       an epoch is 5,900 records
                                                    first (or last) set's

`sample` draws each record from a set chosen by weight, with `weight` the share of *records*, whatever the sizes; a set
that has been gone through starts over in a new order, and no set is ever cut short: `stop` only says what counts as
one epoch. `concat` shows every record once per epoch. Everything is a function of (seed, number of the draw); see
data/order.py.

A single dataset is a mixture of one.
"""

import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from data.conversation import Conversation, Item, Learns, Pair, PartKind
from data.dataset import TRIES, Dataset, SetSpec, StreamDataset, open_set
from data.errors import DataError
from data.media import MediaFolder
from data.order import BlockOrder, ConcatOrder, Key, MixedOrder, Order, SampledOrder, ShuffledOrder


class Mix(Enum):
    """How a mixture is drawn from."""

    SAMPLE = "sample"
    CONCAT = "concat"


class Stop(Enum):
    """When an epoch of a sampled mixture is over."""

    FIRST = "first"
    LAST = "last"


class Modality(Enum):
    """What a dataset is of; where it holds several, the richest."""

    TEXT = "text"
    IMAGE = "image"
    VIDEO = "video"


@dataclass(frozen=True)
class MixtureSet:
    """One of the datasets."""

    name: str
    """As the settings call it; batches carry it (`PackedBatch.datasets`)."""
    dataset: Dataset | StreamDataset
    weight: float = 1.0
    modality: Modality | None = None
    """None: that of its first record."""


class Parts(NamedTuple):
    """What is trained on, and what is kept for evaluation."""

    train: "Mixture"
    heldout: "Mixture | None"


class Mixture:
    """Conversations by `Key`.

    `modality_ratio` scales the weights so that all sets of a modality together are drawn in that proportion.
    """

    def __init__(
        self,
        sets: Sequence[MixtureSet],
        *,
        mix: Mix = Mix.SAMPLE,
        stop: Stop = Stop.FIRST,
        modality_ratio: Mapping[Modality, float] | None = None,
    ):
        if not sets:
            raise DataError("a mixture needs at least one dataset.")
        streams = [one.name for one in sets if isinstance(one.dataset, StreamDataset)]
        if mix is Mix.CONCAT and streams and len(sets) > 1:
            raise DataError(
                f"data.mix is concat, but {', '.join(streams)} is streaming and has no length, so the sets cannot be "
                "shuffled together. Use data.mix=sample, or streaming: false."
            )
        self.sets = list(sets)
        self.mix, self.stop = mix, stop
        self.weights = _weights(self.sets, modality_ratio)

    @staticmethod
    def of(dataset: "Dataset | StreamDataset | Mixture") -> "Mixture":
        """A dataset as a mixture of one, under its own name."""
        if isinstance(dataset, Mixture):
            return dataset
        return Mixture([MixtureSet(dataset.name, dataset)])

    @property
    def name(self) -> str:
        """What messages to the user call it."""
        return " + ".join(one.name for one in self.sets)

    @property
    def fingerprint(self) -> str:
        """Differs between mixtures that draw other records; checked on resume."""
        digest = hashlib.blake2b(f"{self.mix} {self.stop}".encode(), digest_size=16)
        for one, weight in zip(self.sets, self.weights, strict=True):
            digest.update(f"{self._salt(one)} {weight!r} {one.dataset.fingerprint} ".encode())
        return digest.hexdigest()

    @property
    def num_records(self) -> int | None:
        """Of all sets together; None when one of them is a stream."""
        if self.streaming:
            return None
        return sum(len(one.dataset) for one in self.sets if not isinstance(one.dataset, StreamDataset))

    @property
    def streaming(self) -> bool:
        return any(isinstance(one.dataset, StreamDataset) for one in self.sets)

    def __len__(self) -> int:
        if (count := self.num_records) is None:
            raise DataError(f"{self.name} is a stream, which has no length. Set data.streaming=false.")
        return count

    def __getitem__(self, key: Key) -> Conversation | Pair:
        return self.sets[key.set].dataset[key.number]

    def media(self, key: Key) -> MediaFolder:
        return self.sets[key.set].dataset.media

    def keys(self) -> Iterator[Key]:
        """Every record once, set after set."""
        for index, one in enumerate(self.sets):
            if isinstance(one.dataset, StreamDataset):
                raise DataError(f"{one.name} is a stream, which has no end to wait for. Set data.streaming=false.")
            yield from (Key(index, number) for number in range(len(one.dataset)))

    def order(self, *, seed: int, shuffle: bool = True) -> MixedOrder:
        """The order of draws, from its beginning."""
        if self.mix is Mix.CONCAT and not self.streaming:
            return ConcatOrder([len(one.dataset) for one in self.sets], seed=seed, shuffle=shuffle)  # type: ignore[arg-type]
        orders = [_order(one.dataset, seed, shuffle, self._salt(one)) for one in self.sets]
        return SampledOrder(orders, self.weights, seed=seed, until_all=self.stop is Stop.LAST)

    def _salt(self, one: MixtureSet) -> int:
        """By name, so that a set keeps its order when another is added before it; alone it needs none."""
        return zlib.crc32(one.name.encode()) if len(self.sets) > 1 else 0


def _order(dataset: Dataset | StreamDataset, seed: int, shuffle: bool, salt: int) -> Order:
    if isinstance(dataset, StreamDataset):
        return BlockOrder(dataset.block_length, size=dataset.block_size, seed=seed, shuffle=shuffle, salt=salt)
    return ShuffledOrder(len(dataset), seed=seed, shuffle=shuffle, salt=salt)


def _weights(sets: Sequence[MixtureSet], ratio: Mapping[Modality, float] | None) -> list[float]:
    """Shares of the draws; they add up to 1."""
    weights = [one.weight for one in sets]
    if ratio is not None:
        groups = [one.modality or first_modality(one) for one in sets]
        for modality in Modality:
            members = [index for index, group in enumerate(groups) if group is modality]
            if members and modality not in ratio:
                raise DataError(
                    f"data.modality_ratio says nothing of {modality.value}, and {sets[members[0]].name} holds it. Add "
                    f"{modality.value}: with 0 to leave such sets out."
                )
            if not members and ratio.get(modality):
                raise DataError(
                    f"data.modality_ratio asks for {ratio[modality]:g} parts of {modality.value}, and no set holds it. "
                    f"Remove {modality.value} from the ratio, or declare a set's `modality`."
                )
            total = sum(weights[index] for index in members)
            for index in members:
                weights[index] *= ratio[modality] / total if total else 0.0
    if not sum(weights) > 0:
        raise DataError("every weight of the mixture is 0, so nothing would be drawn. Raise one.")
    return [weight / sum(weights) for weight in weights]


def first_modality(one: MixtureSet) -> Modality:
    """Of the first record that can be read."""
    for number in range(TRIES):
        try:
            return modality_of(one.dataset[number])
        except DataError:
            continue
        except IndexError:
            break
    raise DataError(
        f"none of the first records of {one.name} can be read, so its modality is not known. Declare it: `modality: "
        "text`, image or video."
    )


def modality_of(item: Item) -> Modality:
    kinds = {part.kind for part in item.parts}
    if PartKind.VIDEO in kinds:
        return Modality.VIDEO
    return Modality.IMAGE if PartKind.IMAGE in kinds else Modality.TEXT


# ------------------------------------------------------------------------------------------------- from a description


@dataclass(frozen=True, kw_only=True)
class Share:
    """A dataset's place in a mixture."""

    spec: SetSpec
    weight: float = 1.0
    modality: Modality | None = None


def open_mixture(
    shares: Mapping[str, Share],
    *,
    mix: Mix = Mix.SAMPLE,
    stop: Stop = Stop.FIRST,
    modality_ratio: Mapping[Modality, float] | None = None,
    eval_set: SetSpec | None = None,
    eval_fraction: float = 0.0,
    seed: int = 0,
    block_size: int = 1024,
    learns: Learns = Learns.CONVERSATIONS,
) -> Parts:
    """Open every set by name.

    Held out is `eval_set`; or else a share of every set, and the held-out parts that tasks bring. Raises DataError for
    files that are missing or empty and for settings that contradict each other.
    """
    if eval_set is not None and eval_fraction:
        raise DataError(
            f"both data.eval_path ({eval_set.path}) and data.eval_fraction ({eval_fraction}) are set. Keep one."
        )
    if not 0 <= eval_fraction < 1:
        raise DataError(f"data.eval_fraction is {eval_fraction}; it must be at least 0 and less than 1, e.g. 0.1.")
    for name, share in shares.items():
        if eval_set is not None and _same_file(eval_set.path, share.spec.path):
            raise DataError(
                f"data.eval_path and the path of {name} are the same file ({share.spec.path}): accuracy would be "
                "measured on what was trained. Use data.eval_fraction to hold out a part of it."
            )
    splits = {
        name: open_set(name, share.spec, eval_fraction=eval_fraction, seed=seed, block_size=block_size, learns=learns)
        for name, share in shares.items()
    }
    sets = [MixtureSet(name, splits[name].train, share.weight, share.modality) for name, share in shares.items()]
    train = Mixture(sets, mix=mix, stop=stop, modality_ratio=modality_ratio)
    if eval_set is not None:
        opened = open_set("held out", replace(eval_set, streaming=False), learns=learns)
        held = [MixtureSet("held out", opened.train)]
    else:
        held = [MixtureSet(name, split.heldout) for name, split in splits.items() if split.heldout is not None]
    return Parts(train, Mixture(held, mix=Mix.CONCAT) if held else None)


def _same_file(first: str | None, second: str | None) -> bool:
    return first is not None and second is not None and Path(first).resolve() == Path(second).resolve()
