"""What every training stage does around its own step: devices, state, the loop, the result."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from deepseek_jax import files
from deepseek_jax.checkpoint.finding import CHECKPOINTS, checkpoint_steps
from deepseek_jax.checkpoint.model import Model
from deepseek_jax.checkpoint.places import point_to
from deepseek_jax.checkpoint.store import check_directory
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.rows import RowLoader
from deepseek_jax.model.costs import count_parameters
from deepseek_jax.parallel.legal import check_layout
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.parallel.processes import first_host_alone, gather, row_groups, together
from deepseek_jax.parallel.sharding import ShardingRules, constrain, named_sharding, place_batch
from deepseek_jax.saying import doing, say
from deepseek_jax.train.loop import Batches, LoopConfig, run_loop
from deepseek_jax.train.metrics import read_metrics
from deepseek_jax.train.optimizer import OptimizerConfig, learning_rate, make_optimizer, warmup_updates
from deepseek_jax.train.ppo import CriticConfig, with_critic
from deepseek_jax.train.progress import Progress
from deepseek_jax.train.reference import Reference
from deepseek_jax.train.resume import check_resume, differences, flat, saved_meta
from deepseek_jax.train.state import TrainState, abstract_state, create_state
from deepseek_jax.train.step import Batch, Loss, Step, StepConfig, make_step
from deepseek_jax.typed import check_least, check_types
from deepseek_jax.workflows.log_to import opened_logs
from deepseek_jax.workflows.recipe import as_now

RESULT = "result.json"


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """What all stages have: where they write, the seed, and how they train."""

    run_dir: str = "runs/stage"
    """The run's folder: checkpoints, metrics, result. A run that is there goes on. Several processes share it: a file
    system that all hosts see."""
    seed: int = 0
    """Of fresh parameters, of the data's order and of all that is drawn."""
    optimizer: OptimizerConfig = OptimizerConfig()
    step: StepConfig = StepConfig()
    loop: LoopConfig = LoopConfig(steps=100)
    mesh: MeshConfig = MeshConfig()
    compute: ComputeConfig = ComputeConfig()
    log_to: tuple[str, ...] = ()
    """Where metrics go beside metrics.jsonl: wandb, or file.py:function, called with the step and the line; what it
    raises is said once, and the run goes on."""
    quiet: bool = False
    """Say nothing before the result."""

    # What may differ, as a run goes on, from what its checkpoint was made with; see `check_resume`.
    MAY_CHANGE = ("run_dir", "compute", "mesh", "loop", "log_to", "quiet")

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, *(name for name in ("batch_size", "minibatches", "inner_epochs") if hasattr(self, name)))
        self._check_parts()
        if self.run_dir.startswith("gs://"):
            raise ValueError(
                f"run_dir={self.run_dir!r}: expected a local or mounted folder, since a run appends to its files; its "
                "checkpoints can go to a bucket: loop.checkpoints=gs://BUCKET/FOLDER"
            )
        try:
            check_directory(self.run_dir)
        except ValueError as error:
            raise ValueError(f"run_dir={self.run_dir!r}: {error}") from error
        if self.compute.param_dtype != "float32":
            raise ValueError(
                f"compute.param_dtype={self.compute.param_dtype!r}: a stage trains float32 masters; another is for "
                "inference alone"
            )

    def rows_of_step(self) -> tuple[int, str]:
        """How many rows a step has, 0 where it is made as many as its parts and the mesh need, and what says so."""
        rows = getattr(self, "batch_size", 0)
        return rows, f"batch_size={rows}"

    def columns_of_step(self, model: ModelConfig) -> int | None:
        """The most tokens that a row has, where settings say so."""
        return getattr(getattr(self, "data", None), "seq_len", None)

    def _check_parts(self) -> None:
        rows, said = self.rows_of_step()
        minibatches = getattr(self, "minibatches", 1)
        for name, parts in (("minibatches", minibatches), ("step.microbatches", self.step.microbatches)):
            if rows % parts:
                raise ValueError(f"{name}={parts} does not divide the {rows} rows of {said}")
            rows, said = rows // parts, said if parts == 1 else f"{said}, {name}={parts}"


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
    state_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    measured = _measured(step, learning_rate(config.optimizer, schedule_steps * updates), updates, compute.rules)
    jitted = together(measured)
    taken = 0

    def placed_step(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, dict[str, Any]]:
        nonlocal taken
        taken += 1
        if taken == 1 and jax.process_index() == 0:
            (run_dir / RESULT).unlink(missing_ok=True)  # of fewer steps
        placed = place_batch(dict(batch), mesh, compute.rules)
        placed = placed if prepare is None else prepare(state, placed)
        state, metrics = jitted(state, placed)
        if reference is not None:
            reference.follow(state, metrics["finite"])
        if on_done is not None:
            jax.block_until_ready(metrics)
            return state, {**metrics, **on_done()}
        return state, metrics

    def trained(state: TrainState) -> Model:
        return dataclasses.replace(start, params=state.params, router_bias=state.router_bias)

    meta = {**settings, "schedule_steps": schedule_steps}
    with jax.set_mesh(mesh), opened_logs(config.log_to, run_dir, meta) as log:
        state = run_loop(
            run_dir=run_dir,
            config=config.loop,
            state=state,
            step_fn=placed_step,
            batches=batches,
            meta=meta,
            reference=reference,
            waited=on_done is not None,
            evaluate=None if evaluate is None else lambda state: evaluate(trained(state)),
            stop_when=stop_when,
            on_log=log,
            progress=None if config.quiet or jax.process_index() else Progress(stage, config.loop.steps),
        )
    if not taken:
        say(f"{run_dir}: step {int(state.step)} was reached before; nothing was trained")
    return trained(state), {
        **_measured_so_far(run_dir),
        "steps": int(state.step),
        "steps_here": taken,  # by this process
        **count_parameters(model),
        "state_bytes": state_bytes,
        "cache_numbers_per_token_layer": model.cache_numbers_per_token_layer,
    }


def check_start(config: StageConfig, start: Model) -> None:
    """ValueError for a layout that cannot be (``check_layout``): before rows are packed, and before the run's folder is
    there."""
    _check_layout(config, start.config, start.compute, start.mesh, config.columns_of_step(start.config))


def _check_layout(
    config: StageConfig, model: ModelConfig, compute: ComputeConfig, mesh: Mesh, columns: int | None
) -> None:
    rows, said = config.rows_of_step()
    parts = {"minibatches": getattr(config, "minibatches", 1), "step.microbatches": config.step.microbatches}
    said += "".join(f", {name}={count}" for name, count in parts.items() if count > 1)
    rows //= math.prod(parts.values())
    layout = {"rows": rows or None, "columns": columns, "rows_said": f"the {rows} rows of {said}"}
    check_layout(model, compute, mesh.shape, **layout)


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


def _measured_so_far(run_dir: Path) -> dict[str, Any]:
    """What the lines of metrics say of the whole run, whichever process wrote them."""
    lines = read_metrics(run_dir)
    names = ("seconds", "tokens_seen", "loss", "reward")
    found = {name: lines[-1][name] for name in names if lines and name in lines[-1]}
    peaks = {
        name: [line[name] for line in lines if name in line] for name in ("peak_bytes_device", "peak_bytes_process")
    }
    return found | {name: max(values) for name, values in peaks.items() if values}


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


def _measured(
    step: Step, rate: Callable[[jax.Array], jax.typing.ArrayLike], updates: int, rules: ShardingRules
) -> jax.stages.Wrapped:
    """The step, jitted with its state donated, its metrics with the rate and the number of tokens, whole on every
    device: each process reads them."""

    def measured(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        new, metrics = step(state, batch)
        tokens = jnp.sum(batch["segment_ids"] > 0)
        metrics = {**metrics, "lr": jnp.asarray(rate(state.step * updates)), "tokens": tokens}
        return new, jax.tree.map(lambda x: constrain(x, rules, *[None] * x.ndim), metrics)

    return jax.jit(measured, donate_argnums=0)


class AbstractStep(NamedTuple):
    """A jitted step with what it is called with, as shapes, dtypes and shardings: no array exists."""

    step: Any
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]


def abstract_step(config: StageConfig, model: ModelConfig, loss: Loss, mesh: Mesh, columns: int) -> AbstractStep:
    """The step that a stage takes on ``mesh``, whose devices need not be here, on its rows of ``columns`` tokens.

    Raises ValueError where the mesh cannot split them, or the network (``check_layout``).
    """
    compute, rows = config.compute.on(mesh), config.rows_of_step()[0]
    _check_layout(config, model, compute, mesh, columns)
    optimizer = make_optimizer(config.optimizer, model, config.loop.steps)
    state = abstract_state(model, optimizer, mesh, compute=compute, ema=config.step.ema_decay > 0)
    shape = rows, columns
    place = named_sharding(mesh, ("batch", "sequence"), shape, compute.rules)
    array = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place)  # noqa: E731
    batch = {name: array(jnp.int32) for name in ("tokens", "segment_ids", "positions")}
    step = make_step(model, loss, optimizer, config.step, compute=compute)
    jitted = _measured(step, learning_rate(config.optimizer, config.loop.steps), 1, compute.rules)
    return AbstractStep(jitted, state, batch | {"loss_mask": array(jnp.float32)})


def read_result(run_dir: str | Path) -> dict[str, Any] | None:
    """A finished stage's result, or None."""
    return files.read_json_object(Path(run_dir) / RESULT) or None


def finish(config: StageConfig, facts: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Write and return a stage's result: the ``facts`` of ``train_stage``, and what ``measure`` finds.

    A number that is not finite, as a perplexity past all floats, is null there, which is said. Where nothing was
    trained, the result that is there stands: ``train_stage`` leaves none of other settings.
    """
    path = Path(config.run_dir) / RESULT
    there = None if facts["steps_here"] else gather(read_result(config.run_dir))[0]
    if there is not None:
        say(f"{path} stands; remove it to measure again")
        return there | {"steps_here": 0}
    result = facts | measure()
    if past := [name for name, value in flat(result) if isinstance(value, float) and not math.isfinite(value)]:
        say(f"{path}: {', '.join(past)}: not finite, so null")
    first_host_alone(lambda: write_json(path, result))
    return read_result(config.run_dir) or {}


def _has_changed(config: StageConfig) -> bool:
    """Whether settings differ from the last time, other than where the run is and what it says."""
    here = {"recipe": dataclasses.asdict(config)}
    before = as_now(files.read_json_object(Path(config.run_dir) / "config.json"), here, config).get("recipe", {})
    return bool(differences(before, here["recipe"]).keys() - {"run_dir", "quiet", "log_to"})


def write_json(path: Path, content: Any) -> None:
    """``files.write_json``; of several processes the first alone writes."""
    if jax.process_index() == 0:
        files.write_json(path, content)


def row_loader(folder: Path, config: Any, mesh: Mesh) -> RowLoader:
    """Batches of ``config.batch_size`` packed rows, of which each process reads its own alone."""
    index, count = row_groups(mesh, config.compute.rules.batch)
    return RowLoader(folder, batch_size=config.batch_size, seed=config.seed, process_index=index, process_count=count)


class LoaderBatches:
    """A data loader as the loop's ``Batches``: what comes next does not depend on the state."""

    def __init__(self, loader: Any):
        self.loader = loader

    def next(self, state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
        del state
        return next(self.loader), {}

    def state(self) -> dict[str, Any]:
        return self.loader.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.loader.restore(state)
