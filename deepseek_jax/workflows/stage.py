"""What every training stage does around its own step: devices, state, the loop, the result."""

import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.checkpoint.model import Model
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.model.costs import count_parameters
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.parallel.sharding import place_batch
from deepseek_jax.train.loop import Batches, LoopConfig, run_loop
from deepseek_jax.train.optimizer import OptimizerConfig, learning_rate, make_optimizer
from deepseek_jax.train.progress import Progress
from deepseek_jax.train.reference import Reference
from deepseek_jax.train.resume import check_resume, saved_meta
from deepseek_jax.train.state import TrainState, create_state
from deepseek_jax.train.step import Batch, Loss, Step, StepConfig, make_step
from deepseek_jax.typed import check_types

RESULT = "result.json"


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """What all stages have: where they write, the seed, and how they train."""

    run_dir: str = "runs/stage"
    """The run's folder: checkpoints, metrics, result. A run that is there goes on."""
    seed: int = 0
    """Of fresh parameters, of the data's order and of all that is drawn."""
    optimizer: OptimizerConfig = OptimizerConfig()
    step: StepConfig = StepConfig()
    loop: LoopConfig = LoopConfig(steps=100)
    mesh: MeshConfig = MeshConfig()
    compute: ComputeConfig = ComputeConfig()

    # What may differ, as a run goes on, from what its checkpoint was made with; see `check_resume`.
    MAY_CHANGE = ("run_dir", "compute", "mesh", "loop")

    def __post_init__(self) -> None:
        check_types(self)
        if "://" in self.run_dir:
            raise ValueError(f"run_dir={self.run_dir!r}: runs are written to a local or mounted folder")
        if self.compute.param_dtype != "float32":
            raise ValueError(
                f"compute.param_dtype={self.compute.param_dtype!r}: a stage trains float32 masters; another is for "
                "inference alone"
            )


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
    evaluate: Callable[[Model], Mapping[str, float]] | None = None,
    stop_when: Callable[[Mapping[str, Any]], bool] | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Train from ``start`` (its ``params`` None: fresh ones) and return the model with the facts of the run.

    prepare: adds to each batch on the devices, before its step, what the loss reads beside it; ``reference``, if it
    moves, is saved with the state. epochs, minibatches: see ``make_step``.

    Raises ValueError where ``run_dir`` holds a run with other settings (``check_resume``), and what ``run_loop`` does.
    """
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        start.text.save(run_dir)
    model, compute, mesh = start.config, start.compute, start.mesh
    settings = _settings(config, stage, start, reference)
    schedule_steps = config.loop.steps
    if (saved := saved_meta(run_dir)) is not None:
        check_resume(run_dir, saved, settings, config.MAY_CHANGE)
        schedule_steps = saved["schedule_steps"]
    updates = epochs * minibatches
    optimizer = make_optimizer(config.optimizer, model, schedule_steps * updates)
    state = create_state(
        model,
        optimizer,
        mesh,
        compute=compute,
        seed=config.seed,
        params=start.params,
        router_bias=start.router_bias,
        ema=config.step.ema_decay > 0,
    )
    step = make_step(model, loss, optimizer, config.step, compute=compute, epochs=epochs, minibatches=minibatches)
    jitted = _measured(step, learning_rate(config.optimizer, schedule_steps * updates), updates)
    taken = 0

    def placed_step(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, dict[str, jax.Array]]:
        nonlocal taken
        taken += 1
        placed = place_batch(dict(batch), mesh, compute.rules)
        state, metrics = jitted(state, placed if prepare is None else prepare(state, placed))
        if reference is not None:
            reference.follow(state, metrics["finite"])
        return state, metrics

    def trained(state: TrainState) -> Model:
        return dataclasses.replace(start, params=state.params, router_bias=state.router_bias)

    began = time.monotonic()
    with jax.set_mesh(mesh):
        state = run_loop(
            run_dir=run_dir,
            config=config.loop,
            state=state,
            step_fn=placed_step,
            batches=batches,
            meta={**settings, "schedule_steps": schedule_steps},
            reference=reference,
            evaluate=None if evaluate is None else lambda state: evaluate(trained(state)),
            stop_when=stop_when,
            progress=Progress(stage, config.loop.steps),
        )
    return trained(state), {
        "seconds": time.monotonic() - began,
        "steps": int(state.step),
        "steps_here": taken,  # since it went on, where it did
        **count_parameters(model),
        "cache_numbers_per_token_layer": model.cache_numbers_per_token_layer,
    }


def require(config: Any, *names: str) -> None:
    """ValueError for the first of these fields ("data.path") that is empty."""
    for name in names:
        if not functools.reduce(getattr, name.split("."), config):
            raise ValueError(f"{name} is empty: give --{name.replace('_', '-')}, or a recipe that has it")


def _settings(config: StageConfig, stage: str, start: Model, reference: Reference | None) -> dict[str, Any]:
    """What a checkpoint records of the run, and a run that goes on is compared with."""
    found = {"stage": stage, "model": start.config.to_dict(), "tokenizer_fingerprint": start.text.fingerprint}
    found["recipe"] = dataclasses.asdict(config)
    return found if reference is None else found | {"reference": reference.meta}


def _measured(step: Step, rate: Callable[[jax.Array], jax.typing.ArrayLike], updates: int) -> Step:
    """The step, jitted with its state donated, its metrics with the rate and the number of tokens."""

    def measured(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        new, metrics = step(state, batch)
        tokens = jnp.sum(batch["segment_ids"] > 0)
        return new, {**metrics, "lr": jnp.asarray(rate(state.step * updates)), "tokens": tokens}

    return jax.jit(measured, donate_argnums=0)


def read_result(run_dir: str | Path) -> dict[str, Any] | None:
    """A finished stage's result, or None."""
    path = Path(run_dir) / RESULT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_json(path: Path, content: Any) -> None:
    """Write and move: a killed process leaves the old file or the new one. Of several the first alone writes."""
    if jax.process_index() > 0:
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


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
