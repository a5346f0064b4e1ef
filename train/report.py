"""What a run says: its arithmetic before the first step, and its result at the end."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from data.quarantine import Quarantine
from ernie_model.model import ErnieModel
from ernie_model.parts import Part
from train.build import arithmetic, human
from train.checkpoint import Saved
from train.config import TrainingConfig
from train.loop import TrainState
from train.memory import held_bytes
from train.parallel.layout import Layout
from train.score import Score
from train.sources import Data, Told
from train.trained import MOMENT_BYTES, PartRow, trained_parts


def opening(
    console: Console,
    config: TrainingConfig,
    model: ErnieModel,
    data: Data,
    *,
    steps: int,
    layout: Layout,
    device: torch.device,
    notes: Sequence[str],
    update: str | None = None,
) -> None:
    """The arithmetic of the run, so that a wrong setting is seen before it costs an hour.

    Args:
        update: what one goes through, where that is not data.accumulation rows.
    """
    sums = arithmetic(
        model,
        config.model,
        max_tokens=config.data.max_tokens,
        max_patches=config.data.max_patches,
        accumulation=config.data.accumulation,
        parallel=config.parallel,
        ranks=layout.world,
        device=device,
    )
    active = f"{human(sums.active_text)} active per text token"
    if sums.active_vision:
        active += f", {human(sums.active_vision)} per image token"
    start = config.model.checkpoint or f"random weights, seed {config.run.seed}"
    heldout = "none held out" if data.heldout is None else f"{len(data.heldout)} held out"
    total = f"{steps} updates"
    if update is None:
        plural = "s" if layout.data_world > 1 else ""
        who = f"rank{plural}" if layout.sequence == 1 else f"group{plural} of {layout.sequence} ranks that share a row"
        update = (
            f"{config.data.max_tokens} tokens per row x {config.data.accumulation} rows x {layout.data_world} {who}"
        )
        update += f" = {sums.largest_update_tokens} tokens at most"
        total += f", {human(steps * sums.largest_update_tokens)} tokens at most"
    memory = f"about {human(sums.memory.peak, 'B')} on each rank at the highest point of a step, "
    memory += f"{human(sums.memory.state, 'B')} of it for weights, gradients and AdamW"
    if device.type == "cpu" and (held := held_bytes()):
        # what is held now includes the weights
        in_all = held + sums.memory.process - sums.memory.weights
        memory += f"; {human(in_all, 'B')} in all with Python, its libraries and the C library's gaps"
    lines = {
        "model": f"{config.model.name or start}: {human(sums.total)} parameters, {active}",
        "start": start,
        "data": f"{data.train.describe()}, {heldout}",
        "update": update,
        "run": f"{total}; {config.model.precision.value} on {device}",
        "memory": memory,
        "folder": config.run.folder,
    }
    for name, text in lines.items():
        console.print(f"{name:<9} {text}")
    console.print(parts_table(trained_parts(model, config.optim), config.optim.weight_decay))
    if config.model.offload_activations and device.type == "cpu":
        notes = (*notes, "model.offload_activations changes nothing on a CPU: activations are in host memory anyway.")
    for note in notes:
        console.print(f"note      {note}")


def parts_table(rows: Sequence[PartRow], weight_decay: float) -> Table:
    """What trains, at what rate, and what the optimizer keeps for it."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("part", "parameters", "trained", "peak lr", f"decay {weight_decay:g}", "optimizer"):
        table.add_column(name, justify="left" if name == "part" else "right")

    def share(count: int, whole: int) -> str:
        return "no" if not count else "all" if count == whole else human(count)

    for row in rows:
        low, high = row.lr or (0.0, 0.0)
        rate = "" if row.lr is None else f"{high:.2g}" if low == high else f"{low:.2g} to {high:.2g}"
        decayed = share(row.decayed, row.trained) if row.trained else ""
        memory = human(row.optimizer_bytes, "B") if row.trained else ""
        trained = share(row.trained, row.parameters)
        table.add_row(row.part.value, human(row.parameters), trained, rate, decayed, memory)
    table.add_section()
    total, trained = (sum(getattr(row, name) for row in rows) for name in ("parameters", "trained"))
    table.add_row("in all", human(total), share(trained, total), "", "", human(MOMENT_BYTES * trained, "B"))
    return table


def saved_line(saved: Saved) -> str:
    return f"saved {saved.path}: {human(saved.num_bytes, 'B')} in {saved.seconds:.1f} s"


def nonfinite_line(entry: dict) -> str:
    """See train.ledger.nonfinite_entry."""
    text = f"step {entry['step']}: left out, its loss or a gradient was not finite; "
    if entry["records"]:
        return text + f"loss of {_some(entry['records'])}"
    return text + f"gradients of {', '.join(entry['gradients'])}; its records: {_some(entry['suspects'])}"


def spike_line(entry: dict) -> str:
    """See train.ledger.spike_entry."""
    worst = _some([f"{record} ({loss:.3g})" for record, loss in entry["records"]])
    return f"step {entry['step']}: the loss is {entry['loss']:.3g}, usually {entry['usual']:.3g}; highest in {worst}"


def _some(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def resumed_line(path: Path | None, state: TrainState, steps: int) -> str:
    return f"resuming from {path}: step {state.step} of {steps}, {state.tokens_seen:,} tokens seen"


def closing(
    console: Console, state: TrainState, score: type[Score], folders: Sequence[Path], unreached: Sequence[Part]
) -> None:
    """What was measured before and after, what learned nothing, and where the weights are.

    Args:
        score: what the entries of `state.evaluations` are made of.
        unreached: see train.reach.unreached_parts.
    """
    if state.evaluations:
        table = Table(*score.HEADER)
        for name, entry in (("before training", state.evaluations[0]), ("after training", state.evaluations[-1])):
            table.add_row(name, *score(**{key: entry[key] for key in entry.keys() - {"step", "accuracy"}}).cells())
        console.print(table)
    if state.skipped:
        console.print(f"skipped   {state.skipped} updates whose loss or gradient was not finite")
    if unreached and not state.reached:
        console.print("note      no update had a gradient other than zero, so nothing was learned.")
    elif unreached:
        names = ", ".join(part.value for part in unreached)
        console.print(f"note      no gradient ever reached {names}: nothing was learned there. Is it in the data?")
    kinds = {"adapter": "an adapter for peft and peft.init_from=..."}
    for folder in folders:
        kind = kinds.get(folder.name, "a folder for transformers, vLLM and model.checkpoint=...")
        console.print(f"weights   {folder}   ({kind})")


def left_out(console: Console, stream: Told, quarantine: Quarantine) -> None:
    """How full the rows were, and what no row holds."""
    console.print(f"rows      {stream.line()}")
    if refused := len(quarantine):
        records = "record was" if refused == 1 else "records were"
        console.print(f"left out  {refused} {records} refused; {quarantine.path} says which and why")
