"""Sets of pairs and of labelled answers, from files to packed rows."""

import dataclasses
import io
import json
import math

import pytest
import torch
from PIL import Image

from data.batch import Role
from data.cache import PixelCache
from data.conversation import Conversation, Judged, Learns, Message, Pair, Part
from data.corrupt import Corrupt, Corruption
from data.dataset import ListDataset, SetSpec, open_set
from data.encoder import Encoder
from data.errors import DataError, TooLongError
from data.fit import Rules, TooLong, encoded, fit
from data.loader import PackedStream, eval_batches
from data.media import MediaFolder
from data.mixture import Mixture, Modality, Share, modality_of, open_mixture
from data.order import Key
from data.prepare import check_record, measure, other_answer
from data.quarantine import Quarantine
from data.records import write_jsonl
from ernie_model import processor as processor_module
from ernie_model.images import pictures
from tests.ernie_model.test_video import smooth_clip

PAIRS = Rules(max_tokens=64, learns=Learns.PAIRS)
LABELS = Rules(max_tokens=64, learns=Learns.LABELLED)
NOWHERE = MediaFolder(None)


def say(role, text, **more):
    return Message(role=role, parts=(Part.of_text(text),), **more)


def pair(id, question, chosen, rejected, *before):
    prompt = Conversation(id=id, messages=(*before, say("user", question)))
    return Pair(prompt=prompt, chosen=(say("assistant", chosen),), rejected=(say("assistant", rejected),))


def pairs(*lengths):
    """Pair i takes that many tokens under `LetterProcessor`: u + question + 2 x (a + 1 letter + $)."""
    return ListDataset("pairs", [pair(str(i), "q" * (length - 7), "x", "y") for i, length in enumerate(lengths)])


def picture(width, height):
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, format="PNG")
    return file.getvalue()


def test_a_file_of_pairs_is_read_and_packed(tmp_path, processor):
    records = [{"id": str(i), "prompt": "q" * i, "chosen": "yes", "rejected": "no"} for i in range(1, 9)]
    path = write_jsonl(tmp_path / "pairs.jsonl", records)
    parts = open_mixture({"p": Share(spec=SetSpec(path=str(path)))}, eval_fraction=0.25, learns=Learns.PAIRS)
    stream = PackedStream(Encoder(parts.train, processor, PAIRS), seed=0)

    seen = []
    while stream.report.epoch < 1:
        for row in stream.next_step():
            assert row.num_tokens <= 64
            for record in set(row.records):
                roles = [role for role, of in zip(row.roles, row.records, strict=True) if of == record]
                assert roles == [Role.PROMPT, Role.CHOSEN, Role.REJECTED]  # a record is never divided
            seen += [id for id, role in zip(row.ids, row.roles, strict=True) if role is Role.PROMPT]
    heldout = [row for row in eval_batches(Encoder(parts.heldout, processor, PAIRS)) if row]
    asked = {id for row in heldout for id in row.ids}
    assert len(asked) == 2 and asked.isdisjoint(seen)
    assert set(seen) | asked == {str(i) for i in range(1, 9)}


def test_pairs_stay_together_on_ranks_and_after_a_kill(processor):
    def stream(rank=0, world=1, accumulation=2):
        encoder = Encoder(pairs(*range(8, 30)), processor, PAIRS)
        return PackedStream(encoder, seed=0, rank=rank, world=world, accumulation=accumulation, lookahead=4)

    def text(rows):
        return [(row.ids, row.roles, row.stems, row.token_T.tolist()) for row in rows]

    alone, ranks = stream(), [stream(rank, 2, 1) for rank in range(2)]
    for _ in range(3):
        rows = text(alone.next_step())
        assert {str(row) for row in text(ranks[0].next_step() + ranks[1].next_step())} == set(map(str, rows))
        for ids, roles, _, _ in rows:
            whole = (Role.PROMPT, Role.CHOSEN, Role.REJECTED)
            assert roles == whole * (len(ids) // 3) and ids[::3] == ids[1::3] == ids[2::3]
    again = stream()
    again.load_state_dict(json.loads(json.dumps(alone.state_dict())))
    assert text(again.next_step()) == text(alone.next_step())


def test_each_kind_is_for_its_own_training(tmp_path):
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]
    records = {
        Learns.CONVERSATIONS: {"messages": messages},
        Learns.PAIRS: {"prompt": "?", "chosen": "yes", "rejected": "no"},
        Learns.LABELLED: {"messages": messages, "label": False},
    }
    ways_out = {Learns.CONVERSATIONS: "ernie convert", Learns.PAIRS: "`chosen`", Learns.LABELLED: "`label`"}
    for kind, record in records.items():
        path = str(write_jsonl(tmp_path / f"{kind.value}.jsonl", [record]))
        for learns in Learns:
            dataset = open_set("set", SetSpec(path=path), learns=learns).train
            if learns is kind:
                assert modality_of(dataset[0]) is Modality.TEXT
            else:
                with pytest.raises(DataError, match=f"^record .*{learns.value}|^record .*{ways_out[learns]}"):
                    dataset[0]


@pytest.mark.parametrize("learns", [Learns.PAIRS, Learns.LABELLED])
def test_a_task_has_one_right_answer_to_each_question(learns):
    with pytest.raises(DataError, match="the task digits of it has one right answer .*`ernie pairs` makes a file"):
        open_set("it", SetSpec(task="digits"), learns=learns)


def test_the_beginning_of_a_prompt_is_dropped_for_both_answers(processor):
    before = (
        say("system", "s"),
        say("user", "1" * 9),
        say("assistant", "2" * 9),
        say("user", "3"),
        say("assistant", "4"),
    )
    long = pair("a", "?", "yes", "no", *before)
    rules = dataclasses.replace(PAIRS, max_tokens=20)
    with pytest.raises(TooLongError, match=r"of chosen, .* of rejected"):
        fit(long, processor, NOWHERE, rules)

    fitted = fit(long, processor, NOWHERE, dataclasses.replace(rules, too_long=TooLong.DROP_TURNS))

    assert fitted.is_changed and isinstance(fitted.item, Pair)
    assert "".join(map(chr, fitted.example.token_T.tolist())) == "ssu3a4$u?ayes$ano$"
    assert (fitted.item.chosen, fitted.item.rejected) == (long.chosen, long.rejected)


def test_an_answer_is_never_cut(processor):
    long = pair("a", "?", "y" * 60, "no")
    for policy in TooLong:
        with pytest.raises(
            TooLongError, match=r"record 'a': 68 tokens \(3 of the prompt, 61 of chosen, 3 of rejected\)"
        ):
            fit(long, processor, NOWHERE, dataclasses.replace(PAIRS, too_long=policy))


def test_pictures_are_shrunk_until_the_pair_fits(real_processor):
    prompt = Conversation(id="a", messages=(Message(role="user", parts=(Part.of_image(picture(560, 560)),)),))
    photo = Pair(prompt=prompt, chosen=(say("assistant", "red"),), rejected=(say("assistant", "blue"),))
    whole = fit(photo, real_processor, NOWHERE, dataclasses.replace(PAIRS, max_tokens=4096)).example.num_tokens
    rules = dataclasses.replace(PAIRS, max_tokens=whole - 100, too_long=TooLong.SHRINK_IMAGES, corruption=Corruption())
    assert whole > 400  # the picture once; with its corrupted copy it would be twice that

    fitted = fit(photo, real_processor, NOWHERE, rules)
    example = encoded(fitted.item, real_processor, NOWHERE, rules, fitted.max_image_pixels, pixels=True)

    assert whole / 2 < example.num_tokens == fitted.example.num_tokens <= whole - 100
    assert example.grids == fitted.example.grids and len(set(example.grids)) == 1 and len(example.grids) == 2
    assert len(example.patch_PX) == example.num_patches


def test_the_frames_of_a_video_are_decoded_once(tmp_path, monkeypatch, real_processor):
    smooth_clip(tmp_path / "a.mp4", range(0, 200, 10), key_every=20)
    user = Message(role="user", parts=(Part.of_video("a.mp4"), Part.of_text("?")))
    prompt = Conversation(id="a", messages=(user,))
    film = Pair(prompt=prompt, chosen=(say("assistant", "grey"),), rejected=(say("assistant", "red"),))
    rules = dataclasses.replace(PAIRS, max_tokens=16384, corruption=Corruption(keep_min=0.2))
    decoded = []
    original = processor_module.video_patches
    monkeypatch.setattr(processor_module, "video_patches", lambda *all: decoded.append(all) or original(*all))

    fitted = fit(film, real_processor, MediaFolder(tmp_path), rules)
    assert len(decoded) == 1 and not fitted.is_whole  # its corrupted frames are still to be made
    example = encoded(film, real_processor, MediaFolder(tmp_path), rules, None, pixels=True)

    assert len(decoded) == 2 and example.num_tokens == fitted.example.num_tokens
    (grid, other), size = example.grids, math.prod(example.grids[0])
    assert grid == other and len(example.patch_PX) == 2 * size
    frames, cropped = (
        pictures(patch_PX.numpy(), grid, real_processor.video) for patch_PX in example.patch_PX.split(size)
    )
    # A frame is of one grey but for the time in its corner, so a crop of it has the same grey somewhere below.
    below = [[frame.getpixel((frame.width - 1, frame.height - 1))[0] for frame in of] for of in (frames, cropped)]
    assert below[0] == below[1] and len(set(below[0])) > 8
    assert not torch.equal(*example.patch_PX.split(size))


# -- labelled answers -------------------------------------------------------------------------------------------------


def labelled(*texts, wrong=()):
    items = [
        Conversation(id=str(i), messages=(say("user", f"{i}?"), say("assistant", text)), label=i not in wrong)
        for i, text in enumerate(texts)
    ]
    return ListDataset("labelled", items)


def roles_of(example):
    return [role.value for role in example.roles]


def test_the_other_answer_is_the_next_records(processor):
    mixture = Mixture.of(labelled("a", "b", "c", wrong=(1,)))
    rules = dataclasses.replace(LABELS, mismatched=True)

    shown = []
    for key in mixture.keys():
        example = measure(mixture, key, processor, rules).example
        shown.append(["".join(map(chr, part.tolist())) for part in example.token_T.split(example.lengths)])
        assert roles_of(example) == ["prompt", "unwanted" if key.number == 1 else "wanted", "mismatched"]

    assert shown == [["u0?", "aa$", "ab$"], ["u1?", "ab$", "ac$"], ["u2?", "ac$", "aa$"]]
    assert roles_of(measure(mixture, Key(0, 0), processor, LABELS).example) == ["prompt", "wanted"]


def test_an_answer_is_all_that_follows_the_last_question(processor):
    turns = (say("user", "?"), say("assistant", "call"), say("tool", "7"), say("assistant", "ok"))
    judged = Judged(conversation=Conversation(id="a", messages=turns, label=True))

    example = encoded(judged, processor, NOWHERE, LABELS, None, pixels=True)

    assert "".join(map(chr, example.token_T.tolist())) == "u?acall$t7aok$"
    assert "".join(f"{weight:g}" for weight in example.weight_T.tolist()) == "00111110001110"


def test_records_that_cannot_stand_in_are_passed_over(tmp_path, processor):
    def asked(id, content, **more):
        return {
            "id": id,
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}],
            **more,
        }

    records = [
        asked("0", "plain", label=True),
        {"id": "broken", "messages": 7},
        asked("unlabelled", "x"),
        asked("3", "<think>hm</think>thought", label=True),
        asked("4", "plain too", label=False),
    ]
    path = str(write_jsonl(tmp_path / "a.jsonl", records))
    mixture = Mixture.of(open_set("a", SetSpec(path=path), learns=Learns.LABELLED).train)

    assert other_answer(mixture, Key(0, 0), mixture[Key(0, 0)])[0].text == "plain too"
    assert other_answer(mixture, Key(0, 4), mixture[Key(0, 4)])[0].text == "plain"
    checked = check_record(mixture, Key(0, 3), processor, dataclasses.replace(LABELS, mismatched=True))
    assert "none of the next 4 records has an answer that could be shown" in checked.refusal.reason
    assert "with a thought, as its own" in checked.refusal.reason


def test_a_set_without_another_record_is_refused(tmp_path, processor):
    rules = dataclasses.replace(LABELS, mismatched=True)
    with pytest.raises(DataError, match="labelled holds a single record.*=apo_zero_unpaired"):
        Encoder(labelled("a"), processor, rules)
    assert Encoder(labelled("a"), processor, LABELS).size(Key(0, 0))
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "?", "completion": "a", "label": True}]))
    stream = open_set("s", SetSpec(path=path, streaming=True), learns=Learns.LABELLED).train
    with pytest.raises(DataError, match="s is streaming, .*Use streaming: false, or a loss"):
        Encoder(stream, processor, rules)


# -- what must not be mixed up ----------------------------------------------------------------------------------------


def test_a_stream_of_other_rules_is_not_resumed(processor):
    corrupting = dataclasses.replace(PAIRS, corruption=Corruption())
    state = PackedStream(Encoder(pairs(9, 10, 11), processor, corrupting), seed=0).state_dict()
    json.dumps(state)
    PackedStream(Encoder(pairs(9, 10, 11), processor, corrupting), seed=0).load_state_dict(state)
    for rules in (PAIRS, dataclasses.replace(PAIRS, corruption=Corruption(kind=Corrupt.BLANK))):
        with pytest.raises(DataError, match="cannot resume: corrupted pictures was"):
            PackedStream(Encoder(pairs(9, 10, 11), processor, rules), seed=0).load_state_dict(state)


def test_a_state_from_before_there_were_pairs_is_resumed(sized, processor):
    stream = PackedStream(Encoder(sized(9, 10), processor, Rules(max_tokens=20)), seed=0)
    state = stream.state_dict()
    state["identity"] = {key: value for key, value in state["identity"].items() if key.startswith("data")}
    stream.load_state_dict(state)


def test_scores_tell_sets_apart(processor):
    one = pair("a", "?", "x", "y")
    plain, scored = (ListDataset("a", [dataclasses.replace(one, chosen_score=score)]) for score in (None, 1.0))
    assert plain.fingerprint != scored.fingerprint


def test_cached_pixels_are_those_of_the_corruption(tmp_path, real_processor):
    prompt = Conversation(id="a", messages=(Message(role="user", parts=(Part.of_image(picture(56, 56)),)),))
    photo = Pair(prompt=prompt, chosen=(say("assistant", "red"),), rejected=(say("assistant", "blue"),))
    alone = Conversation(id="a", messages=photo.conversations[0].messages)
    kinds = [
        (photo, PAIRS),
        (photo, dataclasses.replace(PAIRS, corruption=Corruption(kind=Corrupt.NOISE))),
        (photo, dataclasses.replace(PAIRS, corruption=Corruption(kind=Corrupt.BLANK))),
        (dataclasses.replace(photo, prompt=dataclasses.replace(prompt, id="b")),
         dataclasses.replace(PAIRS, corruption=Corruption(kind=Corrupt.NOISE))),
        (alone, Rules(max_tokens=64)),
    ]  # fmt: skip
    expected, found = [], []
    for again in range(2):
        for item, rules in kinds:
            fitted = fit(item, real_processor, NOWHERE, rules)
            made = encoded(item, real_processor, NOWHERE, rules, None, pixels=True)

            def make(made=made, again=again):
                assert not again, "the second time it is read"
                return made

            example = PixelCache(tmp_path, real_processor, rules.corruption).get(fitted, NOWHERE, make)
            assert example.lengths == made.lengths and torch.equal(example.token_T, made.token_T)
            expected.append(made.patch_PX)
            found.append(example.patch_PX)
    assert all(map(torch.equal, expected, found))
    assert len({patch_PX.numpy().tobytes() for patch_PX in expected[:4]}) == 4


def test_a_pair_without_pixels_left_is_quarantined_once(tmp_path, png, real_processor):
    (tmp_path / "half.png").write_bytes(png[: len(png) * 2 // 3])
    (tmp_path / "good.png").write_bytes(png)
    records = [
        {"id": name, "prompt": "<image>?", "images": [f"{name}.png"], "chosen": "yes", "rejected": "no"}
        for name in ("half", "good")
    ]
    path = str(write_jsonl(tmp_path / "a.jsonl", records))
    dataset = open_set("a", SetSpec(path=path), learns=Learns.PAIRS).train
    quarantine = Quarantine(max_bad=0.9, num_records=2)
    encoder = Encoder(dataset, real_processor, PAIRS, quarantine=quarantine)

    (row,) = [row for row in eval_batches(encoder) if row]
    assert set(row.ids) == {"good"} and len(row.ids) == 3
    assert len(quarantine) == 1 and not math.isnan(row.patch_PX.sum())
