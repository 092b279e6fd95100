"""What a train state is kept in, whatever the compute dtype, and that small updates are not lost."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from model.tiny import QWEN, V2_LITE, V3, config, relative_error, weights
from train.cases import BATCH, TINY, on_device

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.model import parameters
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.train.optimizer import OptimizerConfig, make_optimizer
from deepseek_jax.train.state import TrainState, create_state
from deepseek_jax.train.step import StepConfig, make_step
from deepseek_kernels import BlockScaled, quantise

BF16 = ComputeConfig(dtype="bfloat16")
ONE = make_mesh(devices=jax.devices()[:1])
LOSS = LanguageModelLoss(isolate=True, chunk=8)
CONFIG = OptimizerConfig(peak_lr=1e-5, warmup_steps=0, constant_until=1.0, cosine_until=1.0, weight_decay=0.0)


def half(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)


def dtypes(tree: Any) -> set[str]:
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


def state_from(params: Any, config: OptimizerConfig = CONFIG) -> TrainState:
    optimizer = make_optimizer(config, TINY, 100)
    return create_state(TINY, optimizer, ONE, compute=BF16, params=params, router_bias=weights(TINY)[1], ema=True)


def adam(state: TrainState) -> optax.ScaleByAdamState:
    is_adam = lambda part: isinstance(part, optax.ScaleByAdamState)  # noqa: E731
    (found,) = filter(is_adam, jax.tree.leaves(state.opt_state, is_leaf=is_adam))
    return found


@functools.cache
def trained(steps: int, moments_dtype: Any = "float32") -> tuple[TrainState, list[set[str]]]:
    """A state that began with bfloat16 parameters, and the dtypes that the optimizer was given."""
    config = OptimizerConfig(**{**vars(CONFIG), "moments_dtype": moments_dtype})
    inner, given = make_optimizer(config, TINY, 100), []

    def update(updates, state, params=None, **extra):
        given.append(dtypes(updates))
        return inner.update(updates, state, params, **extra)

    optimizer = optax.GradientTransformationExtraArgs(inner.init, update)
    options = StepConfig(microbatches=2, ema_decay=0.9)
    step = jax.jit(make_step(TINY, LOSS, optimizer, options, compute=BF16), donate_argnums=0)
    state = state_from(half(weights(TINY)[0]), config)
    for _ in range(steps):
        state, metrics = step(state, on_device(BATCH))
        assert metrics["finite"] == 1 and dtypes(metrics) == {"float32"}
    return jax.device_get(state), given


def test_the_whole_state_is_float32_under_bfloat16_compute():
    state, given = trained(8)
    assert given == [{"float32"}]  # gradients, added up over two microbatches
    before = state_from(half(weights(TINY)[0]))
    for one in (before, state):
        assert dtypes((one.params, one.ema, one.router_bias)) == {"float32"}
        assert dtypes(one.opt_state) == {"float32", "int32"}  # moments, counts


@pytest.mark.parametrize("base", [V3, V2_LITE, QWEN], ids=["v3", "v2-lite", "qwen"])
def test_no_gradient_is_a_bfloat16_number(base):
    """Of matrices, embeddings, gains and biases alike: sums of bfloat16 numbers that are not rounded to one."""
    network = config(base)
    params, bias = weights(network)
    batch = on_device(BATCH)

    @jax.jit
    @jax.grad
    def gradient(params):
        model = parameters.merge(network, params, bias, BF16)
        return LOSS(model, batch, LOSS.normalisers(batch), jnp.int32(0))[0]

    for path, found in jax.tree_util.tree_flatten_with_path(gradient(params))[0]:
        rounded = found.astype(jnp.bfloat16).astype(jnp.float32)
        assert np.mean(found[found != 0] != rounded[found != 0]) > 0.5, jax.tree_util.keystr(path)


def test_float8_weights_become_their_float32_numbers():
    """Of released FP8 matrices training makes masters; scales are not taken for parameters."""
    params = weights(TINY)[0]
    values, scales = quantise(params["head"]["w"])
    state = state_from(params | {"head": {"w": BlockScaled(values, scales)}})
    assert dtypes((state.params, state.ema)) == {"float32"}
    expected = np.asarray(values, np.float64) * np.asarray(scales, np.float64)
    assert relative_error(state.params["head"]["w"], expected) < 1e-6
    assert jax.tree.structure(state.params) == jax.tree.structure(params)


def test_at_a_rate_of_1e_5_the_masters_move_where_bfloat16_would_not():
    """Of those that a gradient reached: two experts and three tokens stand in no batch, and nothing decays here."""
    start = half(weights(TINY)[0])
    state, _ = trained(8)
    reached, moved, rounded = 0, 0, 0
    for before, after, square in zip(*map(jax.tree.leaves, (start, state.params, adam(state).nu)), strict=True):
        reached += np.count_nonzero(square)
        moved += np.count_nonzero((after != np.asarray(before, np.float32)) & (square > 0))
        rounded += np.count_nonzero(after.astype(jnp.bfloat16) != before)
    assert reached > 0.9 * sum(leaf.size for leaf in jax.tree.leaves(start))
    assert moved >= 0.99 * reached
    assert rounded < 0.1 * reached


def test_bfloat16_moments_are_asked_for_by_name_and_nothing_else_is_rounded():
    (state, _), (exact, _) = trained(8, "bfloat16"), trained(8)
    assert dtypes((adam(state).mu, adam(state).nu)) == {"bfloat16"}
    assert dtypes((state.params, state.ema)) == {"float32"}
    start = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), half(weights(TINY)[0]))
    moved, wanted = (
        np.concatenate([(a - b).ravel() for a, b in zip(*map(jax.tree.leaves, (one.params, start)), strict=True)])
        for one in (state, exact)
    )
    assert relative_error(moved, wanted) < 0.02


def test_moments_are_kept_in_one_of_two():
    with pytest.raises(ValueError, match="moments_dtype='float16'.*'float32', 'bfloat16'"):
        OptimizerConfig(moments_dtype="float16")  # pyright: ignore[reportArgumentType]
