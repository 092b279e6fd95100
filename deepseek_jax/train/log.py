"""What the loop keeps of its steps until a line of metrics is written: the device does not wait for the host."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.checkpoint import CheckpointStore
from deepseek_jax.train.loop_config import LoopConfig
from deepseek_jax.train.metrics import MetricsWriter, peak_memory
from deepseek_jax.train.progress import Progress


class NonFiniteError(ArithmeticError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class StepLog:
    """What is known of the steps since the last line, on the device until it is written and shown.

    step: the one that the run goes on from, whose checkpoint ``saved`` this.
    """

    def __init__(
        self,
        run_dir: Path,
        config: LoopConfig,
        store: CheckpointStore,
        step: int,
        saved: Mapping[str, Any],
        on_log: Callable[[int, dict[str, Any]], None] | None,
        progress: Progress | None,
    ) -> None:
        self._config, self._store = config, store
        self._writer = MetricsWriter(run_dir, after_step=step, tensorboard=config.tensorboard)
        self._on_log, self._progress = on_log, progress
        self._new: list[tuple[int, jax.Array, jax.Array | int]] = []  # step, finite, tokens
        self._line: tuple[int, dict[str, Any]] | None = None
        self._last: tuple[int, dict[str, Any]] = (0, {})
        self._all_bad_steps, self._tokens_seen = saved.get("bad_steps", 0), saved.get("tokens_seen", 0)
        self._began = time.monotonic() - saved.get("seconds", 0.0)
        self.bad_steps = 0  # in a row
        self._fatal: int | None = None  # the step after which there were too many
        self._clock: float | None = None
        self._timed = 0  # tokens since
        self._done_at: float | None = None  # when the step of the waiting line was done, where that is known
        if progress is not None:
            progress.start(step)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._writer.close()

    def add(self, step: int, metrics: dict[str, Any], about_batch: Mapping[str, Any]) -> None:
        """Remember a step that was dispatched."""
        if "finite" not in metrics:
            raise ValueError(f"step_fn must report 'finite' (1 or 0); its metrics are {sorted(metrics)}")
        self._last = step, {**about_batch, **metrics}
        if self._config.due(self._config.log_every, step):
            self._line = self._last
        if self._clock is None:  # the first step compiles: time counts from its end
            jax.block_until_ready(metrics["finite"])
            self._tokens_seen += int(metrics.get("tokens", 0))
            self._new.append((step, metrics["finite"], 0))
            self._clock = time.monotonic()
        else:
            self._new.append((step, metrics["finite"], metrics.get("tokens", 0)))
        # A step that is done by now ends here, and not after the making of the next batch, of which the last has none.
        self._done_at = time.monotonic() if metrics["finite"].is_ready() else None
        if self._progress is not None:
            self._progress.update(step)

    def evaluate(self, evaluate: Callable[[Any], Mapping[str, Any]], state: Any) -> Mapping[str, Any]:
        """Evaluate after the last step: the results join its line, the time does not count for its speed."""
        step, metrics = self._last
        jax.block_until_ready(metrics["finite"])
        began = time.monotonic()
        found = evaluate(state)
        assert self._clock is not None
        self._clock += time.monotonic() - began
        self._done_at = None
        if self._config.best_metric is not None and self._config.best_metric not in found:
            raise ValueError(f"best_metric {self._config.best_metric!r} is none of {sorted(found)}")
        self._line = step, {**metrics, **found}
        return found

    def flush(self, *, check: bool = False) -> None:
        """Write the line that waits, if one does; `check` looks for bad steps in any case."""
        if self._line is None:
            self._tell()
            if check:
                self._count()
                self._refuse_bad_steps()
            return
        step, metrics = self._line
        self._line = None
        metrics = jax.device_get(metrics)
        self._count()
        assert self._clock is not None
        now = self._done_at or time.monotonic()
        if self._timed:
            metrics["tokens_per_second"] = self._timed / (now - self._clock)
            self._timed, self._clock = 0, now
        line = self._writer.write(step, {**metrics, **self.totals(), **peak_memory()})
        if self._progress is not None:
            self._progress.update(step, line)
        self._refuse_bad_steps()
        if self._on_log is not None:
            self._on_log(step, line)

    def _tell(self) -> None:
        """Show metrics of the last step, though it has no line, where nothing has been shown for long."""
        step, metrics = self._last
        if self._progress is not None and self._progress.due():
            known = {key: metrics[key] for key in self._progress.keys if key in metrics}
            self._progress.update(step, jax.device_get(known))

    def totals(self) -> dict[str, Any]:
        """What has come together since the run began, other processes' parts included."""
        found = {"bad_steps": self._all_bad_steps, "seconds": time.monotonic() - self._began}
        return found | ({"tokens_seen": self._tokens_seen} if self._tokens_seen else {})

    def _count(self) -> None:
        for step, finite, tokens in jax.device_get(self._new):
            self._timed += int(tokens)
            self._tokens_seen += int(tokens)
            self._all_bad_steps += not finite
            self.bad_steps = 0 if finite else self.bad_steps + 1
            if self.bad_steps == self._config.max_bad_steps:
                self._fatal = step
        self._new = []

    def _refuse_bad_steps(self) -> None:
        if self._fatal is None:
            return
        self._store.wait()
        safe = self._store.latest_step()
        kept = "there is no checkpoint yet" if safe is None else f"the last good checkpoint is step {safe}"
        raise NonFiniteError(
            f"loss or gradient not finite in {self._config.max_bad_steps} steps in a row, up to step {self._fatal}; "
            f"{kept} in {self._store.directory}"
        )
