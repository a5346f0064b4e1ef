"""Routing agreement: by hand, against an engine with other roundings, and what replaying its experts is worth."""

import copy
import dataclasses

import pytest
import torch

from ernie_model.inference.engine import Engine, EngineSettings
from ernie_model.inference.request import SamplingParams
from ernie_model.inference.sampling import Vocabulary, distribution_of
from ernie_model.model import ErnieModel
from tests.ernie_model.inference.test_engine import text, with_pictures
from tests.test_configs import load
from tests.tiny import SPARSE, tiny_processor
from tests.train import sampled, small
from train.config import UserError
from train.policy import Policy, on_device
from train.reinforcement.routing import RoutingAgreement, agreement

CPU = torch.device("cpu")
MANY = SPARSE.replace(num_hidden_layers=4, sparse_layers=(0, 1, 2, 3), num_experts=16)


def test_sums_by_hand():
    """Three tokens, two layers. The first agrees, in another order; the second differs in one layer; of the third
    nothing is known."""
    chosen_LTK = torch.tensor([[[0, 1], [2, 3], [0, 1]], [[1, 2], [0, 1], [0, 1]]])
    engine_TLK = torch.tensor([[[1, 0], [1, 2]], [[2, 1], [1, 0]], [[-1, -1], [-1, -1]]], dtype=torch.int16)
    member_GT = torch.tensor([[True, True, True], [False, True, False], [False, False, True]])
    assert agreement(chosen_LTK, engine_TLK, member_GT).tolist() == [[2, 1, 1, 2], [1, 1, 0, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize("replays", [False, True])
def test_what_an_update_reports(replays):
    """Two rows, one with an image: shares are of all tokens whose experts are known."""
    policy = small.policy()
    policy.replays = replays
    beside = RoutingAgreement(policy, small.CONFIG, CPU)
    rows = [small.row(small.example(0, 9, image=True), small.example(1, 7)), small.row(small.example(2, 11))]
    rows = [small.replaying(row, small.CONFIG, seed, unknown=0.3) for seed, row in enumerate(rows)]
    beside.before(rows)
    text_tokens, vision_tokens, agreeing = 0, 0, []
    for row in rows:
        output = policy(*on_device(row, CPU))
        assert output.chosen_LTK is not None and row.expert_TLK is not None
        beside.terms(row, output)
        for t, experts in enumerate(row.expert_TLK[:, 0].tolist()):  # one sparse layer
            if experts[0] >= 0:
                vision = row.token_T[t].item() in small.CONFIG.vision_pool_token_ids
                vision_tokens, text_tokens = vision_tokens + vision, text_tokens + (not vision)
                agreeing.append((vision, set(experts) == set(output.chosen_LTK[0, t].tolist())))
    sums = beside.sums()
    assert sums is not None
    found = beside.report(sums)
    shares = [sum(same for of, same in agreeing if of is vision) for vision in (False, True)]
    assert found["routing_text_agreement"] == pytest.approx(shares[0] / text_tokens)
    assert found["routing_vision_agreement"] == pytest.approx(shares[1] / vision_tokens)
    assert found["routing_text_differing"] == pytest.approx(1 - shares[0] / text_tokens)
    assert found["routing_text_agreement_min"] == found["routing_text_agreement"] == beside.layers["text"][0]
    assert 0 < found["routing_text_agreement"] < 1 and "routing_sampled_agreement" in found

    beside.before(rows)
    plain = dataclasses.replace(rows[0], expert_TLK=None)
    output = policy(*on_device(plain, CPU))
    assert output.chosen_LTK is None
    beside.terms(plain, output)
    sums = beside.sums()
    assert sums is not None and beside.report(sums) == {} and beside.layers == {}


# ------------------------------------------------------------------------------------- an engine with other roundings


def in_bfloat16(model: ErnieModel) -> None:
    model.set_dtype(torch.bfloat16)


def with_other_routers(model: ErnieModel) -> None:
    """A fiftieth of their spread: near-ties fall the other way."""
    for name, parameter in model.named_parameters():
        if "router" in name:
            parameter += 0.02 * parameter.std() * torch.randn_like(parameter)


@pytest.mark.parametrize("change", [in_bfloat16, with_other_routers])
@pytest.mark.parametrize("images", [False, True])
def test_replayed_experts_bring_the_trainer_far_closer_to_the_engine(change, images):
    torch.manual_seed(0)
    model, tokenizer = ErnieModel(MANY).requires_grad_(False).eval(), tiny_processor().tokenizer
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)  # or nothing would depend on experts
    other = copy.deepcopy(model)
    change(other)
    engine = Engine(other, tokenizer, EngineSettings(cache_gib=0.01))
    params = SamplingParams(max_new_tokens=24, ignore_end=True, seed=1, temperature=0.9, routed_experts=True)
    prompts = [with_pictures(MANY, i, i + 1) if images else text(i, 10 + 3 * i) for i in range(6)]
    row = sampled.row(engine, prompts, params)
    assert row.engine_logprob_T is not None
    distribution = distribution_of(params, Vocabulary.of(tokenizer, MANY))

    far, reports = {}, {}
    for replays in (True, False):
        policy = Policy(model, distribution=distribution, replays=replays).eval()
        beside = RoutingAgreement(policy, MANY, CPU)
        output = policy(*on_device(row, CPU))
        beside.terms(row, output)
        sums = beside.sums()
        assert sums is not None
        far[replays] = (output.logprob_T - row.engine_logprob_T)[row.weight_T > 0].abs()
        reports[replays] = beside.report(sums)
    assert far[True].mean() < 0.5 * far[False].mean() and far[True].max() < 0.25 * far[False].max()
    for report in reports.values():
        assert 0.9 < report["routing_sampled_agreement"] < 1
        assert ("routing_vision_agreement" in report) == images
    # A token that goes astray comes to the next router as another one, so without a replay more of them disagree.
    assert reports[True]["routing_sampled_agreement"] > reports[False]["routing_sampled_agreement"]
    assert reports[True]["routing_sampled_differing"] < reports[False]["routing_sampled_differing"]


@pytest.mark.parametrize(
    "override, says",
    [
        ("sampling.temperature=0", r"sampling\.temperature is 0\.0; .*Use 1\.0"),
        ("sampling.repetition_penalty=1.1", r"sampling\.repetition_penalty is 1\.1; .*must be 1\.0"),
        ("mismatch.routing=true", r"mismatch\.routing is true, and vLLM"),
        ("rollout.replay_experts=true", r"rollout\.replay_experts is true, which vLLM cannot do"),
        ("rollout.tool_steps=20", r"rollout\.tool_steps is 20, and servers .* Leave it out"),
        ("rollout.tool_steps=-1", r"rollout\.tool_steps is -1; it must be 0 or more"),
    ],
)
def test_what_cannot_be_learned_from_is_refused_from_the_settings_alone(override, says):
    vllm = ["rollout.backend=vllm", "rollout.vllm.urls=[http://localhost:8000]", "rollout.vllm.folder=/tmp/weights"]
    load("data.path=prompts.jsonl", *vllm, entry="rl")
    with pytest.raises(UserError, match=says):
        load("data.path=prompts.jsonl", *vllm, override, entry="rl")
