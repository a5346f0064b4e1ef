"""An update of a policy is the same however its attempts lie: in rows, micro-batches, or in another order."""

import dataclasses

import pytest
import torch

from data.batch import PackedBatch, Role
from data.encode import Example
from tests.train import small
from tests.train.objectives.attempts import settings
from tests.train.objectives.rows import record
from train.loop import train_step
from train.objectives.policy_gradient import build
from train.objectives.policy_record import PolicyRecord
from train.reinforcement.mismatch import Mismatch
from train.rl_config import Aggregate, Correction, MismatchConfig, PolicyLoss, Ratio

NOMINAL = 12


def group(seed: int, *, image: bool = False) -> Example:
    """A prompt and three attempts, with an observation in some of them, and advantages and an engine of their own."""
    made = record(seed, Role.ATTEMPT, Role.ATTEMPT, Role.ATTEMPT, image=image)
    generator = torch.Generator().manual_seed(seed)
    weight_T = made.weight_T * (torch.rand(made.num_tokens, generator=generator) < 0.8)
    advantage_S = torch.randn(4, generator=generator)
    return dataclasses.replace(
        made,
        weight_T=weight_T,
        advantage_T=advantage_S.repeat_interleave(torch.tensor(made.lengths)) * weight_T,
        engine_logprob_T=(-4 + torch.randn(made.num_tokens, generator=generator)) * weight_T,
    )


GROUPS = [group(seed, image=seed % 2 == 1) for seed in range(3)]


def swapped(made: Example) -> Example:
    """Its second and third attempts change places."""

    def order(stream_T: torch.Tensor) -> torch.Tensor:
        prompt, first, second, third = stream_T.split(list(made.lengths), dim=-1)
        return torch.cat([prompt, first, third, second], dim=-1)

    names = ("token_T", "target_T", "weight_T", "position_3T", "advantage_T", "engine_logprob_T")
    prompt, first, second, third = made.lengths
    streams = {name: order(getattr(made, name)) for name in names}
    return dataclasses.replace(made, **streams, lengths=(prompt, first, third, second))


def with_old(batch: PackedBatch) -> PackedBatch:
    """p_old of each target by the token itself, so that it does not depend on where it lies."""
    return dataclasses.replace(batch, old_logprob_T=batch.weight_T * (-4 + 0.2 * torch.sin(batch.target_T.double())))


def learn(config, rows: list[PackedBatch], *, old: bool) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    policy = small.policy(dtype=torch.float64)
    policy.wants_entropy = True
    caught: dict[str, torch.Tensor] = {}

    class Catch(torch.optim.SGD):
        def step(self, closure=None):
            caught.update({name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})

    accelerator = small.accelerator()
    metrics = train_step(
        small.updates(policy, Catch(policy.parameters(), lr=1.0)),
        build(config, attempts_per_update=NOMINAL),
        [with_old(small.in_double(row)) if old else small.in_double(row) for row in rows],
        accelerator=accelerator,
        max_grad_norm=1e9,
        beside=[
            PolicyRecord(config, accelerator, attempts_per_update=NOMINAL),
            Mismatch(MismatchConfig(), config, small.CONFIG, accelerator),
        ],
    )
    return caught, metrics


@pytest.mark.parametrize("old", (False, True), ids=("first", "later"))
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"correction": Correction.icepop_sequence, "band": [0.1, 9.0], "aggregate": Aggregate.sequence_sum},
        {"ratio": Ratio.token, "aggregate": Aggregate.token, "entropy": 0.1},
        {"ratio": Ratio.token, "aggregate": Aggregate.length, "max_length": 8, "opsm_delta": 0.0, "entropy": 0.1},
        {"loss": PolicyLoss.gmpo, "correction": Correction.tis_product},
        {"loss": PolicyLoss.cispo, "ratio": Ratio.token, "correction": Correction.mis},
    ],
    ids=("gspo", "luspo", "dapo", "dr_grpo", "gmpo", "cispo"),
)
def test_rows_and_order_change_nothing(keys, old):
    config = settings(**keys, **({"clip_low": 0.05, "clip_high": 0.05} if not keys else {}))
    one, two, three = GROUPS
    whole, metrics = learn(config, [small.row(one, two, three)], old=old)
    scale = max(value.abs().max().item() for value in whole.values())
    assert scale > 0
    for rows in ([small.row(three), small.row(swapped(one), two)], [small.row(one), small.row(three), small.row(two)]):
        parts, others = learn(config, rows, old=old)
        assert parts.keys() == whole.keys()
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=1e-11 * scale, msg=name)
        for name in metrics:
            if name.startswith(
                ("loss", "ratio", "clip", "tokens", "masked", "correction", "kl", "mismatch", "entropy")
            ):
                assert others[name] == pytest.approx(metrics[name], rel=1e-9, abs=1e-12), name
    assert metrics["units"] == (9 if config.aggregate is not Aggregate.token else metrics["tokens_sampled"])


def test_a_thin_update_is_a_smaller_step():
    """Two groups of the three that were planned: each pulls as it would have."""
    both, _ = learn(settings(), [small.row(*GROUPS[:2])], old=False)
    first, _ = learn(settings(), [small.row(GROUPS[0])], old=False)
    second, _ = learn(settings(), [small.row(GROUPS[1])], old=False)
    for name, value in both.items():
        parts = [one[name] for one in (first, second) if name in one]
        torch.testing.assert_close(value, torch.stack(parts).sum(0), rtol=1e-9, atol=1e-12)
