"""Which layouts fit, and which of them is the fastest.

    parallel.zero  x  parallel.expert  x  offloading  x  parallel.held_in       a layout
        x  model.recompute  x  rows of 1, 2, 4 times data.max_tokens            its variants, of which the fastest stays

Longer rows come with less accumulation, so an update goes through the same number of tokens in all of them.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

from ernie_model.config import ErnieConfig
from train.config import HeldIn, PeftKind, Recompute, TrainingConfig
from train.planning.estimate import Estimate, Subject, estimate

LONGER = (1, 2, 4)
MOST_GPUS = 4096


@dataclasses.dataclass(frozen=True)
class Found:
    fitting: list[Estimate]
    """The fastest first."""
    missing: list[Estimate]
    """What does not fit, the nearest first."""


def search(config: TrainingConfig, subjects: Mapping[HeldIn, Subject], tflops: float) -> Found:
    """All layouts on `plan.gpus` GPUs. `subjects`: the model as it is held in either dtype."""
    fitting: dict[tuple, Estimate] = {}
    missing: dict[tuple, Estimate] = {}
    for candidate in candidates(config, subjects[HeldIn.float32].architecture):
        found = estimate(candidate, subjects[candidate.parallel.held_in], tflops)
        key = layout_key(candidate)
        if found.obstacle:
            if key not in missing or found.excess < missing[key].excess:
                missing[key] = found
        elif key not in fitting or found.pace.tokens_per_s > fitting[key].pace.tokens_per_s:
            fitting[key] = found
    return Found(
        sorted(fitting.values(), key=_slowness),
        sorted((one for key, one in missing.items() if key not in fitting), key=lambda one: one.excess),
    )


def layout_key(config: TrainingConfig) -> tuple:
    p = config.parallel
    return p.zero, p.expert, p.offload_optimizer, p.offload_weights, p.held_in.value


def _slowness(one: Estimate) -> tuple:
    """Among equally fast ones (three digits), the simpler."""
    return float(f"{-one.pace.tokens_per_s:.2e}"), layout_key(one.config)


def candidates(config: TrainingConfig, architecture: ErnieConfig) -> Iterator[TrainingConfig]:
    gpus = config.plan.gpus // config.parallel.sequence
    sizes = [n for n in range(1, gpus + 1) if gpus % n == 0 and architecture.num_experts % n == 0]
    for expert in sizes if architecture.sparse_layers else [1]:
        for changes in _layouts(config):
            parallel = dataclasses.replace(config.parallel, expert=expert, **changes)
            for way in Recompute:
                if way is Recompute.layers_and_vision and architecture.vision is None:
                    continue
                offload = config.model.offload_activations and way is not Recompute.none
                model = dataclasses.replace(config.model, recompute=way, offload_activations=offload)
                for times in LONGER:
                    if config.data.accumulation % times:
                        continue
                    yield dataclasses.replace(config, parallel=parallel, model=model, data=_rows(config, times))


def _rows(config: TrainingConfig, times: int):
    patches = config.data.max_patches
    return dataclasses.replace(
        config.data,
        max_tokens=config.data.max_tokens * times,
        max_patches=None if patches is None else patches * times,
        accumulation=config.data.accumulation // times,
    )


def _layouts(config: TrainingConfig) -> Iterator[dict]:
    wide, narrow = HeldIn.float32, HeldIn.bfloat16
    here = dict(offload_optimizer=False, offload_weights=False)
    away = dict(offload_optimizer=True, offload_weights=False)
    yield dict(zero=0, held_in=wide, **here)
    if config.plan.gpus == 1 and not config.parallel.zero:
        yield dict(zero=2, held_in=wide, **away)
        return
    for zero in (1, 2):
        yield dict(zero=zero, held_in=wide, **here)
        if config.peft.kind is PeftKind.none:
            yield dict(zero=zero, held_in=narrow, **here)
    yield dict(zero=2, held_in=wide, **away)
    if config.peft.kind is PeftKind.none:
        yield dict(zero=2, held_in=narrow, **away)
    yield dict(zero=3, held_in=wide, **here)
    yield dict(zero=3, held_in=wide, **away)
    yield dict(zero=3, held_in=wide, offload_optimizer=True, offload_weights=True)


def fewest_gpus(config: TrainingConfig, find: Callable[[TrainingConfig], Found]) -> int | None:
    """Doubling the GPUs of `config` until something fits; None where nothing does."""
    gpus = config.plan.gpus
    while (gpus := 2 * gpus) <= MOST_GPUS:
        if find(dataclasses.replace(config, plan=dataclasses.replace(config.plan, gpus=gpus))).fitting:
            return gpus
    return None
