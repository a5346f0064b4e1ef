"""Where the batches of supervised fine-tuning come from: a dataset, encoded and packed, and its held-out part.

    config.data ──► Splits(train, heldout) ──► Encoder ──► PackedStream ──► next_step(): this rank's micro-batches

The work is in data/; this file turns settings into those parts.
"""

from typing import NamedTuple

from data import encoder as data_encoder
from data.conversation import Conversation
from data.dataset import Dataset, Splits, digits_dataset, jsonl_dataset
from data.encoder import Encoder
from data.loader import BackgroundStream, PackedStream
from ernie_model.processor import Processor
from train.config import DataConfig, DigitsData, JsonlData


class Data(NamedTuple):
    train: PackedStream
    heldout: Encoder | None


def open_splits(config: DataConfig) -> Splits:
    """Raises DataError: files missing or empty, settings that contradict each other."""
    if isinstance(config, DigitsData):
        return digits_dataset(config.seed)
    assert isinstance(config, JsonlData)
    return jsonl_dataset(
        config.path,
        eval_path=config.eval_path,
        eval_fraction=config.eval_fraction,
        media_root=config.media_root,
        seed=config.seed,
    )


class FirstOf:
    """The first `count` conversations of a dataset."""

    def __init__(self, dataset: Dataset, count: int):
        self.dataset, self.count = dataset, min(count, len(dataset))
        self.media, self.name = dataset.media, dataset.name

    @property
    def fingerprint(self) -> str:
        return f"{self.dataset.fingerprint}[:{self.count}]"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Conversation:
        return self.dataset[index]


def build_data(config: DataConfig, processor: Processor, *, rank: int, world: int, max_heldout: int = 0) -> Data:
    """Open both parts and encode the first record of each, so that settings which fit no record fail at once.

    Raises:
        DataError, MediaError: what is wrong with which file or record.
    """
    splits = open_splits(config)
    heldout = splits.heldout
    if heldout is not None and max_heldout:
        heldout = FirstOf(heldout, max_heldout)

    def encoder(dataset: Dataset) -> Encoder:
        return Encoder(
            dataset,
            processor,
            max_tokens=config.max_tokens,
            max_patches=config.max_patches,
            too_long=data_encoder.TooLong(config.too_long.value),
            cache_bytes=int(config.cache_gib * 2**30),
            workers=config.workers,
        )

    stream = PackedStream(
        encoder(splits.train),
        seed=config.seed,
        accumulation=config.accumulation,
        rank=rank,
        world=world,
        lookahead=config.lookahead,
        shuffle=config.shuffle,
    )
    data = Data(stream, None if heldout is None else encoder(heldout))
    for part in (data.train.encoder, data.heldout):
        if part is not None:
            part.size(0)
    return data


def ahead(stream: PackedStream, prefetch: int) -> PackedStream | BackgroundStream:
    """The stream, packed by a thread `prefetch` updates before its batches are needed. Start after loading a state."""
    return BackgroundStream(stream, depth=prefetch) if prefetch else stream
