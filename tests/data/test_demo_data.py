"""Somebody else's real data: the demo sets of LLaMA-Factory, in a folder named by ERNIE_DEMO_DATA."""

import json
import os
from pathlib import Path

import pytest

from data import formats
from data.batch import Role
from data.conversation import Conversation, Learns, Message, Pair, Part, Source
from data.dataset import SetSpec, open_set
from data.encoder import Encoder
from data.fit import Rules
from data.formats import messages
from data.loader import PackedStream, eval_batches
from data.order import Key
from data.quarantine import Quarantine
from data.records import Record, write_jsonl

FOLDER = Path(os.environ.get("ERNIE_DEMO_DATA", ""))
pytestmark = pytest.mark.skipif(
    not (FOLDER / "v1_multimodal_demo.jsonl").exists(), reason="ERNIE_DEMO_DATA names no folder with the demo sets"
)


@pytest.fixture
def root(tmp_path):
    """Its paths begin with data/, the folder's name in the project it comes from."""
    (tmp_path / "data").mkdir()
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        target = tmp_path / "data" / "mllm_demo_data" / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes((FOLDER / "mllm_demo_data" / name).read_bytes())
    return tmp_path


def test_photographs_in_conversations(root, real_processor):
    dataset = open_set("photos", SetSpec(path=str(FOLDER / "v1_multimodal_demo.jsonl"), media_root=str(root))).train
    encoder = Encoder(dataset, real_processor, Rules(max_tokens=2048))

    rows = list(eval_batches(encoder))

    assert sum(row.num_segments for row in rows) == len(dataset) == 24
    assert sum(len(row.grids) for row in rows) >= 24
    for index in range(len(dataset)):
        example = encoder.example(Key(0, index))
        said = real_processor.decode(example.target_T[example.weight_T != 0])
        answers = [message.text for message in dataset[index].messages if message.role == "assistant"]
        # Every turn follows an empty thought, which is the prompt's and not learned.
        assert said == "".join(f"{answer}<|end_of_sentence|>" for answer in answers)


def test_five_hundred_conversations_of_text(real_processor):
    dataset = open_set("text", SetSpec(path=str(FOLDER / "v1_sft_demo.jsonl")), eval_fraction=0.1).train
    stream = PackedStream(Encoder(dataset, real_processor, Rules(max_tokens=4096)), seed=0)
    while stream.report.epoch < 1:
        for row in stream.next_step():
            assert row.weight_T.any() and row.patch_PX is None

    assert stream.report.fill > 0.97


KINDS = {
    "alpaca_en_demo.json": ("alpaca", 999, 0),
    "dpo_en_demo.json": ("sharegpt", 300, 300),
    "glaive_toolcall_en_demo.json": ("sharegpt", 300, 0),
    "kto_en_demo.json": ("messages", 300, 0),
    "mllm_demo.json": ("messages", 6, 0),
    "mllm_video_demo.json": ("messages", 3, 0),
    "reason_tool_use_demo_50.jsonl": ("messages", 50, 0),
    "v1_dpo_demo.jsonl": ("preference", 10, 10),
    "v1_multimodal_demo.jsonl": ("messages", 24, 0),
    "v1_sft_demo.jsonl": ("messages", 500, 0),
}
"""Format, records, and how many of them are pairs."""


@pytest.mark.parametrize("name", KINDS)
def test_every_file_is_recognised_read_and_written(name):
    text = (FOLDER / name).read_text("utf-8")
    values = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.split("\n") if line]
    items = []
    for number, value in enumerate(values, start=1):
        record = Record(value, Source(name, number))
        known = formats.recognise(record)
        assert known.name == KINDS[name][0]
        items.append(known.read(record))
        written = Record(json.loads(json.dumps(messages.write(items[-1]))), record.source)
        assert formats.recognise(written).read(written) == items[-1]

    assert (len(items), sum(isinstance(item, Pair) for item in items)) == KINDS[name][1:]


@pytest.mark.parametrize(
    "name, learns, usable",
    [
        ("dpo_en_demo.json", Learns.PAIRS, 298),  # two are longer than 8,192 tokens
        ("v1_dpo_demo.jsonl", Learns.PAIRS, 10),
        ("kto_en_demo.json", Learns.LABELLED, 297),
    ],
)
def test_preferences_become_rows(name, learns, usable, real_processor):
    dataset = open_set(name, SetSpec(path=str(FOLDER / name)), learns=learns).train
    rules = Rules(max_tokens=8192, learns=learns, mismatched=learns is Learns.LABELLED)
    encoder = Encoder(dataset, real_processor, rules, quarantine=Quarantine(max_bad=0.05, num_records=len(dataset)))

    rows = [row for row in eval_batches(encoder) if row]

    assert len({id for row in rows for id in row.ids}) == usable
    for row in rows:
        written = row.weight_T.split(row.lengths)
        for role, weight_T in zip(row.roles, written, strict=True):
            assert weight_T.any() == (role is not Role.PROMPT)


def test_a_video_clip(real_processor, tmp_path):
    (tmp_path / "clip.mp4").write_bytes((FOLDER / "mllm_demo_data" / "1.mp4").read_bytes())
    user = Message(role="user", parts=(Part.of_video("clip.mp4"), Part.of_text("Why is this funny?")))
    record = Conversation(id="v", messages=(user, Message(role="assistant", parts=(Part.of_text("A baby reads."),))))
    dataset = open_set(
        "clips", SetSpec(path=str(write_jsonl(tmp_path / "train.jsonl", [messages.write(record)])))
    ).train

    (row,) = [row for row in eval_batches(Encoder(dataset, real_processor, Rules(max_tokens=32768))) if row]

    ((frames, height, width),) = row.grids
    assert frames >= 16 and frames % 2 == 0
    assert row.patch_PX is not None and row.patch_PX.shape == (frames * height * width, 588)
    assert frames * height * width // 8 < row.num_tokens <= frames * height * width // 8 + 64
