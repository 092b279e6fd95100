"""The one training loop: it owns resuming, checkpoints, metrics, evaluation, bad steps and preemption.

What a step computes is the caller's: the loop sees a pytree with a `.step` and a jitted function. The device
does not wait for the host: metrics stay on the device until the step after theirs has been dispatched.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import jax

from deepseek_jax.checkpoint import CheckpointStore
from deepseek_jax.checkpoint.model import CHECKPOINTS
from deepseek_jax.files import write_json
from deepseek_jax.train.metrics import MetricsWriter, peak_memory, read_metrics
from deepseek_jax.train.preemption import Preempted, stop_signals
from deepseek_jax.train.progress import Progress
from deepseek_jax.train.reference import Reference
from deepseek_jax.train.resume import with_history
from deepseek_jax.typed import check_least, check_types


@runtime_checkable
class SteppedState(Protocol):
    """A registered dataclass, one pytree of arrays, that counts the steps taken."""

    @property
    def step(self) -> jax.Array: ...


State = TypeVar("State", bound=SteppedState)
State_contra = TypeVar("State_contra", contravariant=True)


@runtime_checkable
class Batches(Protocol[State_contra]):
    """Where batches come from: a data loader, or rollouts sampled from the very state being trained."""

    def next(self, state: State_contra, /) -> tuple[Any, Mapping[str, Any]]:
        """The next batch, and metrics about it for the step's line."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON that, given to `restore`, makes `next` go on after the last batch it returned."""
        ...

    def restore(self, state: dict[str, Any], /) -> None: ...


@dataclass(frozen=True)
class LoopConfig:
    """How long to train, and how often to do what beside it; all counts are in steps."""

    steps: int
    """Of the whole run, those before it was stopped included."""
    log_every: int = 10
    """Steps from one line of metrics to the next."""
    checkpoint_every: int = 100
    """Steps from one checkpoint to the next; the last step makes one in any case."""
    keep: int = 2
    """Newest checkpoints to keep, beside the best."""
    eval_every: int = 0
    """Steps from one evaluation to the next; 0: none."""
    best_metric: str | None = None
    """Keep the checkpoint of the best evaluation by this metric."""
    best_mode: Literal["max", "min"] = "max"
    """Whether more of it is better, or less."""
    max_bad_steps: int = 5
    """This many steps in a row whose loss or gradient is not finite end the run."""
    tensorboard: bool = True
    """Write tensorboard/ beside metrics.jsonl."""

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, "steps", "log_every", "checkpoint_every", "keep", "max_bad_steps")
        if self.best_metric is not None and self.eval_every == 0:
            raise ValueError(f"best_metric={self.best_metric!r} needs evaluations: eval_every is 0")

    def due(self, every: int, step: int) -> bool:
        """Whether something done every so many steps (0: never), and at the end, is due after `step`."""
        return every > 0 and (step % every == 0 or step == self.steps)


class NonFiniteError(ArithmeticError):
    """Too many steps in a row had a loss or gradient that is not finite."""


def run_loop(
    *,
    run_dir: str | Path,
    config: LoopConfig,
    state: State,
    step_fn: Callable[[State, Any], tuple[State, dict[str, Any]]],
    batches: Batches[State],
    meta: dict[str, Any],
    reference: Reference | None = None,
    evaluate: Callable[[State], Mapping[str, Any]] | None = None,
    stop_when: Callable[[Mapping[str, Any]], bool] | None = None,
    on_log: Callable[[int, dict[str, Any]], None] | None = None,
    progress: Progress | None = None,
) -> State:
    """Train to `config.steps`, from the newest checkpoint in `run_dir` if there is one -> the final state.

    Writes `config.json`, `metrics.jsonl`, `tensorboard/` and `checkpoints/` in `run_dir`. Every line of metrics has
    `bad_steps`, the number of steps so far that were not finite, `seconds` of training so far (evaluations included,
    pauses not) and the peak memory of this process; `tokens_seen` so far, if steps report tokens. `config.json` has
    the `history` of what was changed as the run went on.

    Args:
        state: the initial state on its devices. It is used up: donated to the first step, or deleted to make
            room for the checkpoint's, which takes its shapes and shardings. Where there is a checkpoint, a
            tree of ShapeDtypeStruct will do.
        step_fn: `(state, batch) -> (state, metrics)`, jitted with donated state. Where the loss or a
            gradient is not finite it leaves the parameters alone and reports `finite` = 0; `tokens`, if
            reported, makes `tokens_per_second`.
        batches: see `Batches`.
        meta: saved with every checkpoint; its "model" must equal the checkpoint's. See also `resume.check_resume`.
        reference: one that moves is saved and restored with the state.
        evaluate: called every `eval_every` steps and at the end; its metrics join the line of that step.
        stop_when: looks at the line of a step that was evaluated; True ends the run there, saved, and a run that
            ended so is not gone on with.
        on_log: called with step and line after each line of metrics; it may raise to end the run.

    Raises:
        Preempted: SIGTERM or SIGINT; the step was finished and saved. A second signal does not wait for that.
        KeyboardInterrupt: the same before a first step was taken.
        NonFiniteError: `max_bad_steps` in a row; the last good checkpoint stays the newest.
        OSError: the disk is full; what was saved before is safe.
        ValueError: the checkpoint is of another model or data set; see `CheckpointStore.restore`.
    """
    if (config.eval_every > 0) != (evaluate is not None):
        raise ValueError(f"eval_every is {config.eval_every}, but evaluate is {evaluate}: give both or neither")
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stop = stack.enter_context(stop_signals(" before a step was taken; the same command starts again"))
        store = stack.enter_context(
            CheckpointStore(
                run_dir / CHECKPOINTS,
                keep=config.keep,
                best_metric=config.best_metric,
                best_mode=config.best_mode,
            )
        )
        moving = reference if reference is not None and reference.every else None
        state, saved = _resume(store, state, batches, meta, moving)
        step = int(state.step)
        if jax.process_index() == 0:
            path = run_dir / "config.json"
            write_json(path, with_history(path, step, {"loop": asdict(config), **meta}))
        writer = MetricsWriter(run_dir, after_step=step, tensorboard=config.tensorboard)
        stack.callback(writer.close)
        log = _Log(config, store, writer, saved, on_log, progress)
        if progress is not None:
            stack.callback(progress.stop)
            progress.start(step)
        ended = step > 0 and stop_when is not None and _ended(run_dir, step, config, stop_when)
        while step < config.steps and not ended:
            batch, about_batch = batches.next(state)
            state, metrics = step_fn(state, batch)
            step += 1
            log.flush()  # the step before: by now the device is busy with this one
            log.add(step, metrics, about_batch)
            stop.saving = True
            found = None
            if evaluate is not None and config.due(config.eval_every, step):
                found = log.evaluate(evaluate, state)
            best = found is not None and config.best_metric is not None
            ended = found is not None and stop_when is not None and stop_when(found)
            if best or ended or stop.received or config.due(config.checkpoint_every, step):
                log.flush(check=True)
                if stop.received or step == config.steps or log.bad_steps == 0:  # or bad steps would push out good ones
                    about = {**meta, **log.totals()}
                    arrays = None if moving is None else moving.arrays
                    store.save(step, state, loader=batches.state(), meta=about, reference=arrays, metrics=found)
            if stop.received:
                store.wait()
                break
    if stop.received:  # in the last moment too
        raise Preempted(stop.received[0], step, store.directory)
    return state


def _resume(
    store: CheckpointStore, state: State, batches: Batches[State], meta: dict[str, Any], moving: Reference | None
) -> tuple[State, dict[str, Any]]:
    """The state to go on from, and its checkpoint's meta; the reference is where it was."""
    if store.latest_step() is None:
        return state, {}
    state, loader, saved = store.restore(_emptied(state), meta=meta)
    if moving is not None:
        moving.arrays = store.restore_reference(_emptied(moving.arrays), int(state.step))
    batches.restore(loader)
    return state, saved


def _emptied(arrays: Any) -> Any:
    """What a restore makes of arrays, which are deleted: they are never twice in memory."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays)
    jax.tree.map(lambda x: x.delete() if isinstance(x, jax.Array) else None, arrays)
    return abstract


def _ended(run_dir: Path, step: int, config: LoopConfig, stop_when: Callable[[Mapping[str, Any]], bool]) -> bool:
    """Whether the evaluation after the restored step says that the run was to end there."""
    last = read_metrics(run_dir)[-1:]
    return config.due(config.eval_every, step) and any(line["step"] == step and stop_when(line) for line in last)


class _Log:
    """What is known of the steps since the last line, on the device until it is written."""

    def __init__(
        self,
        config: LoopConfig,
        store: CheckpointStore,
        writer: MetricsWriter,
        saved: Mapping[str, Any],
        on_log: Callable[[int, dict[str, Any]], None] | None,
        progress: Progress | None,
    ) -> None:
        self._config, self._store, self._writer = config, store, writer
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
        if self._config.best_metric is not None and self._config.best_metric not in found:
            raise ValueError(f"best_metric {self._config.best_metric!r} is none of {sorted(found)}")
        self._line = step, {**metrics, **found}
        return found

    def flush(self, *, check: bool = False) -> None:
        """Write the line that waits, if one does; `check` looks for bad steps in any case."""
        if self._line is None:
            if check:
                self._count()
                self._refuse_bad_steps()
            return
        step, metrics = self._line
        self._line = None
        metrics = jax.device_get(metrics)
        self._count()
        assert self._clock is not None
        now = time.monotonic()
        if self._timed:
            metrics["tokens_per_second"] = self._timed / (now - self._clock)
            self._timed, self._clock = 0, now
        line = self._writer.write(step, {**metrics, **self.totals(), **peak_memory()})
        if self._progress is not None:
            self._progress.update(step, line)
        self._refuse_bad_steps()
        if self._on_log is not None:
            self._on_log(step, line)

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
