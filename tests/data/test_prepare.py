"""One look at one record, in any process."""

import json
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest

from data.conversation import Conversation, Message, Part
from data.dataset import SetSpec
from data.errors import RefusedError, Stage
from data.fit import Rules
from data.formats import messages
from data.mixture import Share, open_mixture
from data.order import Key
from data.prepare import check_record, measure


@pytest.fixture
def mixture(tmp_path, png, talk):
    """One good record, and one for each stage at which it may be refused."""
    (tmp_path / "good.png").write_bytes(png)
    (tmp_path / "half.png").write_bytes(png[: len(png) * 2 // 3])

    def asked(id, picture):
        user = Message(role="user", parts=(Part.of_image(picture), Part.of_text("?")))
        return Conversation(id=id, messages=(user, Message(role="assistant", parts=(Part.of_text("7"),))))

    lines = [json.dumps(messages.write(asked("good", "good.png")))]
    lines.append('{"id": "read", "messages": [')
    lines.append('{"id": "format", "messages": 7}')
    lines.append(json.dumps(messages.write(asked("media", "half.png"))))
    lines.append(json.dumps(messages.write(talk("encode", "q", "x", train=False))))
    lines.append(json.dumps(messages.write(talk("size", "q" * 2000, "x"))))
    path = tmp_path / "all.jsonl"
    path.write_text("\n".join(lines))
    return open_mixture({"all": Share(spec=SetSpec(path=str(path)))}).train


def test_every_stage_is_told(mixture, real_processor):
    """In processes of a pool, as a check of a whole dataset runs it."""
    rules = Rules(max_tokens=256)
    with ProcessPoolExecutor(1) as pool:
        futures = [pool.submit(check_record, mixture, key, real_processor, rules) for key in mixture.keys()]
        good, *bad = [future.result() for future in futures]

    assert good.refusal is None and good.id == "good"
    assert (good.images, good.videos, good.patches) == (1, 0, 16) and 0 < good.trained < good.tokens
    assert [checked.refusal.stage for checked in bad] == list(Stage)
    assert [checked.refusal.line for checked in bad] == [2, 3, 4, 5, 6]
    assert [checked.id for checked in bad[1:]] == ["format", "media", "encode", "size"]
    assert bad[0].id.endswith("all.jsonl:2")
    assert {checked.refusal.dataset for checked in bad} == {"all"}
    for checked, words in zip(
        bad,
        ["not readable as JSON", "messages is 7", "half.png", "no token is trained", "data.max_tokens=256"],
        strict=True,
    ):
        assert words in checked.refusal.reason


def test_without_pixels_a_header_is_believed(mixture, real_processor):
    assert check_record(mixture, Key(0, 3), real_processor, Rules(max_tokens=256), pixels=False).refusal is None


def test_a_refusal_survives_pickling(mixture, real_processor):
    with pytest.raises(RefusedError) as caught:
        measure(mixture, Key(0, 2), real_processor, Rules(max_tokens=256))
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.refusal, str(again)) == (caught.value.refusal, str(caught.value))
