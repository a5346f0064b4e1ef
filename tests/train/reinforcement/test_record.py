"""What is recorded of rollouts and updates: exact after a resume, aligned token by token, and never in the way."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from data.encode import Example
from data.pack import collate
from tests.train.reinforcement.asked import PROCESSOR, attempt, group, question
from train.config import TaskData, UserError
from train.reinforcement.examples import encode_group, with_advantages
from train.reinforcement.groups import Group
from train.reinforcement.prompts import Prompts
from train.reinforcement.record import LEARNED, PAGE, ROLLOUTS, ZERO, Record, choose, read_lines, recorded_rollouts
from train.reinforcement.source import Rollout
from train.rl_config import RecordConfig, RLConfig, RolloutConfig
from train.tracking import JsonlTracker

CROP = Image.new("RGB", (20, 10), "red")
CONFIG = RLConfig(
    data=TaskData(task="zoom", max_tokens=16384),
    record=RecordConfig(every=1),
    rollout=RolloutConfig(groups=2, attempts=2, updates=2),
)


def record(folder: Path, *, rollouts: int = 0, step: int = 0, config: RLConfig = CONFIG) -> Record:
    prompts = Prompts([question(number) for number in range(4)], "made up")
    sampler = SimpleNamespace(history=[])
    return Record(config, prompts, sampler, PROCESSOR, folder, main=True, rollouts=rollouts, step=step)


def two_groups(first: int = 0) -> list[Group]:
    """Two that differ, of different prompts; both attempts of the second write the same."""
    return [
        group(first, attempt("7", 1.0, crop=CROP), attempt("3", 0.0), prompt=0),
        group(first + 1, attempt("5", 1.0), attempt("5", 0.0), prompt=1),
    ]


def rollout(number: int, groups: Sequence[Group], *, waiting: Sequence[int] = ()) -> Rollout:
    accepted = [one.ticket.group for one in groups if one.ticket.group not in waiting]
    return Rollout(
        number=number,
        summaries=[one.summary("digits") for one in groups],
        usable={one.ticket.group for one in groups},
        accepted=accepted,
        waiting=set(waiting),
        stale=0,
        groups=groups,
        advantages={name: [1.0, -1.0] for name in accepted},
        held={name: {0, 1} for name in accepted},
        seconds={"asking": 1.0},
        metrics={},
    )


def row(*groups: Group, old: bool = False):
    """A row of their attempts; its old log-probabilities are 0.25 above the engine's."""
    made: list[Example] = []
    for one in groups:
        episodes = [scored.episode for scored in one.attempts]
        for episode in episodes:
            episode.media = []
        ((example, _),) = encode_group(
            [dataclasses.replace(episode) for episode in episodes],
            [True] * len(episodes),
            dataclasses.replace(PROCESSOR.config, vision=None),
            id=f"q{one.ticket.prompt}",
            dataset="set",
            max_tokens=512,
            max_patches=None,
        )
        made.append(with_advantages(example, [1.0, -1.0]))
    batch = collate(made)
    if old:
        batch = dataclasses.replace(batch, old_logprob_T=batch.engine_logprob_T + 0.25)
    return batch


def update(made: Record, *batches, above: float = 0.125) -> None:
    """The policy gives every token `above` more than the engine."""
    made.before(batches)
    for batch in batches:
        made.terms(batch, SimpleNamespace(logprob_T=batch.engine_logprob_T + above))


def test_lines_are_aligned_with_what_an_update_learns_from(tmp_path):
    made, groups = record(tmp_path), two_groups()
    made.told(rollout(0, groups))
    assert [(one["group"], one["attempt"]) for one in read_lines(tmp_path / ROLLOUTS)] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    update(made, row(groups[0]))
    update(made, row(groups[1], old=True))
    made.state_dict()
    learned = {(one["group"], one["attempt"]): one for one in read_lines(tmp_path / LEARNED)}
    assert [(one, line["step"]) for one, line in learned.items()] == [
        ((0, 0), 1),
        ((0, 1), 1),
        ((1, 0), 2),
        ((1, 1), 2),
    ]
    for line in read_lines(tmp_path / ROLLOUTS):
        gaps = learned[line["group"], line["attempt"]]["gaps"]
        sampled = [
            "logprobs" in piece
            for piece in line["pieces"]
            for _ in range(piece.get("count", len(piece.get("ids", ()))))
        ]
        expected = 0.25 if line["group"] else 0.125  # of the policy that sampled, not of the one that is learned
        assert gaps == [expected if wrote else None for wrote in sampled]
        assert learned[line["group"], line["attempt"]]["advantage"] == (-1.0 if line["attempt"] else 1.0)


def test_attempts_that_wait_in_the_queue_are_found_when_they_are_learned_from(tmp_path):
    made, groups = record(tmp_path), two_groups()
    made.told(rollout(0, groups, waiting=[1]))
    assert [one["fate"] for one in read_lines(tmp_path / ROLLOUTS)] == ["learned", "learned", "waiting", "waiting"]
    update(made, row(groups[0]))
    later = dataclasses.replace(rollout(1, two_groups(2)), accepted=[1, 2, 3])
    made.told(later)
    update(made, row(groups[1]))
    made.state_dict()
    assert [(one["rollout"], one["group"]) for one in read_lines(tmp_path / LEARNED)] == [
        (0, 0),
        (0, 0),
        (0, 1),
        (0, 1),
    ]


def test_what_nobody_waits_for_any_longer_is_forgotten(tmp_path):
    made, groups = record(tmp_path), two_groups()
    made.told(rollout(0, groups))
    for number in range(1, 4):  # rollout.max_lag is 1
        made.told(dataclasses.replace(rollout(number, []), accepted=[]))
    assert made._wanted == {}
    update(made, row(groups[0]))
    made.state_dict()
    assert read_lines(tmp_path / LEARNED) == []


def run_of(folder: Path, plan: Sequence[int], made: Record | None = None, first: int = 0) -> Record:
    """A rollout for each of `plan`, with two updates each, or one."""
    made = record(folder) if made is None else made
    for number, updates in enumerate(plan, first):
        groups = two_groups(2 * number)
        made.told(rollout(number, groups))
        for one in groups[:updates]:
            update(made, row(one))
            made.metrics(made._step, {"loss": 0.0})
    return made


def test_a_resumed_run_ends_with_the_same_lines(tmp_path):
    run_of(tmp_path / "whole", [2, 2, 2])
    whole = tmp_path / "whole"
    # The checkpoint is taken in the middle of rollout 1; the process dies in rollout 2, in the middle of a line.
    broken = run_of(tmp_path / "broken", [2, 1])
    state = json.loads(json.dumps(broken.state_dict()))
    update(broken, row(two_groups(2)[1]))
    run_of(tmp_path / "broken", [1], broken, first=2)
    with (tmp_path / "broken" / ROLLOUTS).open("a") as file:
        file.write('{"rollout": 3, "gr')
    again = record(tmp_path / "broken", rollouts=2, step=3)
    again.load_state_dict(state)
    update(again, row(two_groups(2)[1]))
    again.metrics(4, {"loss": 0.0})
    run_of(tmp_path / "broken", [2], again, first=2)
    again.finish(6, [])
    assert len(read_lines(whole / LEARNED)) == 10  # the last update's are written by `finish`
    for name in (ROLLOUTS, ZERO):
        assert (tmp_path / "broken" / name).read_bytes() == (whole / name).read_bytes()
    got = read_lines(tmp_path / "broken" / LEARNED)
    assert got[:10] == read_lines(whole / LEARNED) and len(got) == 12
    assert len({(one["group"], one["attempt"]) for one in got}) == 12


def test_only_every_nth_rollout_and_a_few_groups_are_recorded(tmp_path):
    config = dataclasses.replace(CONFIG, record=RecordConfig(every=2, groups=1))
    made = record(tmp_path, config=config)
    for number in range(4):
        made.told(rollout(number, two_groups(2 * number)))
    assert {one["rollout"] for one in read_lines(tmp_path / ROLLOUTS)} == {0, 2}
    assert {one["group"] for one in read_lines(tmp_path / ROLLOUTS)} == {0, 4}
    never = record(tmp_path / "never", config=dataclasses.replace(CONFIG, record=RecordConfig(every=0)))
    never.told(rollout(0, two_groups()))
    assert read_lines(tmp_path / "never" / ROLLOUTS) == []


def test_the_page_reads_only_the_rollouts_that_it_shows(tmp_path):
    config = dataclasses.replace(CONFIG, record=RecordConfig(every=1, rollouts=2))
    made = record(tmp_path, config=config)
    for number in range(11):
        made.told(rollout(number, two_groups(2 * number)))
    made.finish(22, [])
    assert recorded_rollouts(tmp_path / ROLLOUTS) == list(range(11))
    assert {one["rollout"] for one in read_lines(tmp_path / ROLLOUTS, {1})} == {1}  # and not 10
    assert "11 rollouts recorded, 2 of them shown" in (tmp_path / PAGE).read_text()


def test_groups_of_every_kind_are_chosen():
    def summary(number, *totals):
        return group(number, *(attempt("7", total) for total in totals)).summary("digits")

    mixed = [summary(number, 1.0, 0.0) for number in range(5)]
    others = [summary(5, 0.0, 0.0), summary(6, 0.0, 0.0), summary(7, 1.0, 1.0), summary(8, None, None)]
    assert choose([*mixed, *others], 4) == {0, 7, 1, 5}
    assert choose(mixed, 3) == {0, 1, 2}
    assert choose(others, 9) == {5, 6, 7, 8}
    assert choose([], 3) == set()


def test_what_is_off_is_told_once_until_it_was_well_again(tmp_path):
    made = record(tmp_path, config=dataclasses.replace(CONFIG, record=RecordConfig(zero_gradient_every=5)))
    made.told(rollout(0, two_groups()))
    fine = {"tokens_sampled": 10.0, "attempt_tokens": 5.0, "tokens_taught": 10.0}
    bad = fine | {"tokens_unknown": 3.0}

    def notes(step: int, metrics: dict[str, float]) -> list[str]:
        made.metrics(step, metrics)
        return made.notes(step)

    assert notes(1, fine) == []
    (told,) = notes(2, bad)
    assert "3 sampled tokens have no log-probability of the engine" in told and "attempts asked in rollout 0" in told
    assert notes(3, bad) == []
    assert notes(4, fine) == []
    assert len(notes(5, fine)) == 1  # it is time
    assert "3 sampled tokens" in notes(6, bad)[0]


def test_metrics_of_an_update_hold_the_split_of_time_and_of_gradients(tmp_path):
    made = record(tmp_path)
    made.told(rollout(0, two_groups()))
    seconds = {"seconds_asking": 6.0, "seconds_scoring": 1.0, "seconds_weights": 1.0, "seconds_engine": 5.0}
    found = made.metrics(1, {"loss": 0.0, "step_s": 10.0, "data_wait": 0.8, **seconds})
    assert found["seconds_update"] == pytest.approx(4.0)  # two updates of 2 s
    assert found["seconds_rollout"] == pytest.approx(12.0) and found["seconds_idle"] == pytest.approx(2.0)
    assert found["zero_attempts_learned"] == 1.0
    assert "50%, scoring 8%" in made.finish(1, [])[0]


def test_page_tables_and_curves(tmp_path):
    tracker = JsonlTracker()
    tracker.start("run", {}, tmp_path)
    made = run_of(tmp_path, [2])
    tracker.log({"rollout": 0.0, "reward": 0.5, "loss": 0.0, "tool_use": 0.25}, 1)
    made.show(1, [tracker])
    made.show(2, [tracker])
    tables = [one for one in read_lines(tmp_path / "metrics.jsonl") if "table" in one]
    (table,) = tables  # once for a rollout
    assert table["columns"][:2] == ["prompt pictures", "tool pictures"] and len(table["rows"]) == 4
    best = table["rows"][0]
    assert best[table["columns"].index("reward")] == 1.0 and best[table["columns"].index("became")] == "learned from"
    (crop,) = best[1]
    assert (tmp_path / crop).exists()
    written = made.finish(2, [tracker])
    assert (tmp_path / PAGE).exists() and (tmp_path / "curves.png").exists()
    tracker.finish()
    assert any("rollouts.html" in line for line in written) and any("curves.png" in line for line in written)


def test_a_page_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    made = run_of(tmp_path, [2])
    (tmp_path / PAGE).mkdir()
    assert made.show(2, []) == []
    made.told(rollout(1, two_groups(2)))
    made.show(3, [])
    assert caplog.text.count("cannot be drawn") == 1


def test_only_the_main_rank_writes(tmp_path):
    prompts = Prompts([question(0)], "made up")
    other = Record(CONFIG, prompts, SimpleNamespace(history=[]), PROCESSOR, tmp_path, main=False, rollouts=0, step=0)
    other.told(rollout(0, two_groups()[:1]))
    other.metrics(1, {})
    assert other.show(1, [], last=True) == [] and not list(tmp_path.glob("*.jsonl"))


@pytest.mark.parametrize(
    "name, value", [("every", -1), ("groups", 0), ("attempts", 2), ("rollouts", 0), ("plots_every", -1)]
)
def test_settings(name, value):
    with pytest.raises(UserError, match=f"record.{name} is {value}"):
        RecordConfig(**{name: value})
