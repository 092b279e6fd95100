"""Show how far a stage is: a bar in a terminal, a plain line now and then in a log file."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from deepseek_jax.saying import terminal


class Progress:
    """The progress of one stage, with the remaining time and the metrics named in `keys`.

    Args:
        stage: its name on the screen.
        total: its number of steps.
        keys: metrics to show, in this order, where a step has them.
        every_seconds: how often a plain line is printed where there is no terminal.
        console: where to; standard error if None.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        *,
        keys: Sequence[str] = ("loss", "reward", "dropped_sum", "tokens_per_second"),
        every_seconds: float = 10.0,
        console: Console | None = None,
    ) -> None:
        self._stage, self._total, self.keys = stage, total, tuple(keys)
        self._every_seconds = every_seconds
        self._console = console or terminal(stderr=True)
        self._text = ""
        self._bar: RichProgress | None = None
        self._began: tuple[int, float] | None = None
        self._started = self._printed = 0.0

    def start(self, step: int) -> None:
        """Begin at `step`: 0, or where the stage goes on."""
        self._began, self._started = None, time.monotonic()
        self._printed = self._started
        if step == self._total:
            return
        if not self._console.is_terminal:
            self._say(f"{self._stage}: compiling …")
        else:
            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}", style="dim", markup=False),
                console=self._console,
            )
            self._bar.add_task(self._stage, total=self._total, completed=step, text="compiling …")
            self._bar.start()

    def update(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """`step` is done; `metrics`, when there are new ones, replace those shown."""
        now = time.monotonic()
        if self._began is None:  # the first step compiles and would spoil the estimate
            self._began, self._printed = (step, now), now
            self._say(f"{self._stage}: first step after {now - self._started:.1f} s")
        if metrics is not None:
            shown = [f"{key} {metrics[key] + 0.0:.4g}" for key in self.keys if metrics.get(key) is not None]
            self._text = " · ".join(shown)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, text=self._text)
            self._printed = now if metrics is not None else self._printed
        elif self.due() or (step == self._total and metrics is not None):
            self._printed = now
            parts = [f"{self._stage} {step}/{self._total}", f"{self._remaining(step, now)} left", self._text]
            self._say(" · ".join(part for part in parts if part))

    def due(self) -> bool:
        """Whether it is time for a line, or in a terminal for newer metrics."""
        return self._began is not None and time.monotonic() - self._printed >= self._every_seconds

    def stop(self) -> None:
        """Leave the terminal as it was found."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _remaining(self, step: int, now: float) -> str:
        assert self._began is not None
        first, began = self._began
        if step == first:
            return "?:??"
        seconds = round((now - began) / (step - first) * (self._total - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
