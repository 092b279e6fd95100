"""A recipe's program on any mesh, as shapes alone: what of a device's memory its arrays take, and how it is lowered."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from deepseek_jax.inference.abstract import abstract_program
from deepseek_jax.model.parameters import logical_axes
from deepseek_jax.parallel.sharding import state_sharding
from deepseek_jax.train.state import TrainState
from deepseek_jax.workflows.pretrain import PretrainConfig
from deepseek_jax.workflows.stage_step import abstract_step

Work = Literal["train", "prefill", "decode"]


@dataclasses.dataclass(frozen=True)
class Abstract:
    lower: Callable[[], Any]
    """To be called with the mesh entered."""
    memory: dict[str, int]
    """Bytes of a device, of each kind of array that has a shape."""
    parameters: int = 0
    """Of the model, on all devices, where it is trained."""
    state_bytes: float = 0.0
    """Of each of them, with its moments."""


def abstract(recipe: PretrainConfig, mesh: Mesh, work: Work, columns: int) -> Abstract:
    """The recipe's train step, or what serving does up to each answer's first token or for one more of each, on rows of
    ``columns`` tokens. Call it with ``mesh`` entered, whose devices need not be here.

    Raises ValueError where the recipe's layout is not legal.
    """
    if work != "train":
        lower, weights, cache = abstract_program(recipe.model, recipe.compute, mesh, recipe.batch_size, columns, work)
        return Abstract(lower, {"parameters": device_bytes(weights), "cache": device_bytes(cache)})
    built = abstract_step(recipe, recipe.model, recipe.loss, mesh, columns)
    state, leaves = built.state, jax.tree.leaves(built.state)
    memory = {"parameters": device_bytes(state.params), "optimiser state": device_bytes(state)}
    memory["optimiser state"] -= memory["parameters"]
    memory |= {"batch": device_bytes(built.batch), "gradients": device_bytes(gradients(recipe, state, mesh))}
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    each = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / count
    return Abstract(lambda: built.step.lower(state, built.batch), memory, count, each)


def gradients(recipe: PretrainConfig, state: TrainState, mesh: Mesh) -> Any:
    """Of all parameters, as shapes: in float32, where the optimizer's state lies."""
    where = lambda leaf, axes: state_sharding(mesh, axes, leaf.shape, recipe.compute.rules)  # noqa: E731
    place = lambda leaf, axes: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where(leaf, axes))  # noqa: E731
    return jax.tree.map(place, state.params, logical_axes(recipe.model))


def device_bytes(tree: Any) -> int:
    """What a device holds of arrays that are shapes and shardings."""
    local = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize  # noqa: E731
    return sum(map(local, jax.tree.leaves(tree)))
