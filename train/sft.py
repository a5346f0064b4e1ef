"""Supervised fine-tuning: an assistant's words become likelier. The run itself is in train/training.py.

ernie sft experiment=digits                                  learn to read handwriting, on a CPU, in a minute
ernie sft data=files data.path=chats.jsonl run.epochs=2      your own conversations
accelerate launch -m train.sft ...                           the same program on several devices
"""

from collections.abc import Sequence

from omegaconf import DictConfig
from rich.console import Console

from train import neftune
from train.compose import to_typed
from train.config import SFTConfig
from train.heldout import Score, measure
from train.loop import Beside
from train.objectives import Objective, sft
from train.router import RouterLosses
from train.run import program
from train.telemetry import SegmentLosses
from train.tracking import Tracker
from train.training import Algorithm, Setup, run, show_answers


@program("sft")
def main(cfg: DictConfig) -> None:
    run(SFT(to_typed(cfg, SFTConfig)))


class SFT(Algorithm[SFTConfig]):
    score = Score

    def objective(self, rows_per_update: int) -> Objective:
        return sft.build(self.config.objective, positions=self.config.data.max_tokens * rows_per_update)

    def begin(self, setup: Setup) -> Sequence[Beside]:
        config, device, state = self.config.objective, setup.accelerator.device, setup.state
        if config.neftune_alpha:
            seed = self.config.run.seed
            neftune.install(setup.policy, config.neftune_alpha, seed=seed, step=lambda: state.step)
        return [
            RouterLosses(setup.policy, config, setup.accelerator, setup.layout),
            SegmentLosses(setup.model.config, setup.data.names, device),
        ]

    def measure(self, setup: Setup) -> Score:
        heldout = setup.data.heldout_encoder
        assert heldout is not None
        return measure(setup.policy, heldout, setup.accelerator, setup.layout)

    def finish(self, setup: Setup, console: Console, trackers: Sequence[Tracker]) -> None:
        show_answers(self.config, setup, console, trackers)


if __name__ == "__main__":
    main()
