"""What keeps the experts of both pools in use: three losses for routers, and the update of their correction bias.

    balance      E * sum_e P[e] * c[e]              P mean probability, c choices per token; K when even
    z            mean_t logsumexp_t ^ 2             keeps the router's logits small
    orthogonal   mean_ef ((W^ W^T - 1)[e, f]) ^ 2   W^ the router's rows at unit length; 0 at right angles
    bias         b[e] += u * sign(mean n - n[e])    n choices in the update that was just done; no gradient

Each exists once per sparse layer and pool, over that pool's tokens only: a sum over both pools would call two half-dead
pools balanced. The losses of all layers are added, times their weight, to what is minimised, and reported beside it.

Everything is over the tokens of the whole update, so micro-batches and ranks change nothing:

    P, z         sums over tokens / tokens of the update, which the token ids give before the first forward
    c            known only after every forward. One micro-batch: ranks add their counts between forward and backward.
                 Several: a forward pass without gradients counts first.
    orthogonal   no tokens in it: each micro-batch of each rank adds an equal share

Shape letters:  L sparse layers   E experts of a pool   2 pools, text then vision   D model width
Source: reference 3.1 to 3.4, 3.6.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from data.batch import PackedBatch
from ernie_model.moe import MoE, Router, RouterStats
from train.config import ObjectiveConfig, UserError
from train.loop import Beside, all_sum
from train.parallel.layout import Layout
from train.policy import Policy, PolicyOutput, on_device


class RouterLosses(Beside):
    """The losses of one model's routers, and the update of their bias.

    Raises:
        UserError: a weight is set for routers that do not exist, that are frozen, or that ZeRO has cut up.
    """

    def __init__(self, policy: Policy, config: ObjectiveConfig, accelerator: Accelerator, layout: Layout | None = None):
        self.policy, self.config, self.accelerator = policy, config, accelerator
        self.layout = layout or Layout()
        layers = [layer.mlp for layer in policy.model.layers if isinstance(layer.mlp, MoE)]
        self.routers: dict[str, list[Router]] = {
            "text": [mlp.text.router for mlp in layers],
            "vision": [mlp.vision.router for mlp in layers if mlp.vision is not None],
        }
        self._spread = [pool for pool, weight in vars(config.orthogonal).items() if weight]
        self._check()
        device = accelerator.device
        self.balance_2, self.z_2 = (
            torch.tensor([weight.text, weight.vision], dtype=torch.float64, device=device)
            for weight in (config.balance, config.z_loss)
        )
        self.balances, self.has_terms = _any(config.balance), _any(config.balance) or _any(config.z_loss)
        if self._spread and not config.orthogonal_decoupled:
            policy.penalty = self._penalty
        self.share = 1.0
        """Of what is to be minimised once per update, in each micro-batch of each rank."""
        self.token_2: Tensor | None = None
        self.preferred_L2E: Tensor | None = None

    def _check(self) -> None:
        config = self.config
        for pool, routers in self.routers.items():
            chosen = {
                f"objective.{name}.{pool}": getattr(getattr(config, name), pool)
                for name in ("balance", "z_loss", "orthogonal")
            }
            for key, weight in chosen.items():
                if weight and not routers:
                    raise UserError(f"{key} is {weight}, but the model has no {pool} router. Set {key}=0.")
                if weight and not _trains(routers):
                    raise UserError(
                        f"{key} is {weight}, but the {pool} routers are frozen. Set {key}=0, or train them: with every "
                        "weight (peft=none), and router not in optim.freeze."
                    )
        if config.orthogonal_decoupled and self._spread and self.layout.zero:
            raise UserError(
                f"objective.orthogonal_decoupled=true moves the routers beside AdamW, but with parallel.zero="
                f"{self.layout.zero} what a router is lies in shares on all ranks, and the step would be undone. Set "
                "objective.orthogonal_decoupled=false, or parallel.zero=0."
            )
        if self._spread and self.layout.zero == 3:
            raise UserError(
                f"objective.orthogonal.{self._spread[0]} is set, but it needs all rows of a router at once, and "
                "parallel.zero=3 cuts them up over the ranks. Set it to 0, or use parallel.zero=2."
            )
        if config.bias_update and not any(_trains(routers) for routers in self.routers.values()):
            what = (
                "the model has no router that is trained" if any(self.routers.values()) else "the model has no router"
            )
            raise UserError(f"objective.bias_update is {config.bias_update}, but {what}. Set objective.bias_update=0.")

    # ------------------------------------------------------------------------------------------- around one update

    def before(self, microbatches: Sequence[PackedBatch]) -> None:
        """Find what the losses divide by: each pool's tokens in this update and, where it takes a pass, the choices."""
        self.token_2 = self.preferred_L2E = None
        self.share = 1 / (len(microbatches) * self.accelerator.num_processes)
        if self.balances and len(microbatches) > 1:
            self._remember(self._count(microbatches))
        elif self.has_terms and not self.balances:
            ids = torch.tensor(self.policy.model.config.vision_pool_token_ids, dtype=torch.int64)
            rows = [batch for batch in microbatches if not batch.is_filler]
            tokens = sum(batch.num_tokens for batch in rows)
            vision = sum(int(torch.isin(batch.token_T, ids).sum()) for batch in rows)
            here = torch.tensor([tokens - vision, vision], dtype=torch.float64, device=self.accelerator.device)
            self.token_2 = all_sum(self.accelerator, here) / self.layout.sequence

    def terms(self, batch: PackedBatch, output: PolicyOutput) -> Tensor | float:
        """This micro-batch's share of the losses: the shares of an update add up to them."""
        penalty = 0.0 if output.penalty is None else output.penalty * self.share
        if not self.has_terms:
            return penalty
        router = output.router
        assert router is not None  # without routers _check refuses
        if self.token_2 is None:
            self._remember(router)
        assert self.token_2 is not None
        dtype, experts = router.prob_2E.dtype, router.prob_2E.shape[-1]
        token_2 = self.token_2.clamp(min=1)  # a pool without tokens has sums of 0
        total = (router.square_2 * (self.z_2 / token_2).to(dtype)).sum()
        if self.preferred_L2E is not None:
            slope_L2E = (self.balance_2 * experts / token_2**2)[:, None] * self.preferred_L2E
            total = total + (router.prob_2E * slope_L2E.to(dtype)).sum()
        return penalty + total

    @torch.no_grad()
    def after_update(self, optimizer: torch.optim.Optimizer, router: RouterStats | None) -> None:
        if self.config.orthogonal_decoupled:
            rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
            for one, gradient_ED in self._orthogonal_gradients():
                one.weight_ED.sub_(gradient_ED, alpha=rates[id(one.weight_ED)])
        if self.config.bias_update and router is not None:
            sign_L2E = (router.count_2E.mean(-1, keepdim=True) - router.count_2E).sign().to(self.accelerator.device)
            for pool, routers in enumerate(self.routers.values()):
                for layer, one in enumerate(routers):
                    if one.weight_ED.requires_grad:  # reference 3.6
                        bias_E = one.correction_bias_E
                        bias_E.add_(sign_L2E[layer, pool].to(bias_E.dtype), alpha=self.config.bias_update)

    @torch.no_grad()
    def sums(self) -> Tensor | None:
        """The orthogonal loss of each pool that has a weight, mean over layers; `router_summary` has the rest."""
        values = [orthogonal(_stacked(self.routers[pool])).mean() for pool in self._spread]
        return torch.stack(values) / self.accelerator.num_processes if values else None

    def report(self, sums: Tensor) -> dict[str, float]:
        return {f"router_{pool}_orthogonal": value for pool, value in zip(self._spread, sums.tolist(), strict=True)}

    # ----------------------------------------------------------------------------------------------------- pieces

    def _remember(self, stats: RouterStats) -> None:
        """Tokens and choices of the update, from this rank's."""
        token_2 = stats.token_2[0].double()  # equal in every layer
        flat = all_sum(self.accelerator, torch.cat([token_2, stats.preferred_2E.double().flatten()]))
        self.token_2, self.preferred_L2E = flat[:2], flat[2:].view_as(stats.preferred_2E)

    @torch.no_grad()
    def _count(self, microbatches: Sequence[PackedBatch]) -> RouterStats:
        """Run the layers, without the head, only to see what the routers choose."""
        device, total = self.accelerator.device, None
        devices = [device] if device.type == "cuda" else []
        # The real pass must draw the same random numbers (dropout of adapters), or other choices would be counted.
        with torch.random.fork_rng(devices):
            for batch in microbatches:
                moved, row_R = on_device(batch, device, self.layout.sequence_group)
                # The policy, so that noise on embeddings is there too.
                router = self.policy(moved, row_R[:0], join=self.layout.joint).router
                total = router if total is None else total.plus(router)
        assert total is not None
        return total

    def _penalty(self) -> Tensor:
        """The orthogonal losses of all pools and layers, with gradient, times their weights."""
        losses = [
            vars(self.config.orthogonal)[pool] * orthogonal(_stacked(self.routers[pool])).sum() for pool in self._spread
        ]
        return torch.stack(losses).sum()

    def _orthogonal_gradients(self) -> list[tuple[Router, Tensor]]:
        """(router, gradient of the penalty), for the routers that train."""
        routers = [router for pool in self._spread for router in self.routers[pool] if router.weight_ED.requires_grad]
        with torch.enable_grad():
            gradients = torch.autograd.grad(self._penalty(), [router.weight_ED for router in routers])
        return list(zip(routers, gradients, strict=True))


def orthogonal(weight_LED: Tensor) -> Tensor:
    """(L, E, D) -> (L,): mean squared entry of W^ W^T - 1. Two rows at 45 degrees: (2 * 0.5 + 2 * 0) / 4 = 0.25."""
    unit_LED = F.normalize(weight_LED, dim=-1, eps=1e-12)
    gram_LEE = unit_LED @ unit_LED.transpose(1, 2)
    return (
        (gram_LEE - torch.eye(gram_LEE.shape[-1], dtype=gram_LEE.dtype, device=gram_LEE.device)).square().mean((1, 2))
    )


def _stacked(routers: Sequence[Router]) -> Tensor:
    return torch.stack([router.weight_ED for router in routers])


def _trains(routers: Sequence[Router]) -> bool:
    return any(router.weight_ED.requires_grad for router in routers)


def _any(weights: object) -> bool:
    return any(vars(weights).values())
