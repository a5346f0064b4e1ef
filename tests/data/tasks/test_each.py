"""What is particular to a task: the picture shows what the answer says."""

import asyncio
import io
import json
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.conversation import Conversation
from data.encode import encode
from data.tasks import (
    cards,
    charts,
    circuits,
    counting,
    digits,
    documents,
    glance,
    grounding,
    locate,
    places,
    search,
    video,
    zoom,
)
from data.tasks.base import drawn
from data.tasks.drawing import COLOURS
from ernie_model.images import ImageSettings, pictures
from ernie_model.inference.image_index import Embedder, ImageIndex, image_search_tool, make_index
from ernie_model.inference.tools import ToolBox, ToolContext, zoom_tool
from ernie_model.model import ErnieModel
from ernie_model.processor import Processor
from ernie_model.video import decode_frames, probe
from tests.tiny import tiny_processor

pytest.importorskip("sklearn.datasets")


def some(module, count: int = 40, split="heldout") -> list[Conversation]:
    return drawn(module.TASK.name, {split: count}, module.draw)(split, 0)


def picture(one: Conversation, message: int = 0, part: int = 0) -> Image.Image:
    media = one.messages[message].parts[part].media
    assert isinstance(media, bytes)
    return Image.open(io.BytesIO(media)).convert("RGB")


def nearly(image: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    return (np.abs(np.asarray(image, dtype=int) - colour) < 12).all(-1)


def test_a_box_of_grounding_holds_its_thing_and_nothing_less():
    checked = 0
    for one in some(grounding):
        found = json.loads(one.answer or "")
        image = picture(one)
        paper = max(image.getcolors(20000) or [])[1]
        drawn_on = (np.abs(np.asarray(image, dtype=int) - paper) > 20).any(-1)
        for box in found:
            left, top, right, bottom = (round(value * grounding.SIDE / 1000) for value in box["bbox_2d"])
            inside = drawn_on[top:bottom, left:right]
            if one.extra["domain"] == "digit":
                assert inside.mean() > 0.1
                continue
            assert inside[:2].any() and inside[-2:].any() and inside[:, :2].any() and inside[:, -2:].any()
            of_its_colour = nearly(image, COLOURS[box["label"].split()[0]])[top:bottom, left:right]
            assert of_its_colour.mean() > 0.2  # a star fills a third of its box
            checked += 1
        assert found == sorted(found, key=lambda box: box["bbox_2d"])
    assert checked > 20


def test_counting_counts_what_is_drawn():
    """Areas of one colour: the shapes of a scene lie in different cells, so each cell has one or none."""
    for one in some(counting):
        image = picture(one)
        cells = [
            (x * counting.CELL, y * counting.CELL, (x + 1) * counting.CELL, (y + 1) * counting.CELL)
            for x in range(counting.CELLS)
            for y in range(counting.CELLS)
        ]
        domain, question = one.extra["domain"], one.messages[0].text
        colours = [name for name in COLOURS if domain == "all" or name in question]
        if domain == "kind":
            continue
        count = sum(any(nearly(image.crop(cell), COLOURS[name]).sum() > 30 for name in colours) for cell in cells)
        assert str(count) == one.answer


def test_a_chart_shows_the_numbers_and_a_day_has_one_quietest_hour():
    for one in some(charts, 12):
        image = picture(one)
        assert image.size == (charts.WIDTH, charts.HEIGHT)
        assert (np.asarray(image) < 80).all(-1).sum() > 100  # letters and axes
    rng = np.random.default_rng(0)
    for _ in range(50):
        counts = sorted(charts._visitors(rng))
        assert counts[1] - counts[0] >= charts.GAP and counts[-1] - counts[-2] >= charts.GAP


def test_a_chart_does_not_depend_on_those_drawn_before():
    first, *_, last = some(charts, 6)
    again = some(charts, 6)[-1]
    assert again.messages[0].parts[0].media == last.messages[0].parts[0].media
    assert first.messages[0].parts[0].media == some(charts, 1)[0].messages[0].parts[0].media


def watched(monkeypatch, module, name: str) -> list[tuple]:
    """What a task hands to the function that draws its pictures."""
    seen, real = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **options: seen.append((*args, options)) or real(*args, **options))
    return seen


def test_documents_ask_for_two_fields_that_are_printed(monkeypatch):
    drawn_forms = watched(monkeypatch, documents, "_form")
    for one, (_, printed, *_) in zip(some(documents), drawn_forms, strict=True):
        asked_for = json.loads(one.answer or "")
        assert len(asked_for) == 2
        for key, value in asked_for.items():
            assert key in one.messages[0].text
            assert [shown for name, shown in printed if name in documents.FIELDS[key]] == [value]


def test_the_answer_of_a_chart_is_what_is_drawn(monkeypatch):
    drawn_charts = watched(monkeypatch, charts, "_chart")
    for one, (dates, visitors, _) in zip(some(charts), drawn_charts, strict=True):
        question = one.messages[0].text
        (day,) = [at for at, date in enumerate(dates) if len(dates) == 1 or f"{date:%A}" in question]
        if "How many" in question:
            hour = int(re.findall(r"(\d+):00", question)[0])
            assert one.answer == str(visitors[day][hour - charts.HOURS[0]])
        else:
            order = np.argsort(visitors[day])
            assert one.answer == f"{charts.HOURS[order[0 if 'quietest' in question else -1]]}:00"


def test_the_answer_of_a_circuit_is_that_of_the_drawn_network(monkeypatch):
    drawn_circuits = watched(monkeypatch, circuits, "_picture")
    for one, (network, *_) in zip(some(circuits), drawn_circuits, strict=True):
        ohms, volts = circuits.resistance(network), re.findall(r"(\d+) volts", one.messages[0].text)
        assert Fraction(one.answer or "") == (int(volts[0]) / ohms if volts else ohms)


def test_the_answer_of_counting_is_what_is_drawn(monkeypatch):
    scenes = watched(monkeypatch, counting, "show")
    for one, (scene, *_) in zip(some(counting), scenes, strict=True):
        names = [name for name in (*counting.ALL_KINDS, *counting.ALL_COLOURS) if name in one.messages[0].text]
        assert len(names) == (one.extra["domain"] != "all")
        assert one.answer == str(sum(set(names) <= {thing.kind, thing.colour} for thing in scene))


@pytest.mark.parametrize(
    ("network", "ohms"),
    [((5, 7), 12), (((6, 3),), 2), ((4, (6, 3)), 6), (((2, 3, 6),), 1), ((1, (1, 1)), Fraction(3, 2))],
)
def test_resistance(network, ohms):
    assert circuits.resistance(network) == ohms


@pytest.mark.parametrize(
    ("value", "text"), [(Fraction(4), "4"), (Fraction(3, 2), "1.5"), (Fraction(9, 4), "2.25"), (Fraction(1, 3), None)]
)
def test_answers_of_circuits_are_exact(value, text):
    assert circuits.exact(value) == text


def test_a_clip_shows_its_thing_from_start_to_end():
    for one in some(video, 8):
        stretch = json.loads(one.answer or "")
        part = one.messages[0].parts[0]
        assert isinstance(part.media, bytes) and part.sampling is not None and part.sampling.fps == 1
        clip = probe(part.media)
        assert (clip.num_frames, clip.fps) == (video.SECONDS * video.FPS, video.FPS)
        colour, kind = re.findall(r"(\w+) (circle|square|triangle)", one.messages[0].text)[0]
        shown = []
        for frame in decode_frames(part.media, range(clip.num_frames)):
            red, green, blue = COLOURS[colour]
            near = np.abs(np.asarray(frame, dtype=int) - (red, green, blue)).max(-1) < 60  # the codec blurs colours
            shown.append(int(near.sum()))
        visible = np.array(shown) > min(shown) + 60
        expected = [stretch["start"] * video.FPS <= number < stretch["end"] * video.FPS for number in range(len(shown))]
        assert visible.tolist() == expected, (kind, colour)


# ---------------------------------------------------------------------------------------------------------- with tools


def test_the_crop_of_a_trace_is_what_the_tool_returns():
    box = ToolBox([zoom_tool()])
    for one in some(zoom, 6):
        call = one.messages[1].tool_calls[0]
        context = ToolContext(images=(picture(one),), from_user=(True,))
        result = asyncio.run(box.run(call.name, dict(call.arguments), context))
        assert not result.error and len(result.parts) == 1
        assert result.images[0].tobytes() == picture(one, message=2).tobytes()
        assert one.tools == tuple(box.definitions())


def test_a_card_is_what_the_tool_cuts_out():
    scans = digits.scans("heldout", 0)
    item = zoom.draw(np.random.default_rng(3), "heldout", 0)
    rng = np.random.default_rng(3)
    chosen, ink = rng.integers(len(scans), size=9), rng.uniform(*zoom.INK, size=9).round(3)
    trace = item.render("x")
    place = zoom.PLACES.index(trace.messages[0].text.removeprefix("Which digit is ").rstrip("?"))
    read = cards.shown(scans[chosen[place]][0], ink[place])
    assert read.tobytes() == picture(trace, message=2).tobytes()


def test_a_glance_is_a_trace_without_its_tool():
    rng, same = np.random.default_rng(4), np.random.default_rng(4)
    one, trace = glance.draw(rng, "train", 0).render("x"), zoom.draw(same, "train", 0).render("x")
    assert one.messages[0] == trace.messages[0] and one.tools == trace.tools and len(one.messages) == 2
    assert not one.messages[1].tool_calls and one.messages[1].text == trace.messages[-1].text == one.answer


def test_all_of_a_digit_lies_in_its_box_and_nothing_else():
    for one in some(locate, 20):
        (found,) = json.loads(one.answer)
        left, top, right, bottom = (round(value * locate.SIDE / 1000) for value in found["bbox_2d"])
        page = np.asarray(picture(one).convert("L")).copy()
        assert page[top:bottom, left:right].max() > 200
        page[top:bottom, left:right] = 0
        assert not page.any()
        width, height = right - left, bottom - top
        assert abs(width - height) <= 1 and 26 <= width <= 48


def test_places_are_where_the_tool_is_asked_to_look():
    """The box is that of the traces for the same place, and what lies there is a card: darker than its tile."""
    traced = {}
    for one in some(zoom, 60):
        place = one.messages[0].text.removeprefix("Which digit is ").rstrip("?")
        traced[place] = one.messages[1].tool_calls[0].arguments["bbox_2d"]
    assert len(traced) == 9
    for one in some(places, 20):
        asked = next(place for place in traced if one.messages[0].text.endswith((f"{place}?", f"{place}.")))
        (found,) = json.loads(one.answer)
        assert found["bbox_2d"] == traced[asked]
        left, top, right, bottom = found["bbox_2d"]
        page = picture(one)
        inside, around = page.crop((left, top, right, bottom)), page.crop((left - 9, top - 9, right + 9, top))
        assert max(np.asarray(inside)[0, 0]) < min(np.asarray(around).min(axis=(0, 1)))


def test_the_digit_can_be_read_in_the_crop_and_not_in_the_picture_as_the_model_gets_it():
    """By nearest neighbours among the pictures of the training part: over 85 % right, and less than a third."""
    small = ImageSettings(min_pixels=3136, max_pixels=7056)
    looks: dict[str, dict[str, list[np.ndarray]]] = {"train": {}, "heldout": {}}
    answers: dict[str, list[str | None]] = {"train": [], "heldout": []}
    processor = tiny_processor()
    processor.image = small
    for split, count in (("train", 300), ("heldout", 80)):
        for one in some(zoom, count, split):
            example = encode(one, processor)
            assert example.grids == ((1, 6, 6), (1, 4, 4)) and example.patch_PX is not None
            whole = pictures(example.patch_PX[:36].numpy(), example.grids[0], small)[0]
            crop = pictures(example.patch_PX[36:].numpy(), example.grids[1], small)[0]
            # the card's surroundings, where a reader who knows the place would look
            left, top, *_ = one.messages[1].tool_calls[0].arguments["bbox_2d"]
            x, y = (round((at + zoom.CARD / 2) * 84 / 1000) for at in (left, top))
            near = np.asarray(whole.convert("L").crop((x - 3, y - 3, x + 3, y + 3)), dtype=float)
            read = np.asarray(crop.convert("L"), dtype=float)
            for name, look in (("whole", near - near.mean()), ("crop", read / read.max())):
                looks[split].setdefault(name, []).append(look.ravel())
            answers[split].append(one.answer)
    right = {
        name: nearest_share(looks["train"][name], answers["train"], seen, answers["heldout"])
        for name, seen in looks["heldout"].items()
    }
    assert right["crop"] > 0.85 and right["whole"] < 0.33, right


def nearest_share(known, labels, asked, expected) -> float:
    known, asked = np.stack(known), np.stack(asked)
    distances = ((asked[:, None] - known[None]) ** 2).sum(-1)
    return float(np.mean([labels[index] == right for index, right in zip(distances.argmin(1), expected, strict=True)]))


def test_no_name_of_the_catalogue_is_twice_and_none_is_in_both_splits():
    both = search.catalogue(0)
    names = [badge.name for split in both.values() for badge in split]
    looks = [badge.looks for split in both.values() for badge in split]
    assert len(set(names)) == len(set(looks)) == len(names) == 500
    shown = " ".join(part.text for one in search.conversations("train", 0) for m in one.messages for part in m.parts)
    assert not {badge.name for badge in both["heldout"]} & set(shown.split())  # nor among the results of a tool


def test_a_search_trace_reads_as_the_tool_writes_it(tmp_path: Path):
    """With the real tool, on an index of the tiny model: the same parts, and the right item first for nearly all."""
    torch.manual_seed(0)
    processor = tiny_processor()
    embedder = Embedder(ErnieModel(processor.config), Processor(processor.tokenizer, processor.config), 56 * 56)
    some_badges = search.catalogue(0)["heldout"][:25]
    for badge in some_badges:
        (tmp_path / f"{badge.name}.png").write_bytes(badge.picture())
        (tmp_path / f"{badge.name}.txt").write_text(badge.name)
    make_index(tmp_path, tmp_path / "index", embedder)
    tool = image_search_tool(ImageIndex.load(tmp_path / "index"), embedder, count=search.HITS)
    box, right = ToolBox([tool]), 0
    for one in search.conversations("heldout", 0)[:25]:
        context = ToolContext(images=(picture(one),), from_user=(True,))
        result = asyncio.run(box.run("image_search", {"img_idx": 0}, context))
        written, kinds = one.messages[2].parts, [isinstance(part, str) for part in result.parts]
        assert kinds == [part.media is None for part in written]
        line = re.compile(r"[1-3]\. [A-Z]\d\d \(likeness \d\.\d\d\)\n")
        assert all(line.fullmatch(part) for part in result.parts if isinstance(part, str))
        assert all(line.fullmatch(part.text) for part in written if part.media is None)
        assert one.tools == tuple(box.definitions())
        right += result.text.startswith(f"1. {one.answer} ")
        assert written[0].text.startswith(f"1. {one.answer} ")
    assert right >= 20, right


def test_the_catalogue_is_written_for_the_index(tmp_path: Path):
    assert search.TASK.write_index is not None
    search.TASK.write_index(tmp_path, 0)
    assert len(list(tmp_path.glob("*.png"))) == len(list(tmp_path.glob("*.txt"))) == 500
    badge = search.catalogue(0)["train"][7]
    assert (tmp_path / f"{badge.name}.txt").read_text().strip() == badge.name


def test_the_first_turn_of_a_trace_stands_behind_the_prompt_of_a_thought():
    for module in (zoom, search):
        one = search.conversations("heldout", 0)[0] if module is search else some(zoom, 1)[0]
        processor = tiny_processor()
        asked = processor.render(
            replace(one, messages=one.messages[:1]).to_chat(),
            tools=list(one.tools),
            thinking=True,
            add_generation_prompt=True,
        )
        assert processor.render(one.to_chat(), tools=list(one.tools), every_turn=True).startswith(asked)
