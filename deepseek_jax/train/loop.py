"""The one training loop: it owns resuming, checkpoints, metrics, evaluation, bad steps and preemption.

What a step computes is the caller's: the loop sees a pytree with a `.step` and a jitted function. The device
does not wait for the host: metrics stay on the device until the step after theirs has been dispatched.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax

from deepseek_jax.checkpoint import CheckpointStore
from deepseek_jax.checkpoint.model import CHECKPOINTS
from deepseek_jax.files import write_json
from deepseek_jax.parallel.processes import Agreement, gather
from deepseek_jax.train.log import StepLog
from deepseek_jax.train.loop_config import LoopConfig
from deepseek_jax.train.metrics import read_metrics
from deepseek_jax.train.preemption import Preempted, stop_signals
from deepseek_jax.train.progress import Progress
from deepseek_jax.train.reference import Reference
from deepseek_jax.train.resume import with_history


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


def run_loop(
    *,
    run_dir: str | Path,
    config: LoopConfig,
    state: State,
    step_fn: Callable[[State, Any], tuple[State, dict[str, Any]]],
    batches: Batches[State],
    meta: dict[str, Any],
    reference: Reference | None = None,
    waited: bool = False,
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
        batches: see `Batches`; what has a `close` is closed at the end, however that comes.
        meta: saved with every checkpoint; its "model" must equal the checkpoint's. See also `resume.check_resume`.
        reference: one that moves is saved and restored with the state.
        waited: step_fn returns when the devices are done. Elsewhere several processes agree on a signal a step late.
        evaluate: called every `eval_every` steps and at the end; its metrics join the line of that step.
        stop_when: looks at the line of a step that was evaluated; True ends the run there, saved, and a run that
            ended so is not gone on with.
        on_log: called with step and line after each line of metrics; it may raise to end the run.

    Raises:
        Preempted: SIGTERM or SIGINT, to any process of the run; the step was finished and saved, the same by all. A
            second signal does not wait for that.
        KeyboardInterrupt: the same before a first step was taken.
        RuntimeError: another process is gone.
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
        stack.callback(getattr(batches, "close", lambda: None))
        store = stack.enter_context(
            CheckpointStore(
                run_dir / CHECKPOINTS, keep=config.keep, best_metric=config.best_metric, best_mode=config.best_mode
            )
        )
        moving = reference if reference is not None and reference.every else None
        state, saved = _resume(store, state, batches, meta, moving)
        step = int(state.step)
        if jax.process_index() == 0:
            path = run_dir / "config.json"
            write_json(path, with_history(path, step, {"loop": asdict(config), **meta}))
        log = StepLog(run_dir, config, store, step, saved, on_log, progress)
        stack.callback(log.close)
        ended = gather(step > 0 and stop_when is not None and _ended(run_dir, step, config, stop_when))[0]
        agreed, signalled = Agreement(), 0
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
            signalled = agreed.largest(stop.number, now=waited or found is not None)
            if best or ended or signalled or config.due(config.checkpoint_every, step):
                log.flush(check=True)
                if signalled or step == config.steps or log.bad_steps == 0:  # or bad steps would push out good ones
                    about = {**meta, **log.totals()}
                    arrays = None if moving is None else moving.arrays
                    store.save(step, state, loader=batches.state(), meta=about, reference=arrays, metrics=found)
            if signalled:
                store.wait()
                break
    if signalled := signalled or agreed.largest(stop.number, now=True):  # in the last moment too
        raise Preempted(signalled, step, store.directory)
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
