"""One live line while a run trains; plain lines where there is no terminal.

    step 120/400 ━━━━────────  loss 0.412  accuracy 71.0%  left 1:05  tokens/s 18.4k (text 6.1k, image 12.3k)  mem 1.2G
    step 120/400 ━━━━────────  reward 0.61  loss -0.012  accuracy 58.0%  tools 93.0%  gradient 71%  masked 2%  left 1:05

    with Progress(total_steps=400) as progress:
        progress.update(step, {"loss": 0.412, "accuracy": 0.71, ...})
        progress.note("saved checkpoint-120")

In a terminal the line is redrawn in place and notes scroll above it. Elsewhere (a file, a batch system's log) a line is
printed for the first step, the last one, and every `every_s` seconds between them.
"""

import math
import time
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

BAR_CELLS = 12
KNOWN = frozenset(
    "loss accuracy reward reward_accuracy reward_margin tokens_per_s text_tokens_per_s image_tokens_per_s eta_s "
    "memory_gb lr grad_norm".split()
)


class Progress:
    """The state of a run on one line. `enabled=False` (every rank but the first) shows nothing."""

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        console: Console | None = None,
        every_s: float = 10.0,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total_steps = total_steps
        self.start_step = start_step
        self.console = console or Console(highlight=False)
        self.every_s = every_s
        self.enabled = enabled
        self.clock = clock
        self.started = clock()
        self.printed: float | None = None
        self.shown_step: int | None = None
        self.last: tuple[int, dict[str, float]] | None = None
        self.live: Live | None = None

    def __enter__(self) -> "Progress":
        self.started = self.clock()
        if self.enabled and self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=8, get_renderable=self._live_line)
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None
        elif self.enabled and self.last is not None and self.shown_step != self.last[0]:
            self._print_plain()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show `step` (the number of finished steps). Keys that are absent keep their last value.

        The keys are those in KNOWN (accuracy is a fraction); others are ignored. Without eta_s the time left follows
        from the steps done so far.
        """
        if not self.enabled or not KNOWN.intersection(metrics):
            return
        known = {} if self.last is None else {key: value for key, value in self.last[1].items() if key != "eta_s"}
        known.update(metrics)
        if "eta_s" not in known and step > self.start_step:
            known["eta_s"] = (self.clock() - self.started) / (step - self.start_step) * (self.total_steps - step)
        self.last = (step, known)
        if self.live is not None:
            return  # redrawn by its own clock
        due = self.printed is None or self.clock() - self.printed >= self.every_s
        if step != self.shown_step and (due or step >= self.total_steps):
            self._print_plain()

    def note(self, text: str) -> None:
        """Print a line that stays."""
        if self.enabled:
            self.console.print(Text(text), soft_wrap=True)

    def _print_plain(self) -> None:
        assert self.last is not None
        step, metrics = self.last
        self.printed, self.shown_step = self.clock(), step
        line = "  ".join([f"step {step}/{self.total_steps}", *fields(metrics)])
        self.console.print(Text(line), soft_wrap=True)

    def _live_line(self) -> Text:
        if self.last is None:
            return Text(f"step {self.start_step}/{self.total_steps}  starting")
        step, metrics = self.last
        head = Text(f"step {step}/{self.total_steps}", style="bold")
        done = min(1.0, step / self.total_steps) if self.total_steps else 1.0
        filled = round(done * BAR_CELLS)
        bar = Text("━" * filled, style="green") + Text("━" * (BAR_CELLS - filled), style="bright_black")
        # A narrow terminal first loses the bar, then the words inside the speed, then fields from the end.
        for start, texts in ([head, bar], fields(metrics)), ([head], fields(metrics)), ([head], fields(metrics, True)):
            whole = sum(2 + len(text) for text in texts if not text.startswith(LEAST))
            if sum(part.cell_len for part in start) + whole <= self.console.width:
                break
        line = Text(" ", no_wrap=True, overflow="ellipsis").join(start)
        for text in texts:
            if line.cell_len + 2 + len(text) > self.console.width:
                break
            line.append("  ").append(text, style="bold red" if "nan" in text or "inf" in text else "")
        return line


LEAST = ("lr", "grad")
"""Fields that are shown where there is room."""


def fields(metrics: Mapping[str, float], compact: bool = False) -> list[str]:
    """The metrics as short texts, the most important first.

    compact: "acc 71.0%" and "tokens/s 6.1k+12.3k" for "accuracy 71.0%" and "tokens/s 18.4k (text 6.1k, image 12.3k)".
    """
    out = []
    if "loss" in metrics:
        out.append(f"loss {number(metrics['loss'])}")
    if "reward" in metrics:  # of rollouts
        out.insert(0, f"reward {number(metrics['reward'])}")
        for key, name in (("reward_accuracy", "acc" if compact else "accuracy"), ("tool_use", "tools")):
            if key in metrics and (metrics[key] or key != "tool_use"):
                out.append(f"{name} {100 * metrics[key]:.1f}%")
        for key, name in (("zero_left", "gradient"), ("zero_tokens_masked", "masked"), ("entropy", "entropy")):
            if key in metrics and not compact:
                value = metrics[key]
                out.append(f"{name} {number(value)}" if key == "entropy" else f"{name} {value:.0%}")
    elif "reward_accuracy" in metrics:  # of preferences; of tokens says little where some are to become less likely
        out.append(f"{'ranked' if compact else 'ranked right'} {100 * metrics['reward_accuracy']:.1f}%")
        if "reward_margin" in metrics:
            out.append(f"margin {number(metrics['reward_margin'])}")
    elif "accuracy" in metrics:
        out.append(f"{'acc' if compact else 'accuracy'} {100 * metrics['accuracy']:.1f}%")
    if "eta_s" in metrics:
        out.append(f"left {duration(metrics['eta_s'])}")
    if "tokens_per_s" in metrics:
        speed = short(metrics["tokens_per_s"])
        if "text_tokens_per_s" in metrics and "image_tokens_per_s" in metrics:
            text, image = short(metrics["text_tokens_per_s"]), short(metrics["image_tokens_per_s"])
            speed = f"{text}+{image}" if compact else f"{speed} (text {text}, image {image})"
        out.append(f"tokens/s {speed}")
    if "mfu" in metrics and not compact:
        out.append(f"mfu {metrics['mfu']:.0%}")
    if "memory_gb" in metrics:
        out.append(f"mem {metrics['memory_gb']:.1f}G")
    if "lr" in metrics:
        out.append(f"lr {metrics['lr']:.2g}")
    if "grad_norm" in metrics:
        out.append(f"grad {number(metrics['grad_norm'])}")
    return out


def number(value: float) -> str:
    """0.4123 -> 0.412, 12.34 -> 12.3, 0.00001 -> 1e-05, nan -> nan."""
    if math.isfinite(value) and 0 < abs(value) < 1e-3:
        return f"{value:.2g}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def short(value: float) -> str:
    """834 -> 834, 18_400 -> 18.4k, 2_500_000 -> 2.5M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{letter}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """65 -> 1:05, 3661 -> 1:01:01, 90061 -> 1d 1:01:01."""
    if not math.isfinite(seconds):
        return "?"
    minutes, s = divmod(max(0, round(seconds)), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h}:{m:02}:{s:02}"
    return f"{h}:{m:02}:{s:02}" if h else f"{m}:{s:02}"
