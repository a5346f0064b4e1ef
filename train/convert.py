"""`ernie convert`: anybody's records as records of another format.

ernie convert input=chats.json output=chats.jsonl to=messages                  ShareGPT, Alpaca, ...: recognised
ernie convert input=chats.jsonl output=kit/chats.jsonl to=erniekit media=copy  for ERNIEKit, with its images
ernie convert input=pairs.json output=sft.jsonl to=messages keep=wanted        the chosen answers, for `ernie sft`

Every record that cannot be converted is named, with its file and line; the exit code is then 1, and the output holds
the others. An output that exists is not overwritten.
"""

import os
import re
import sys
from pathlib import Path

from omegaconf import DictConfig

from data import formats
from data.convert import Converter, MediaCopy
from data.errors import DataError
from data.media import MediaFolder
from data.records import open_stream
from train.compose import to_typed
from train.config import (
    ConvertConfig,
    ConvertMedia,
    Keep,
    UserError,
)
from train.run import program

# Messages of data/ name settings as `ernie sft` calls them.
_SETTING = re.compile(r"\bdata\.(path|format|columns|media_root|split|subset|revision)\b")


@program("convert")
def main(cfg: DictConfig) -> None:
    config = to_typed(cfg, ConvertConfig)
    try:
        refused = convert(config)
    except DataError as error:
        raise UserError(in_own_words(str(error))) from error
    if refused:
        sys.exit(1)


def convert(config: ConvertConfig) -> int:
    """Write the output, say what was done, and return how many records were refused.

    Raises DataError for an input that cannot be opened, UserError for an output that exists.
    """
    output = Path(config.output)
    stream = open_stream(config.input, split=config.split, subset=config.subset, revision=config.revision)
    # The folder that `ernie sft` would look in for the same records.
    source = Path(config.input)
    folder = Path(config.media_root) if config.media_root else source if source.is_dir() else source.parent
    copied = output.parent / f"{output.stem}_media"
    _check_free(output)
    if config.media is ConvertMedia.copy:
        _check_free(copied)
    converter = Converter(
        to=formats.by_name(config.to),
        format=None if config.format is None else formats.by_name(config.format),
        columns=config.columns,
        keep_wanted=config.keep is Keep.wanted,
        media=MediaCopy(MediaFolder(folder), copied) if config.media is ConvertMedia.copy else None,
    )

    def refuse(reason: str) -> None:
        print(f"refused: {in_own_words(reason)}", file=sys.stderr, flush=True)

    partial = output.with_name(f".{output.name}.partial")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(converter.lines(stream, refuse))
        counts = converter.counts
        written = [f"{counts[kind]} {kind}" for kind in ("conversations", "prompts", "pairs") if counts[kind]]
        if written:
            os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    recognised = "" if config.format is not None else " (recognised)"
    if converter.format is not None:
        print(f"format    {converter.format.name}{recognised}")
    print(f"written   {f'{output}: ' if written else ''}{', '.join(written) or 'nothing'}")
    if counts["unwanted"]:
        print(f"left out  {counts['unwanted']} answers that are not wanted (keep=wanted)")
    if counts["noted"]:
        print(
            f"notes     {counts['noted']} records carry what ERNIEKit has no words for, under `ernie`; it ignores that"
        )
    if counts["refused"]:
        print(f"refused   {counts['refused']} records, each named above")
    if counts["paths"] and folder.resolve() != output.parent.resolve():
        print(f"media     {counts['paths']} paths are still relative to {folder}: use media=copy, or train with")
        print(f"          data.media_root={folder}")
    return counts["refused"]


def in_own_words(message: str) -> str:
    return _SETTING.sub(lambda match: {"path": "input"}.get(match[1], match[1]), message)


def _check_free(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists, and nothing is overwritten. Remove it, or give another output.")


if __name__ == "__main__":
    main()
