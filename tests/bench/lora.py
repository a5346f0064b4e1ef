"""What adapters cost:  python -m tests.bench.lora [--size small] [--rounds 8] [--parts experts] [--dtype bfloat16]

    forward and backward with adapters on the parts  /  the same model frozen, activations passed back all the way

The denominator is the least that adapters everywhere need: no weight has a gradient, but the inputs of the text model
and of the vision tower want one. Adapters on some parts may take less, where the way back ends early. One process, one
thread, CPU seconds, all in turn. Target: at most 1.25 with adapters on all parts.
"""

import argparse
import copy
from collections.abc import Callable

import torch

from ernie_model.config import ErnieConfig
from ernie_model.model import ErnieModel
from tests.bench.models import SIZES, packed, random_segments, transformers_config
from tests.bench.timing import in_turn, ratio
from train.config import (
    TARGETS,
    PeftConfig,
    PeftKind,
)
from train.lora.adapt import adapt
from train.memory import keep_freed_memory
from train.policy import Policy, on_device

PARTS = {
    "experts": ["text_experts", "vision_experts"],
    "language": ["attention", "dense", "shared", "text_experts", "vision_experts"],
    "all": list(TARGETS),
}


def frozen(model: ErnieModel) -> ErnieModel:
    """No weight trains, and activations have gradients from the inputs on."""
    model.requires_grad_(False)
    assert model.vision is not None
    for first in (model.embed_tokens, model.vision.patch_embed):
        first.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return model


def step(policy: Policy, size, lengths: list[int], image_side: int) -> Callable[[int], object]:
    def run(number: int) -> None:
        batch = packed(random_segments(size, lengths, image_side=image_side, seed=number), policy.model.config)
        output = policy(*on_device(batch, torch.device("cpu")))
        (-output.logprob_T.sum()).backward()
        policy.zero_grad(set_to_none=True)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--parts", choices=PARTS, nargs="*", default=list(PARTS))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    size = SIZES[asked.size]
    lengths, image_side = [256] * 6, 16
    config = ErnieConfig.from_json(transformers_config(size).to_dict())
    dtype = torch.bfloat16 if asked.dtype == "bfloat16" else None
    torch.manual_seed(0)
    base = ErnieModel(config, compute_dtype=dtype)
    policies = [Policy(frozen(copy.deepcopy(base)))]
    if dtype is not None:  # as adapters keep it
        policies[0].model.set_dtype(dtype)
    for name in asked.parts:
        model = copy.deepcopy(base)
        adapt(model, PeftConfig(kind=PeftKind.lora, targets=PARTS[name], rank=asked.rank), seed=0)
        policies.append(Policy(model))
    print(f"{asked.size}, rank {asked.rank}, {asked.dtype}, {sum(lengths)} tokens a step, {asked.rounds} rounds")
    base_time, *times = in_turn([step(policy, size, lengths, image_side) for policy in policies], asked.rounds)
    print(f"{'frozen, activations passed back':<34} {base_time.median:7.3f} s")
    for name, found in zip(asked.parts, times, strict=True):
        print(f"{'adapters on ' + name:<34} {found.median:7.3f} s   {ratio(found, base_time):5.2f} x")


if __name__ == "__main__":
    main()
