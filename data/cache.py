"""Decoded pixels on disk, so that they need not be decoded again, in this run or another.

    data.cache_folder/3f/3f9c...e1      named by a hash of all that goes in: the content of the images and videos, the
                                        size each is to have, how some are corrupted, the processor's settings, VERSION

Tokens are not kept: they are made when a record is measured, which costs less than reading them. A file holds a
checksum and one tensor. It appears by one rename, so ranks may share a folder; a damaged one is removed and made again.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from data.batch import Role
from data.conversation import PartKind
from data.corrupt import Corruption
from data.encode import Example
from data.errors import DataError
from data.fit import Fitted
from data.media import MediaFolder
from ernie_model.images import MediaError
from ernie_model.processor import Processor

VERSION = 1
"""To be raised when the same pictures become other patches."""
CHECKSUM_BYTES = 16


class PixelCache:
    """Safe for threads and processes. Removes nothing but what is damaged: the folder is the user's to clear."""

    def __init__(self, folder: Path, processor: Processor, corruption: Corruption | None = None):
        self.folder = folder
        self._settings = repr((VERSION, processor.image, processor.video)).encode()
        self._corruption = corruption

    def get(self, fitted: Fitted, media: MediaFolder, make: Callable[[], Example]) -> Example:
        """The example of `fitted`, its pixels read, or made and written. Raises what `make` raises."""
        try:
            path = self._path(fitted, media)
        except MediaError:  # a file that is gone: say so as always
            return make()
        patch_PX = _read(path)
        if patch_PX is not None and len(patch_PX) == fitted.example.num_patches:
            return replace(fitted.example, patch_PX=patch_PX)
        example = make()
        if example.patch_PX is not None:
            _write(path, example.patch_PX)
        return example

    def _path(self, fitted: Fitted, media: MediaFolder) -> Path:
        digest = hashlib.blake2b(self._settings, digest_size=20)
        digest.update(json.dumps([fitted.example.grids, fitted.max_image_pixels]).encode())
        if Role.CORRUPTED in fitted.example.roles:
            digest.update(repr((self._corruption, fitted.example.id)).encode())
        for part in fitted.item.parts:
            if part.kind is PartKind.TEXT or part.media is None:
                continue
            file = media.file(part.kind, part.media)
            content = file if isinstance(file, bytes) else file.read_bytes()
            digest.update(f"{part.kind} {part.sampling} {len(content)} ".encode() + content)
        name = digest.hexdigest()
        return self.folder / name[:2] / name


def _read(path: Path) -> Tensor | None:
    """None where there is nothing, or nothing whole."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"data.cache_folder: {path} cannot be read ({error.strerror}).") from error
    checksum, body = content[:CHECKSUM_BYTES], content[CHECKSUM_BYTES:]
    if _checksum(body) == checksum:
        try:
            return load(body)["patch_PX"]
        except (SafetensorError, KeyError):  # whole, but written by another version
            pass
    path.unlink(missing_ok=True)
    return None


def _write(path: Path, patch_PX: Tensor) -> None:
    body = save({"patch_PX": patch_PX.contiguous()})
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(_checksum(body) + body)
            os.replace(temporary, path)  # no fsync: what a power cut damages is found by its checksum
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"data.cache_folder: {path.parent} cannot be written ({error.strerror}). Make room, choose another folder, "
            "or set data.cache_folder=null."
        ) from error


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=CHECKSUM_BYTES).digest()
