"""How probable right answers are: against one forward pass each, and against what training measures."""

import math

import pytest
import torch
from accelerate import Accelerator

from data.dataset import SetSpec
from data.encoder import Encoder
from data.fit import Rules
from data.mixture import Share, open_mixture
from data.quarantine import Quarantine
from ernie_model.context import Packed
from train.evaluation.likelihood import likelihoods
from train.evaluation.questions import open_tasks
from train.evaluation.results import task_results, weights_hash
from train.heldout import measure
from train.inference_config import EvaluationConfig
from train.policy import Policy
from train.sources import SomeOf


def questions_of(*tasks: str, **settings):
    return open_tasks(EvaluationConfig(checkpoint="x", tasks=list(tasks), **settings))


def test_packed_rows_say_what_one_pass_for_each_question_says(served, sums):
    (task,) = questions_of(sums)
    found = likelihoods(served.model, served.processor, task.questions, max_tokens=100)
    for question, one in zip(task.questions[:4], found, strict=False):
        encoded = served.processor.encode(question.target.to_chat())
        length = len(served.processor.encode(question.asked.to_chat(), add_generation_prompt=True).token_T)
        hidden_TD = served.model(encoded.token_T, encoded.position_3T, Packed([len(encoded.token_T)])).hidden_TD
        logprob_TV = (hidden_TD @ served.model.head_VD.T).double().log_softmax(-1)
        written = encoded.token_T[length:]
        each = logprob_TV[length - 1 : -1].gather(1, written[:, None])[:, 0]
        # float32, logits of order 1, sums of 64 products; a handful of tokens
        assert one.logprob == pytest.approx(each.sum().item(), abs=1e-3) and one.num_tokens == len(written)
        assert one.exact == bool((logprob_TV[length - 1 : -1].argmax(-1) == written).all())
    result = task_results(task, [], found, attempts=1, pass_at=[], right_at=1.0, seed=0)["likelihood"]
    tokens = sum(one.num_tokens for one in found)
    assert result["perplexity"] == pytest.approx(math.exp(-sum(one.logprob for one in found) / tokens))
    assert result["questions"] == 12


def test_the_held_out_measure_of_training_is_the_same(served):
    """Digits with pictures, packed by training's own encoder."""
    parts = open_mixture({"digits": Share(spec=SetSpec(task="digits"))}, seed=0)
    encoder = Encoder(SomeOf(parts.heldout, 12), served.processor, Rules(max_tokens=256), quarantine=Quarantine(None))
    score = measure(Policy(served.model), encoder, Accelerator(cpu=True))
    (task,) = questions_of("digits", limit=12)
    found = likelihoods(served.model, served.processor, task.questions, max_tokens=256)
    assert sum(one.exact for one in found) == score.correct and len(found) == score.total
    nll = -sum(one.logprob for one in found) / sum(one.num_tokens for one in found)
    assert nll == pytest.approx(score.nll, rel=1e-5)


def test_a_question_without_an_answer_in_words_has_none(served, write):
    path = write([{"prompt": "a", "reward": "json_valid"}, {"prompt": "b", "answer": "1", "reward": "json_valid"}])
    (task,) = questions_of(path)
    first, second = likelihoods(served.model, served.processor, task.questions, max_tokens=100)
    assert first is None and second.num_tokens >= 2
    assert task_results(task, [], None, attempts=1, pass_at=[], right_at=1.0, seed=0)["likelihood"] is None


def test_the_hash_of_weights_sees_every_bit_and_every_name(served):
    first = weights_hash(served.model)
    assert weights_hash(served.model) == first
    weight = served.model.norm.weight
    before = weight[0].item()
    with torch.no_grad():
        weight[0] = torch.nextafter(weight[0], torch.tensor(2.0))
    assert weights_hash(served.model) != first
    with torch.no_grad():
        weight[0] = before
    assert weights_hash(served.model) == first
