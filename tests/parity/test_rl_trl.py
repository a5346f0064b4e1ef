"""Policy gradients against TRL's own code, losses and gradients, on attempts of random lengths with observations."""

from typing import Any

import pytest
import torch

from tests.train.objectives import trl_policy_oracle
from tests.train.objectives.attempts import Attempt, settings, update
from train.rl_config import Aggregate, Correction, PolicyLoss, Ratio

NONE = {"correction": Correction.none}
GRPO = {**NONE, "ratio": Ratio.token}
GSPO = {**NONE, "clip_low": 0.02, "clip_high": 0.03}
SETTINGS: list[dict[str, Any]] = [
    GRPO,
    {**GRPO, "dual_clip": 1.3},
    {**GRPO, "opsm_delta": 0.05},
    {**GRPO, "kl": 0.3},
    {**GRPO, "kl": 0.3, "kl_unbiased": True},
    {**GRPO, "aggregate": Aggregate.token, "clip_high": 0.28},
    {**GRPO, "aggregate": Aggregate.token, "kl": 0.1},
    {**GRPO, "aggregate": Aggregate.length, "max_length": 16},
    {**GRPO, "aggregate": Aggregate.sequence_sum},
    *[{"ratio": Ratio.token, "correction": correction} for correction in trl_policy_oracle.LEVELS],
    {"ratio": Ratio.token, "kl": 0.3},
    GSPO,
    {**GSPO, "dual_clip": 1.05},
    {**GSPO, "kl": 0.1},
    {**GSPO, "opsm_delta": 0.05},
    {**GSPO, "aggregate": Aggregate.sequence_sum},
    {**GSPO, "correction": Correction.tis_product},
    {**GSPO, "correction": Correction.mis_product},
    {**GRPO, "loss": PolicyLoss.cispo, "aggregate": Aggregate.token, "cispo_cap": 1.2},
    # TRL takes the steepness in float32, which has 1.25
    {**GRPO, "loss": PolicyLoss.sapo, "sapo_negative": 1.25},
    {**NONE, "loss": PolicyLoss.sapo, "sapo_negative": 1.25},
    {**NONE, "loss": PolicyLoss.gmpo, "gmpo_clip": 0.1},
    {**NONE, "loss": PolicyLoss.gmpo, "kl": 0.1},
]


def attempts(seed: int, count: int = 6) -> list[Attempt]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        tokens = int(torch.randint(1, 9, (), generator=generator))
        old_T = -3 * torch.rand(tokens, generator=generator, dtype=torch.float64)
        policy_T, engine_T, ref_T = old_T + 0.3 * torch.randn(3, tokens, generator=generator, dtype=torch.float64)
        engine_T = old_T + 3 * (engine_T - old_T)
        sampled = torch.rand(tokens, generator=generator) < 0.7
        sampled[0] = True
        advantage = torch.randn((), generator=generator, dtype=torch.float64).item()
        streams = (stream.tolist() for stream in (policy_T, old_T, engine_T, ref_T, sampled))
        policy, old, engine, reference, mask = streams
        made.append(Attempt(policy, old, advantage, engine, reference, mask))
    return made


@pytest.mark.parametrize(
    "keys", SETTINGS, ids=lambda keys: "-".join(str(getattr(v, "value", v)) for v in keys.values())
)
def test_loss_and_gradient(keys):
    for seed in range(5):
        config, made = settings(**keys), attempts(seed)
        theirs = trl_policy_oracle.learned(config, made)
        assert theirs is not None
        ours = update(config, made)
        assert ours.loss == pytest.approx(theirs[0], rel=1e-11, abs=1e-13)
        for mine, other in zip(ours.gradients, theirs[1], strict=True):
            assert mine == pytest.approx(other, rel=1e-11, abs=1e-13)


def test_tokens_that_trl_rejects_still_learn_with_a_ratio_of_attempts():
    """Its gradient goes through the attempt's ratio, and so through every token; ours ends at the token's weight."""
    config, made = settings(clip_low=0.9, clip_high=0.9), attempts(3, count=24)
    theirs, ours = trl_policy_oracle.learned(config, made), update(config, made)
    assert theirs is not None and ours.loss == pytest.approx(theirs[0], rel=1e-11)
    rejected = 0
    for attempt, mine, other in zip(made, ours.gradients, theirs[1], strict=True):
        assert sum(mine) == pytest.approx(sum(other), rel=1e-11)
        assert attempt.old is not None and attempt.engine is not None
        for at, sampled in enumerate(attempt.mask):
            outside = not -0.693 < attempt.old[at] - attempt.engine[at] < 1.609
            if sampled and outside and any(mine):
                rejected += 1
                assert mine[at] == 0 and other[at] != 0
    assert rejected > 3
