"""The progress line, in a terminal and out of one."""

import io
import math

import pytest
from rich.console import Console

from train.progress import Progress, duration, fields, number, short

METRICS = {
    "loss": 0.4123,
    "accuracy": 0.71,
    "tokens_per_s": 18_400.0,
    "text_tokens_per_s": 6_100.0,
    "image_tokens_per_s": 12_300.0,
    "eta_s": 65.0,
    "memory_gb": 1.23,
    "lr": 4.8e-7,
    "grad_norm": 1.31,
}


class Clock:
    """A clock that the test moves."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=False, width=80, highlight=False), out


def test_all_numbers_in_order_of_importance():
    assert "  ".join(fields(METRICS)) == (
        "loss 0.412  accuracy 71.0%  left 1:05  tokens/s 18.4k (text 6.1k, image 12.3k)  "
        "mem 1.2G  lr 4.8e-07  grad 1.310"
    )


def test_of_rollouts_the_reward_comes_first():
    metrics = {"loss": -0.01, "accuracy": 0.2, "reward": 0.61, "reward_accuracy": 0.58, "eta_s": 65.0}
    assert "  ".join(fields(metrics)) == "reward 0.610  loss -0.010  accuracy 58.0%  left 1:05"
    metrics |= {"tool_use": 0.93, "zero_left": 0.71, "zero_tokens_masked": 0.02, "entropy": 0.118}
    assert "  ".join(fields(metrics)) == (
        "reward 0.610  loss -0.010  accuracy 58.0%  tools 93.0%  gradient 71%  masked 2%  entropy 0.118  left 1:05"
    )
    assert "  ".join(fields(metrics, compact=True)) == "reward 0.610  loss -0.010  acc 58.0%  tools 93.0%  left 1:05"


def test_of_preferences_what_was_ranked():
    assert fields({"loss": 0.6, "accuracy": 0.2, "reward_accuracy": 0.58}) == ["loss 0.600", "ranked right 58.0%"]


def test_absent_numbers_are_left_out():
    assert fields({"loss": 2.0, "tokens_per_s": 830.0, "something_else": 1.0}) == ["loss 2.000", "tokens/s 830"]


def test_without_a_terminal_a_line_comes_at_first_then_every_ten_seconds_and_at_last():
    console, out = plain()
    clock = Clock()
    with Progress(100, console=console, every_s=10, clock=clock) as progress:
        for step in range(1, 101):
            clock.now += 1
            progress.update(step, {"loss": 1 / step})
        assert "step 100/100" in out.getvalue()  # at once: what follows (saving, evaluating) may take long
    assert [line.split()[1] for line in out.getvalue().splitlines()] == [
        *(f"{step}/100" for step in range(1, 100, 10)),  # 1, 11, 21, ...
        "100/100",
    ]
    assert "\x1b" not in out.getvalue()  # nothing for a terminal to obey


def test_a_run_that_ends_early_still_shows_its_last_step_once():
    console, out = plain()
    with pytest.raises(KeyboardInterrupt), Progress(100, console=console, clock=Clock()) as progress:
        for step in (1, 2, 3):
            progress.update(step, {"loss": 0.5})
        raise KeyboardInterrupt
    assert out.getvalue().splitlines() == ["step 1/100  loss 0.500  left 0:00", "step 3/100  loss 0.500  left 0:00"]


def test_time_left_follows_from_the_steps_of_this_process():
    """Resumed at 50; 10 steps took 20 s, so the remaining 40 take 80 s."""
    console, out = plain()
    clock = Clock()
    with Progress(100, start_step=50, console=console, clock=clock) as progress:
        clock.now += 20
        progress.update(60, {"loss": 1.0})
    assert "left 1:20" in out.getvalue()


def test_a_number_that_is_absent_keeps_its_last_value():
    console, out = plain()
    clock = Clock()
    with Progress(10, console=console, every_s=0, clock=clock) as progress:
        progress.update(1, {"loss": 1.0, "accuracy": 0.25})
        progress.update(2, {"loss": 0.9})
    assert "loss 0.900  accuracy 25.0%" in out.getvalue().splitlines()[1]


def test_notes_and_lines_longer_than_the_console_are_not_broken():
    console, out = plain()
    with Progress(10, console=console, clock=Clock()) as progress:
        progress.note("saved runs/digits/checkpoint-100 [not markup] " + "x" * 100)
        progress.update(10, METRICS)
    note, line = out.getvalue().splitlines()
    assert note == "saved runs/digits/checkpoint-100 [not markup] " + "x" * 100
    assert line.endswith("grad 1.310")


def test_numbers_it_does_not_know_draw_no_line_and_a_step_is_drawn_once():
    console, out = plain()
    with Progress(3, console=console, clock=Clock()) as progress:
        progress.update(0, {"eval_accuracy": 0.1})
        for step in (1, 2, 3):
            progress.update(step, {"loss": 1.0})
        progress.update(3, {"eval_accuracy": 0.9})
        progress.update(3, {"loss": 1.0})
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["1/3", "3/3"]


def test_other_ranks_are_silent():
    console, out = plain()
    with Progress(10, console=console, enabled=False) as progress:
        progress.update(1, METRICS)
        progress.note("saved")
    assert out.getvalue() == ""


LINES = {
    200: "step 120/400 ━━━━━━━━━━━━  loss 0.412  accuracy 71.0%  left 1:05  tokens/s 18.4k (text 6.1k, image 12.3k)  "
    "mem 1.2G  lr 4.8e-07  grad 1.310",
    120: "step 120/400 ━━━━━━━━━━━━  loss 0.412  accuracy 71.0%  left 1:05  tokens/s 18.4k (text 6.1k, image 12.3k)  "
    "mem 1.2G",
    110: "step 120/400  loss 0.412  accuracy 71.0%  left 1:05  tokens/s 18.4k (text 6.1k, image 12.3k)  mem 1.2G",
    80: "step 120/400  loss 0.412  acc 71.0%  left 1:05  tokens/s 6.1k+12.3k  mem 1.2G",
    60: "step 120/400  loss 0.412  acc 71.0%  left 1:05",
    30: "step 120/400  loss 0.412",
}


@pytest.mark.parametrize("width", LINES)
def test_the_live_line_fits_the_terminal_and_drops_whole_fields(width):
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    progress = Progress(400, console=console)
    assert progress._live_line().plain == "step 0/400  starting"
    with progress:
        progress.update(120, METRICS)
        assert progress._live_line().plain == LINES[width]


def test_the_terminal_gets_one_line_that_is_redrawn_and_notes_above_it():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with Progress(3, console=console) as progress:
        for step in (1, 2, 3):
            progress.update(step, {"loss": 1.0})
            progress.live.refresh()
            progress.note(f"note {step}")
    text = out.getvalue()
    assert "\x1b[2K" in text  # the line is erased before it is drawn again
    assert text.count("\n") == 4  # three notes and the end; the live line itself never scrolls
    assert "step 3/3" in text.splitlines()[-2]


def test_numbers():
    assert [number(x) for x in (0.4123, 12.34, 0.00001, 0.0, math.nan, math.inf)] == [
        *("0.412", "12.3", "1e-05", "0.000", "nan", "inf")
    ]
    assert [short(x) for x in (834, 18_400, 2_500_000)] == ["834", "18.4k", "2.5M"]
    assert [duration(x) for x in (0, 65, 3661, 90061, math.inf)] == ["0:00", "1:05", "1:01:01", "1d 1:01:01", "?"]
