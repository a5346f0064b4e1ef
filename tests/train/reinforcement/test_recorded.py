"""An attempt as a line: every token with its kind, pictures once, and nothing that JSON or UTF-8 cannot hold."""

import json
import math

import torch
from PIL import Image

from data.conversation import Conversation, Message, Part
from data.tasks.drawing import png
from ernie_model.inference.agent import Status
from tests.train.reinforcement.asked import PROCESSOR, attempt, group, question
from train.reinforcement.recorded import Place, key_of, lines_of, pieces_of, store, to_line

PLACE = Place(rollout=2, step=5, domain="digits", kind="mixed")


def lines(*attempts, asked=None, folder=None, advantages=None):
    fates = ["learned"] * len(attempts)
    return list(lines_of(group(4, *attempts), asked or question(), PLACE, fates, advantages, PROCESSOR, folder))


def test_pieces_by_hand():
    one = attempt("7", 1.0, crop=Image.new("RGB", (20, 10), "red")).episode
    pieces = list(pieces_of(one, PROCESSOR, thinking=True))
    kinds = [piece["kind"] for piece in pieces]
    before, after = ["reasoning", "tool_call", "end"], ["result", "image", "result", "reasoning", "answer", "end"]
    assert kinds == [*before, *after]
    assert pieces[0]["texts"][-1] == "</think>" and pieces[1]["texts"][0] == "<tool_call>"
    assert pieces[4] == {"kind": "image", "count": 4, "number": 0}
    # Token by token, nothing lost and nothing twice.
    flat = [token for piece in pieces for token in piece.get("ids", [PROCESSOR.config.image_token_id] * 4)]
    assert flat == one.token_ids[one.num_prompt_tokens :]
    sampled = [("logprobs" in piece) for piece in pieces for _ in range(piece.get("count", len(piece.get("ids", []))))]
    assert sampled == one.sampled[one.num_prompt_tokens :]


def test_without_a_thought_all_is_the_answer():
    one = attempt("7", 1.0, thought="").episode
    kinds = {piece["kind"] for piece in pieces_of(one, PROCESSOR, thinking=False)}
    assert kinds == {"answer", "end"}


def test_a_line(tmp_path):
    crop = Image.new("RGB", (20, 10), "red")
    picture = Part.of_image(png(Image.new("RGB", (64, 48), "blue")))
    first = Message(role="user", parts=(picture, picture, Part.of_text("Which digit?")))
    made = attempt("7", 1.0, crop=crop)
    made.episode.images[:0] = [Image.new("RGB", (64, 48), "blue")] * 2
    asked = question()
    object.__setattr__(asked, "conversation", Conversation(id="q0", messages=(first,)))
    (line,) = lines(made, asked=asked, folder=tmp_path, advantages=[0.25])
    assert (line["rollout"], line["step"], line["group"], line["attempt"], line["id"]) == (2, 5, 4, 0, "set/q0")
    assert (line["reward"], line["advantage"], line["status"], line["fate"]) == (1.0, 0.25, "answered", "learned")
    assert line["question"] == "Which digit?" and line["expected"] == "7" and line["answer"] == "7"
    assert "<|begin_of_sentence|>" in line["prompt"]
    assert len(line["pictures"]) == 2 and len(set(line["pictures"])) == 1  # the same picture is stored once
    (call,) = line["calls"]
    assert call["name"] == "image_zoom_in_tool" and call["boxes"] == [[100, 200, 300, 400]] and not call["failed"]
    assert call["on"] == 1  # the tool cuts out of the last picture
    assert len(list((tmp_path / "rollouts").iterdir())) == 2
    with Image.open(tmp_path / call["pictures"][0]) as stored:
        assert stored.size == (20, 10)


def test_an_attempt_that_failed_before_it_began_is_a_line_too(tmp_path):
    from ernie_model.inference.agent import Episode
    from train.reinforcement.groups import Scored, Scores

    nothing = Scored(
        episode=Episode([], [], [], status=Status.FAILED, error="no such picture"),
        scores=Scores(parts={}, accuracy=None, total=None, problem="it failed"),
    )
    (line,) = lines(nothing, folder=tmp_path)
    assert line["error"] == "no such picture" and line["pieces"] == [] and line["key"] == "" and line["reward"] is None


def test_keys_are_those_of_a_segment():
    made = attempt("7", 1.0).episode
    segment_T = torch.tensor(made.token_ids)[made.num_prompt_tokens - 1 :]
    assert key_of(made.token_ids[made.num_prompt_tokens - 1 :]) == key_of(segment_T.tolist())
    assert key_of([1, 2]) != key_of([1, 3])


def test_a_line_holds_whatever_a_model_writes():
    line = to_line({"text": "half \ud83d a pair", "logprob": -math.inf, "gap": math.nan, "parts": {"a": [1.5, None]}})
    assert json.loads(line.encode("utf-8")) == {
        "text": "half ? a pair",
        "logprob": None,
        "gap": None,
        "parts": {"a": [1.5, None]},
    }


def test_large_pictures_are_stored_small(tmp_path):
    with Image.open(tmp_path / store(Image.new("RGB", (4000, 10)), tmp_path)) as stored:
        assert stored.size == (640, 2)
