"""The only training loop.

    count targets over all micro-batches and ranks
    for each micro-batch:   policy(batch) → objective → backward          gradients add up, ranks meet on the last one
    clip → update → report → maybe evaluate → maybe save

It knows a policy (packed batch in, log-probabilities out), an objective (log-probabilities to a sum), a source
(where batches come from), what goes on beside the objective (`Beside`) and who turns gradients into an update
(`Updates`), and nothing about any algorithm or layout.
"""

import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from data.batch import PackedBatch
from data.pack import filler
from ernie_model.moe import RouterStats
from ernie_model.rope import num_media_tokens
from train.config import UserError
from train.ledger import WINDOW, Evidence, is_spike
from train.objectives import Objective
from train.parallel.updates import Updates
from train.policy import PolicyOutput, on_device


@dataclass
class TrainState:
    """What the loop itself must remember. Model, optimizer and source save their own state."""

    step: int = 0
    """Updates done, skipped ones included."""
    tokens_seen: int = 0
    skipped: int = 0
    """Updates left out because the loss or a gradient was not finite."""
    evaluations: list[dict[str, float]] = field(default_factory=list)
    """One entry per evaluation, oldest first: {"step": ..., "accuracy": ..., ...}."""
    recent: list[float] = field(default_factory=list)
    """The last losses, for what is called a spike."""
    reached: list[str] = field(default_factory=list)
    """Parts of the model (values of `Part`) that have had a gradient other than zero."""


class Interrupted(Exception):
    """The process was asked to end, and something long was dropped in the middle. Raised on all ranks; everything
    stands as the last update left it."""


class Source(Protocol):
    """Where batches come from."""

    def next_step(self) -> list[PackedBatch]:
        """This rank's micro-batches of the next update. Ranks may have different numbers of them.

        Raises:
            Interrupted: what a later start draws is what would have been drawn now.
        """
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Beside:
    """What an update does beside its objective: losses of routers, a record of their choices. Here, nothing."""

    def before(self, microbatches: Sequence[PackedBatch]) -> None:
        """Before the first forward; `microbatches` are this rank's, on the host."""

    def streams(self, microbatches: Sequence[PackedBatch]) -> Sequence[PackedBatch]:
        """The same rows, with the streams that take a forward pass of their own: log-probabilities of a reference.

        All ranks have equally many rows.
        """
        return microbatches

    def terms(self, batch: PackedBatch, output: PolicyOutput) -> Tensor | float:
        """After each forward: this micro-batch's share of a loss over the whole update, with gradient."""
        return 0.0

    def sums(self) -> Tensor | None:
        """This rank's numbers to report (N,), on the device. They travel with everything else that is reported."""
        return None

    def report(self, sums: Tensor) -> dict[str, float]:
        """What to report, from `sums` added over ranks, float64 on the host."""
        return {}

    def after_update(self, optimizer: torch.optim.Optimizer, router: RouterStats | None) -> None:
        """The optimizer has stepped; not called for an update that is left out.

        `router`: of the whole update, summed over micro-batches and ranks, float64 on the host.
        """


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The numbers `fit` needs."""

    steps: int
    learning_rate: Callable[[int], float]
    """Of update `step`, counted from 0."""
    max_grad_norm: float
    max_skipped: int
    spike: float | None = None
    log_every: int = 1
    save_every: int = 0
    evaluate_every: int = 0
    peak_flops: float | None = None
    """Operations per second that all devices together could do; with it, the share reached is reported."""


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What happens around the updates. All ranks call all of them."""

    log: Callable[[int, dict[str, float]], None]
    save: Callable[[TrainState], None]
    evaluate: Callable[[TrainState], None]
    """May raise `Interrupted`."""
    saw: Callable[[int, Sequence[PackedBatch]], None] = lambda step, microbatches: None
    """These are this rank's rows of the update."""
    nonfinite: Callable[[int, dict[str, float], Evidence], None] = lambda step, metrics, evidence: None
    """The update was left out because a loss or a gradient was not finite."""
    spiked: Callable[[int, float, float, Evidence], None] = lambda step, loss, usual, evidence: None
    """The loss lies far above `usual`, the median of the last ones."""
    stop: Callable[[], bool] = lambda: False
    """Has somebody asked this process to end (SIGTERM)?"""


def fit(
    updates: Updates,
    objective: Objective,
    source: Source,
    state: TrainState,
    *,
    accelerator: Accelerator,
    plan: Plan,
    hooks: Hooks,
    beside: Sequence[Beside] = (),
) -> bool:
    """Train until `plan.steps` updates are done. Returns False when it was asked to stop: something is left to do.

    Raises:
        UserError: more than `plan.max_skipped` updates were not finite.
    """
    updates.policy.train()
    clock = Clock(state.step, plan.steps, plan.peak_flops)
    saved = state.step
    """Where another start would go on: at first, where this one did."""

    def save() -> None:
        nonlocal saved
        hooks.save(state)
        saved = state.step

    try:
        if evaluation_is_due(state, plan):  # the run was stopped before it
            hooks.evaluate(state)
        while state.step < plan.steps:
            clock.start()
            microbatches = source.next_step()
            clock.data_arrived()
            lr = plan.learning_rate(state.step)
            for group in updates.optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            evidence = Evidence()
            metrics = train_step(
                updates,
                objective,
                microbatches,
                accelerator=accelerator,
                max_grad_norm=plan.max_grad_norm,
                beside=beside,
                evidence=evidence,
            )
            state.step += 1
            state.tokens_seen += int(metrics["tokens"])
            hooks.saw(state.step, microbatches)
            if state.step % plan.log_every == 0 or state.step in (1, plan.steps):
                hooks.log(state.step, {**metrics, "lr": lr, **clock.speed(state.step, metrics)})
            watch(state, metrics, evidence, plan, hooks)
            # Asked before the evaluation, which may take longer than a process that must end is given.
            stopping = any_rank(accelerator, hooks.stop())
            if not stopping and evaluation_is_due(state, plan):
                hooks.evaluate(state)
                stopping = any_rank(accelerator, hooks.stop())
            last = state.step == plan.steps
            if last or stopping or (plan.save_every and state.step % plan.save_every == 0):
                save()
            if stopping:
                return False
    except Interrupted:
        if state.step > saved:
            save()
        return False
    return True


def evaluation_is_due(state: TrainState, plan: Plan) -> bool:
    """At this step, and not done: an orderly stop leaves it to the start that goes on."""
    if state.step == 0 or (state.evaluations and state.evaluations[-1]["step"] == state.step):
        return False
    return state.step == plan.steps or bool(plan.evaluate_every and state.step % plan.evaluate_every == 0)


def watch(state: TrainState, metrics: dict[str, float], evidence: Evidence, plan: Plan, hooks: Hooks) -> None:
    """Count and report what went wrong in an update.

    Raises:
        UserError: more than `plan.max_skipped` updates were not finite.
    """
    if metrics["skipped"]:
        if metrics["units"] == 0:  # nothing to learn: left out too, and nobody's fault
            return
        state.skipped += 1
        hooks.nonfinite(state.step, metrics, evidence)
        if state.skipped > plan.max_skipped:
            raise UserError(
                f"step {state.step}: the loss or a gradient was not finite, for the {state.skipped}. time; "
                f"optim.max_skipped allows {plan.max_skipped}. nonfinite.jsonl in the run folder names the records and "
                "the parts of the model. Mend or remove the records, or lower optim.lr or optim.max_grad_norm. The "
                "last checkpoint is untouched."
            )
        return
    if plan.spike is not None and is_spike(metrics["loss"], state.recent, plan.spike):
        hooks.spiked(state.step, metrics["loss"], statistics.median(state.recent), evidence)
    state.recent = [*state.recent, metrics["loss"]][-WINDOW:]


def train_step(
    updates: Updates,
    objective: Objective,
    microbatches: Sequence[PackedBatch],
    *,
    accelerator: Accelerator,
    max_grad_norm: float,
    beside: Sequence[Beside] = (),
    evidence: Evidence | None = None,
) -> dict[str, float]:
    """One update over `microbatches` of every rank. Returns global means and sums, on the host.

    The gradient is that of (sum of losses over all ranks and micro-batches) / (units over all ranks and micro-batches).
    An update whose loss or gradient is not finite, or that has nothing to learn, is left out: metrics["skipped"] is 1.

    Args:
        evidence: takes in what tells which records and parameters made an update fail.
    """
    device, ranks, layout = accelerator.device, accelerator.num_processes, updates.layout
    work = agree(accelerator, objective, microbatches, sequence=layout.sequence)
    count = work.count
    divisor = count.clamp(min=1e-9) if objective.divisor is None else torch.full_like(count, objective.divisor)
    # Where ranks meet, what one of them uses all do: weights that only media reach too, on a rank without any.
    join = layout.lockstep or (ranks > 1 and work.media)
    for part in beside:
        part.before(work.microbatches)
    microbatches = work.microbatches
    for part in beside:
        microbatches = part.streams(microbatches)
    tally, evidence = Tally(device, sequence=layout.sequence), evidence or Evidence()
    for index, batch in enumerate(microbatches):
        batch, row_R = on_device(batch, device, layout.sequence_group)
        with updates.microbatch(last=index == len(microbatches) - 1):
            output = updates.policy(batch, row_R, join=join)
            loss = objective.loss(output.logprob_T, batch)
            terms = sum(part.terms(batch, output) for part in beside)
            # Ranks *average* their gradients, so each one's share is multiplied by their number.
            updates.backward(loss.total * (ranks / divisor).to(loss.total.dtype) + ranks * terms)
        tally.add(batch, row_R, output.correct_T, loss.metrics, output.router)
        evidence.add(batch, output.logprob_T)
        del output, loss, terms  # or the next forward runs beside what is left of this graph
    grad_norm = updates.grad_norm()
    # The one wait for the device in a step: everything the host wants to know, in one transfer.
    metrics, router = tally.reduce(accelerator, count, grad_norm.to(device), beside)
    if metrics["skipped"]:
        evidence.blame(finite_gradients(updates, accelerator))
        updates.drop()
    else:
        # Only now: a norm that is not finite would make every gradient so, and hide where it came from.
        updates.step(max_grad_norm, media=work.media)
        for part in beside:
            part.after_update(updates.optimizer, router)
    return metrics


class Work(NamedTuple):
    """What all ranks know of an update before its first forward."""

    count: Tensor
    """Units over all ranks and micro-batches, float64 on the device."""
    microbatches: Sequence[PackedBatch]
    """This rank's, and rows that teach nothing until every rank has equally many."""
    media: bool
    """Some rank has an image or a video."""


def agree(
    accelerator: Accelerator, objective: Objective, microbatches: Sequence[PackedBatch], *, sequence: int = 1
) -> Work:
    """Args:
    sequence: ranks that share each row, all of which have it among theirs.
    """
    count = sum(float(objective.count(batch)) for batch in microbatches)
    media = any(batch.grids for batch in microbatches)
    mine = torch.tensor([[count, len(microbatches), media]], dtype=torch.float64)
    if accelerator.num_processes == 1:
        return Work(mine[0, 0].to(accelerator.device), microbatches, media)
    everywhere = accelerator.gather(mine.to(accelerator.device))
    assert isinstance(everywhere, Tensor)
    _, most, media = everywhere.amax(0).tolist()
    # Any word will do: nothing is learned from the row, and nothing is counted.
    extra = [filler(0)] * (int(most) - len(microbatches))
    return Work(everywhere[:, 0].sum() / sequence, [*microbatches, *extra], bool(media))


def finite_gradients(updates: Updates, accelerator: Accelerator) -> dict[str, bool]:
    """Is a parameter's gradient finite, wherever its elements lie? Those that have one."""
    place = {name: index for index, name in enumerate(updates.names)}
    seen_2N = torch.zeros(2, len(place), device=accelerator.device)  # has a gradient, and one that is not finite
    for name, gradient in updates.gradients():
        seen_2N[0, place[name]] = 1
        seen_2N[1, place[name]] = ~gradient.isfinite().all()
    has_N, bad_N = all_sum(accelerator, seen_2N).bool().tolist()
    return {name: not bad for name, has, bad in zip(place, has_N, bad_N, strict=True) if has}


def all_sum(accelerator: Accelerator, value: Tensor) -> Tensor:
    """Sum over ranks, everywhere."""
    if accelerator.num_processes == 1:
        return value
    total = accelerator.reduce(value, reduction="sum")
    assert isinstance(total, Tensor)
    return total


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """True everywhere if it is true somewhere: ranks must leave the loop together."""
    if accelerator.num_processes == 1:
        return flag
    return bool(all_sum(accelerator, torch.tensor(float(flag), device=accelerator.device)) > 0)


class Tally:
    """Sums of one step, kept on the device until `reduce`.

    Args:
        sequence: ranks that share each row, all of which add it.
    """

    def __init__(self, device: torch.device, *, sequence: int = 1):
        self.device, self.sequence = device, sequence
        self.sums: dict[str, Tensor] = {}  # by the objective; divided by its count
        self.correct = torch.zeros((), device=device)
        self.numbers = dict.fromkeys(("learned", "tokens", "text_tokens", "image_tokens", "patches"), 0)
        self.router: RouterStats | None = None

    def add(
        self,
        batch: PackedBatch,
        row_R: Tensor,
        correct_T: Tensor,
        metrics: dict[str, Tensor],
        router: RouterStats | None,
    ) -> None:
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.correct += correct_T.sum()
        media = sum(num_media_tokens(grid) for grid in batch.grids)
        patches = sum(frames * rows * columns for frames, rows, columns in batch.grids)
        tokens = 0 if batch.is_filler else batch.num_tokens
        counted = (row_R.shape[0], tokens, tokens - media, media, patches)
        for name, number in zip(self.numbers, counted, strict=True):
            self.numbers[name] += number
        if router is not None:
            # RouterStats are sums over tokens, so micro-batches and ranks add up.
            self.router = router.detach() if self.router is None else self.router.plus(router.detach())

    def reduce(
        self, accelerator: Accelerator, count: Tensor, grad_norm: Tensor, beside: Sequence[Beside] = ()
    ) -> tuple[dict[str, float], RouterStats | None]:
        """Metrics and the router's sums, over all ranks. `count` and `grad_norm` are equal on them already."""
        extra = [part.sums() for part in beside]
        groups = [
            torch.stack([*self.sums.values(), self.correct]),
            torch.tensor(list(self.numbers.values()), dtype=torch.float64, device=self.device),
            *(self.router or ()),
            *(value for value in extra if value is not None),
        ]
        summed = all_sum(accelerator, torch.cat([value.flatten().double() for value in groups]))
        # What is equal on all ranks must not be summed.
        *host, known = (
            torch.cat([summed, count[None], grad_norm.double()[None]])
            .cpu()
            .split([*(value.numel() for value in groups), 2])
        )
        losses, numbers, *others = (value.view(like.shape) for value, like in zip(host, groups, strict=True))
        losses, numbers = losses / self.sequence, numbers / self.sequence  # the routers' are of each rank's own tokens
        units, norm = known.tolist()
        metrics = {name: value / max(units, 1e-9) for name, value in zip(self.sums, losses.tolist(), strict=False)}
        counted = dict(zip(self.numbers, numbers.tolist(), strict=True))
        metrics["accuracy"] = losses[-1].item() / max(counted.pop("learned"), 1.0)
        metrics |= counted | {"units": units, "grad_norm": norm}
        router = None
        if self.router is not None:
            router, others = RouterStats(*others[: len(self.router)]), others[len(self.router) :]
            metrics |= router_summary(router)
        reporting = [part for part, value in zip(beside, extra, strict=True) if value is not None]
        for part, value in zip(reporting, others, strict=True):
            metrics |= part.report(value)
        finite = bool(torch.isfinite(losses[:-1]).all()) and math.isfinite(norm)
        metrics["skipped"] = float(not finite or units == 0)
        return metrics, router


def router_summary(stats: RouterStats) -> dict[str, float]:
    """A few numbers per pool, from sums with a leading dimension for the layers.

    imbalance: load of the busiest expert over the mean load; 1 is even, E means that one expert does everything. Mean
        over layers.
    dead: experts that no token chose, in all layers together.
    entropy: of the router's softmax, in nats, mean over tokens and layers; log(E) is undecided, 0 is certain.
    balance, z: the losses of train/router.py, mean over layers, whether they are minimised or not. An even load has
        balance K.
    """
    out: dict[str, float] = {}
    for index, pool in enumerate(("text", "vision")):
        token_L = stats.token_2[:, index]
        if not token_L.sum():
            continue
        count_LE = stats.count_2E[:, index]
        out[f"router_{pool}_imbalance"] = float((count_LE.max(1).values / count_LE.mean(1)).mean())
        out[f"router_{pool}_dead"] = float((count_LE == 0).sum())
        out[f"router_{pool}_entropy"] = float((stats.entropy_2[:, index] / token_L).mean())
        product_LE = stats.prob_2E[:, index] * stats.preferred_2E[:, index]
        out[f"router_{pool}_balance"] = float((count_LE.shape[1] * product_LE.sum(1) / token_L**2).mean())
        out[f"router_{pool}_z"] = float((stats.square_2[:, index] / token_L).mean())
    return out


class Clock:
    """How fast it goes, and how long it will take."""

    def __init__(self, first_step: int, steps: int, peak_flops: float | None = None):
        self.first_step, self.steps, self.peak_flops = first_step, steps, peak_flops
        self.begin = self.arrived = time.perf_counter()
        self.mean_s = 0.0

    def start(self) -> None:
        self.begin = time.perf_counter()

    def data_arrived(self) -> None:
        self.arrived = time.perf_counter()

    def speed(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        step_s = time.perf_counter() - self.begin
        # A running mean that forgets over about 20 steps: a process's first steps are slow and must not count long.
        weight = max(0.05, 1 / (step - self.first_step))
        self.mean_s += weight * (step_s - self.mean_s)
        rates = {
            f"{name}_per_s": metrics[name] / step_s for name in ("tokens", "text_tokens", "image_tokens", "patches")
        }
        if self.peak_flops and "flops" in metrics:
            rates["mfu"] = metrics["flops"] / step_s / self.peak_flops
        return rates | {
            "step_s": step_s,
            "data_wait": (self.arrived - self.begin) / step_s,
            "eta_s": self.mean_s * (self.steps - step),
            "memory_gb": peak_memory_gb(),
        }


def peak_memory_gb() -> float:
    """Most memory this process has held so far, in GB (10^9 bytes): of the GPU, or of the machine without one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
