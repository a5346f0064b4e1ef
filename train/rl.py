"""Reinforcement learning: the policy answers, answers are judged, good ones become likelier.

The run: train/training.py. What a rollout is: train/reinforcement/source.py.

ernie rl model.checkpoint=runs/sft/export data.path=prompts.jsonl reward=math       GSPO with IcePop
ernie rl ... objective=grpo                                                         other losses: docs/rl.md
ernie rl ... agent.tools=[image_zoom_in_tool] rewards.weights.tool_bonus=0.5        with tools that return pictures
ernie rl ... rollout.backend=vllm rollout.vllm.urls=[http://host:8000]              vLLM samples
accelerate launch -m train.rl ...                                                   the same program on several devices
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor

from ernie_model.exact import check_exact, make_exact
from ernie_model.inference.agent import Agent
from ernie_model.inference.sampling import Vocabulary, distribution_of
from ernie_model.inference.tools import ToolBox
from ernie_model.processor import Processor
from train.agents import open_toolbox, sampling_params
from train.checkpoint import Resumable
from train.compose import to_typed
from train.config import UserError
from train.evaluation.questions import Question
from train.loop import Beside
from train.objectives import Objective, policy_gradient
from train.objectives.policy_record import PolicyRecord
from train.parallel.layout import Layout
from train.reference import Reference, build_reference
from train.reinforcement.difficulty import DifficultySampler
from train.reinforcement.engines import LocalEngine, RolloutEngine
from train.reinforcement.mismatch import Mismatch
from train.reinforcement.prompts import Prompts, check_reward, open_prompts, quarantine_of
from train.reinforcement.record import Record
from train.reinforcement.routing import RoutingAgreement
from train.reinforcement.score import RolloutScore, measure
from train.reinforcement.scoring import RewardPool
from train.reinforcement.source import RolloutSource
from train.reinforcement.vllm_engine import VLLMEngine
from train.rl_config import RLConfig, RolloutBackend
from train.run import program
from train.score import Score
from train.served import Served
from train.sources import Data, TrainSource, open_parts
from train.tracking import Tracker
from train.training import Algorithm, Setup, run


@program("rl")
def main(cfg: DictConfig) -> None:
    run(RL(to_typed(cfg, RLConfig)))


class RL(Algorithm[RLConfig]):
    score = RolloutScore
    prompts: Prompts
    heldout: Prompts | None
    rollouts: RolloutSource
    engine: RolloutEngine
    pool: RewardPool
    reference: Reference
    mismatch: Mismatch

    def __init__(self, config: RLConfig):
        super().__init__(config)
        self.toolboxes: dict[tuple[str, ...], ToolBox] = {}
        self.runner = asyncio.Runner()

    def rows_per_update(self, layout: Layout) -> int:
        return 0  # as many as the attempts fill

    def open_data(self, processor: Processor, layout: Layout, folder: Path) -> Data:
        config = self.config
        parts = open_parts(config.data)
        quarantine = quarantine_of(parts, folder, max_bad=config.data.max_bad)
        self.prompts = open_prompts(parts.train, config, processor, quarantine)
        if parts.heldout is None:
            self.heldout = None
        else:
            limit = config.evaluate.max_examples or None
            self.heldout = open_prompts(parts.heldout, config, processor, quarantine, limit=limit)
        check_reward(config, self.asked)
        sampler = DifficultySampler(
            self.prompts.infos,
            config.sampler,
            attempts=config.rollout.attempts,
            seed=config.run.seed,
            keep_equal=config.rollout.keep_equal,
        )
        self.rollouts = RolloutSource(self.prompts, sampler, config, layout)
        self.rollouts.quarantine = quarantine
        names = tuple(one.name for one in parts.train.sets)
        return Data(self.rollouts, self.heldout, quarantine, names)

    @property
    def asked(self) -> list[Question]:
        """All questions, the held-out ones last."""
        return [*self.prompts.questions, *(() if self.heldout is None else self.heldout.questions)]

    def update_text(self) -> str:
        rollout = self.config.rollout
        per_update = rollout.groups // rollout.updates
        return (
            f"{per_update} groups of {rollout.attempts} attempts; a rollout of {rollout.groups} groups makes "
            f"{rollout.updates} updates"
        )

    @property
    def attempts_per_update(self) -> int:
        """Over all ranks, whatever is left out of them."""
        rollout = self.config.rollout
        return rollout.groups // rollout.updates * rollout.attempts

    def objective(self, rows_per_update: int) -> Objective:
        return policy_gradient.build(self.config.objective, attempts_per_update=self.attempts_per_update)

    def begin(self, setup: Setup) -> Sequence[Beside]:
        config, processor = self.config, setup.processor
        replays = config.rollout.replay_experts
        routing = replays or config.mismatch.routing
        if routing and not setup.model.config.sparse_layers:
            key = "rollout.replay_experts" if replays else "mismatch.routing"
            raise UserError(f"{key} is true, and this model has no experts. Leave it out.")
        self.params = replace(sampling_params(config.sampling), routed_experts=routing)
        vocabulary = Vocabulary.of(processor.tokenizer, setup.model.config)
        if config.rollout.exact:
            self.make_exact(setup)
        # Before the reference, which is compared under the same.
        setup.policy.distribution = distribution_of(self.params, vocabulary)
        self.reference = build_reference(
            config.reference,
            needed=policy_gradient.needs_reference(config.objective),
            model=config.model,
            peft=config.peft,
            parallel=config.parallel,
            seed=config.run.seed,
            policy=setup.policy,
            weights=setup.weights,
            accelerator=setup.accelerator,
            layout=setup.layout,
            engine=setup.engine,
            folder=setup.folder,
        )
        setup.notes.extend(self.reference.notes())
        if bad := len(setup.data.quarantine):
            what = "1 record is" if bad == 1 else f"{bad} records are"
            setup.notes.append(f"{what} refused; {setup.data.quarantine.path} says which and why.")
        self.mismatch = Mismatch(config.mismatch, config.objective, setup.model.config, setup.accelerator)
        setup.policy.wants_entropy = True
        setup.policy.replays = replays
        self.pool = RewardPool(config.rewards, self.prompts.questions)
        self.engine = self.open_engine(setup)
        self.examiner = self.engine
        if config.rollout.backend is RolloutBackend.local:  # of the weights as they are, whatever samples meanwhile
            self.examiner = LocalEngine(
                setup.model,
                setup.processor.tokenizer,
                config.engine,
                joint=setup.layout.joint,
                away=config.rollout.tool_steps,
            )
        self.served = Served(setup.model, setup.processor)
        self.rollouts.attach(
            engine=self.engine,
            agents=self.agents,
            pool=self.pool,
            processor=setup.processor,
            params=self.params,
            policy=setup.policy,
            accelerator=setup.accelerator,
            runner=self.runner,
            steps=setup.steps,
        )
        self.agents(None)  # tools that cannot be opened are told of now
        objective, accelerator = config.objective, setup.accelerator
        self.record = Record(
            config,
            self.prompts,
            self.rollouts.sampler,
            processor,
            setup.folder,
            main=accelerator.is_main_process,
            rollouts=self.rollouts.rollouts,
            step=setup.state.step,
        )
        self.rollouts.told = self.record.told
        beside = [
            self.reference,
            PolicyRecord(
                objective,
                accelerator,
                attempts_per_update=self.attempts_per_update,
                sequence=setup.layout.sequence,
            ),
            self.mismatch,
            self.record,
        ]
        if routing:
            beside.append(RoutingAgreement(setup.policy, setup.model.config, accelerator.device))
        return beside

    def make_exact(self, setup: Setup) -> None:
        """Raises UserError: rollout.exact=true cannot be kept with these settings, or on this machine."""
        if setup.layout.joint:
            raise UserError(
                "rollout.exact is true, and parallel shares a model or a row among ranks (expert, sequence or ZeRO-3). "
                "Use parallel=single, ddp, zero1 or zero2, or set rollout.exact=false."
            )
        try:
            make_exact(setup.model)
            check_exact(setup.model)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"rollout.exact=true: {error}") from error

    def open_engine(self, setup: Setup) -> RolloutEngine:
        rollout = self.config.rollout
        if rollout.backend is RolloutBackend.vllm:
            servers = VLLMEngine(
                rollout.vllm,
                setup.model,
                setup.processor,
                setup.weights,
                folder=setup.folder,
                max_tokens=self.config.agent.max_tokens,
                params=self.params,
                joint=setup.layout.joint,
            )
            setup.notes.extend(servers.notes)
            return servers
        return LocalEngine(
            setup.model,
            setup.processor.tokenizer,
            self.config.engine,
            noise=rollout.noise,
            seed=self.config.run.seed,
            joint=setup.layout.joint,
            apart=rollout.ahead > 0,
            away=rollout.tool_steps,
        )

    def agents(self, engine: RolloutEngine | None) -> Mapping[tuple[str, ...], Agent]:
        """One for each choice of tools among the questions; without an engine, only to see that they can be opened."""
        config = self.config
        agents = {}
        for tools in dict.fromkeys(one.tools for one in self.asked):
            if tools not in self.toolboxes:
                self.toolboxes[tools] = open_toolbox(replace(config.agent, tools=list(tools)), self.served)
            if engine is not None:
                agents[tools] = Agent(
                    engine.generates, self.served.processor, self.toolboxes[tools], config.agent, self.params
                )
        return agents

    def start(self, setup: Setup, optimizer: Any) -> None:
        self.reference.start(optimizer, setup.data)
        if isinstance(self.engine, VLLMEngine):
            self.engine.optimizer = optimizer

    def may_stop(self, asked: Callable[[], bool]) -> None:
        self.rollouts.stop = asked

    def source(self, setup: Setup) -> TrainSource:
        return self.rollouts

    def resumable(self, weights: Resumable) -> Resumable:
        return self.reference.resumable(weights)

    def state_dict(self) -> dict[str, Any]:
        return {
            "reference": self.reference.state(),
            "mismatch": self.mismatch.state_dict(),
            "record": self.record.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reference.load(state["reference"])
        self.mismatch.load_state_dict(state["mismatch"])
        self.record.load_state_dict(state["record"])

    def files(self) -> dict[str, Tensor]:
        return self.rollouts.files()

    def load_files(self, files: Sequence[dict[str, Tensor]]) -> None:
        self.rollouts.load_files(files)

    def measure(self, setup: Setup) -> Score:
        assert self.heldout is not None
        self.rollouts.settle()
        self.examiner.begin(self.rollouts.updates)
        try:
            return measure(
                self.heldout,
                self.examiner,
                self.agents(self.examiner),
                self.pool,
                setup.processor,
                replace(self.params, routed_experts=False),
                setup.layout,
                self.runner,
                self.rollouts.stop,
            )
        finally:
            self.examiner.end()

    def metrics(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        return self.record.metrics(step, metrics)

    def warnings(self, step: int, metrics: dict[str, float]) -> Sequence[str]:
        return [*self.mismatch.warnings(metrics), *(self.record.notes(step) if "loss" in metrics else ())]

    @property
    def gives_up(self) -> str | None:
        return self.rollouts.gives_up

    def show(self, step: int, trackers: Sequence[Tracker]) -> None:
        self.record.show(step, trackers)

    def finish(self, setup: Setup, console: Console, trackers: Sequence[Tracker]) -> None:
        for line in self.record.finish(setup.state.step, trackers):
            console.print(line)


if __name__ == "__main__":
    main()
