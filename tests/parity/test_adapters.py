"""Adapters against transformers + peft: the folders we write load there, those written there load here, same logits.

Tolerances are those of test_transformers.py. Weights, A and B are random and not small, so that every factor counts.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel

from tests.parity.reference import (
    MODELS,
    MOE_SHAPE,
    SHAPES,
    VL_SHAPE,
    Result,
    Shape,
    load_ours,
    logit_error,
    loss_error,
    make_conversations,
    make_reference,
    run_ours,
    run_reference,
)
from train.config import (
    TARGETS,
    PeftConfig,
    PeftKind,
    UserError,
)
from train.lora.adapt import Adapters, adapt, find_sites
from train.lora.files import PREFIX, keys_by_tensor, to_peft

# peft uses a name that transformers is about to drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # peft looks for the patterns of parameters among the modules, although it obeys them.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]
NO_PROCESSOR = SimpleNamespace(save=lambda folder: None)


def all_parts(model) -> list[str]:
    """Every part that this model has adapters for."""
    parts = []
    for part in TARGETS:
        try:
            find_sites(model, PeftConfig(targets=[part]))
        except UserError:  # not in this model
            continue
        parts.append(part)
    return parts


def settings(model, **changes) -> PeftConfig:
    parts = all_parts(model)
    fields = dict(kind=PeftKind.lora, targets=parts, rank=4, alpha=6.0, merge=True)
    fields |= dict(ranks={"dense": 3} if "dense" in parts else {}, alphas={"attention": 5.0})
    return PeftConfig(**fields | changes)


def randomise(adapters: Adapters, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))


@pytest.fixture
def pair(tmp_path: Path, shape: Shape):
    reference = make_reference(shape)
    return reference, load_ours(reference, tmp_path / "base"), make_conversations(shape.rows, seed=5)


def with_peft(shape: Shape, base: Path, adapter: Path):
    model = MODELS[shape.model_type][1].from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    return PeftModel.from_pretrained(model, adapter, is_trainable=True).eval()


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        *((shape, {}) for shape in SHAPES),
        *((shape, dict(rslora=True, alpha=3.0, alphas={"attention": 2.0})) for shape in (MOE_SHAPE, VL_SHAPE)),
        (SHAPES[1], dict(dora=True)),
        (VL_SHAPE, dict(dora=True, targets=["attention", "dense", "shared", "resampler", "vision"])),
    ],
    ids=lambda value: value.name if isinstance(value, Shape) else "+".join(value) or "plain",
)
def test_peft_loads_our_folder_with_the_same_logits_and_gradients(shape: Shape, changes: dict, pair, tmp_path: Path):
    _, model, conversations = pair
    adapters = adapt(model, settings(model, **changes), seed=0)
    randomise(adapters)
    adapter, merged = adapters.publish(tmp_path, "export", NO_PROCESSOR)
    ours = run_ours(model, conversations)
    plain = run_ours(load_ours(None, tmp_path / "base"), conversations, grads=False)
    assert logit_error(ours, plain) > 0.05  # the adapter matters

    theirs = with_peft(shape, tmp_path / "base", adapter)
    reference = run_reference(theirs.base_model.model, conversations)
    assert logit_error(ours, reference) <= 1e-5
    assert loss_error(ours, reference) <= 1e-6
    assert_same_gradients(adapters, reference)

    whole = MODELS[shape.model_type][1].from_pretrained(merged, dtype=torch.float32, attn_implementation="eager")
    assert logit_error(ours, run_reference(whole, conversations, grads=False)) <= 1e-5
    assert logit_error(run_ours(load_ours(None, merged), conversations, grads=False), ours) <= 1e-5


def assert_same_gradients(adapters: Adapters, reference: Result) -> None:
    keys = keys_by_tensor(adapters.model.config)
    compared = 0
    for site in adapters.sites["default"]:
        for tensor in adapters.layers[site.module].TENSORS:
            factors = adapters.layers[site.module].factors(tensor)["default"]
            grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in factors[:2]]
            ours = to_peft(factors._replace(A=grads[0], B=grads[1]))
            if factors.magnitude_O is not None:
                assert factors.magnitude_O.grad is not None
                ours = (*ours, factors.magnitude_O.grad)
            for key, mine in zip(keys[f"{site.module}.{tensor}"], ours, strict=False):
                theirs = reference.grads[key.removeprefix(PREFIX).removesuffix(".weight") + ".default.weight"]
                # as grad_error: a gradient that is zero in exact arithmetic is noise in both programs
                assert (mine - theirs).norm() <= 1e-5 * theirs.norm() + 1e-8 * mine.numel() ** 0.5, key
                compared += 1
    assert compared == sum(p.requires_grad for p in adapters.model.parameters())
