"""Estimates for people."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ernie_model.config import ErnieConfig
from train.build import human
from train.checks.cost import duration
from train.config import HeldIn, TrainingConfig
from train.planning.estimate import Estimate, cache_bytes
from train.planning.search import Found

NEAREST = 3
"""Layouts that do not fit, of which the reason is told."""


def overrides(config: TrainingConfig) -> str:
    """A layout as it is typed."""
    p = config.parallel
    words = [f"parallel.zero={p.zero}"]
    if p.expert > 1:
        words.append(f"parallel.expert={p.expert}")
    if p.sequence > 1:
        words.append(f"parallel.sequence={p.sequence}")
    if p.held_in is HeldIn.bfloat16:
        words.append("parallel.held_in=bfloat16")
    words += [f"parallel.{key}=true" for key in ("offload_optimizer", "offload_weights") if getattr(p, key)]
    words.append(f"model.recompute={config.model.recompute.value}")
    return " ".join(
        [*words, f"data.max_tokens={config.data.max_tokens}", f"data.accumulation={config.data.accumulation}"]
    )


def show_one(console: Console, one: Estimate, architecture: ErnieConfig) -> None:
    """Memory, traffic and time of one layout."""
    memory, traffic, pace, plan = one.memory, one.traffic, one.pace, one.config.plan
    table = _table("memory of each rank", "bytes", "")
    for name, size, note in (
        ("weights", memory.weights, ""),
        ("gradients", memory.gradients, ""),
        ("optimizer", memory.optimizer, ""),
        ("buckets", memory.buckets, "DeepSpeed's, for what travels"),
        ("gathered", memory.gathered, "weights of the layer at work, and those kept for reuse"),
        ("activations", memory.activations, f"{human(memory.logits, 'B')} of them chunks of logits"),
    ):
        table.add_row(name, human(size, "B"), note)
    if one.reference:
        table.add_row("reference", human(one.reference, "B"), "a second model that stays as it is, or follows")
    each = f"{human(cache_bytes(one.config, architecture), 'B')} a token"
    answers = f"{each}; {plan.answers} answers of {plan.answer_tokens} tokens" if plan.answers else each
    table.add_row("KV cache", human(one.cache, "B"), answers)
    table.add_section()
    table.add_row("highest point", human(one.needed, "B"), f"of {human(one.room, 'B')} ({plan.reserve:.0%} kept free)")
    if memory.host:
        node = f"{human(one.host_of_node, 'B')} on a node that has {plan.host_gb:g} GB"
        table.add_row("host memory", human(memory.host, "B"), node)
    console.print(table)

    table = _table("an update", "sent by each rank", "seconds", "")
    for name, sent, seconds, note in (
        ("products", None, pace.products, f"{pace.flops:.3g} operations of the model on each rank"),
        ("experts", traffic.experts, pace.experts, "all-to-all, beyond the shared experts"),
        ("sequence", traffic.sequence, pace.sequence, "heads of attention, between the ranks of a row"),
        ("gradients", traffic.gradients, pace.gradients, "beyond the backward pass"),
        ("weights", traffic.weights, pace.gathers, "gathered; nothing hides it"),
        ("optimizer", None, pace.update, ""),
        ("in all", None, pace.seconds, f"{pace.tokens:,} tokens, {pace.tokens_per_s:,.0f} a second"),
    ):
        table.add_row(name, "" if sent is None else human(sent, "B"), f"{seconds:.3g}", note)
    console.print(table)
    seconds = one.checkpoint / (plan.disk_gb_s * 1e9)
    console.print(f"{'checkpoint':<12} {human(one.checkpoint, 'B')} in all, {duration(seconds)} to write")
    console.print(f"{'fits':<12} {'no: ' + one.obstacle if one.obstacle else 'yes'}", markup=False)


def show_found(console: Console, found: Found, most: int) -> None:
    table = _table("layout", "recompute", "row", "state", "activations", "peak", "s/update", "tokens/s", "exchanging")
    for one in found.fitting[:most]:
        memory, pace = one.memory, one.pace
        table.add_row(
            brief(one.config),
            one.config.model.recompute.value,
            f"{one.config.data.max_tokens} x {one.config.data.accumulation}",
            *(human(size, "B") for size in (memory.state, memory.activations, one.needed)),
            f"{pace.seconds:.3g}",
            f"{pace.tokens_per_s:,.0f}",
            f"{1 - (pace.products + pace.update) / pace.seconds:.0%}",
        )
    console.print(table)
    if found.fitting:
        console.print(f"{'fastest':<12} {overrides(found.fitting[0].config)}", markup=False)
    for one in found.missing[:NEAREST]:
        console.print(f"{'not':<12} {brief(one.config)}: {one.obstacle}", markup=False)


def brief(config: TrainingConfig) -> str:
    """The part of `overrides` that is the layout: zero=2 expert=8 bf16 offload=optimizer."""
    p = config.parallel
    words = [f"zero={p.zero} expert={p.expert}"]
    if p.held_in is HeldIn.bfloat16:
        words.append("bf16")
    away = [name for name in ("optimizer", "weights") if getattr(p, f"offload_{name}")]
    return " ".join(words + ([f"offload={'+'.join(away)}"] if away else []))


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(first)
    for name in columns:
        table.add_column(name, justify="left" if not name else "right")
    return table


def days(tokens: float, estimates: Sequence[Estimate]) -> str:
    return f"{human(tokens)} tokens take {duration(tokens / estimates[0].pace.tokens_per_s)}"
