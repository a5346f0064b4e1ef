"""Everything that can go wrong with a run, looked at before it starts. No GPU, nothing trained, nothing downloaded.

ernie doctor experiment=digits              the settings of `ernie sft`, all of them
ernie doctor dpo data.path=pairs.jsonl      those of `ernie dpo`
ernie doctor rl data.path=prompts.jsonl     those of `ernie rl`: prompts, rewards and tools
ernie doctor ... doctor.processes=8         every record is read and decoded, by eight processes

    machine      versions, device, threads, disk            weights    headers of the checkpoint, tokenizer, chat format
    settings     contradictions, an earlier run             data       every record; lengths, packing, steps
    training     what trains, adapters, memory, time, disk  trackers   could they take the numbers?

Exit code 1, and a list of what to put right, when anything is in the way. RUN_FOLDER/doctor.json holds it all for
programs, RUN_FOLDER/quarantine.jsonl the records that cannot be trained on.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.console import Console

from data.loader import check_countable
from ernie_model.config import ErnieConfig
from ernie_model.model import ErnieModel
from ernie_model.processor import Processor
from train import report
from train.build import human
from train.checks import cost, prompts, records
from train.checks.findings import Finding, Level, Report, ok, warning
from train.checks.machine import available_cores, check_machine
from train.checks.settings import check_settings
from train.checks.trackers import check_trackers
from train.checks.weights import check_adapters, check_weights
from train.compose import ALGORITHMS, training_settings
from train.config import (
    PeftKind,
    TrainingConfig,
    check_heldout,
    check_steps,
)
from train.outline import outline
from train.reinforcement.looks import open_looks
from train.rl_config import RLConfig
from train.run import USER_ERRORS, forget_earlier_looks, program
from train.sources import open_parts, rules_of
from train.trained import trained_parts

Add = Callable[[Sequence[Finding]], None]


@program("sft", also=ALGORITHMS)
def main(cfg: DictConfig) -> None:
    config = training_settings(cfg)
    console = Console(highlight=False, soft_wrap=True)
    found = Report(console, USER_ERRORS)
    began = time.perf_counter()
    examine(config, found)
    folder = Path(config.run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    found.numbers["seconds"] = round(time.perf_counter() - began, 1)
    found.write(folder / "doctor.json")
    conclude(found, folder)
    if found.of(Level.PROBLEM):
        sys.exit(1)


def examine(config: TrainingConfig, found: Report) -> None:
    """All sections, each with what the ones before it have found out."""
    device = torch.device("cuda" if torch.cuda.is_available() and not config.parallel.cpu else "cpu")
    if config.parallel.threads:
        torch.set_num_threads(config.parallel.threads)
    with found.section("machine") as add:
        add(check_machine(config.parallel, Path(config.run.folder)))
    architecture: ErnieConfig | None = None
    processor: Processor | None = None
    with found.section("weights") as add:
        architecture, processor, findings = check_weights(config.model)
        add(findings)
    with found.section("settings") as add:
        if architecture is not None:
            add(check_settings(config, architecture, device))
    rows = None
    with found.section("data") as add:
        if processor is None:
            add([warning("not looked at: that needs the tokenizer (see weights).")])
        else:
            if isinstance(config, RLConfig):
                assert architecture is not None  # both come from check_weights
                examine_prompts(config, architecture, processor, found, add)
            else:
                rows = examine_data(config, processor, found, add)
    with found.section("training") as add:
        if architecture is not None:
            examine_training(config, architecture, rows, device, found, add)
    with found.section("trackers") as add:
        add(check_trackers(config.tracker))


def examine_data(config: TrainingConfig, processor: Processor, found: Report, add: Add) -> cost.Rows | None:
    """The rows that an epoch packs into; None when there is nothing to pack."""
    data, folder = config.data, Path(config.run.folder)
    rules = rules_of(config)
    parts = open_parts(data, rules.learns)
    if not config.run.steps:
        check_countable(parts.train)
    known = sum(part.num_records or 0 for part in parts if part is not None)
    forget_earlier_looks(folder)
    quarantine = records.quarantine_for(folder, known)
    epoch = None
    for name, part in (("training data", parts.train), ("held-out data", parts.heldout)):
        if part is None:
            continue
        statistics = records.check_records(
            part,
            processor,
            rules,
            quarantine,
            name=name,
            processes=config.doctor.processes or available_cores(),
            stream_records=config.doctor.stream_records,
            progress=found.console.is_terminal,
        )
        add(records.judge(statistics, quarantine, data))
        if not statistics.ids or part is parts.heldout:
            continue
        for line in records.describe(statistics):
            found.console.print(f"    {line}", markup=False)
        rows = records.rows_of(statistics, part, data)
        epoch = cost.Rows.of(statistics, rows)
        fill = epoch.tokens / data.max_tokens
        steps = -(-len(rows) // data.accumulation)
        add(records.judge_packing(fill, len(rows), steps, data))
        found.numbers |= {
            "records": len(statistics.ids),
            "refused": len(statistics.refusals),
            "tokens": int(statistics.tokens.sum()),
            "trained_tokens": int(statistics.trained.sum()),
            "patches": int(statistics.patches.sum()),
            "longest": int(statistics.tokens.max()),
            "rows_per_epoch": len(rows),
            "fill": round(fill, 4),
            "updates_per_epoch": steps,
        }
    check_heldout(config, parts.heldout is not None)
    return epoch


def examine_prompts(config: RLConfig, architecture: ErnieConfig, processor: Processor, found: Report, add: Add) -> None:
    """What rollouts ask; how many rows the answers fill is not known before."""
    forget_earlier_looks(Path(config.run.folder))
    looks = open_looks(config, processor, architecture, max_bad=1.0)  # here every bad record shall be named
    if refusals := looks.quarantine.refusals:
        add(records.refused(refusals, looks.quarantine, config.data))
    for name, part in (("training data", looks.train), ("held-out data", looks.heldout)):
        if part is None:
            continue
        measured = prompts.measure(part.questions, looks, config)
        add(prompts.judge(measured, name))
        if part is looks.train:
            for line in prompts.describe(measured):
                found.console.print(f"    {line}", markup=False)
            rewards = Counter(one.reward_name for one in part.questions)
            add([ok("judged by " + ", ".join(f"{name} ({count:,})" for name, count in rewards.most_common()))])
            add([ok(prompts.describe_rollouts(len(part), config))])
            found.numbers |= {"prompts": len(part), "refused": len(looks.quarantine) + len(measured.refused)}
            found.numbers |= {"longest": max(measured.tokens, default=0)}


def examine_training(
    config: TrainingConfig,
    architecture: ErnieConfig,
    rows: cost.Rows | None,
    device: torch.device,
    found: Report,
    add: Add,
) -> None:
    adapted = config.peft.kind is not PeftKind.none
    if adapted:
        with torch.device("meta"):
            add(check_adapters(config.peft, ErnieModel(architecture)))
    model, notes, table = outline(config, architecture)
    if table is not None:
        found.show(table)
    add([warning(note) for note in notes])
    parts = trained_parts(model, config.optim)
    found.show(report.parts_table(parts, config.optim.weight_decay))
    plan = cost.Plan(model, parts, adapted)
    total = sum(part.parameters for part in parts)
    add([ok(f"{human(plan.trained)} of {human(total)} parameters train")])
    add(cost.check_memory(config, plan, rows, device))
    if rows is not None:
        findings, numbers = cost.check_time(config, plan, rows, device)
        add(findings)
        found.numbers |= numbers
    add(cost.check_disk(config, plan))
    if rows is not None:
        check_steps(config, cost.count_updates(config, rows))
    found.numbers |= {"parameters": total, "trained_parameters": plan.trained}


def conclude(found: Report, folder: Path) -> None:
    problems, warnings = found.of(Level.PROBLEM), found.of(Level.WARNING)
    console = found.console
    console.print()
    if problems:
        console.print("[bold]to put right before training[/]")
        for number, (section, one) in enumerate(problems, start=1):
            console.print(f"{number:3}. {section}: {one.text}", markup=False)
    plural = "" if len(warnings) == 1 else "s"
    verdict = f"{len(problems)} problem{'' if len(problems) == 1 else 's'}" if problems else "nothing is in the way"
    console.print(f"{verdict}, {len(warnings)} warning{plural}; {folder / 'doctor.json'}", markup=False)


if __name__ == "__main__":
    main()
