"""Training, from settings to a folder of weights, whatever the algorithm. Read it top to bottom.

An algorithm (train/sft.py, train/dpo.py) says what records become, how log-probabilities become a loss, what goes on
beside it, and how held-out data is measured. Everything else of a run is here, once.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from torch import Tensor

from data.batch import PackedBatch
from data.encode import Example
from data.loader import PackedStream
from data.quarantine import Quarantine
from ernie_model.atomic import atomic_write
from ernie_model.checkpoint import CheckpointError
from ernie_model.config import ConfigError
from ernie_model.model import ErnieModel
from ernie_model.processor import Processor
from train import checkpoint, report
from train.build import build_model
from train.checkpoint import Resumable
from train.compose import plain
from train.config import (
    PeftKind,
    TrainingConfig,
    UserError,
    check_heldout,
    check_steps,
)
from train.efficiency import Work, peak_flops
from train.heldout import draw_answers
from train.ledger import Evidence, Ledger, Segment, nonfinite_entry, spike_entry
from train.loop import Beside, Hooks, Interrupted, Plan, TrainState, fit
from train.objectives import Objective
from train.optim import build_optimizer, learning_rate
from train.parallel.layout import Layout, build_accelerator, build_layout, leave
from train.parallel.partition import found_by_reading, partitioner
from train.parallel.rows import SharedSource, check_shareable
from train.parallel.settings import deepspeed_config
from train.parallel.traffic import Traffic
from train.parallel.updates import build_updates
from train.peers import Peers
from train.policy import Policy
from train.progress import Progress
from train.reach import Reach, unreached_parts
from train.run import (
    StopSignal,
    check_not_past,
    check_same_maths,
    check_same_start,
    described,
    going_on,
    open_folder,
    start_trackers,
    write_start,
)
from train.score import Score
from train.sources import Data, TrainSource, ahead, build_data, rules_of
from train.telemetry import RoutingRecord
from train.tracking import Tracker
from train.trained import freeze
from train.weights import Weights, trained_weights

ConfigT = TypeVar("ConfigT", bound=TrainingConfig)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A run that has been put together, for what an algorithm adds to it."""

    accelerator: Accelerator
    layout: Layout
    engine: dict[str, Any]
    """DeepSpeed's settings."""
    folder: Path
    model: ErnieModel
    processor: Processor
    weights: Weights
    policy: Policy
    data: Data
    state: TrainState
    steps: int
    """Updates of the whole run."""
    notes: list[str]
    """Printed before the first step; an algorithm may add to them."""


class Algorithm(Generic[ConfigT]):
    """What a run needs to know of an algorithm. Made before anything else, from the settings alone."""

    score: type[Score]

    def __init__(self, config: ConfigT):
        self.config = config

    def rows_per_update(self, layout: Layout) -> int:
        """On all ranks together; 0 where it depends on the data. A resumed run must have as many."""
        return self.config.data.accumulation * layout.data_world

    def open_data(self, processor: Processor, layout: Layout, folder: Path) -> Data:
        """What is trained on and what is held out, looked at as far as it takes to refuse what cannot work."""
        config, place = self.config, dict(rank=layout.data_rank, world=layout.data_world)
        heldout = config.evaluate.max_examples
        return build_data(config.data, processor, rules=rules_of(config), **place, folder=folder, max_heldout=heldout)

    def objective(self, rows_per_update: int) -> Objective:
        raise NotImplementedError

    def update_text(self) -> str | None:
        """What an update goes through, for people; None: data.accumulation rows."""
        return None

    def begin(self, setup: Setup) -> Sequence[Beside]:
        """What goes on beside the objective. The weights are those that training starts from."""
        raise NotImplementedError

    def start(self, setup: Setup, optimizer: Any) -> None:
        """Whatever takes a forward pass of the start weights: the engine is made, and no checkpoint loaded yet.

        Args:
            optimizer: PyTorch's, or the one of DeepSpeed's engine.
        """

    def may_stop(self, asked: Callable[[], bool]) -> None:
        """Before the first update. Has somebody asked this process, or another rank's, to end? What takes long and can
        be dropped asks now and then, and raises `Interrupted`, on all ranks."""

    def source(self, setup: Setup) -> TrainSource:
        """`setup.data.train`, ready to be drawn from: after a checkpoint's state was loaded into it."""
        assert isinstance(setup.data.train, PackedStream)
        return ahead(setup.data.train, self.config.data.prefetch)

    def resumable(self, weights: Resumable) -> Resumable:
        """The tensors of a checkpoint, from those of the trained weights."""
        return weights

    def state_dict(self) -> dict[str, Any]:
        """What else a checkpoint must hold, JSON-able. All ranks ask together."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """After the tensors. All ranks together."""

    def files(self) -> dict[str, Tensor]:
        """Tensors of this rank that a checkpoint must hold beside those of `resumable`."""
        return {}

    def load_files(self, files: Sequence[dict[str, Tensor]]) -> None:
        """What `files` gave, of every rank that there was. After `load_state_dict`."""

    def measure(self, setup: Setup) -> Score:
        """On `setup.data.heldout`, which there is. All ranks call it and get the same.

        Raises:
            Interrupted: see `may_stop`.
        """
        raise NotImplementedError

    def metrics(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """What else to report of a logged update. All ranks ask."""
        return {}

    @property
    def gives_up(self) -> str | None:
        """Why there is no use in going on, in words, after an update: the run saves, and ends. Alike on all ranks."""
        return None

    def show(self, step: int, trackers: Sequence[Tracker]) -> None:
        """After an update was logged, on all ranks: what people look at. Only the main rank has trackers."""

    def warnings(self, step: int, metrics: dict[str, float]) -> Sequence[str]:
        """What somebody who watches the run should be told about an update."""
        return ()

    def finish(self, setup: Setup, console: Console, trackers: Sequence[Tracker]) -> None:
        """After the last update, on all ranks: what people look at."""


def show_answers(
    config: TrainingConfig,
    setup: Setup,
    console: Console,
    trackers: Sequence[Tracker],
    conversation: Callable[[Example], Example] = lambda example: example,
) -> None:
    """Held-out images with the model's answers, as a picture in the run folder and the trackers. All ranks call it.

    Args:
        conversation: see `draw_answers`.
    """
    heldout, joint, step = setup.data.heldout_encoder, setup.layout.joint, setup.state.step
    if heldout is None or not (setup.accelerator.is_main_process or joint):
        return
    drawn = draw_answers(
        sheet := setup.folder / "answers.png",
        f"{config.run.name}, held out, step {step}",
        setup.model,
        setup.processor,
        heldout,
        config.evaluate,
        together=setup.accelerator if joint else None,
        conversation=conversation,
    )
    if drawn:
        console.print(f"answers   {sheet}")
        for tracker in trackers:
            tracker.log_image("answers", sheet, step)


def run(algorithm: Algorithm) -> None:
    if algorithm.config.run.debug:
        os.environ["ERNIE_DEBUG"] = "1"
    # Whatever was opened is closed, after an error too; the other ranks hear of the error first.
    with ExitStack() as at_end, Peers(described) as peers:
        train(algorithm, at_end, peers)


def train(algorithm: Algorithm, at_end: ExitStack, peers: Peers) -> None:
    config: TrainingConfig = algorithm.config
    # The parts, in order. Whatever can be wrong with the settings is found here, before the first step.
    accelerator = build_accelerator(config.parallel)
    peers.watch()
    layout = build_layout(config.parallel, accelerator)
    rank, ranks, on_main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    console = Console(quiet=not on_main, highlight=False, soft_wrap=True)
    run = open_folder(config.run, at_end, main=on_main)
    at_end.enter_context(going_on(run.folder))
    check_same_start(accelerator, run)
    settings = plain(config) | {"rows_per_update": algorithm.rows_per_update(layout)}
    saved = None if run.resume_from is None else checkpoint.read_state(run.resume_from)
    if saved is not None:
        check_same_maths(run.resume_from, saved["settings"], settings)

    frozen = config.peft.kind is not PeftKind.none
    check_shareable(config.model, layout.sequence)
    gpu = accelerator.device.type == "cuda"
    engine = deepspeed_config(config.parallel, max_grad_norm=config.optim.max_grad_norm, gpu=gpu)
    try:
        model, processor, notes = build_model(
            config.model,
            seed=config.run.seed,
            frozen=frozen,
            held_in=config.parallel.held_in,
            layout=layout,
            partition=partitioner(engine) if layout.zero == 3 else None,
        )
    except (CheckpointError, ConfigError) as error:
        if config.model.checkpoint is None:
            raise
        raise UserError(f"model.checkpoint={config.model.checkpoint}: {error}") from error
    weights = trained_weights(model, config.peft, seed=config.run.seed, base=config.model.checkpoint)
    if on_main and saved is None:
        Quarantine.start_anew(run.folder)
    accelerator.wait_for_everyone()
    data = algorithm.open_data(processor, layout, run.folder)
    steps = config.run.steps or data.train.count_steps(config.run.epochs)
    check_steps(config, steps)
    check_heldout(config, data.heldout is not None)
    model.to(accelerator.device)
    notes += freeze(model, config.optim, random=config.model.checkpoint is None)
    objective = algorithm.objective(settings["rows_per_update"])
    policy = Policy(model, loss_is_linear=objective.linear, sequence_group=layout.sequence_group)
    optimizer = build_optimizer(model, config.optim)
    state = TrainState()
    if run.resume_from is not None and saved is not None:
        data.train.load_state_dict(saved["source"])
        state = TrainState(**saved["loop"])
        check_not_past(steps, state.step, run.resume_from)
    setup = Setup(
        accelerator=accelerator,
        layout=layout,
        engine=engine,
        folder=run.folder,
        model=model,
        processor=processor,
        weights=weights,
        policy=policy,
        data=data,
        state=state,
        steps=steps,
        notes=notes,
    )
    own = algorithm.begin(setup)
    often = (config.evaluate.every, config.tracker.images_every)
    routing = RoutingRecord(
        model, run.folder if on_main else None, every=often, last=steps, step=state.step, joint=layout.joint
    )
    report.opening(
        console,
        config,
        model,
        data,
        steps=steps,
        layout=layout,
        device=accelerator.device,
        notes=notes,
        update=algorithm.update_text(),
    )
    if table := weights.table():
        console.print(table)
    updates = build_updates(policy, optimizer, accelerator, layout, engine)
    beside = [
        Traffic(model, layout, accelerator.device),  # first: what the others compute beforehand travels too
        *own,
        Work(model, model.config, accelerator.device, sequence=layout.sequence),
        Reach(updates, state.reached, accelerator.device),
        routing,
    ]
    algorithm.start(setup, updates.optimizer)
    resumable = algorithm.resumable(weights)
    if run.resume_from is not None and saved is not None:
        checkpoint.load(run.resume_from, weights=resumable, optimizer=updates.optimizer)
        algorithm.load_state_dict(saved.get("algorithm", {}))
        algorithm.load_files(checkpoint.load_files(run.resume_from))
    source = algorithm.source(setup)  # after loading: it begins to pack at once
    at_end.callback(source.close)
    shared = SharedSource(source, layout, accelerator.device)

    if on_main:
        write_start(run.folder, plain(config), run.resume_from)
        if layout.zero:
            atomic_write(run.folder / "deepspeed.json", json.dumps(engine, indent=2) + "\n")
    trackers = start_trackers(config, run, saved, at_end) if on_main else []
    ledger = Ledger(run.folder, step=state.step, rank=rank, ranks=ranks)
    at_end.callback(ledger.close)
    progress = Progress(steps, start_step=state.step, console=console, enabled=on_main)

    # What happens around the updates.
    def log(step: int, metrics: dict[str, float]) -> None:
        if "loss" in metrics:  # of an update, not of an evaluation
            metrics = metrics | source.report.metrics()
            metrics |= algorithm.metrics(step, metrics)
        progress.update(step, metrics)
        for tracker in trackers:
            tracker.log(metrics, step)
        for warning in algorithm.warnings(step, metrics):
            progress.note(f"step {step}: {warning}")
        if "loss" in metrics:
            algorithm.show(step, trackers)

    def evaluate(state: TrainState) -> None:
        if data.heldout is None:
            return
        with found_by_reading(model):  # before the first update, which would find them too
            score = algorithm.measure(setup)
        best = max((entry["accuracy"] for entry in state.evaluations if entry["step"]), default=-1.0)
        state.evaluations.append({"step": state.step, "accuracy": score.accuracy, **vars(score)})
        log(state.step, score.metrics())
        progress.note(f"step {state.step}: {score.line()}")
        if state.step and score.accuracy > best:
            weights.publish(run.folder, "best", processor, updates.optimizer)

    def saw(step: int, microbatches: Sequence[PackedBatch]) -> None:
        if layout.sequence_rank == 0:  # of a row that ranks share, one tells
            ledger.saw(step, microbatches)
        if routing.due(step):
            routing.publish(step, trackers)

    def segments(evidence: Evidence) -> list[Segment]:
        return evidence.segments() if layout.sequence_rank == 0 else []

    def nonfinite(step: int, metrics: dict[str, float], evidence: Evidence) -> None:
        entry = nonfinite_entry(step, metrics, evidence, gather_object(segments(evidence)))
        progress.note(report.nonfinite_line(entry))
        if on_main:
            ledger.write("nonfinite.jsonl", entry)

    def spiked(step: int, loss: float, usual: float, evidence: Evidence) -> None:
        entry = spike_entry(step, loss, usual, gather_object(segments(evidence)))
        progress.note(report.spike_line(entry))
        if on_main:
            ledger.write("spikes.jsonl", entry)

    def save(state: TrainState) -> None:
        ledger.sync()
        done = checkpoint.save(
            run.checkpoints,
            state.step,
            weights=resumable,
            optimizer=updates.optimizer,
            tensors=algorithm.files(),
            state={
                "settings": settings,
                "loop": dataclasses.asdict(state),
                "source": source.state_dict(),
                "algorithm": algorithm.state_dict(),
                "trackers": {tracker.name: tracker.mark() for tracker in trackers},
            },
            keep=config.run.keep,
        )
        progress.note(report.saved_line(done))

    peak = config.tracker.peak_tflops
    peak = peak_flops(accelerator.device, model.compute_dtype or torch.float32) if peak is None else peak * 1e12
    plan = Plan(
        steps=steps,
        peak_flops=ranks * peak,
        learning_rate=lambda step: learning_rate(step, steps, config.optim),
        max_grad_norm=config.optim.max_grad_norm,
        max_skipped=config.optim.max_skipped,
        spike=config.run.spike,
        log_every=config.run.log_every,
        save_every=config.run.save_every,
        evaluate_every=config.evaluate.every,
    )
    stop = StopSignal(at_end, grace_s=config.run.grace_s)
    peers.asked = stop
    algorithm.may_stop(lambda: stop() or peers.stopping)
    hooks = Hooks(
        log=log,
        save=save,
        evaluate=evaluate,
        saw=saw,
        nonfinite=nonfinite,
        spiked=spiked,
        stop=lambda: stop() or (state.step < steps and algorithm.gives_up is not None),
    )

    # The run.
    if run.resume_from is None:
        checkpoint.seed_generators(config.run.seed, rank=rank)
    else:
        checkpoint.load_generators(run.resume_from, rank=rank)
    with progress:
        try:
            if state.step == 0:
                evaluate(state)
            else:
                progress.note(report.resumed_line(run.resume_from, state, steps))
            finished = fit(
                updates, objective, shared, state, accelerator=accelerator, plan=plan, hooks=hooks, beside=beside
            )
        except Interrupted:  # of the start weights' evaluation
            finished = False
    if not finished and (reason := algorithm.gives_up) is not None:
        algorithm.finish(setup, console, trackers)
        export = f"ernie export checkpoint={run.folder} output=..."
        raise UserError(
            f"ended after step {state.step} of {steps}: {reason} What has been learned is saved: `{export}`."
        )
    if not finished:
        done, way_on = f"after step {state.step} of {steps}", "goes on from there"
        if state.step == 0:
            done, way_on = "before the first update", "begins anew: there is nothing to save yet"
        console.print(f"stopped {done}; the same command {way_on}.")
    else:
        folders = weights.publish(run.folder, "export", processor, updates.optimizer)
        if on_main:
            report.closing(console, state, algorithm.score, folders, unreached_parts(model, state.reached))
            report.left_out(console, source.report, data.quarantine)
        algorithm.finish(setup, console, trackers)
    accelerator.wait_for_everyone()
    leave()
