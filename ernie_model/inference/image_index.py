"""A folder of pictures that can be searched by picture: the memory behind `image_search`.

    picture ──► vision tower ──► mean of each quarter: where things are ──┐
                     └──► resampler ──► mean of all tokens: what they are ──┴──► length 1    one row of embedding_NF
    caption     NAME.txt, or "caption" of NAME.json beside NAME.png; else the file's name in words

    INDEX_FOLDER/
      index.json               model, size of pictures, and for each row: file, digest of its bytes, caption
      embedding.safetensors    embedding_NF float32, rows in the order of the file names

The model is the one that answers, so nothing else has to be loaded; the index says which vision tower and resampler
made it, and no other may search it. Equal likeness (to six decimals) is ordered by file name.

Shape letters:  N pictures   F numbers of an embedding   P patches   X numbers in a patch   M media tokens
                D model width   C vision width
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ernie_model.atomic import atomic_folder
from ernie_model.images import MediaError, image_patches, load_image
from ernie_model.inference.tools import Tool, ToolContext, ToolError, ToolResult, shrunk
from ernie_model.model import ErnieModel
from ernie_model.processor import Processor
from ernie_model.rope import Grid

FORMAT = 1
INDEX_FILE, EMBEDDING_FILE = "index.json", "embedding.safetensors"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_CAPTION = 1000
"""Characters."""
DECIMALS = 6


class ImageIndexError(ValueError):
    """An index that cannot be used."""


class Embedder:
    """Pictures as directions: near each other where the model sees alike.

    Args:
        max_pixels: larger pictures are shrunk to this area before the vision tower sees them.

    Raises:
        ValueError: a text model.
    """

    def __init__(self, model: ErnieModel, processor: Processor, max_pixels: int):
        if model.vision is None or model.resampler is None:
            raise ValueError(
                "a text model has no vision tower to embed pictures with. Use a vision-language checkpoint."
            )
        self.model, self.processor, self.max_pixels = model, processor, max_pixels

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> Tensor:
        """float32 (F,) on the CPU, of length 1. Depends on nothing but the picture and the weights.

        Raises:
            MediaError: a picture that is too long and thin.
        """
        patch_array_PX, grid = image_patches(shrunk(image, self.max_pixels), self.processor.image)
        like = self.model.norm.weight
        patch_PX = torch.from_numpy(patch_array_PX).to(like.device, self.model.activation_dtype)
        vision, resampler = self.model.vision, self.model.resampler
        assert vision is not None and resampler is not None
        seen_PC = vision(patch_PX, [grid])
        where = F.normalize(_quarters(seen_PC, grid), dim=0)
        what = F.normalize(resampler(seen_PC, [grid]).float().mean(0), dim=0)
        return F.normalize(torch.cat((where, what)), dim=0).cpu()

    @cached_property
    def model_name(self) -> str:
        """Digest of the weights that make embeddings. The same whether they are held in bfloat16 or float32."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.model.vision, self.model.resampler):
            assert part is not None
            for name, weight in sorted(part.state_dict().items()):
                digest.update(f"{name} {tuple(weight.shape)}".encode())
                digest.update(weight.detach().to("cpu", torch.bfloat16).flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _quarters(seen_PC: Tensor, grid: Grid) -> Tensor:
    """(4 C,) float32: the mean of each quarter of the picture."""
    _, rows, columns = grid
    # Patches come in merge-block order: four consecutive rows are one 2x2 block.
    block_CHW = seen_PC.float().unflatten(0, (rows // 2, columns // 2, 4)).mean(2).movedim(-1, 0)
    return F.adaptive_avg_pool2d(block_CHW, 2).flatten()


@dataclass(frozen=True)
class Entry:
    file: str
    """Relative to the folder of pictures."""
    digest: str
    """Of the file's bytes."""
    caption: str


@dataclass(frozen=True)
class Hit:
    file: str
    caption: str
    likeness: float
    """Cosine: 1 for the same picture."""


@dataclass(frozen=True)
class Report:
    """What making an index did, in file names."""

    computed: tuple[str, ...]
    kept: tuple[str, ...]
    """Found in the index that was there, by the digest of their bytes."""
    unreadable: tuple[tuple[str, str], ...]
    """Files that are left out, and what is wrong with each."""


class ImageIndex:
    """An index that was made: `ImageIndex.load`."""

    def __init__(self, folder: Path, model_name: str, max_pixels: int, entries: list[Entry], embedding_NF: Tensor):
        self.folder = folder
        """Of the pictures."""
        self.model_name, self.max_pixels = model_name, max_pixels
        self.entries, self.embedding_NF = entries, embedding_NF

    @classmethod
    def load(cls, path: str | Path) -> "ImageIndex":
        """Read the folder that `make_index` wrote.

        Raises:
            ImageIndexError: there is none, or it is damaged.
        """
        path = Path(path)
        if not (path / INDEX_FILE).is_file():
            raise ImageIndexError(f"{path} holds no {INDEX_FILE}. Make one: ernie index folder=PICTURES output={path}")
        try:
            raw = json.loads((path / INDEX_FILE).read_text("utf-8"))
            if raw["format"] != FORMAT:
                raise ValueError(f"format is {raw['format']}; this program writes {FORMAT}")
            entries = [Entry(**entry) for entry in raw["entries"]]
            embedding_NF = load_file(path / EMBEDDING_FILE)["embedding_NF"]
            if embedding_NF.ndim != 2 or len(embedding_NF) != len(entries):
                raise ValueError(f"{len(entries)} entries, and embeddings of shape {tuple(embedding_NF.shape)}")
            return cls((path / raw["folder"]).resolve(), raw["model"], raw["max_pixels"], entries, embedding_NF)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ImageIndexError(f"{path} cannot be read ({error}). Delete it and make it again.") from error

    def check(self, embedder: Embedder) -> None:
        """Raises ImageIndexError: another model made this index."""
        if self.model_name != embedder.model_name:
            raise ImageIndexError(
                f"the index of {self.folder} was made with another vision tower ({self.model_name[:8]}; this model's "
                f"is {embedder.model_name[:8]}), and likeness between the two means nothing. Run ernie index again."
            )

    def search(self, embedding_F: Tensor, count: int) -> list[Hit]:
        """The `count` nearest pictures, best first."""
        likeness_N = (self.embedding_NF.double() @ embedding_F.double()).tolist()
        scored = [(-round(value, DECIMALS), row) for row, value in enumerate(likeness_N)]
        return [
            Hit(self.entries[row].file, self.entries[row].caption, -value)  # rows are in the order of the names
            for value, row in sorted(scored)[:count]
        ]


def make_index(
    folder: str | Path,
    output: str | Path,
    embedder: Embedder,
    *,
    on_picture: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Write the index of all pictures under `folder`, subfolders included, hidden files and folders left out.

    Pictures that an index at `output` holds already, made by the same model at the same size, are not computed again:
    they are known by their bytes, wherever they lie now. Captions are read anew.

    Args:
        on_picture: called with how many are done, and how many there are.

    Raises:
        ImageIndexError: `folder` is no folder, or holds no picture that can be read; `output` holds other files.
        NotADirectoryError, OSError: `output` cannot be written.
    """
    folder, output = Path(folder), Path(output)
    if not folder.is_dir():
        raise ImageIndexError(f"folder={folder} is not a folder.")
    _refuse_others(output)
    known = _known(output, embedder)
    rows: list[Tensor] = []
    entries: list[Entry] = []
    computed: list[str] = []
    kept: list[str] = []
    unreadable: list[tuple[str, str]] = []
    files = list(_pictures(folder))
    for number, file in enumerate(files):
        on_picture(number, len(files))
        path = folder / file
        try:
            content = path.read_bytes()
            digest = hashlib.blake2b(content, digest_size=16).hexdigest()
            if digest in known:
                kept.append(file)
            else:
                known[digest] = embedder(load_image(content, file))
                computed.append(file)
        except (MediaError, OSError) as error:
            unreadable.append((file, error.problem if isinstance(error, MediaError) else str(error)))
            continue
        rows.append(known[digest])
        entries.append(Entry(file, digest, caption_of(path)))
    on_picture(len(files), len(files))
    if not rows:
        found = f"none of its {len(files)} pictures can be read" if files else f"no file ends in {', '.join(SUFFIXES)}"
        raise ImageIndexError(f"folder={folder}: {found}.")
    raw: dict[str, Any] = {
        "format": FORMAT,
        "model": embedder.model_name,
        "max_pixels": embedder.max_pixels,
        # Relative while one lies in the other, so that both can be moved together.
        "folder": _relative(folder.resolve(), output.resolve()),
        "entries": [asdict(entry) for entry in entries],
    }
    with atomic_folder(output, overwrite=True) as new:
        (new / INDEX_FILE).write_text(json.dumps(raw, indent=1, ensure_ascii=False) + "\n", "utf-8")
        save_file({"embedding_NF": torch.stack(rows)}, new / EMBEDDING_FILE)
    return Report(tuple(computed), tuple(kept), tuple(unreadable))


def _refuse_others(output: Path) -> None:
    """The folder is replaced as a whole: what else lies in it would be lost."""
    others = {path.name for path in output.iterdir()} - {INDEX_FILE, EMBEDDING_FILE} if output.is_dir() else set()
    if others:
        raise ImageIndexError(
            f"output={output} holds {min(others)!r}, which is no part of an index. Name a folder that is new, or holds "
            f"nothing but an index, such as {output / '.ernie_index'}."
        )


def _known(output: Path, embedder: Embedder) -> dict[str, Tensor]:
    """Digest -> embedding of what need not be computed again."""
    if not (output / INDEX_FILE).exists():
        return {}
    try:
        old = ImageIndex.load(output)
    except ImageIndexError:
        return {}
    if (old.model_name, old.max_pixels) != (embedder.model_name, embedder.max_pixels):
        return {}
    return {entry.digest: row for entry, row in zip(old.entries, old.embedding_NF, strict=True)}


def _pictures(folder: Path) -> Iterator[str]:
    """Relative names with forward slashes, in the order of their characters."""
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES]
    hidden = [any(part.startswith(".") for part in path.parts) for path in found]
    names = (path.as_posix() for path, left_out in zip(found, hidden, strict=True) if not left_out)
    return iter(sorted(name for name in names if (folder / name).is_file()))


def _relative(folder: Path, output: Path) -> str:
    try:
        return "/".join([".."] * len(output.relative_to(folder).parts)) or "."
    except ValueError:
        return str(folder)


def caption_of(picture: Path) -> str:
    """What the file beside it says: NAME.txt, or "caption" in NAME.json; else its own name, in words."""
    text = ""
    try:
        if (beside := picture.with_suffix(".txt")).is_file():
            text = beside.read_text("utf-8")
        elif (beside := picture.with_suffix(".json")).is_file():
            found = json.loads(beside.read_text("utf-8"))
            text = found.get("caption") if isinstance(found, dict) else ""
    except ValueError as error:  # not UTF-8, not JSON
        raise ImageIndexError(f"{beside} cannot be read as a caption ({error}). Put it right, or remove it.") from error
    text = " ".join(text.split()) if isinstance(text, str) else ""
    return text[:MAX_CAPTION] or " ".join(picture.stem.replace("_", " ").replace("-", " ").split()) or picture.stem


# ------------------------------------------------------------------------------------------------------------ the tool


def image_search_tool(index: ImageIndex, embedder: Embedder, *, count: int = 3) -> Tool:
    """`image_search(img_idx)`: the pictures of `index` most like one of the conversation.

    `img_idx` counts all pictures of the conversation, crops and earlier results included, from 0: "Picture 1" is 0.
    Each hit is one line of text, its caption and likeness, followed by the picture at the index's size.

    Raises:
        ImageIndexError: another model made the index.
    """
    index.check(embedder)

    def run(arguments: dict[str, Any], context: ToolContext) -> ToolResult:
        number, there = arguments["img_idx"], len(context.images)
        if not 0 <= number < there:
            raise ToolError(f"img_idx is {number}; the conversation has {there} images, counted from 0.")
        parts: list[str | Image.Image] = []
        for place, hit in enumerate(index.search(embedder(context.images[int(number)]), count), start=1):
            parts.append(f"{place}. {hit.caption} (likeness {hit.likeness:.2f})\n")
            try:
                parts.append(shrunk(load_image(index.folder / hit.file), index.max_pixels))
            except MediaError:
                parts.append("[the picture is gone]\n")
        return ToolResult(tuple(parts))

    return Tool(SEARCH["name"], SEARCH["description"], SEARCH["parameters"], run)


# Name and argument are the family's (reference 5.2); it publishes no texts for them.
SEARCH: dict[str, Any] = {
    "name": "image_search",
    "description": "Search for images that look like an image of the conversation. Returns similar images with their "
    "captions.",
    "parameters": {
        "type": "object",
        "properties": {
            "img_idx": {
                "type": "integer",
                "description": "Which image of the conversation to search with, counted from 0 in order of appearance.",
            }
        },
        "required": ["img_idx"],
    },
}
