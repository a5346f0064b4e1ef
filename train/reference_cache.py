"""Log-probabilities of a reference on disk: computed before the first update, found again by a record's content.

    FOLDER/
      8f3a.../                      of one model: weights, architecture, dtype (model.json)
        5b0c....safetensors         numbers of some records; the file is called by the hash of its bytes
        all-77d1....json            every record of this data is here

    row    [ record 0          ][ record 1 ]      a record: all segments of a pair, its pictures
           hash ──► 4 numbers    hash ──► 7       one for each target that has a weight

A record's key is a hash of all that the model is given and asked for it: tokens, targets, which of them count,
positions, segments, grids, pixels. So nothing has to be known about data, processor or settings, whoever computed a
number may use it, and what has changed is not found. Numbers of other models lie in other folders and are never read.

Files appear whole, by one rename; one that is not what it is called is removed. What a killed run has written is not
computed again. Ranks share the folder: each computes the rows it would evaluate, and reads what all have written.

Shape letters:  T tokens   R targets that count   N records of a file   P patches   X numbers in a patch
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from data.batch import PackedBatch
from data.encoder import Encoder
from ernie_model.atomic import atomic_write
from ernie_model.config import ErnieConfig
from ernie_model.rope import num_media_tokens
from train.checkpoint import everyones, here
from train.config import UserError

VERSION = 1
"""To be raised when the same weights give other numbers."""
KEY_BYTES = 16


# -------------------------------------------------------------------------------------------------- records of a row


class Record(NamedTuple):
    """One record of a packed row."""

    id: str
    segments: slice
    tokens: slice
    grids: slice
    patches: slice
    row_R: Tensor
    """int64, where in the row its targets that count are predicted."""


def records_of(batch: PackedBatch, config: ErnieConfig) -> list[Record]:
    """The records of a row on the host, in order. Pictures belong to the record that has their placeholders."""
    counts = torch.isin(batch.token_T, torch.tensor(config.placeholder_token_ids, dtype=torch.int64))
    found: list[Record] = []
    token = grid = patch = 0
    for of in batch.record_segments:
        segments = slice(of.start, of.stop)
        tokens = slice(token, token + sum(batch.lengths[segments]))
        room, grids, patches = int(counts[tokens].sum()), grid, patch
        while room > 0:
            room -= num_media_tokens(batch.grids[grids])
            patches += _patches(batch.grids[grids])
            grids += 1
        row_R = batch.weight_T[tokens].nonzero()[:, 0] + tokens.start
        found.append(Record(batch.ids[of.start], segments, tokens, slice(grid, grids), slice(patch, patches), row_R))
        token, grid, patch = tokens.stop, grids, patches
    return found


def _patches(grid: tuple[int, int, int]) -> int:
    frames, rows, columns = grid
    return frames * rows * columns


def alone(batch: PackedBatch, record: Record) -> PackedBatch:
    """A row of this record only."""
    first = record.segments.start
    stems = tuple(stem if stem < 0 else stem - first for stem in batch.stems[record.segments])
    return PackedBatch(
        token_T=batch.token_T[record.tokens],
        target_T=batch.target_T[record.tokens],
        weight_T=batch.weight_T[record.tokens],
        position_3T=batch.position_3T[:, record.tokens],
        lengths=batch.lengths[record.segments],
        grids=batch.grids[record.grids],
        patch_PX=None if batch.patch_PX is None or not batch.grids[record.grids] else batch.patch_PX[record.patches],
        ids=batch.ids[record.segments],
        datasets=batch.datasets[record.segments],
        stems=stems,
        roles=batch.roles[record.segments],
        records=(0,) * (record.segments.stop - first),
        scores=batch.scores[record.segments],
    )


def key_of(batch: PackedBatch, record: Record) -> bytes:
    """Of everything that the record's log-probabilities depend on, the model apart."""
    one = alone(batch, record)
    stems = one.stems or (-1,) * one.num_segments
    shape = [one.lengths, stems, one.grids, None if one.patch_PX is None else str(one.patch_PX.dtype)]
    digest = xxhash.xxh3_128(json.dumps(shape).encode())
    for stream in (one.token_T, one.target_T, one.weight_T != 0, one.position_3T, one.patch_PX):
        if stream is not None:
            digest.update(stream.contiguous().numpy())  # pyright: ignore[reportArgumentType]
    return digest.digest()


# ------------------------------------------------------------------------------------------------------------ files


class Place(NamedTuple):
    file: int
    start: int
    stop: int


class Store:
    """The numbers of one model: those in `folder`, and those that wait to be written."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._places: dict[bytes, Place] = {}
        self._files: list[Any] = []
        self._new: dict[bytes, Tensor] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._places or key in self._new

    def __len__(self) -> int:
        return len(self._places) + len(self._new)

    def read(self, key: bytes) -> Tensor:
        """(R,)"""
        if key in self._new:
            return self._new[key]
        file, start, stop = self._places[key]
        return self._files[file].get_slice("logprob_R")[start:stop]

    def add(self, key: bytes, logprob_R: Tensor) -> None:
        self._new[key] = logprob_R

    @property
    def waiting_bytes(self) -> int:
        return sum(KEY_BYTES + value.nbytes for value in self._new.values())

    def write(self) -> None:
        """Everything that waits, as one file.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        if not self._new:
            return
        counts = [value.numel() for value in self._new.values()]
        tensors = {
            "key_N16": torch.frombuffer(bytearray(b"".join(self._new)), dtype=torch.uint8).view(-1, KEY_BYTES),
            "count_N": torch.tensor(counts, dtype=torch.int64),
            "logprob_R": torch.cat(list(self._new.values())),
        }
        content = save(tensors)
        atomic_write(self.folder / f"{xxhash.xxh3_128_hexdigest(content)}.safetensors", content)
        self._new = {}

    def open(self) -> None:
        """Read where everything lies that ranks have written. All open together, and see the same.

        Raises:
            UserError: a rank sees another folder.
        """
        rank, world = here()
        names = everyones(sorted(path.name for path in self.folder.glob("*.safetensors")))
        if any(found != names[0] for found in names):
            raise UserError(
                f"{self.folder} does not look alike to all ranks. reference.cache_folder must be on a disk that all "
                "machines share."
            )
        mine = [name for name in names[0][rank::world] if not self._whole(name)]
        damaged = {name for found in everyones(mine) for name in found}
        if rank == 0:
            for name in damaged:
                (self.folder / name).unlink(missing_ok=True)
        self._places, self._files = {}, []
        for name in sorted({*names[0]} - damaged):
            file = safe_open(self.folder / name, framework="pt")
            start, keys = 0, file.get_tensor("key_N16").numpy().tobytes()
            for index, count in enumerate(file.get_tensor("count_N").tolist()):
                key = keys[index * KEY_BYTES : (index + 1) * KEY_BYTES]
                self._places[key] = Place(len(self._files), start, start + count)
                start += count
            self._files.append(file)

    def _whole(self, name: str) -> bool:
        return xxhash.xxh3_128_hexdigest((self.folder / name).read_bytes()) == name.partition(".")[0]

    # -- what is complete --

    def has_all(self, data: str) -> bool:
        return (self.folder / f"all-{data}.json").exists()

    def note_all(self, data: str, about: dict[str, Any]) -> None:
        atomic_write(self.folder / f"all-{data}.json", json.dumps(about, indent=1) + "\n")

    def forget_all(self) -> None:
        for path in self.folder.glob("all-*.json"):
            path.unlink(missing_ok=True)


def data_key(encoder: Encoder) -> str:
    """Of the records of an encoder, without looking at them."""
    processor = encoder.processor
    parts = (encoder.dataset.fingerprint, len(encoder), encoder.rules, processor.image, processor.video)
    return xxhash.xxh3_128_hexdigest(repr(parts).encode())
