"""What only media reach: rests in an update without media, whatever is in its moments."""

import torch

from data.pack import filler
from ernie_model.parts import only_media
from tests.train import small
from train.config import ObjectiveConfig, PoolWeights
from train.loop import train_step
from train.objectives.sft import SFT
from train.router import RouterLosses

IMAGE, TEXT = small.row(small.example(0, 9, image=True, learned=7)), small.row(small.example(1, 7))


def test_without_media_what_only_media_reach_stays_and_its_moments_shrink():
    policy = small.policy()
    optimizer = small.optimizer(policy, lr=0.1, weight_decay=0.5)
    updates = small.updates(policy, optimizer)
    setting = dict(accelerator=small.accelerator(), max_grad_norm=1.0)
    train_step(updates, SFT, [IMAGE], **setting)
    rates = [group["lr"] for group in optimizer.param_groups]
    named = dict(policy.model.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in named.items()}
    train_step(updates, SFT, [TEXT], **setting)
    for name, parameter in named.items():
        # momentum and decay would move it: both are large here
        assert torch.equal(parameter, before[name]) == only_media(name), name
        if only_media(name):
            expected = moments[name].mul(optimizer.param_groups[0]["betas"][0])
            # AdamW writes b1 m as m + (1 - b1) (0 - m)
            torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], expected, rtol=1e-6, atol=0)
        assert optimizer.state[parameter]["step"] == 2
    assert [group["lr"] for group in optimizer.param_groups] == rates
    assert moments["vision.ln.weight"].any() and moments["layers.1.mlp.vision.router.weight_ED"].any()


def test_a_rank_may_have_fewer_rows_and_what_fills_it_up_counts_for_nothing():
    """A filler row among the micro-batches: the same update and the same numbers."""
    config = ObjectiveConfig(balance=PoolWeights(0.3, 0.7), z_loss=PoolWeights(0.2, 0.05))

    def run(rows):
        policy = small.policy(dtype=torch.float64)
        updates = small.updates(policy, small.optimizer(policy, lr=0.1, eps=1e-3))
        routers = RouterLosses(policy, config, small.accelerator())
        rows = [small.in_double(row) for row in rows]
        metrics = train_step(updates, SFT, rows, accelerator=small.accelerator(), max_grad_norm=1.0, beside=[routers])
        return metrics, {name: p.detach() for name, p in policy.named_parameters()}

    (plain, weights), (filled, same) = run([IMAGE, TEXT]), run([IMAGE, filler(0), TEXT, filler(0)])
    assert plain.keys() == filled.keys()
    for key, value in plain.items():
        assert abs(value - filled[key]) <= 1e-12 * abs(value), key
    for name, value in weights.items():
        torch.testing.assert_close(same[name], value, rtol=0, atol=1e-12, msg=name)
