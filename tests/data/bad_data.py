"""What becomes of bad data, as a table:  python -m tests.data.bad_data  writes docs/bad_data.md

Every case is a record in a real file, with its media beside it, and goes the way of training: read, format, media,
encode (`check_record`). So the page tells what the code says; tests/data/test_bad_data.py compares the two. What
libraries say of their own accord is left out, as it changes with them.
"""

import base64
import io
import json
import re
import sys
import tempfile
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from data.conversation import Learns, PartKind
from data.dataset import SetSpec, open_set
from data.fit import Rules
from data.mixture import Mixture
from data.order import Key
from data.prepare import check_record, measure
from ernie_model.processor import Processor
from ernie_model.video import Clip
from tests.ernie_model.test_images import png_that_claims
from tests.ernie_model.test_video import repeated, smooth_clip
from tests.tiny import tiny_processor

PAGE = Path(__file__).resolve().parents[2] / "docs" / "bad_data.md"


@dataclass(frozen=True)
class Case:
    """One row of the table. `make` writes what it needs into a folder and returns the line of the record."""

    name: str
    make: Callable[[Path], bytes]
    accepted: str = ""
    """How it is understood, if it is no error after all."""
    shows: Callable[[Any], bool] | None = None
    """Does the opened picture show that? Of a video: what `MediaFolder.video_size` says of it; of a text: its tokens,
    decoded."""
    fetch: bool = False
    rules: Rules = Rules(max_tokens=200_000)
    format: str = "messages"


def line(id: str, content: Any, answer: Any = "yes", **more: Any) -> bytes:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer, **more}]
    return json.dumps({"id": id, "messages": messages}).encode()


def with_image(path: str) -> bytes:
    return line("bad", [{"type": "image", "image": path}, {"type": "text", "text": "What?"}])


def with_video(path: str, **more: Any) -> bytes:
    return line("bad", [{"type": "video", "video": path, **more}, {"type": "text", "text": "What?"}])


def file(name: str, content: bytes, folder: Path) -> bytes:
    (folder / name).write_bytes(content)
    return with_image(name)


def picture(name: str, image: Image.Image, folder: Path, **options: Any) -> bytes:
    image.save(folder / name, **options)
    return with_image(name)


def encoded(image: Image.Image, format: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format)
    return stream.getvalue()


def noise(width: int = 64, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


JPEG = encoded(noise(), "JPEG")


def link(folder: Path) -> bytes:
    (folder.parent / "outside.png").write_bytes(encoded(noise(), "PNG"))
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    return with_image("link.png")


def turned(folder: Path) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture("turned.jpg", noise(64, 32), folder, exif=exif)


def animation(folder: Path) -> bytes:
    red, blue = Image.new("RGB", (40, 40), "red"), Image.new("RGB", (40, 40), "blue")
    return picture("moving.gif", red, folder, save_all=True, append_images=[blue])


def sixteen_bits(folder: Path) -> bytes:
    return picture("deep.png", Image.fromarray(np.full((40, 40), 0x8012, dtype=np.uint16)), folder)


def clip(name: str, folder: Path) -> Path:
    return smooth_clip(folder / name, range(0, 200, 10), key_every=20)


def video(name: str, change: Callable[[bytes], bytes], folder: Path) -> bytes:
    path = clip(name, folder)
    path.write_bytes(change(path.read_bytes()))
    return with_video(name)


def frameless(folder: Path) -> bytes:
    with av.open(str(folder / "frameless.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()
    return with_video("frameless.mp4")


def lying_header(content: bytes) -> bytes:
    """The movie's and the track's duration, a thousand times too long."""
    changed = bytearray(content)
    for box, offset in ((b"mvhd", 4 + 16), (b"tkhd", 4 + 20)):
        at = content.index(box) + offset
        changed[at : at + 4] = (int.from_bytes(content[at : at + 4], "big") * 1000).to_bytes(4, "big")
    assert bytes(changed) != content
    return bytes(changed)


def three_hours(folder: Path) -> bytes:
    repeated(folder / "long.mp4", clip("part.mp4", folder), times=3 * 3600 // 20, rate=1)
    return with_video("long.mp4", num_frames=16)


def sound(folder: Path) -> bytes:
    with wave.open(str(folder / "sound.mp4"), "wb") as target:
        target.setnchannels(1)
        target.setsampwidth(2)
        target.setframerate(8000)
        target.writeframes(bytes(1600))
    return with_video("sound.mp4")


def fixed(raw: bytes, folder: Path) -> bytes:
    return raw


def of_record(**record: Any) -> Callable[[Path], bytes]:
    return partial(fixed, json.dumps({"id": "bad", **record}).encode())


MARKERS = "<|IMAGE_PLACEHOLDER|><|end_of_sentence|><image>"
USER = {"role": "user", "content": "What?"}

CASES = (
    Case("a line that is not UTF-8", partial(fixed, b'{"id": "\xe4"}')),
    Case("a line of broken JSON", partial(fixed, b'{"id": "bad", "messages": [')),
    Case("a line that is no object", partial(fixed, b"17")),
    Case(
        "half a surrogate pair", partial(fixed, b'{"id": "bad", "messages": [{"role": "user", "content": "\\ud83d"}]}')
    ),
    Case("no messages", of_record(text="hello")),
    Case("a key with a typo", of_record(messages=[USER, {"role": "assistant", "contents": "yes"}])),
    Case("nothing is trained", partial(fixed, line("bad", "What?", train=False))),
    Case("fewer images than markers", of_record(messages=[{**USER, "content": "<image><image>"}], images=["a.png"])),
    Case(
        "placeholders and special tokens in a text",
        partial(fixed, line("bad", MARKERS)),
        "as text, never as the token of that name",
        lambda text: MARKERS in text and text.count("<|end_of_sentence|>") == 2,  # the text's, and the answer's end
    ),
    Case("truncated JPEG", partial(file, "half.jpg", JPEG[: len(JPEG) // 2])),
    Case("corrupt PNG", partial(file, "corrupt.png", encoded(noise(), "PNG")[:300] + bytes(40))),
    Case("0 bytes", partial(file, "empty.png", b"")),
    Case("no image at all", partial(file, "text.png", b"this is no picture")),
    Case("PostScript called .png", partial(file, "page.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")),
    Case("decompression bomb", partial(file, "bomb.png", png_that_claims(9_000, 9_000))),
    Case("a larger one", partial(file, "bomb2.png", png_that_claims(100_000, 100_000))),
    Case(
        "wrong extension",
        partial(file, "jpeg.png", JPEG),
        "by its content: a JPEG",
        lambda image: image.size == (64, 64),
    ),
    Case(
        "CMYK",
        lambda folder: picture("cmyk.jpg", Image.new("CMYK", (40, 40), (0, 255, 255, 0)), folder),
        "converted to RGB",
        lambda image: image.getpixel((0, 0))[0] > 200 > 50 > image.getpixel((0, 0))[1],
    ),
    Case("16 bits", sixteen_bits, "the upper 8 bits", lambda image: image.getpixel((0, 0)) == (128, 128, 128)),
    Case(
        "palette",
        lambda folder: picture("palette.png", Image.new("RGB", (40, 40), "lime").quantize(4), folder),
        "its colours",
        lambda image: image.getpixel((0, 0)) == (0, 255, 0),
    ),
    Case("turned by EXIF", turned, "upright, as in a viewer", lambda image: image.size == (32, 64)),
    Case("animated GIF", animation, "its first picture", lambda image: image.getpixel((0, 0)) == (255, 0, 0)),
    Case(
        "transparent",
        lambda folder: picture("clear.png", Image.new("RGBA", (40, 40), (0, 0, 0, 0)), folder),
        "on white",
        lambda image: image.getpixel((0, 0)) == (255, 255, 255),
    ),
    Case(
        "1 x 1",
        lambda folder: picture("dot.png", Image.new("RGB", (1, 1)), folder),
        "enlarged to 56 x 56, the smallest",
        lambda image: image.size == (1, 1),
    ),
    Case("longer than 200 times its width", lambda folder: picture("strip.png", Image.new("RGB", (2010, 10)), folder)),
    Case("no such file", partial(fixed, with_image("none.png"))),
    Case("an absolute path", partial(fixed, with_image("/etc/passwd"))),
    Case("a path with ..", partial(fixed, with_image("../outside.png"))),
    Case("a path with backslashes", partial(fixed, with_image("..\\outside.png"))),
    Case("a link that leads out", link),
    Case("file: address", partial(fixed, with_image("file:///etc/passwd"))),
    Case("https, not switched on", partial(fixed, with_image("https://example.org/a.png"))),
    Case("http, switched on", partial(fixed, with_image("http://example.org/a.png")), fetch=True),
    Case("https to this machine, switched on", partial(fixed, with_image("https://127.0.0.1/a.png")), fetch=True),
    Case("https to a private network", partial(fixed, with_image("https://192.168.0.1/a.png")), fetch=True),
    Case("https to a cloud's keys", partial(fixed, with_image("https://169.254.169.254/latest")), fetch=True),
    Case("https to IPv4 inside IPv6", partial(fixed, with_image("https://[::ffff:10.0.0.1]/a.png")), fetch=True),
    Case("data: URL, broken base64", partial(fixed, with_image("data:image/png;base64,@@@"))),
    Case("data: URL without base64", partial(fixed, with_image("data:image/png,abc"))),
    Case(
        "data: URL that is no image",
        partial(fixed, with_image("data:image/png;base64," + base64.b64encode(b"text").decode())),
    ),
    Case("video without frames", frameless),
    Case("truncated video", partial(video, "half.mp4", lambda content: content[: len(content) // 2])),
    Case("video that is only sound", sound),
    Case("video that is no video", lambda folder: file("text.mp4", b"no film", folder) and with_video("text.mp4")),
    Case(
        "wrong duration in the header",
        partial(video, "lying.mp4", lying_header),
        "its frames are counted, their times are right",
        lambda seen: seen == (Clip(20, 10.0), (64, 64)),
    ),
    Case(
        "three hours",
        three_hours,
        "frames are jumped to, not decoded on the way",
        lambda seen: seen == (Clip(10_800, 1.0), (64, 64)),
    ),
    Case("a stretch behind the end", lambda folder: clip("a.mp4", folder) and with_video("a.mp4", start_s=60)),
)

YES, NO = ({"role": "assistant", "content": text} for text in ("yes", "no"))
PAIR = dict(prompt="What?", chosen="yes", rejected="no")


def compare(name: str, max_tokens: int = 200_000, accepted: str = "", scored: bool = False, **record: Any) -> Case:
    rules = Rules(max_tokens=max_tokens, learns=Learns.PAIRS, scored=scored)
    return Case(name, of_record(**record), accepted, rules=rules, format="preference")


def judge(name: str, **record: Any) -> Case:
    rules = Rules(max_tokens=200_000, learns=Learns.LABELLED)
    return Case(name, of_record(**record), rules=rules, format="preference" if "chosen" in record else "messages")


LOOK = [{"role": "assistant", "content": "look"}, {"role": "tool", "content": "<image>"}, YES]
CASES += (
    compare("equal answers", **PAIR | {"rejected": "yes"}),
    compare("an answer is missing", prompt="What?", chosen="yes"),
    compare("an answer is null", **PAIR | {"rejected": None}),
    compare("an answer is empty", **PAIR | {"rejected": ""}),
    compare("no question", chosen=[YES], rejected=[NO]),
    compare("prompts that differ", chosen=[USER, YES], rejected=[{**USER, "content": "Who?"}, NO]),
    compare("a third prompt", prompt="Who?", chosen=[USER, YES], rejected=[USER, NO]),
    compare("an answer without its image", images=[], **PAIR | {"chosen": LOOK}),
    compare("one image too many for one of them", chosen=[USER, *LOOK], rejected=[USER, NO], images=["a.png"]),
    compare("an answer longer than a row", max_tokens=64, **PAIR | {"rejected": "no, " * 64}),
    compare("a thought on one side", **PAIR | {"chosen": "<think>Hm.</think>yes"}),
    compare("nothing of an answer is trained", **PAIR | {"rejected": [{**NO, "train": False}]}),
    compare("a score that is no number", score_chosen="high", **PAIR),
    compare("no score, where a loss asks for it", scored=True, **PAIR),
    compare("a score that says otherwise", scored=True, score_chosen=1, score_rejected=2, **PAIR),
    compare("a single answer", messages=[USER, YES]),
    compare("a labelled answer", messages=[USER, YES], label=True),
    compare("a question alone", messages=[USER]),
    judge("no label", messages=[USER, YES]),
    judge("a label that is neither true nor false", messages=[USER, YES], label="good"),
    judge("no answer", messages=[USER], label=True),
    judge("an answer that is empty", messages=[USER, {**YES, "content": ""}], label=False),
    judge("no user message", messages=[{**USER, "role": "assistant"}], label=True),
    judge("a pair", **PAIR),
)


def outcomes(root: Path) -> Iterator[tuple[Case, str | None, str]]:
    """(case, stage, reason) of each case; the stage is None where the record can be trained on."""
    processor = tiny_processor()
    for number, case in enumerate(CASES):
        folder = root / str(number)
        folder.mkdir(parents=True)
        (folder / "a.jsonl").write_bytes(case.make(folder) + b"\n")
        spec = SetSpec(path=str(folder / "a.jsonl"), format=case.format, fetch=case.fetch)
        mixture = Mixture.of(open_set("set", spec, learns=case.rules.learns).train)
        (key,) = mixture.keys()
        checked = check_record(mixture, key, processor, case.rules)
        if checked.refusal is None:
            if case.shows is not None:
                _check(case, mixture, key, processor)
            yield case, None, ""
        else:
            yield case, checked.refusal.stage.value, checked.refusal.reason.replace(str(folder), "FOLDER")


def _check(case: Case, mixture: Mixture, key: Key, processor: Processor) -> None:
    media, parts = mixture.media(key), mixture[key].parts
    part = next((part for part in parts if part.media is not None), parts[0])
    if part.media is None:
        token_T = measure(mixture, key, processor, case.rules).example.token_T
        assert processor.tokenizer.require("<|IMAGE_PLACEHOLDER|>") not in token_T.tolist()
        seen: Any = processor.decode(token_T)
    else:
        seen = media.open_image(part.media) if part.kind is PartKind.IMAGE else media.video_size(part.media)
    assert case.shows is not None and case.shows(seen), f"{case.name}: {seen}"


def tidy(reason: str, root: str) -> str:
    """Without what changes from machine to machine: folders, and what libraries say in brackets."""
    reason = reason.replace(root, "...")
    reason = re.sub(r"\s*\(In record 'bad' \([^)]*\)\.\)", "", reason)
    return re.sub(
        r"\((?:\w+(?:Error|Exception|Warning)\w*|Expecting|Invalid|Unterminated)\b.*?\)(?=[.:])", "(...)", reason
    )


def page() -> str:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve() / "run"
        rows: dict[Learns, list[str]] = {learns: [] for learns in Learns}
        for case, stage, reason in outcomes(root):
            text = f"*trained:* {case.accepted}" if stage is None else tidy(reason, str(root.parent))
            assert (stage is None) == bool(case.accepted), f"{case.name}: {stage} {reason}"
            rows[case.rules.learns].append(f"| {case.name} | {stage or ''} | {text} |".replace("<", "&lt;"))
    return HEAD + "".join(HEADING[learns] + TABLE + "\n".join(lines) + "\n" for learns, lines in rows.items())


HEAD = """# Bad data

What becomes of a record that is not as it should be. One that is refused goes to `quarantine.jsonl` with its stage and
this message; the others go on (docs/data.md). The messages are the code's own: `python -m tests.data.bad_data` writes
this page, and a test fails when it is out of date. `(...)` stands for what a library adds.
"""
HEADING = {
    Learns.CONVERSATIONS: "",
    Learns.PAIRS: "\n## Pairs\n\nAll of the above, in the question and in both answers; and in `ernie dpo`:\n",
    Learns.LABELLED: "\n## Labelled answers\n\nIn `ernie dpo` with a loss that learns from labels:\n",
}
TABLE = "\n| case | refused at | message |\n|---|---|---|\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(PAGE.read_text(encoding="utf-8"))
