"""Long rows: no program of an attention layer or its gradient holds an array of the size of half an S × S mask."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.gqa import GQA
from deepseek_jax.model.mla import MLA
from deepseek_jax.model.rope import rotary_tables
from deepseek_jax.workflows.recipe import load_recipe
from deepseek_kernels import Visible

S = 32768
TARGETS = [("cuda:9.0:132", "bfloat16"), ("tpu:TPU v5p", "bfloat16"), ("cpu", "bfloat16"), ("cpu", "float32")]


def largest(jaxpr) -> int:
    """Elements of the largest array in a program, loops and calls within it included."""
    found = [getattr(v.aval, "size", 0) for equation in jaxpr.eqns for v in (*equation.invars, *equation.outvars)]
    inner = [sub for equation in jaxpr.eqns for sub in jaxprs_in_params(equation.params)]
    return max(found + [largest(sub) for sub in inner], default=0)


@pytest.mark.parametrize(("target", "dtype"), TARGETS)
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_no_array_of_half_a_mask(kind, segments, target, dtype):
    v2_lite = load_recipe("models/deepseek_v2_lite", ModelConfig)
    if kind == "gqa":
        v2_lite = dataclasses.replace(
            load_recipe("models/r1_distill_qwen_1_5b", ModelConfig), hidden_size=v2_lite.hidden_size
        )
    compute = ComputeConfig(dtype=dtype, target=target)
    module = nnx.eval_shape(lambda: (MLA if kind == "mla" else GQA)(v2_lite, compute, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(module)

    def loss(state, x_BSD, ids_BS):
        visible = Visible.rows(ids_BS if segments else None)
        y, _ = nnx.merge(graph, state)(x_BSD, rotary_tables(v2_lite, ids_BS), visible)
        return jnp.sum(y.astype(jnp.float32))

    x = jax.ShapeDtypeStruct((1, S, v2_lite.hidden_size), dtype), jax.ShapeDtypeStruct((1, S), jnp.int32)
    make = functools.partial(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1))), state)
    assert S * v2_lite.hidden_size <= largest(make(*x).jaxpr) < S * S // 2
