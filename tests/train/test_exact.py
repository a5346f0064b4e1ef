"""Exact mode: what the engine says of its tokens is what a training row says of them, bit for bit."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data.batch import Role
from data.encode import Example, shift
from data.pack import collate
from ernie_model.context import Packed
from ernie_model.distribution import Distribution
from ernie_model.exact import ROWS, check_exact, make_exact
from ernie_model.inference.engine import Engine, EngineSettings
from ernie_model.inference.request import Completion, Prompt, SamplingParams
from ernie_model.inference.runner import Runner
from ernie_model.inference.sampling import distribution_of
from ernie_model.model import ErnieModel
from ernie_model.recompute import recompute
from ernie_model.rope import position_ids
from ernie_model.tile_plan import TILE
from ernie_model.tokenizer import load_tiny_tokenizer
from tests.ernie_model.inference.test_engine import picture, text, with_pictures
from tests.tiny import DENSE, SPARSE
from train.config import PeftConfig, PeftKind
from train.logprobs import token_logprobs
from train.policy import Policy
from train.weights import trained_weights

WIDE = SPARSE.replace(
    hidden_size=128, head_dim=32, num_experts=8, text_expert_width=96, vision_expert_width=96, mrope_section=(6, 6, 4)
)
PARAMS = SamplingParams(temperature=0.7, max_new_tokens=24, ignore_end=True, routed_experts=True)


def build(config, dtype=torch.float32, exact=True) -> ErnieModel:
    torch.manual_seed(0)
    model = ErnieModel(config).set_dtype(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if exact:
        make_exact(model)
    return model.eval()


def engine_of(model: ErnieModel, *, num_pages: int = 800, **settings) -> Engine:
    page_bytes = Runner.page_bytes(model.config, model.activation_dtype, 4)
    settings = {"page_tokens": 4, "cache_gib": (num_pages + 0.5) * page_bytes / 2**30} | settings
    return Engine(model, load_tiny_tokenizer(), EngineSettings(**settings))


def group(prompt: Prompt, attempts: list[tuple[Prompt, Completion]], config) -> Example:
    """The prompt as a stem, attempts as its branches: each the prompt of its last turn, and the answer to it."""
    stem = len(prompt.token_ids) - 1
    parts, media = [], list(prompt.media)
    for before, completion in attempts:
        token_T = torch.tensor([*before.token_ids, *completion.token_ids])
        weight_T, engine_T, first = torch.zeros(len(token_T)), torch.zeros(len(token_T)), len(before.token_ids) - 1
        weight_T[first:-1], engine_T[first:-1] = 1, torch.tensor(completion.logprobs)
        position_3T = position_ids(token_T, [item.grid for item in before.media], config)
        parts.append((token_T, shift(token_T), weight_T, engine_T, position_3T.T, completion.experts))
        media += before.media[len(prompt.media) :]
    streams = [torch.cat([each[0][:stem], *(x[stem:] for x in each)]) for each in zip(*parts, strict=True)]
    token_T, target_T, weight_T, engine_T, position_T3, expert_TLK = streams
    return Example(
        id="group",
        token_T=token_T,
        target_T=target_T,
        weight_T=weight_T,
        position_3T=position_T3.T,
        grids=tuple(item.grid for item in media),
        patch_PX=torch.cat([item.patch_PX for item in media]) if media else None,
        lengths=(stem, *(len(part[0]) - stem for part in parts)),
        stems=(-1, *(0 for _ in parts)),
        roles=(Role.PROMPT, *(Role.ATTEMPT for _ in parts)),
        engine_logprob_T=engine_T,
        expert_TLK=expert_TLK,
    )


def rollout(engine: Engine, num_attempts: int = 3) -> list[Example]:
    """Groups of text and pictures, whose attempts have another turn with a picture of a tool's."""
    config = engine.config
    prompts = [text(2, 45), with_pictures(config, 1), with_pictures(config, 1, 2), text(7, 3), text(2, 70)]
    asked = [prompt for prompt in prompts for _ in range(num_attempts)]
    params = [replace(PARAMS, seed=i, max_new_tokens=5 + 7 * i % 40) for i in range(len(asked))]
    first = engine.generate(asked, params)
    later = []
    for i, (prompt, completion) in enumerate(zip(asked, first, strict=True)):
        ids, item = picture(config, i, (1, 4 + 2 * (i % 3), 6))
        grown = prompt.extended((*completion.token_ids, 350, *ids, 351 + i), [item] if i % 2 else [])
        later.append(grown if i % 2 else prompt.extended((*completion.token_ids, 350), []))
    answers = list(zip(later, engine.generate(later, params), strict=True))
    return [
        group(prompt, answers[i * num_attempts : (i + 1) * num_attempts], config) for i, prompt in enumerate(prompts)
    ]


def difference(model: ErnieModel, example_list: list[Example], distribution: Distribution) -> float:
    """Largest, of log-probabilities and of experts of learned tokens."""
    policy, largest = Policy(model, distribution=distribution, replays=False, wants_experts=True), 0.0
    for parts in (example_list, *([one] for one in example_list)):
        batch = collate(parts)
        rows = batch.weight_T.nonzero()[:, 0]
        output = policy(batch, rows)  # with gradient: as it learns
        assert batch.engine_logprob_T is not None and output.chosen_LTK is not None and batch.expert_TLK is not None
        largest = max(largest, (output.logprob_T - batch.engine_logprob_T)[rows].abs().max().item())
        same = output.chosen_LTK.transpose(0, 1)[rows] == batch.expert_TLK[rows]
        if model.exact:
            assert same.all()
    return largest


SETTINGS = {
    "plain": {},
    "chunks": {"step_tokens": 11, "share_prefixes": False},
    "preempted": {"num_pages": 70, "step_tokens": 40},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [SPARSE, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_engine_and_training_row_agree_bit_for_bit(config, dtype, settings):
    model = build(config, dtype)
    engine = engine_of(model, **SETTINGS[settings])
    distribution = distribution_of(PARAMS, engine._entry.vocabulary)
    assert difference(model, rollout(engine), distribution) == 0
    stats = engine.stats()
    assert settings != "preempted" or stats.preemptions > 0
    assert (stats.cached_tokens > 0) == (settings != "chunks")


class Additions(TorchDispatchMode):
    """What is added up by one call of an operator."""

    def __init__(self):
        super().__init__()
        self.seen: set[tuple[str, tuple[int, ...]]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        kind = {"mm": "product", "linear": "product", "addmm": "product"}.get(name, name)
        if kind in ("product", "mean", "sum", "bmm"):
            given = args[1 if name == "addmm" else 0]
            self.seen.add((kind, tuple(given.shape)))
        return func(*args, **(kwargs or {}))


def test_no_sum_is_of_a_shape_that_follows_from_the_row():
    """The order in which a kernel adds may follow from the shape, on this machine or on another one."""
    model = build(SPARSE)
    with Additions() as of_engine:
        rollout(engine_of(model), 2)
    seen = [of_engine.seen]
    for tokens in (5, 37, 150):  # of 150 and 4 experts, some get more than a block
        token_T = torch.tensor(text(1, tokens).token_ids)
        with Additions() as of_training:
            row = model(token_T, position_ids(token_T, [], SPARSE), Packed([tokens]), stats=False)
            token_logprobs(row.hidden_TD, model.head_VD, token_T, exact=True)
        seen.append(of_training.seen)
    chunk = math.gcd(SPARSE.vocab_size, 1024)
    for kind, shape in set().union(*seen):
        match kind:
            case "product" | "mean":
                assert shape[0] == ROWS, (kind, shape)
            case "bmm":
                assert TILE in shape[1:] or 2 * TILE in shape[1:], shape  # two query heads share one of the keys
            case "sum":  # counts, and of each token the chunks of its vocabulary
                assert len(shape) == 1 or shape[1:] == (SPARSE.vocab_size // chunk, chunk), shape
    assert all({"product", "mean", "bmm", "sum"} <= {kind for kind, _ in one} for one in seen)


def test_activations_computed_again_and_what_is_trusted_of_kernels():
    model = build(SPARSE)
    check_exact(model)
    model.run_layer = recompute
    engine = engine_of(model, step_tokens=29)
    assert difference(model, rollout(engine, 2), distribution_of(PARAMS, engine._entry.vocabulary)) == 0


@pytest.mark.slow
def test_two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = build(SPARSE)
        check_exact(model)
        engine = engine_of(model)
        assert difference(model, rollout(engine, 2), distribution_of(PARAMS, engine._entry.vocabulary)) == 0
    finally:
        torch.set_num_threads(threads)


def test_adapters_agree_bit_for_bit_too():
    usual = build(SPARSE, exact=False)
    trained_weights(usual, PeftConfig(kind=PeftKind.lora, rank=4), seed=0, base=None)
    with torch.no_grad():
        for name, parameter in usual.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model = copy.deepcopy(usual)
    make_exact(model)
    token_T = torch.tensor(text(1, 40).token_ids)
    inputs = token_T, position_ids(token_T, [], SPARSE), Packed([40])
    torch.testing.assert_close(model(*inputs).hidden_TD, usual(*inputs).hidden_TD, rtol=0, atol=1e-4)
    engine = engine_of(model)
    assert difference(model, rollout(engine), distribution_of(PARAMS, engine._entry.vocabulary)) == 0


def test_a_machine_whose_sums_depend_on_the_number_of_rows_is_found(monkeypatch):
    model, softmax = build(SPARSE), torch.Tensor.softmax

    def other(x, *args, **keys):
        return softmax(x, *args, **keys) * (1 + 2**-20 * (len(x) % 2))

    check_exact(model)
    monkeypatch.setattr(torch.Tensor, "softmax", other)
    with pytest.raises(RuntimeError, match="sums along a row depend on how many rows there are"):
        check_exact(model)


def test_what_cannot_be_exact_is_refused():
    model = build(SPARSE, exact=False)
    vars(model.layers[1].mlp)["route"] = lambda *_: None
    with pytest.raises(ValueError, match="sends tokens to other ranks"):
        make_exact(model)
    assert not model.exact and type(model.layers[0].input_layernorm).__name__ == "RMSNorm"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_usual_mode_differs(dtype):
    model = build(SPARSE, dtype, exact=False)
    engine = engine_of(model)
    assert difference(model, rollout(engine), distribution_of(PARAMS, engine._entry.vocabulary)) > 0


@pytest.mark.parametrize("config", [SPARSE, DENSE], ids=["sparse", "dense"])
def test_values_and_gradients_are_those_of_the_usual_mode(config):
    usual = build(config, torch.float64, exact=False)
    exact = copy.deepcopy(usual)
    make_exact(exact)
    ids, item = picture(config, 3)
    token_T = torch.tensor([*text(1, 50).token_ids, *ids, *text(2, 40).token_ids, *text(3, 21).token_ids])
    position_3T = position_ids(token_T, [item.grid], config)
    lengths = [50 + len(ids), 40, 21]
    found = []
    for model in (usual, exact):
        context = Packed(lengths, stems=[-1, 0, 0])
        out = model(token_T, position_3T, context, patch_PX=item.patch_PX.double(), grids=[item.grid])
        logit_TV = model.logits(out.hidden_TD)
        logit_TV.log_softmax(-1).gather(1, token_T.roll(-1)[:, None]).sum().backward()
        found.append((logit_TV, {name: parameter.grad for name, parameter in model.named_parameters()}))
    (logit_TV, grads), (exact_TV, exact_grads) = found
    torch.testing.assert_close(exact_TV, logit_TV, rtol=1e-12, atol=1e-12)
    assert grads.keys() == exact_grads.keys()
    for name, grad in grads.items():
        if grad is None:
            assert exact_grads[name] is None or not exact_grads[name].any(), name
        else:  # sums of about 1e2 terms: relative to the largest
            torch.testing.assert_close(exact_grads[name], grad, rtol=0, atol=1e-12 * max(grad.abs().max().item(), 1))
