"""Whatever the layout, a server gets the weights of the whole model, and every rank is answered."""

import json

import pytest
import torch

from ernie_model.inference.engine import Engine
from ernie_model.model import ErnieModel
from tests.distributed.gloo import launch
from tests.distributed.pushed import CASES, PARAMS, prompt, start_model
from tests.tiny import SPARSE, tiny_processor
from tests.train.reinforcement.fake_vllm import FakeVLLM


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """Folder of what the ranks were told, and the model of the server after each push."""
    folder, models = tmp_path_factory.mktemp("pushed"), []
    torch.manual_seed(9)
    with FakeVLLM(ErnieModel(SPARSE).eval(), tiny_processor(SPARSE)) as server:
        server.on_request = lambda path: models.append(server.state.model) if path == "/resume" else None
        launch(2, "-m", "tests.distributed.pushed", str(folder), server.url)
    return folder, dict(zip(CASES, models, strict=True))


@pytest.mark.parametrize("case", CASES, ids=" of ".join)
def test_a_layout_pushes_the_whole_model(pushed, case):
    folder, models = pushed
    ranks = json.loads((folder / f"{' '.join(case)}.json").read_text())
    mine, theirs = start_model().state_dict(), models[case].state_dict()
    # A new adapter adds nothing; what it is merged from is there all the same.
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    engine = Engine(start_model().eval(), tiny_processor(SPARSE).tokenizer)
    for rank, (ids, versions, metrics) in enumerate(ranks):
        (own,) = engine.generate([prompt(rank)], PARAMS)
        assert tuple(ids) == own.token_ids and set(versions) == {6}
        assert metrics["vllm_servers"] == 1
    assert ranks[0][2]["vllm_parity_max"] < 1e-4


def test_what_rank_0_is_refused_every_rank_hears(pushed):
    folder, _ = pushed
    assert "http://127.0.0.1:9, which cannot be reached" in (folder / "refused.txt").read_text()
