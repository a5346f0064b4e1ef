"""When is something to be seen? Clips of eight seconds, as video files.

    User: Video 1:[8 s, 84 x 84 pixels: a green square throughout, a red circle from 2 to 5 s]When is the red circle
          visible?
    Assistant: {"start": 2, "end": 5}

Things appear and disappear at whole seconds and drift meanwhile. The question's clip is looked at once a second
(`VideoSampling.fps`), so the answer can be told exactly. `model.video_pixels` of configs/experiment/video.yaml keeps
frames at their size, which the family's processor would enlarge to 300 tokens.
"""

import io
import json
from fractions import Fraction

import numpy as np
from PIL import Image

from data.conversation import Conversation, Part, VideoSampling
from data.tasks.base import Item, Split, Task, asked, choice, drawn
from data.tasks.drawing import COLOURS, KINDS, Colour, Thing, free_box, paper, show

SIDE = 84
SECONDS = 8
FPS = 2
"""Of the file."""
SIZES = (22, 30)
DRIFT = 6
"""Pixels that a thing moves at most, each way, during the clip."""
STRETCHES = [(start, end) for end in range(1, SECONDS + 1) for start in range(end) if end - start < SECONDS]
"""Seconds: all but the whole clip."""
ALL_KINDS, ALL_COLOURS = KINDS[:3], tuple(COLOURS)[:3]


def draw(rng: np.random.Generator, split: Split, seed: int) -> Item:
    first = free_box(rng, (), side=SIDE - 2 * DRIFT, sizes=SIZES, gap=0)
    assert first is not None  # one finds room
    second = free_box(rng, (first,), side=SIDE - 2 * DRIFT, sizes=SIZES, gap=2 * DRIFT)
    if second is None:
        return draw(rng, split, seed)
    labels = [(colour, kind) for colour in ALL_COLOURS for kind in ALL_KINDS]
    target, other = (labels[int(index)] for index in rng.permutation(len(labels))[:2])
    start, end = choice(rng, STRETCHES)
    drift = rng.integers(-DRIFT, DRIFT + 1, size=(2, 2)).tolist()
    background = paper(rng)
    label = " ".join(target)
    question = choice(rng, (f"When is the {label} visible?", f"From when to when can the {label} be seen?"))
    things = [Thing(target[1], target[0], first), Thing(other[1], other[0], second)]
    domain = "from the start" if start == 0 else "to the end" if end == SECONDS else "between"

    def render(id: str) -> Conversation:
        frames = [
            _frame(things if start * FPS <= number < end * FPS else things[1:], drift, number, background)
            for number in range(SECONDS * FPS)
        ]
        clip = Part.of_video(encode_clip(frames, FPS), VideoSampling(fps=1.0))
        return asked(
            id,
            (clip, Part.of_text(question)),
            json.dumps({"start": start, "end": end}),
            reward="temporal_iou",
            domain=domain,
        )

    return Item(f"{things} {drift} {start} {end} {background}", render)


def _frame(things: list[Thing], drift: list[list[int]], number: int, background: Colour) -> Image.Image:
    done = number / (SECONDS * FPS - 1)
    moved = []
    for thing, (right, down) in zip(things, drift[-len(things) :], strict=True):
        x, y = (DRIFT + by * (2 * done - 1) for by in (right, down))
        left, top, far, bottom = thing.box
        moved.append(Thing(thing.kind, thing.colour, (left + x, top + y, far + x, bottom + y)))
    return show(moved, SIDE, background)


def encode_clip(frames: list[Image.Image], fps: int) -> bytes:
    """An MP4 file; the same bytes for the same frames."""
    import av  # takes a moment to import, so only when a clip is made

    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("mpeg4", rate=fps, options={"qscale": "2", "threads": "1"})
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, fps)
        stream.codec_context.qmin = 1
        stream.codec_context.qmax = 3
        stream.codec_context.bit_rate = 1_000_000
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_image(frame)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file.getvalue()


TASK = Task(
    name="video",
    description="when something is visible in a clip, as JSON in seconds",
    conversations=drawn("video", {"train": 800, "heldout": 150}, draw),
    max_new_tokens=32,
)
