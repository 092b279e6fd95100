"""What every training stage does around its own step: devices, state, the loop, the facts of the run."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from deepseek_jax import files
from deepseek_jax.checkpoint.finding import CHECKPOINTS, checkpoint_steps
from deepseek_jax.checkpoint.model import Model
from deepseek_jax.checkpoint.places import point_to
from deepseek_jax.parallel.processes import together
from deepseek_jax.parallel.sharding import ShardingRules, place_batch
from deepseek_jax.saying import doing, say
from deepseek_jax.train.loop import Batches, run_loop
from deepseek_jax.train.optimizer import OptimizerConfig, learning_rate, make_optimizer, warmup_updates
from deepseek_jax.train.ppo import CriticConfig, with_critic
from deepseek_jax.train.progress import Progress
from deepseek_jax.train.reference import Reference
from deepseek_jax.train.resume import check_resume, differences, saved_meta
from deepseek_jax.train.state import TrainState, abstract_state, create_state
from deepseek_jax.train.step import Batch, Loss, make_step
from deepseek_jax.workflows.log_to import opened_logs
from deepseek_jax.workflows.recipe import as_now
from deepseek_jax.workflows.stage_config import StageConfig, check_start
from deepseek_jax.workflows.stage_result import RESULT, facts_of
from deepseek_jax.workflows.stage_step import jitted_step


def train_stage(
    config: StageConfig,
    *,
    stage: str,
    start: Model,
    loss: Loss,
    batches: Batches[TrainState],
    prepare: Callable[[TrainState, Batch], Batch] | None = None,
    reference: Reference | None = None,
    epochs: int = 1,
    minibatches: int = 1,
    critic: CriticConfig | None = None,
    evaluate: Callable[[Model], Mapping[str, float]] | None = None,
    stop_when: Callable[[Mapping[str, Any]], bool] | None = None,
    on_done: Callable[[], Mapping[str, float]] | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Train from ``start`` (its ``params`` None: fresh ones) and return the model with the facts of the run.

    The arrays of ``start`` are used up, but where ``reference`` is them; where there is a checkpoint they are not used.

    prepare: adds to each batch on the devices, before its step, what the loss reads beside it; ``reference``, if it
    moves, is saved with the state. epochs, minibatches: see ``make_step``. critic: what is trained beside, see
    ``with_critic``. on_done: called when the devices have finished a step, which are then waited for; what it returns
    joins the step's metrics.

    Raises ValueError where ``run_dir`` holds a run with other settings (``check_resume``), and what ``run_loop`` does.
    """
    run_dir, updates = Path(config.run_dir), epochs * minibatches
    model, compute, mesh = start.config, start.compute, start.mesh
    check_start(config, start)
    settings = _settings(config, stage, start, reference)
    saved = _open_run(config, settings, start)
    schedule_steps = config.loop.steps if saved is None else saved["schedule_steps"]
    _tell_warmup(config.optimizer, schedule_steps * updates)
    optimizer = make_optimizer(config.optimizer, model, schedule_steps * updates)
    keep = reference is not None and not reference.every  # they are the reference's
    state = _state(config, start, optimizer, going_on=saved is not None, keep=keep)
    step = make_step(model, loss, optimizer, config.step, compute=compute, epochs=epochs, minibatches=minibatches)
    if critic is not None:
        parts = {"steps": schedule_steps, "epochs": epochs, "minibatches": minibatches}
        step, state = with_critic(step, state, model, critic, config.step, **parts, compute=compute, mesh=mesh)
    jitted = jitted_step(step, learning_rate(config.optimizer, schedule_steps * updates), updates, compute.rules)
    steps = _Steps(together(jitted), run_dir, mesh, compute.rules, prepare, reference, on_done)

    def trained(state: TrainState) -> Model:
        return dataclasses.replace(start, params=state.params, router_bias=state.router_bias)

    meta = {**settings, "schedule_steps": schedule_steps}
    with jax.set_mesh(mesh), opened_logs(config.log_to, run_dir, meta) as log:
        state = run_loop(
            run_dir=run_dir,
            config=config.loop,
            state=state,
            step_fn=steps,
            batches=batches,
            meta=meta,
            reference=reference,
            waited=on_done is not None,
            evaluate=None if evaluate is None else lambda state: evaluate(trained(state)),
            stop_when=stop_when,
            on_log=log,
            progress=None if config.quiet or jax.process_index() else Progress(stage, config.loop.steps),
        )
    if not steps.taken:
        say(f"{run_dir}: step {int(state.step)} was reached before; nothing was trained")
    return trained(state), facts_of(run_dir, model, state, steps.taken)


@dataclasses.dataclass
class _Steps:
    """The step as the loop calls it: with a batch that is not on the devices yet, and all that goes with it."""

    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]
    run_dir: Path
    mesh: Mesh
    rules: ShardingRules
    prepare: Callable[[TrainState, Batch], Batch] | None
    reference: Reference | None
    on_done: Callable[[], Mapping[str, float]] | None
    taken: int = 0
    """By this process."""

    def __call__(self, state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, dict[str, Any]]:
        self.taken += 1
        if self.taken == 1 and jax.process_index() == 0:
            (self.run_dir / RESULT).unlink(missing_ok=True)  # of fewer steps
        placed = place_batch(dict(batch), self.mesh, self.rules)
        placed = placed if self.prepare is None else self.prepare(state, placed)
        state, metrics = self.step(state, placed)
        if self.reference is not None:
            self.reference.follow(state, metrics["finite"])
        if self.on_done is not None:
            jax.block_until_ready(metrics)
            return state, {**metrics, **self.on_done()}
        return state, metrics


def _open_run(config: StageConfig, settings: dict[str, Any], start: Model) -> dict[str, Any] | None:
    """Make the run's folder, with its tokenizer; what its checkpoint says, if it has one, which must be of this run."""
    run_dir, first = Path(config.run_dir), jax.process_index() == 0
    if config.loop.checkpoints:
        point_to(run_dir / CHECKPOINTS, config.loop.checkpoints)
    if (saved := saved_meta(run_dir)) is not None:
        check_resume(run_dir, as_now(saved, settings, config), settings, config.MAY_CHANGE)
        say(f"{run_dir}: goes on from step {checkpoint_steps(run_dir / CHECKPOINTS)[-1]}")
        if first and _has_changed(config):
            (run_dir / RESULT).unlink(missing_ok=True)  # it may have been measured otherwise
    run_dir.mkdir(parents=True, exist_ok=True)
    if first:
        start.text.save(run_dir)
    return saved


def _state(
    config: StageConfig, start: Model, optimizer: optax.GradientTransformation, *, going_on: bool, keep: bool
) -> TrainState:
    """The state that a run begins with, in place of the parameters of ``start`` unless ``keep``; or, where it is
    ``going_on``, the shapes of what it will read."""
    options: dict[str, Any] = {"compute": start.compute, "ema": config.step.ema_decay > 0}
    if going_on:
        return abstract_state(start.config, optimizer, start.mesh, **options)
    with doing("making the state"):
        options |= {"params": start.params, "router_bias": start.router_bias, "seed": config.seed}
        state = jax.block_until_ready(create_state(start.config, optimizer, start.mesh, **options))
    if not keep:
        jax.tree.map(lambda array: array.delete(), start.params)
    return state


def _settings(config: StageConfig, stage: str, start: Model, reference: Reference | None) -> dict[str, Any]:
    """What a checkpoint records of the run, and a run that goes on is compared with."""
    found = {"stage": stage, "model": start.config.to_dict(), "tokenizer_fingerprint": start.text.fingerprint}
    found["recipe"] = dataclasses.asdict(config)
    return found if reference is None else found | {"reference": reference.meta}


def _tell_warmup(config: OptimizerConfig, updates: int) -> None:
    """Say where a run ends before its rate has risen: little is learnt."""
    if (warmup := warmup_updates(config, updates)) > updates:
        say(
            f"optimizer.warmup_steps={warmup} is more than the run's {updates} updates: the rate ends at "
            f"{updates / warmup:.2g} of peak_lr={config.peak_lr}"
        )


def _has_changed(config: StageConfig) -> bool:
    """Whether settings differ from the last time, other than where the run is and what it says."""
    here = {"recipe": dataclasses.asdict(config)}
    before = as_now(files.read_json_object(Path(config.run_dir) / "config.json"), here, config).get("recipe", {})
    return bool(differences(before, here["recipe"]).keys() - {"run_dir", "quiet", "log_to"})
