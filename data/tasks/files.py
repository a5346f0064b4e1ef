"""A task as files, to look at or to start from: what `data=files` reads, and gives the same training.

folder/train.jsonl     {"id", "messages": [{"role": "user", "content": [{"type": "image", "image": "media/..."}]}]}
folder/heldout.jsonl
folder/media/          every picture and clip once
"""

from dataclasses import replace
from pathlib import Path

from data.conversation import Conversation, Message, Part, PartKind
from data.formats import messages
from data.media import file_ending, save_media
from data.records import write_jsonl as write_records
from data.tasks.base import SPLITS, Task


def write_jsonl(task: Task, folder: str | Path, seed: int = 0) -> dict[str, Path]:
    """Returns the paths of the two JSONL files by split."""
    folder = Path(folder)
    return {
        split: write_records(
            folder / f"{split}.jsonl",
            [messages.write(_on_disk(one, folder)) for one in task.conversations(split, seed)],
        )
        for split in SPLITS
    }


def _on_disk(conversation: Conversation, folder: Path) -> Conversation:
    """With paths in the place of bytes."""
    count = 0

    def saved(part: Part) -> Part:
        nonlocal count
        if not isinstance(part.media, bytes):
            return part
        ending = file_ending(part.media)
        path = save_media(folder, f"media/{conversation.id}{f'-{count}' if count else ''}{ending}", part.media)
        count += 1
        return Part.of_image(path) if part.kind is PartKind.IMAGE else Part.of_video(path, part.sampling)

    def on_disk(message: Message) -> Message:
        return replace(message, parts=tuple(saved(part) for part in message.parts))

    return replace(conversation, messages=tuple(on_disk(message) for message in conversation.messages))
