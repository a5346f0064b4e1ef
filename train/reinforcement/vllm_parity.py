"""Does vLLM compute what the trainer computes? Asked once, of the weights that were pushed, before the first step.

Prompts of train/certificate.py (texts, pictures) go through the model that trains and through every server; their
log-probabilities are compared. What rounding explains is measured, as for a certificate: the trainer's pass is repeated
with every product and every layer's output multiplied by 1 ± epsilon at random; of the two sides' epsilons, the larger.

Shape letters:  T tokens   V vocabulary
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ernie_model.context import Packed
from ernie_model.layers import Linear
from ernie_model.model import ErnieModel, Layer
from ernie_model.moe import Experts
from ernie_model.processor import Encoded, Processor
from train.certificate import FACTOR, Case, cases
from train.parallel.partition import found_by_reading, whole

SEEDS = 2
"""Passes with random rounding."""


class Probe(NamedTuple):
    """One prompt, and what the trainer makes of it."""

    name: str
    encoded: Encoded
    logprob_T: Tensor
    """float32, of each token but the first; -inf for one that is never sampled."""
    bound: float
    """Of the largest difference that rounding explains."""
    mean_bound: float


class Difference(NamedTuple):
    largest: float
    mean: float


@torch.no_grad()
def probes(
    model: ErnieModel, processor: Processor, never: Sequence[int], dtype: torch.dtype, *, join: bool = False
) -> list[Probe]:
    """All ranks together, where a forward pass takes all ranks.

    Args:
        never: ids that are not sampled. They have no share in the probabilities.
        dtype: that the server computes in.
        join: see `ErnieModel.forward`.
    """
    epsilon = max(torch.finfo(one).eps for one in (dtype, model.activation_dtype))
    was_training = model.training
    model.eval()
    try:
        with found_by_reading(model):
            return [_probe(model, case, never, epsilon, join) for case in cases(processor) if not case.is_video]
    finally:
        model.train(was_training)


def _probe(model: ErnieModel, case: Case, never: Sequence[int], epsilon: float, join: bool) -> Probe:
    exact_T, size = _logprobs(model, case.encoded, never, join)
    shaken = []
    for seed in range(SEEDS):
        with shaking(model, epsilon, seed):
            shaken.append(_difference(_logprobs(model, case.encoded, never, join)[0], exact_T))
    largest = max(*(one.largest for one in shaken), epsilon * size)
    mean = max(*(one.mean for one in shaken), epsilon * size / 4)
    # Twice: a log-probability is a logit less a sum of logits.
    return Probe(case.name, case.encoded, exact_T, 2 * FACTOR * largest, FACTOR * mean)


def _logprobs(model: ErnieModel, encoded: Encoded, never: Sequence[int], join: bool) -> tuple[Tensor, float]:
    """Of the prompt's own tokens, on the host, and the size of the largest logit."""
    device = model.norm.weight.device
    ids = encoded.token_T.to(device)
    patch_PX = None if encoded.patch_PX is None else encoded.patch_PX.to(device)
    context = Packed([len(ids)])
    out = model(ids, encoded.position_3T.to(device), context, patch_PX=patch_PX, grids=encoded.grids, join=join)
    with whole(model.head):
        logit_TV = (out.hidden_TD[:-1] @ model.head_VD.to(out.hidden_TD.dtype).T).float()
    size = logit_TV.abs().max().item()
    logit_TV[:, list(never)] = -torch.inf
    return logit_TV.log_softmax(-1).gather(1, ids[1:, None])[:, 0].cpu(), size


def compare(probe: Probe, theirs: Sequence[float]) -> Difference:
    """`theirs`: log-probabilities of the prompt's tokens but the first."""
    return _difference(torch.tensor(theirs, dtype=torch.float32), probe.logprob_T)


def _difference(theirs_T: Tensor, ours_T: Tensor) -> Difference:
    kept_T = ours_T.isfinite()
    difference_T = (theirs_T - ours_T)[kept_T].abs().nan_to_num(nan=torch.inf)
    return Difference(difference_T.max().item(), difference_T.mean().item())


@contextmanager
def shaking(model: ErnieModel, epsilon: float, seed: int) -> Iterator[None]:
    """Inside, the output of every product and layer is rounded once more, at random; the same on every rank."""
    random = torch.Generator().manual_seed(seed)

    def shake(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (shake(module, inputs, output[0]), *output[1:])
        sign = torch.randint(0, 2, output.shape, generator=random).to(output) * 2 - 1
        return output * (1 + epsilon * sign)

    kinds = (Linear, Experts, Layer)
    hooks = [module.register_forward_hook(shake) for module in model.modules() if isinstance(module, kinds)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
