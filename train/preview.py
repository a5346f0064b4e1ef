"""What training would be shown, before it is: real encoded conversations as a page to look at.

ernie preview experiment=digits                        runs/digits/preview.html
ernie preview data=files data.path=chats.jsonl ...     the settings of `ernie sft`, all of them
ernie preview dpo data.path=pairs.jsonl ...            those of `ernie dpo`
ernie preview rl data.path=prompts.jsonl ...           those of `ernie rl`: prompts, with what is right
ernie preview ... preview.examples=30 preview.ranks=8  more of it; rows dealt to eight processes

The page has the pictures as the model sees them, every token with who wrote it and whether it is trained, and the
packed rows. Nothing is trained and no weights are read.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from data.batch import Role
from data.encode import Example
from data.loader import StreamReport
from data.pack import collate
from ernie_model.atomic import atomic_write
from ernie_model.chat import SpanKind
from ernie_model.config import ErnieConfig
from train import contact_sheet
from train.build import build_processor, read_config
from train.compose import (
    ALGORITHMS,
    plain,
    training_settings,
)
from train.config import TaskData, TrainingConfig
from train.evaluation.questions import evenly
from train.preview_page import Page, write_page
from train.reinforcement.looks import open_looks
from train.rl_config import RLConfig
from train.run import forget_earlier_looks, program
from train.samples import Row, Sample, Section, Witness, kind_of, samples_of, stretches_of
from train.sources import build_data, rules_of
from train.tracking import make_trackers


@program("sft", also=ALGORITHMS)
def main(cfg: DictConfig) -> None:
    config = training_settings(cfg)
    console = Console(highlight=False, soft_wrap=True)
    began = time.perf_counter()
    architecture = read_config(config.model)
    processor = Witness(build_processor(config.model, architecture))
    folder = Path(config.run.folder)
    forget_earlier_looks(folder)
    stream = None
    if isinstance(config, RLConfig):
        samples, rows = list(prompts(config, processor, architecture)), []
    else:
        samples, rows, stream = collect(config, processor)

    folder.mkdir(parents=True, exist_ok=True)
    source = config.data.task if isinstance(config.data, TaskData) else config.data.kind.value
    page = Page(
        title=f"What {config.run.name} is shown",
        subtitle=f"{'The first' if rows else 'Some'} {kind_of(samples)} of {source} data, as "
        f"{config.model.name or 'the model'} would {'be trained on' if rows else 'get'} them. Hover over tokens and "
        "pictures.",
        samples=samples,
        rows=rows,
        max_tokens=config.data.max_tokens,
        max_patches=config.data.max_patches,
        patch_size=processor.image.patch_size,
        settings=OmegaConf.to_yaml(OmegaConf.create(plain(config))),
    )
    atomic_write(folder / "preview.html", write_page(page))
    tell(console, samples, rows, stream, config.data.max_tokens)
    if track(config, folder, samples, processor):
        console.print(f"pictures  {folder / 'preview.png'}")
    console.print(f"page      {folder / 'preview.html'}   ({time.perf_counter() - began:.1f} s)")


def collect(config: TrainingConfig, processor: Witness) -> tuple[list[Sample], list[Row], StreamReport]:
    """Rows as training packs and deals them, until there are enough of them and of the conversations in them."""
    wanted, ranks, rules = config.preview, config.preview.ranks, rules_of(config)
    streams = [
        build_data(config.data, processor, rules=rules, rank=rank, world=ranks, folder=Path(config.run.folder)).packed
        for rank in range(ranks)
    ]
    samples: list[Sample] = []
    rows: list[Row] = []
    known: set[tuple[str, str]] = set()
    step = 0
    while len(rows) < wanted.rows or len(samples) < wanted.examples:
        if streams[0].report.epoch >= 2:  # small data: all of it has been in a row by now
            break
        for rank, stream in enumerate(streams):
            for batch in stream.next_step():
                shown: dict[int, int] = {}
                for sample in samples_of(batch, processor, row=len(rows)):
                    if len(samples) == wanted.examples:
                        break
                    if (sample.dataset, sample.id) not in known:  # in small data the next epoch begins in this row
                        known.add((sample.dataset, sample.id))
                        shown[sample.record] = len(samples)
                        samples.append(sample)
                rows.append(Row(step, rank, stretches_of(batch, processor, shown)))
        step += 1
    report = streams[0].report
    for stream in streams:
        stream.close()
    return samples, rows, report


def prompts(config: RLConfig, processor: Witness, architecture: ErnieConfig) -> Iterator[Sample]:
    """Of reinforcement learning: as many as wanted, evenly over all, in the form that rollouts ask them."""
    looks = open_looks(config, processor, architecture, max_bad=config.data.max_bad)
    for number, one in enumerate(evenly(looks.train.questions, config.preview.examples)):
        encoded = looks.open(one).encoded
        example = Example(
            id=one.id,
            token_T=encoded.token_T,
            target_T=torch.zeros_like(encoded.token_T),
            weight_T=torch.zeros(len(encoded.token_T)),
            position_3T=encoded.position_3T,
            grids=encoded.grids,
            patch_PX=encoded.patch_PX,
            dataset=one.task,
        )
        (sample,) = samples_of(collate([example]), processor, row=number)
        yield dataclasses.replace(sample, right=f"right: {one.expected}   ({one.reward_name})")


def tell(
    console: Console, samples: Sequence[Sample], rows: Sequence[Row], report: StreamReport | None, max_tokens: int
) -> None:
    """The page in four lines."""
    tokens = sum(len(sample.ids) for sample in samples)
    trained = sum(sample.num_trained for sample in samples)
    media = sum(medium.num_tokens for sample in samples for medium in sample.media)
    longest = max(samples, key=lambda sample: len(sample.ids))
    learned = f" {trained:,} trained," if rows else ""
    console.print(f"shown     {len(samples)} {kind_of(samples)}, {tokens:,} tokens:{learned} {media:,} of media")
    console.print(f"longest   {longest.id}: {len(longest.ids):,} tokens", markup=False)
    if report is None:
        return
    fill = sum(row.tokens for row in rows) / (len(rows) * max_tokens)
    patches = max(row.patches for row in rows)
    skipped = f"; {report.num_refused} draws left out, see quarantine.jsonl" if report.num_refused else ""
    console.print(f"rows      {len(rows)}, {fill:.1%} filled, at most {patches:,} patches in one{skipped}")


def track(config: TrainingConfig, folder: Path, samples: Sequence[Sample], processor: Witness) -> bool:
    """One picture of every sample with what it teaches, as a sheet in the run folder and in the trackers."""
    items = [
        contact_sheet.SheetItem(sample.media[0].frames[0], expected="", answer=taught(sample), correct=True)
        for sample in samples
        if sample.media
    ]
    if not items:
        return False
    sheet = folder / "preview.png"
    under = "what is trained" if any(sample.num_trained for sample in samples) else "what is right"
    contact_sheet.draw(items, sheet, f"{config.run.name}, before training", summary=f"under each image, {under}")
    for tracker in make_trackers(config.tracker.names, config.tracker.project):
        if tracker.name == "jsonl":  # the record of the run that is yet to come
            continue
        tracker.start(f"{config.run.name} preview", plain(config), folder)
        tracker.log_image("preview", sheet, step=0)
        tracker.finish()
    return True


def taught(sample: Sample) -> str:
    """The answers that are trained, as text: of a pair `this, not that`, of a prompt the right one."""
    if sample.right:
        return sample.right
    wanted, unwanted = (Role.WHOLE, Role.CHOSEN, Role.WANTED), (Role.REJECTED, Role.UNWANTED)
    said, avoided = (
        "".join(_written(sample, section) for section in sample.sections if section.role in roles)
        for roles in (wanted, unwanted)
    )
    return ", not ".join([said, avoided] if avoided else [said])


def _written(sample: Sample, section: Section) -> str:
    return "".join(
        "".join(sample.texts[span.start : span.stop])
        for span in section.spans
        if span.generated and span.kind is not SpanKind.END and sample.weights[span.start]
    )


if __name__ == "__main__":
    main()
