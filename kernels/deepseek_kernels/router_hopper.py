"""A router's scores and choice for few tokens on NVIDIA Hopper: two kernels, where XLA takes six.

In a step of decoding each costs 1 to 2 µs, however little it does, and the experts wait for the last.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from deepseek_kernels import hopper_sizes
from deepseek_kernels.hopper_tiles import swizzled
from deepseek_kernels.target import Target
from deepseek_kernels.weights import Weight, as_it_lies, stack_and_layer, stored_gradient

TOKENS = 256  # at most
_TOGETHER = 4  # of more than 64: so many share a block of the weight
_EXPERTS = 64, 128
_NUMBERS = 8192  # of the weight, of a block of the first kernel
_PARAMS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
_DOWN, _ACROSS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)  # a number for each row, each column


def refuses(target: Target, dtype: Any, *, tokens: int = 1, weight: Weight = None, limited: bool = False) -> str:
    """Why ``scores_and_best`` cannot run; "" where it can. limited: to experts of some groups."""
    if why := hopper_sizes.refuses(target, dtype):
        return why
    if limited or tokens > TOKENS:
        return f"it needs {TOKENS} tokens at most, and all groups of experts to choose from"
    depth, experts = (_NUMBERS, _EXPERTS[0]) if weight is None else weight.shape
    if experts not in _EXPERTS or depth % (_NUMBERS // experts):
        return f"it needs {' or '.join(map(str, _EXPERTS))} experts and whole blocks of {_NUMBERS} numbers"
    stored = weight is None or any(as_it_lies(weight, jnp.dtype(dtype)) for dtype in ("float32", "bfloat16"))
    return "" if stored else "it needs a weight in float32 or bfloat16"


def scores_and_best(
    x_TD: Float[Array, "T D"], w: Weight, bias_E: Float[Array, "E"] | None, scoring: str
) -> tuple[Float[Array, "T E"], Int[Array, "T E"]]:
    """``s = softmax(x w)``, or its sigmoid, all in float32, and the experts by ``s + bias``, best first, ties to the
    lower index. w: (D, E), float32 or bfloat16, or a layer of a stack of such."""
    found: Any = _by_kernels(x_TD, w, bias_E, scoring)
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _by_kernels(x_TD, w, bias_E, scoring):
    stack, layer = stack_and_layer(w)
    bias_E = np.zeros(w.shape[1]) if bias_E is None else bias_E
    parts_PTE = _products(x_TD, stack, jnp.asarray(layer, jnp.int32).reshape(1))
    return _choose(parts_PTE, bias_E.astype(jnp.float32), scoring)


def _forward(x_TD, w, bias_E, scoring):
    return _by_kernels(x_TD, w, bias_E, scoring), (x_TD, w, bias_E)


def _backward(scoring, residuals, gradients):
    x_TD, w, bias_E = residuals

    def scores(x_TD, w_DE):
        logits = jnp.dot(x_TD, w_DE, precision=jax.lax.Precision.HIGHEST)
        return jax.nn.sigmoid(logits) if scoring == "sigmoid" else jax.nn.softmax(logits, axis=-1)

    _, pullback = jax.vjp(scores, x_TD.astype(jnp.float32), w.astype(jnp.float32))
    dx, dw = pullback(gradients[0])
    return dx.astype(x_TD.dtype), stored_gradient(w, lambda: dw), jax.tree.map(jnp.zeros_like, bias_E)


_by_kernels.defvjp(_forward, _backward)


@jax.jit  # lowered once for all layers
def _products(x_TD, w_LDE, layer):
    """Logits of each token, in parts of their sums. Float32 products: the tensor cores have none."""
    (T, D), E = x_TD.shape, w_LDE.shape[2]
    terms, some = _NUMBERS // E, 1 if T <= 64 else _TOGETHER

    def kernel(layer, x, w, out, x_NS, w_SE, sums_NE, arrived):
        part, first = jax.lax.axis_index("part"), jax.lax.axis_index("tokens") * some
        first = jnp.minimum(first, T - some)  # the last ones may be those before them once more
        mine = pl.ds(part * terms, terms)
        plgpu.copy_gmem_to_smem(x.at[pl.ds(first, some), mine], x_NS, arrived)
        plgpu.copy_gmem_to_smem(w.at[layer[0], mine], w_SE, arrived)
        plgpu.barrier_wait(arrived)
        w = plgpu.layout_cast(w_SE[...], plgpu.Layout.WGMMA).astype(jnp.float32)
        for n in range(some):
            x_SE = _down(plgpu.layout_cast(x_NS[n], _DOWN).astype(jnp.float32), E)
            sums_NE[n] = jnp.sum(x_SE * w, axis=0)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(sums_NE, out.at[part, pl.ds(first, some)])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((D // terms, T, E), jnp.float32),
        grid=(D // terms, pl.cdiv(T, some)),
        grid_names=("part", "tokens"),
        compiler_params=_PARAMS,
        scratch_types=[
            plgpu.SMEM((some, terms), x_TD.dtype),
            plgpu.SMEM((terms, E), w_LDE.dtype, transforms=swizzled(128 // w_LDE.dtype.itemsize, w_LDE.dtype)),
            plgpu.SMEM((some, E), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
        ],
    )(layer, x_TD, w_LDE)


@functools.partial(jax.jit, static_argnames="scoring")
def _choose(parts_PTE, bias_E, scoring: str):
    """Each expert's place is the number of those before it. Numbers of experts are exact in float32."""
    P, T, E = parts_PTE.shape

    def kernel(parts, bias, scores, best, parts_PE, bias_S, scores_S, choice_S, place_S, best_S, arrived):
        token = jax.lax.axis_index("token")
        plgpu.copy_gmem_to_smem(parts.at[:, token], parts_PE, arrived)
        plgpu.copy_gmem_to_smem(bias, bias_S, arrived)
        plgpu.barrier_wait(arrived)
        logits_E = _sum_of_parts(parts_PE, _DOWN)
        if scoring == "sigmoid":
            scores_E = 1 / (1 + jnp.exp(-logits_E))
        else:
            row_EE = _across(_sum_of_parts(parts_PE, _ACROSS))
            top_E = jnp.max(row_EE, axis=1)
            scores_E = jnp.exp(logits_E - top_E) / jnp.sum(jnp.exp(row_EE - _down(top_E, E)), axis=1)
        choice_E = scores_E + plgpu.layout_cast(bias_S[...], _DOWN)
        scores_S[...], choice_S[...] = scores_E, choice_E
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scores_S, scores.at[token])
        one, other = _down(choice_E, E), _across(plgpu.layout_cast(choice_S[...], _ACROSS))
        row, column = (plgpu.broadcasted_iota(jnp.int32, (E, E), i, layout=plgpu.Layout.WGMMA) for i in range(2))
        before = (other > one) | ((other == one) & (column < row))
        place_S[...] = jnp.sum(jnp.where(before, 1.0, 0.0), axis=1)
        plgpu.commit_smem()
        here = _across(plgpu.layout_cast(place_S[...], _ACROSS)) == row.astype(jnp.float32)
        best_S[...] = jnp.sum(jnp.where(here, column.astype(jnp.float32), 0.0), axis=1).astype(jnp.int32)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(best_S, best.at[token])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct((T, E), jnp.float32), jax.ShapeDtypeStruct((T, E), jnp.int32)),
        grid=(T,),
        grid_names=("token",),
        compiler_params=_PARAMS,
        scratch_types=[
            plgpu.SMEM((P, E), jnp.float32),
            *[plgpu.SMEM((E,), jnp.float32)] * 4,
            plgpu.SMEM((E,), jnp.int32),
            plgpu.Barrier(num_arrivals=2),
        ],
    )(parts_PTE, bias_E)


def _sum_of_parts(parts_PE, layout):
    return sum(plgpu.layout_cast(parts_PE[part], layout) for part in range(parts_PE.shape[0]))


def _down(of_rows, columns: int):
    return jax.lax.broadcast_in_dim(of_rows, (len(of_rows), columns), [0])


def _across(of_columns):
    return jax.lax.broadcast_in_dim(of_columns, (len(of_columns), len(of_columns)), [1])
