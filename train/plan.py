"""What a layout of ranks takes, before a GPU is rented: memory, traffic and time, on the meta device, in seconds.

ernie plan experiment=full_vl_28b data.path=- parallel=ep8_zero2      this layout, on plan.gpus GPUs
ernie plan experiment=lora_vl_28b data.path=- plan.search=true        which layouts fit, the fastest first
ernie plan ... plan=h200 plan.gpus=64                                 configs/plan/: h100, h200, a100, cpu

    settings ──► model without values ──► pieces ──┬── train/footprint.py         bytes held by each rank
                                                   ├── train/planning/traffic.py  bytes sent in an update
                                                   └── train/planning/pace.py     seconds of an update

The settings are those of `ernie sft`, all of them; `plan.*` describes the machines. Neither data nor weights are read:
the architecture is the checkpoint's where that is a folder here, else the one of configs/model/. RUN_FOLDER/plan.json
holds it all for programs.
"""

import dataclasses
import json
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from ernie_model.atomic import atomic_write
from ernie_model.config import ErnieConfig
from train.build import human
from train.compose import ALGORITHMS, plain, training_settings
from train.config import HeldIn, ParallelConfig, PeftKind, TrainingConfig
from train.outline import architecture_of, outline
from train.planning import tables
from train.planning.estimate import Estimate, Subject, check_layout, estimate
from train.planning.pace import peak_tflops
from train.planning.search import fewest_gpus, search
from train.rl_config import RLConfig
from train.run import program

WIDTH = 120
"""Of tables that go to a file."""
ROLLOUTS = (
    "rollouts are not in these numbers: neither the time to sample and judge, nor what the engine's cache takes "
    "meanwhile. An update is counted with one full row on each rank; answers may fill more"
)
"""Of reinforcement learning."""


@program("sft", also=ALGORITHMS)
def main(cfg: DictConfig) -> None:
    config = training_settings(cfg)
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = WIDTH
    plan = config.plan
    architecture = architecture_of(config.model)
    tflops = peak_tflops(plan, config.model.precision)
    model, notes, adapted = outline(config, architecture)
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    name = config.model.name or config.model.checkpoint or "the model"
    console.print(f"{'model':<12} {name}: {human(count)} parameters, {human(trained)} of them train", markup=False)
    machine = f"{plan.gpus} x {plan.device}, {plan.gpu_gb:g} GB, {plan.gpus_per_node} in a node; "
    machine += f"{tflops:.3g} TFLOP/s, of which {plan.mfu:.0%} are reached (plan.mfu, a guess)"
    console.print(f"{'machines':<12} {machine}", markup=False)
    if adapted is not None:
        console.print(adapted)
    if isinstance(config, RLConfig):
        notes = [*notes, ROLLOUTS]
    for note in notes:
        console.print(f"{'note':<12} {note}", markup=False)

    shown: list[Estimate]
    if plan.search:
        subjects = held_subjects(config, architecture)
        found = search(config, subjects, tflops)
        shown = found.fitting
        tables.show_found(console, found, plan.show)
        if not shown:
            more = fewest_gpus(config, lambda one: search(one, subjects, tflops))
            hint = f"something does from {more} GPUs on (plan.gpus={more})" if more else "more GPUs do not help"
            console.print(f"{'fits':<12} nothing; {hint}", markup=False)
    else:
        check_layout(config, architecture)
        shown = [estimate(config, Subject.of(model), tflops)]
        tables.show_one(console, shown[0], architecture)
    tokens = planned_tokens(config, shown[0]) if shown else None
    if tokens:
        console.print(f"{'data':<12} {tables.days(tokens, shown)}", markup=False)
    folder = Path(config.run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    told = {"plan": plain(plan), "tflops": tflops, "parameters": count, "trained_parameters": trained, "tokens": tokens}
    told |= {"layouts": [one.numbers() for one in shown[: plan.show]]}
    atomic_write(folder / "plan.json", json.dumps(told, indent=1))
    console.print(f"{'written':<12} {folder / 'plan.json'}", markup=False)


def held_subjects(config: TrainingConfig, architecture: ErnieConfig) -> dict[HeldIn, Subject]:
    """The model as it is held in either dtype; beside adapters only they are trained, and are always float32."""
    subjects = {}
    for held_in in HeldIn if config.peft.kind is PeftKind.none else [HeldIn.float32]:
        parallel = ParallelConfig(zero=2, held_in=held_in)  # any stage that may hold weights in it
        subjects[held_in] = Subject.of(outline(dataclasses.replace(config, parallel=parallel), architecture)[0])
    return subjects


def planned_tokens(config: TrainingConfig, one: Estimate) -> float | None:
    """In the whole run, as far as it is known."""
    if isinstance(config, RLConfig):  # as many as answers turn out to have
        return config.plan.tokens
    if config.plan.tokens:
        return config.plan.tokens
    if config.run.steps:
        return float(config.run.steps * one.pace.tokens)
    looked = Path(config.run.folder) / "doctor.json"
    if looked.is_file():
        numbers = json.loads(looked.read_text()).get("numbers", {})
        return numbers["tokens"] * config.run.epochs if "tokens" in numbers else None
    return None


if __name__ == "__main__":
    main()
