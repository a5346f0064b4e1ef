"""Mixture of experts with two pools.

    y_t  =  shared(x_t)  +  sum_k  weight[t,k] * expert_{id[t,k]}(x_t)

Text tokens choose among the text experts, image and video tokens (placeholders and their start/end tokens) among the
vision experts; the pools never mix. Read top to bottom: `Router` chooses, `sort_by_expert` lays the chosen rows of both
pools out expert by expert, `Experts` multiplies, `combine` adds the results back, `MoE` puts the four together.

    token       a  b [img] c            text experts 0..E-1 are 0..E-1, vision experts E..2E-1
    expert_TK  20 31  6 5  31           K = 2, E = 4
    rows        a0 b1 c1 a2 b3 c3 | [img]5 [img]6

Nothing here knows how many devices exist: expert parallelism replaces one function, `MoE.route`
(expert_parallel.py). Where ranks wait for each other, a parameter that is used on one of them must be used on all:
`join` calls both pools, and a pool without rows gives its weights a gradient of zero (`touch`).

Shape letters:  T tokens   D model width   F expert hidden width   E experts of a pool   K experts per token
                R = T*K routed rows, grouped by expert, text pool first   U rows of one pool
Source: reference 2.8, 2.9.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ernie_model.config import ErnieConfig
from ernie_model.layers import SwiGLU, silu_mul, touch


class Pools(NamedTuple):
    """Which tokens belong to the vision pool."""

    vision_T: Tensor  # bool
    num_vision: int
    """Their number, on the host: it is read once per forward, so that no layer has to wait for the device."""
    join: bool = False
    """Some rank has tokens for the vision pool: every rank calls both pools, whatever its own tokens are."""
    stats: bool = True
    """Count what the routers did."""
    visited: list[Tensor] | None = None
    """Every sparse layer appends its (T, K) experts,"""
    chosen: list[Tensor] | None = None
    """and those that its routers would have chosen."""
    replay_TK: Tensor | None = None
    """int16, of one layer: the experts that tokens must visit, numbered as in `Routing`; -1: the router chooses."""


class Routing(NamedTuple):
    """Which experts each token visits, and how much each one counts."""

    expert_TK: Tensor  # int64 in [0, 2E): vision experts come after the text experts
    weight_TK: Tensor  # float32 (float64 in a float64 model)
    num_vision: int
    join: bool = False
    """As in `Pools`."""


class RouterStats(NamedTuple):
    """What the router did; index 0 is the text pool, 1 the vision pool. In the router's dtype.

    Sums over the pool's tokens, so that micro-batches and ranks add up; divide by `token_2` for means. `prob_2E` and
    `square_2` carry gradient, for the losses of routers; whoever keeps them for longer detaches them.
    """

    token_2: Tensor  # tokens of each pool
    count_2E: Tensor  # how many tokens chose each expert; a row sums to tokens * K
    preferred_2E: Tensor  # the same for a choice by probability alone, as if there were no correction bias
    prob_2E: Tensor  # sum of softmax probabilities
    entropy_2: Tensor  # sum of the entropies of the softmax, in nats
    square_2: Tensor  # sum of the squared logsumexp of the router's logits

    def detach(self) -> "RouterStats":
        return RouterStats(*(value.detach() for value in self))

    def plus(self, other: "RouterStats") -> "RouterStats":
        return RouterStats(*map(torch.add, self, other))

    @staticmethod
    def stack(layers: "list[RouterStats]") -> "RouterStats":
        """One leading dimension for the layers."""
        return RouterStats(*(torch.stack(values) for values in zip(*layers, strict=True)))


def check_replay(replay_TLK: Tensor, vision_T: Tensor, num_experts: int) -> None:
    """Waits for the device.

    Raises:
        ValueError: a token is to visit experts that it cannot, some twice, or fewer than the others.
    """
    first_T11 = (vision_T * num_experts)[:, None, None]
    of_pool_TL = ((replay_TLK >= first_T11) & (replay_TLK < first_T11 + num_experts)).all(-1)
    twice_TL = (replay_TLK.sort(-1).values.diff(dim=-1) == 0).any(-1)
    right_TL = (of_pool_TL & ~twice_TL) | (replay_TLK == -1).all(-1)
    if right_TL.all():
        return
    token, layer = (~right_TL).nonzero()[0].tolist()
    pool, first = ("vision", num_experts) if vision_T[token] else ("text", 0)
    raise ValueError(
        f"token {token}, of the {pool} pool, is to visit experts {replay_TLK[token, layer].tolist()} in sparse layer "
        f"{layer}; they must be {replay_TLK.shape[2]} different ones from {first} to {first + num_experts - 1}, or all "
        "-1 where they are not known."
    )


class Rows(NamedTuple):
    """Routed (token, expert) pairs, sorted by expert. `x_TD[token_R]` is the experts' input."""

    token_R: Tensor  # int64: the token of each row; token 0 stands in where a row is padding
    place_TK: Tensor  # int64: choice (t, k) sits in row place_TK[t, k]
    count_X: Tensor  # int64: rows per expert with padding, all experts of both pools; sums to R
    num_text: int
    """The first rows, which belong to the text pool."""


class Router(nn.Module):
    """Scores one pool's experts, in float32: near-ties decide routing, and bfloat16 has many ties."""

    def __init__(self, config: ErnieConfig):
        super().__init__()
        self.weight_ED = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, dtype=torch.float32))
        self.correction_bias_E: Tensor
        self.register_buffer("correction_bias_E", torch.zeros(config.num_experts, dtype=torch.float32))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Logits (T, E) of a router whose weight is never rounded."""
        return F.linear(x_TD, self.weight_ED.to(x_TD.dtype))


class Experts(nn.Module):
    """E independent SwiGLU networks over rows that are already grouped by expert."""

    def __init__(self, num_experts: int, width: int, hidden: int):
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_EFD = nn.Parameter(torch.empty(num_experts, 2 * hidden, width))  # gate rows, then up rows
        self.down_EDF = nn.Parameter(torch.empty(num_experts, width, hidden))

    def forward(self, x_UD: Tensor, count_E: Tensor) -> Tensor:
        if not x_UD.shape[0]:
            return touch(x_UD, self.gate_up_EFD, self.down_EDF)
        gate_UF, up_UF = grouped_linear(x_UD, self.gate_up_EFD, count_E).chunk(2, dim=-1)
        return grouped_linear(silu_mul(gate_UF, up_UF), self.down_EDF, count_E)


def grouped_linear(x_RI: Tensor, weight_EOI: Tensor, count_E: Tensor) -> Tensor:
    """Rows of expert e times `weight_EOI[e]` transposed; rows lie expert by expert.

    `grouped_mm` where it exists for the dtype and layout (16-byte rows), else one matmul per expert that has rows.
    """
    weight_EOI = weight_EOI if weight_EOI.dtype == x_RI.dtype else weight_EOI.to(x_RI.dtype)
    aligned = all(size * x_RI.element_size() % 16 == 0 for size in weight_EOI.shape[1:])
    if aligned and x_RI.dtype in (torch.float32, torch.bfloat16, torch.float16):
        offset_E = count_E.cumsum(0, dtype=torch.int32)
        return F.grouped_mm(x_RI, weight_EOI.transpose(-2, -1), offs=offset_E)
    counts = count_E.tolist()
    rows = zip(x_RI.split(counts), weight_EOI.unbind(), strict=True)
    # unbind, not indexing: its gradient is one stack instead of one zero-filled copy of all experts per expert
    return torch.cat([F.linear(x, weight) for x, weight in rows if x.shape[0]])


def sort_by_expert(routing: Routing, num_experts: int, *, multiple: int = 1) -> Rows:
    """Lay (T, K) choices out as R rows ordered by expert; ties keep token order. One sort serves both pools.

    Each expert's rows are padded to a `multiple`; padding costs work but no accuracy (nothing reads its results).
    """
    tokens, choices = routing.expert_TK.shape
    sorted_R, order = routing.expert_TK.flatten().sort(stable=True)
    count_X = torch.searchsorted(sorted_R, torch.arange(1 + num_experts, device=order.device)).diff()
    row = torch.arange(tokens * choices, device=order.device)
    num_rows, num_text = tokens * choices, (tokens - routing.num_vision) * choices
    if multiple > 1:
        padded_X = (count_X + multiple - 1) // multiple * multiple
        shift_X = (padded_X - count_X).cumsum(0) - (padded_X - count_X)  # padding before each expert's first row
        row = row + shift_X[sorted_R]
        count_X, num_rows = padded_X, int(padded_X.sum())
        num_text = int(padded_X[: num_experts // 2].sum()) if routing.num_vision else num_rows
    place = torch.empty_like(order)
    place[order] = row
    token_R = order.new_zeros(num_rows)
    token_R[row] = order // choices
    return Rows(token_R, place.view(tokens, choices), count_X, num_text)


class _Dispatch(torch.autograd.Function):
    """x_TD -> the row of every choice. The gradient gathers a token's K rows and adds them: no scatter."""

    @staticmethod
    def forward(ctx, x_TD, token_R, place_TK):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(place_TK)
        return x_TD.index_select(0, token_R)

    @staticmethod
    def backward(ctx, grad_RD):  # pyright: ignore[reportIncompatibleMethodOverride]
        (place_TK,) = ctx.saved_tensors
        return _rows_of_tokens(grad_RD, place_TK).sum(1), None, None


class _Combine(torch.autograd.Function):
    """Weight every row and add a token's K rows. The inverse of `_Dispatch`, with the same two gathers."""

    @staticmethod
    def forward(ctx, y_RD, weight_TK, token_R, place_TK):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(y_RD, weight_TK, token_R, place_TK)
        # Weights are rounded to the activations' dtype and the K products summed in one reduction (reference 2.8).
        return (_rows_of_tokens(y_RD, place_TK).mul_(weight_TK.to(y_RD.dtype)[..., None])).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD):  # pyright: ignore[reportIncompatibleMethodOverride]
        y_RD, weight_TK, token_R, place_TK = ctx.saved_tensors
        weight_R = y_RD.new_zeros(y_RD.shape[0])  # 0 for padding: it sends nothing back
        weight_R[place_TK] = weight_TK.to(y_RD.dtype)
        grad_RD = grad_TD.index_select(0, token_R)
        grad_weight_R = (grad_RD * y_RD).sum(-1, dtype=weight_TK.dtype)
        return grad_RD.mul_(weight_R[:, None]), grad_weight_R[place_TK], None, None


def _rows_of_tokens(y_RD: Tensor, place_TK: Tensor) -> Tensor:
    return y_RD.index_select(0, place_TK.flatten()).unflatten(0, place_TK.shape)


def dispatch(x_TD: Tensor, rows: Rows) -> Tensor:
    """(T, D) -> (R, D), grouped by expert."""
    return _Dispatch.apply(x_TD, rows.token_R, rows.place_TK)  # pyright: ignore[reportReturnType]


def combine(y_RD: Tensor, weight_TK: Tensor, rows: Rows) -> Tensor:
    """(R, D) -> (T, D): weight each row and add it back to its token."""
    return _Combine.apply(y_RD, weight_TK, rows.token_R, rows.place_TK)  # pyright: ignore[reportReturnType]


CPU_ROWS = 32


def _prefers_few_shapes(x_TD: Tensor) -> bool:
    """On the CPU, low-precision products compile a kernel for every new shape, which costs more than the product."""
    return x_TD.device.type == "cpu" and x_TD.dtype in (torch.bfloat16, torch.float16)


def row_multiple(x_TD: Tensor) -> int:
    """To what the rows of each expert are padded."""
    return CPU_ROWS if _prefers_few_shapes(x_TD) else 1


def route_local(x_TD: Tensor, routing: Routing, text: Experts, vision: Experts | None, shared: SwiGLU | None) -> Tensor:
    """Send every token through its experts and the shared ones; all experts of both pools live on this device."""
    num_experts = text.num_experts
    rows = sort_by_expert(routing, num_experts * (1 if vision is None else 2), multiple=row_multiple(x_TD))
    x_RD = dispatch(x_TD, rows)
    if vision is None or (rows.num_text == x_RD.shape[0] and not routing.join):
        y_RD = text(x_RD, rows.count_X[:num_experts])
    elif rows.num_text == 0 and not routing.join:
        y_RD = vision(x_RD, rows.count_X[num_experts:])
    else:
        x_text, x_vision = x_RD.split([rows.num_text, x_RD.shape[0] - rows.num_text])
        parts = text(x_text, rows.count_X[:num_experts]), vision(x_vision, rows.count_X[num_experts:])
        y_RD = torch.cat(parts)
    y_TD = combine(y_RD, routing.weight_TK, rows)
    return y_TD if shared is None else y_TD + shared(x_TD)


Route = Callable[[Tensor, Routing, Experts, "Experts | None", "SwiGLU | None"], Tensor]
"""(x_TD, routing, text, vision, shared) -> y_TD. The shared experts come along, so that whoever waits for rows from
other ranks has something to compute meanwhile."""


class Pool(nn.Module):
    """One modality's router and experts."""

    def __init__(self, config: ErnieConfig, hidden: int):
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config.num_experts, config.hidden_size, hidden)


class MoE(nn.Module):
    """Both pools and the shared experts that every token visits."""

    def __init__(self, config: ErnieConfig):
        super().__init__()
        self.experts_per_token = config.experts_per_token
        self.num_experts = config.num_experts
        self.norm_min = config.moe_norm_min
        self.text = Pool(config, config.text_expert_width)
        self.vision = Pool(config, config.vision_expert_width) if config.vision_expert_width else None
        shared = config.num_shared_experts * config.text_expert_width
        self.shared_experts = SwiGLU(config.hidden_size, shared, bias=config.use_bias) if shared else None
        self.route: Route = route_local  # the seam: expert parallelism swaps this function

    def forward(self, x_TD: Tensor, pools: Pools) -> tuple[Tensor, RouterStats | None]:
        routing, stats = self.choose(x_TD, pools)
        vision = self.vision.experts if self.vision is not None else None
        return self.route(x_TD, routing, self.text.experts, vision, self.shared_experts), stats

    def choose(self, x_TD: Tensor, pools: Pools) -> tuple[Routing, RouterStats | None]:
        """Softmax over the token's own pool; the K best by probability + correction bias; weights without the bias.

        Where experts are replayed, weights are the probabilities of those, over their sum: softmax restricted to them,
        whose gradient reaches the router. The bias has no part in it (router replay: arXiv 2510.11370, reference 6.3).
        """
        score_TD = x_TD if x_TD.dtype == torch.float64 else x_TD.float()
        logit_TE = self.text.router(score_TD)
        bias = self.text.router.correction_bias_E
        offset: Tensor | int = 0
        if self.vision is not None and (pools.num_vision or pools.join):
            vision_T1 = pools.vision_T[:, None]
            logit_TE = torch.where(vision_T1, self.vision.router(score_TD), logit_TE)
            bias = torch.where(vision_T1, self.vision.router.correction_bias_E, bias)
            offset = vision_T1 * self.num_experts
        prob_TE = logit_TE.softmax(dim=-1)
        chosen_TK = (prob_TE.detach() + bias).topk(self.experts_per_token, dim=-1).indices
        if pools.chosen is not None:
            pools.chosen.append(chosen_TK + offset)
        if pools.replay_TK is not None:
            chosen_TK = torch.where(pools.replay_TK >= 0, pools.replay_TK - offset, chosen_TK)
        weight_TK = prob_TE.gather(1, chosen_TK)
        weight_TK = self.shares(weight_TK)
        expert_TK = chosen_TK if isinstance(offset, int) else chosen_TK + offset
        if pools.visited is not None:
            pools.visited.append(expert_TK)
        routing = Routing(expert_TK, weight_TK, pools.num_vision, pools.join)
        if not pools.stats:
            return routing, None
        preferred_TK = prob_TE.detach().topk(self.experts_per_token, dim=-1).indices + offset
        return routing, self._stats(logit_TE, prob_TE, routing.expert_TK, preferred_TK, pools)

    def shares(self, prob_TK: Tensor) -> Tensor:
        """Probabilities of the chosen experts over their sum."""
        return prob_TK / prob_TK.sum(dim=-1, keepdim=True).clamp(min=self.norm_min)

    def _stats(
        self, logit_TE: Tensor, prob_TE: Tensor, expert_TK: Tensor, preferred_TK: Tensor, pools: Pools
    ) -> RouterStats:
        vision_T = pools.vision_T.to(logit_TE.dtype)
        member_2T = torch.stack((1 - vision_T, vision_T))
        logsumexp_T = logit_TE.logsumexp(-1)

        def counted(choice_TK: Tensor) -> Tensor:
            chosen = choice_TK.flatten()  # not bincount: it waits for the device to know the largest entry
            count = chosen.new_zeros(2 * self.num_experts).scatter_add_(0, chosen, torch.ones_like(chosen))
            return count.view(2, -1).to(logit_TE.dtype)

        with torch.no_grad():
            # entropy = -sum p log p = logsumexp - sum p * logit
            entropy_T = logsumexp_T - (prob_TE * logit_TE).sum(-1)
        return RouterStats(
            token_2=member_2T.sum(1),
            count_2E=counted(expert_TK),
            preferred_2E=counted(preferred_TK),
            prob_2E=member_2T @ prob_TE,
            entropy_2=member_2T @ entropy_T,
            square_2=member_2T @ logsumexp_T.square(),
        )
