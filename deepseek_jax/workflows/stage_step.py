"""The step that a training stage takes, jitted: with arrays, or as shapes alone for devices that are not here."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from deepseek_jax.config import ModelConfig
from deepseek_jax.parallel.sharding import ShardingRules, constrain, named_sharding
from deepseek_jax.train.optimizer import learning_rate, make_optimizer
from deepseek_jax.train.state import TrainState, abstract_state
from deepseek_jax.train.step import Batch, Loss, Step, make_step
from deepseek_jax.workflows.stage_config import StageConfig, check_stage_layout


def jitted_step(
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
    check_stage_layout(config, model, compute, mesh, columns)
    optimizer = make_optimizer(config.optimizer, model, config.loop.steps)
    state = abstract_state(model, optimizer, mesh, compute=compute, ema=config.step.ema_decay > 0)
    shape = rows, columns
    place = named_sharding(mesh, ("batch", "sequence"), shape, compute.rules)
    array = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place)  # noqa: E731
    batch = {name: array(jnp.int32) for name in ("tokens", "segment_ids", "positions")}
    step = make_step(model, loss, optimizer, config.step, compute=compute)
    jitted = jitted_step(step, learning_rate(config.optimizer, config.loop.steps), 1, compute.rules)
    return AbstractStep(jitted, state, batch | {"loss_mask": array(jnp.float32)})
