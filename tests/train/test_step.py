"""One step: the same for any microbatches and mesh, the bias and the averages it moves, and what NaN leaves alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from model.tiny import V3, config, weights
from train.cases import BATCH, TINY, on_device

from deepseek_jax.model import parameters
from deepseek_jax.model.router import route
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.parallel.sharding import ShardingRules, place_batch
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.train.optimizer import OptimizerConfig, make_optimizer
from deepseek_jax.train.state import TrainState, create_state, state_shardings
from deepseek_jax.train.step import StepConfig, load_metrics, make_step

PARAMS, BIAS = weights(TINY)
LOSS = LanguageModelLoss(balance_weight=0.01, isolate=True, chunk=8)
# A great eps keeps Adam's step a smooth function of the gradient: comparing signs of noise would prove nothing.
OPTIMIZER = make_optimizer(OptimizerConfig(peak_lr=0.01, warmup_steps=0, eps=0.01), TINY, 100)
OPTIONS = StepConfig(bias_update_speed=0.01, bias_frozen_from=3, ema_decay=0.75)
ONE = make_mesh(devices=jax.devices()[:1])


def fresh(mesh=ONE, **changes) -> TrainState:
    state = create_state(TINY, OPTIMIZER, mesh, params=PARAMS, router_bias=BIAS, ema=True)
    return dataclasses.replace(state, **changes)


@functools.cache
def compiled(mesh=ONE, microbatches=1, loss=LOSS):
    step = make_step(TINY, loss, OPTIMIZER, dataclasses.replace(OPTIONS, microbatches=microbatches))
    jitted = jax.jit(step, donate_argnums=0)

    def on_mesh(state, batch):
        with jax.set_mesh(mesh):
            return jitted(state, place_batch(batch, mesh))

    return on_mesh


def take(state, batch=BATCH, mesh=ONE, **options):
    return jax.device_get(compiled(mesh, **options)(state, batch))


@functools.cache
def whole():
    """A step of the whole batch on one device."""
    return take(fresh())


def moments(state):
    """Adam's first moments: a tenth of the clipped gradient after the first step."""
    (found,) = [part for part in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(part)]
    return found.mu


def is_adam(part) -> bool:
    return isinstance(part, optax.ScaleByAdamState)


def assert_close(tree, expected):
    """Within 1e-5 of each array's norm."""

    def check(path, value, wanted):
        error = np.linalg.norm(np.float64(value) - wanted)
        assert error <= 1e-5 * np.linalg.norm(wanted), f"{jax.tree_util.keystr(path)}: {error}"

    jax.tree_util.tree_map_with_path(check, tree, expected)


def assert_same_step(found):
    (state, metrics), (expected, expected_metrics) = found, whole()
    assert metrics["finite"] == 1
    np.testing.assert_array_equal(metrics["load"], expected_metrics["load"])
    np.testing.assert_allclose(state.router_bias, expected.router_bias, atol=1e-7)
    assert metrics.keys() == expected_metrics.keys()
    assert_close(metrics, expected_metrics)
    assert_close(moments(state), moments(expected))
    assert_close(state.params, expected.params)
    assert_close(state.ema, expected.ema)


# Any split


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_give_the_step_of_the_whole_batch(microbatches):
    """The batch's rows are packed, padded and empty: no split has equally many targets on both sides."""
    assert_same_step(take(fresh(), microbatches=microbatches))


# More of them: tests/parallel/test_meshes.py.
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp_data": MeshConfig(fsdp=2, data=4),
    "tensor_fsdp_data": MeshConfig(tensor=2, fsdp=2, data=2),
}


def test_microbatches_on_a_mesh_give_the_step_of_one_device():
    mesh = make_mesh(MESHES["tensor_fsdp_data"])
    assert_same_step(take(fresh(mesh), mesh=mesh, microbatches=2))


def test_the_state_keeps_its_places():
    """So that the next step fits the compiled one, and a checkpoint goes back to where it was."""
    mesh = make_mesh(MESHES["tensor_fsdp_data"])
    state = fresh(mesh)
    wanted = jax.tree.leaves(state_shardings(TINY, state, mesh, ShardingRules()))
    assert [leaf.sharding for leaf in jax.tree.leaves(state)] == wanted
    matrix, moment = state.params["dense_layers"]["mlp"]["wi"], moments(state)["dense_layers"]["mlp"]["wi"]
    assert matrix.sharding == moment.sharding and not matrix.sharding.is_fully_replicated
    after, _ = compiled(mesh, microbatches=2)(state, BATCH)
    for leaf, sharding in zip(jax.tree.leaves(after), wanted, strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_gradients_are_those_of_the_loss():
    batch = on_device(BATCH)
    norm = LOSS.normalisers(batch)
    run = lambda p: LOSS(parameters.merge(TINY, p, BIAS), batch, norm, jnp.int32(0))[0]  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(run))(PARAMS)
    state, metrics = whole()
    norm = np.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in jax.tree.leaves(gradient)))
    assert metrics["loss"] == pytest.approx(float(value), rel=1e-6)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert norm > 1  # it was clipped
    assert_close(moments(state), jax.tree.map(lambda leaf: 0.1 * np.float64(leaf) / norm, gradient))


def test_microbatches_must_divide_the_rows():
    with pytest.raises(ValueError, match="microbatches=3 does not divide the batch's 8 rows"):
        take(fresh(), microbatches=3)
    mesh = make_mesh(MESHES["data"])
    with pytest.raises(ValueError, match=r"microbatches=2 of 8 rows: batch of size 4 cannot be split 8 ways"):
        take(fresh(mesh), mesh=mesh, microbatches=2)


# Bias and averages


def test_bias_moves_towards_the_mean_load():
    state, metrics = whole()
    assert BIAS is not None
    load = metrics["load"]
    np.testing.assert_allclose(load.sum(axis=1), 1, rtol=1e-6)
    sign = np.sign(load.mean(axis=1, keepdims=True) - load)
    assert set(sign.ravel()) >= {1, -1}
    np.testing.assert_allclose(state.router_bias, BIAS + 0.01 * sign, rtol=1e-6)
    assert metrics["bias_range"] == pytest.approx(float(np.mean(np.ptp(state.router_bias, axis=1))))
    assert metrics["max_vio"] == pytest.approx(np.mean(load.max(axis=1) * 8 - 1), rel=1e-5)


def test_average_and_freezing_follow_their_steps():
    states, before = [], jax.device_get(fresh())
    state = fresh()
    for _ in range(4):
        state, _ = compiled()(state, BATCH)
        states.append(jax.device_get(state))
    assert [int(state.step) for state in states] == [1, 2, 3, 4]
    ema = before.params
    for state in states:
        ema = jax.tree.map(lambda mean, new: 0.75 * mean + 0.25 * np.float64(new), ema, state.params)
        assert_close(state.ema, ema)
    same = lambda a, b: all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))  # noqa: E731
    moved = [not same(a.router_bias, b.router_bias) for a, b in zip([before, *states], states, strict=False)]
    assert moved == [True, True, True, False]


def test_states_are_donated_but_what_they_start_from_is_not():
    state = fresh()
    leaves = jax.tree.leaves(state)
    take(state)
    assert all(leaf.is_deleted() for leaf in leaves)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((PARAMS, BIAS)))


def test_fresh_parameters_follow_the_seed_on_any_mesh():
    states = [create_state(TINY, OPTIMIZER, mesh, seed=3) for mesh in (ONE, make_mesh(MESHES["fsdp_data"]))]
    assert states[0].ema is None
    assert not np.any(states[0].router_bias)
    for a, b in zip(*(jax.tree.leaves(state.params) for state in states), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    spread = np.std(states[0].params["embed"])
    assert spread == pytest.approx(TINY.initializer_range, rel=0.1)


@dataclasses.dataclass(frozen=True)
class RoutingOnly:
    """The load of one router over tokens whose affinities are skewed; nothing to learn."""

    router: tuple[tuple[float, ...], ...]

    def normalisers(self, batch):
        return {}

    def __call__(self, model, batch, norm, step):
        routing = route(model.config, batch["x"], jnp.asarray(self.router), model.router_bias[...][0])
        load = jnp.sum(jax.nn.one_hot(routing.experts_TK, model.config.n_routed_experts), axis=(0, 1))
        return jnp.sum(model.norm.gain[...]), {"load": load[None]}


def test_bias_balances_skewed_routing_within_200_updates():
    """At u = 0.003 MaxVio falls under 0.2; at 0 it stays. Every update sees other tokens."""
    wide = config(V3, n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4)
    rng = np.random.default_rng(0)
    router = 0.3 * rng.standard_normal((8, 16))
    router[0] += np.linspace(0.0, 0.6, 16)  # the first number of a token is always about 1
    loss = RoutingOnly(tuple(map(tuple, router.tolist())))

    def violations(speed):
        step = make_step(wide, loss, optax.sgd(0.0), StepConfig(bias_update_speed=speed))
        params, bias = weights(wide)
        assert bias is not None
        state = TrainState(jnp.int32(0), params, optax.sgd(0.0).init(params), jnp.zeros_like(bias))

        def update(state, key):
            x = jax.random.normal(key, (4096, 8)).at[:, 0].set(1.0)
            state, metrics = step(state, {"x": x})
            return state, metrics["max_vio"]

        return np.asarray(jax.jit(lambda: jax.lax.scan(update, state, jax.random.split(jax.random.key(1), 200)))()[1])

    unmoved, moved = violations(0.0), violations(0.003)
    assert unmoved[0] == moved[0] > 0.8 and unmoved[-1] > 0.8
    assert np.all(moved[-20:] < 0.2)


def test_load_metrics_of_nothing_are_zero():
    metrics = load_metrics(jnp.zeros((2, 4)))
    assert not np.any(metrics["load"]) and metrics["max_vio"] == -1


# Not finite


@dataclasses.dataclass(frozen=True)
class NaNGradient:
    """The loss, finite as ever, plus a term that is 0 and whose derivative is not a number."""

    inner: LanguageModelLoss

    def normalisers(self, batch):
        return self.inner.normalisers(batch)

    def __call__(self, model, batch, norm, step):
        loss, parts = self.inner(model, batch, norm, step)
        return loss + jnp.sqrt(0.0 * jnp.sum(model.norm.gain[...])), parts


@pytest.mark.parametrize("case", ["gradient", "loss", "infinite_loss", "parameter"])
def test_what_is_not_finite_changes_nothing(case):
    state, batch, loss = fresh(step=jnp.int32(1)), BATCH, LOSS
    if case == "gradient":
        loss = NaNGradient(LOSS)
    elif case == "parameter":
        gain = state.params["norm"]["gain"].at[0].set(jnp.nan)
        state = dataclasses.replace(state, params=state.params | {"norm": {"gain": gain}})
    else:
        mask = BATCH["loss_mask"].copy()
        mask[0, 1] = np.nan if case == "loss" else np.inf
        batch = BATCH | {"loss_mask": mask}
    before = jax.device_get(state)
    after, metrics = take(state, batch, loss=loss)
    assert metrics["finite"] == 0 and np.isnan(metrics["grad_norm"])
    assert np.isfinite(metrics["loss"]) == (case == "gradient")
    assert after.step == 2
    jax.tree.map(np.testing.assert_array_equal, dataclasses.replace(after, step=before.step), before)


@pytest.mark.parametrize(
    "fields, message",
    [({"microbatches": 0}, "microbatches=0"), ({"ema_decay": 1.0}, "ema_decay=1.0"), ({"ema_decay": "no"}, "float")],
)
def test_what_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        StepConfig(**fields)
