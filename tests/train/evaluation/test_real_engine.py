"""With the real engine: what decoding finds is what teacher forcing says, whatever is asked beside it."""

import asyncio

import pytest
import torch
from rich.console import Console

from data.encode import encode
from data.pack import collate
from ernie_model.inference.async_engine import AsyncEngine
from ernie_model.inference.engine import EngineSettings
from ernie_model.model import ErnieModel
from tests.tiny import tiny_processor
from train.compose import plain
from train.evaluation.asking import read_answers
from train.evaluation.evaluation import agents_of, evaluate
from train.evaluation.likelihood import likelihoods
from train.evaluation.questions import open_tasks
from train.heldout import exact
from train.inference_config import EvaluationConfig, SamplingConfig
from train.policy import Policy, on_device
from train.served import Served, open_engine


@pytest.fixture(scope="module")
def half_taught(tmp_path_factory) -> tuple[Served, str]:
    """A model that knows some of a file's twelve answers, and the file."""
    path = tmp_path_factory.mktemp("questions") / "sums.jsonl"
    path.write_text(
        "".join(
            f'{{"id": "q{a}", "prompt": "{a} * 3 = ?", "answer": "{a * 3}", "reward": "exact"}}\n' for a in range(12)
        )
    )
    processor = tiny_processor()
    torch.manual_seed(0)
    policy = Policy(ErnieModel(processor.config))
    (task,) = open_tasks(EvaluationConfig(checkpoint="x", tasks=[str(path)]))
    batch, row_R = on_device(
        collate([encode(one.target, processor) for one in task.questions]), policy.model.head_VD.device
    )
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for _ in range(300):
        output = policy(batch, row_R)
        if 4 <= int(exact(output.correct_T, batch).sum()) <= 8:
            break
        optimizer.zero_grad()
        (-(output.logprob_T * batch.weight_T).sum()).backward()
        optimizer.step()
    else:
        raise AssertionError("the model never knew some and not others: choose another learning rate")
    policy.model.requires_grad_(False).eval()
    return Served(policy.model, processor), str(path)


def ask(half_taught, output, **settings):
    served, path = half_taught
    settings.setdefault("sampling", SamplingConfig(max_new_tokens=8, temperature=0.0))
    config = EvaluationConfig(checkpoint="x", tasks=[path], output=str(output), **settings)
    tasks = open_tasks(config)
    engine = AsyncEngine(open_engine(config, served))
    try:
        agents = agents_of(config, tasks, served, engine)
        return evaluate(config, plain(config), tasks, served, agents, Console(quiet=True), {}), tasks
    finally:
        asyncio.run(engine.close(drain=False))


def test_greedy_decoding_is_right_exactly_where_teacher_forcing_says_so(half_taught, tmp_path):
    results, tasks = ask(half_taught, tmp_path / "out")
    served, _ = half_taught
    forced = likelihoods(served.model, served.processor, tasks[0].questions, max_tokens=64)
    scores = [answer.score for answer in read_answers(tmp_path / "out" / "answers.jsonl")]
    assert scores == [float(one.exact) for one in forced]
    one = results["tasks"]["sums"]
    assert one["score"]["mean"] == one["likelihood"]["exact"] and 4 <= sum(scores) <= 8


def test_sampled_answers_depend_on_the_seed_and_on_nothing_beside_them(half_taught, tmp_path):
    sampling = SamplingConfig(max_new_tokens=8, temperature=1.0)

    def texts(name: str, **settings) -> dict[tuple[str, int], str]:
        ask(half_taught, tmp_path / name, sampling=sampling, attempts=3, likelihood=False, **settings)
        return {(one.id, one.attempt): one.text for one in read_answers(tmp_path / name / "answers.jsonl")}

    whole = texts("a")
    assert texts("b", concurrency=1) == whole
    small = EngineSettings(max_running=2, step_tokens=32, share_prefixes=False)
    assert texts("c", concurrency=5, engine=small) == whole
    some = texts("d", limit=4)
    assert some == {key: whole[key] for key in some} and len(some) == 12
    assert texts("e", seed=1) != whole
    assert len(set(whole.values())) > 6
