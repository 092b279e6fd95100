"""``generate``'s two programs on any mesh, as shapes alone: for compiling where neither devices nor weights are."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.inference.cache import Cache
from deepseek_jax.inference.generate import begin, go_on
from deepseek_jax.inference.requests import Requests
from deepseek_jax.inference.weights import abstract_weights, sampling_compute, sampling_config
from deepseek_jax.parallel.sharding import named_sharding


class AbstractProgram(NamedTuple):
    """A program, and of its arrays those that fill the memory."""

    lower: Callable[[], Any]
    """To be called with the mesh entered."""
    weights: Any
    cache: Cache


def abstract_program(
    config: ModelConfig,
    compute: ComputeConfig,
    mesh: Mesh,
    batch: int,
    columns: int,
    work: Literal["prefill", "decode"],
) -> AbstractProgram:
    """``generate``'s program up to the first token of ``batch`` answers to prompts of ``columns`` tokens; or the one
    that goes on, with ``columns`` tokens of room in the cache. Call it with ``mesh`` entered.

    Raises ValueError where the mesh does not divide the batch or the weights.
    """
    config, compute = sampling_config(config), sampling_compute(compute.on(mesh))
    weights = abstract_weights(config, compute, mesh)

    def rows(x: Any, axis: int = 0) -> Any:
        if not x.ndim:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, jax.sharding.PartitionSpec()))
        axes = tuple("batch" if place == axis else None for place in range(x.ndim))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=named_sharding(mesh, axes, x.shape, compute.rules))

    requests = jax.tree.map(rows, _requests(batch, columns))
    decoding = jax.eval_shape(lambda *given: begin(config, compute, *given), *weights, requests)
    layers = tuple(rows(buffer, buffer.ndim - 3) for buffer in decoding.cache.layers)
    cache = dataclasses.replace(decoding.cache, layers=layers, lengths_B=rows(decoding.cache.lengths_B))
    if work == "prefill":
        return AbstractProgram(lambda: begin.lower(config, compute, *weights, requests), weights, cache)
    decoding = dataclasses.replace(jax.tree.map(rows, decoding), cache=cache)
    until = rows(np.int32(0))
    return AbstractProgram(lambda: go_on.lower(config, compute, *weights, requests, decoding, until), weights, cache)


def _requests(batch: int, columns: int) -> Requests:
    numbers = lambda dtype, *shape: jax.ShapeDtypeStruct((batch, *shape), dtype)  # noqa: E731
    per_row = {"rows_B": jnp.uint32, "temperature_B": jnp.float32, "top_p_B": jnp.float32, "top_k_B": jnp.int32}
    return Requests(
        tokens_BP=numbers(jnp.int32, columns),
        lengths_B=numbers(jnp.int32),
        keys_B=jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch)),
        limit_B=numbers(jnp.int32),
        stops_BX=numbers(jnp.int32, 4),
        pad=jax.ShapeDtypeStruct((), jnp.int32),
        answers=16,
        columns=columns,
        **{name: numbers(dtype) for name, dtype in per_row.items()},
    )
