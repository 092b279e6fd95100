"""Three train steps, and answers, on meshes of every kind are those of one device, in float32 and without drops."""

import functools
import itertools
from typing import Any

import jax
import numpy as np
import optax
import pytest
from model.tiny import V2, V3, config, weights
from train.cases import BATCH

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.parallel.sharding import ShardingRules, place_batch
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.train.state import create_state
from deepseek_jax.train.step import StepConfig, make_step

# A dense layer and a MoE layer, with widths that eight devices split.
_WIDTHS: dict[str, Any] = dict(
    num_hidden_layers=2, num_attention_heads=8, intermediate_size=24, q_lora_rank=32, moe_intermediate_size=48
)
MODELS = {"v3": config(V3, **_WIDTHS), "v2": config(V2, **_WIDTHS)}
# Of the experts' dispatch: all that drop nothing.
DISPATCH: dict[str, dict[str, Any]] = {"gather": {}}
RULES = ShardingRules()
ONE = make_mesh(devices=jax.devices()[:1])
STEPS, LOSS = 3, LanguageModelLoss(balance_weight=0.01, isolate=True, chunk=6)


def named(**sizes: int) -> str:
    return "-".join(f"{axis}{ways}" for axis, ways in sizes.items())


AXES = ("data", "fsdp", "expert", "context", "tensor")
SINGLE = [{axis: 8} for axis in AXES]
PAIRS = [{a: 2, b: 4} if (a, b) != ("data", "tensor") else {a: 4, b: 2} for a, b in itertools.combinations(AXES, 2)]
TRIPLES = [dict.fromkeys(axes, 2) for axes in itertools.combinations(AXES[1:], 3)]
MESHES = {named(**sizes): sizes for sizes in (*SINGLE, *PAIRS, *TRIPLES)}
ALL = dict.fromkeys(AXES[1:], 2)  # the twentieth: on 16 devices, in a process apart
IN_CI = ["expert8", "data2-fsdp4", "data2-context4", "data4-tensor2", *map(lambda sizes: named(**sizes), TRIPLES)]


def chosen(names) -> list[Any]:
    return [name if name in IN_CI else pytest.param(name, marks=pytest.mark.slow) for name in names]


def kept_gradients() -> optax.GradientTransformation:
    """Plain descent whose state is the last gradient."""
    return optax.chain(optax.trace(0.0), optax.scale(-0.02))


@functools.cache
def three_steps(model: str, dispatch: str = "gather", mesh=ONE, rules: ShardingRules = RULES) -> list[Any]:
    """Of each step (its gradient, the parameters and bias behind it, its metrics)."""
    tiny, optimizer = MODELS[model], kept_gradients()
    params, bias = weights(tiny)
    compute = ComputeConfig(rules=rules, **DISPATCH[dispatch])
    state = create_state(tiny, optimizer, mesh, compute=compute, params=params, router_bias=bias)
    step = jax.jit(make_step(tiny, LOSS, optimizer, StepConfig(bias_update_speed=0.01), compute=compute))
    found = []
    with jax.set_mesh(mesh):
        batch = place_batch(BATCH, mesh, rules)
        for _ in range(STEPS):
            state, metrics = step(state, batch)
            gradients = state.opt_state[0].trace
            found.append(jax.device_get((gradients, state.params, state.router_bias, metrics)))
    return found


def assert_same(found: Any, expected: Any) -> None:
    """Within 1e-5 of each array's norm; integers and the load exactly."""

    def check(path, value, wanted):
        value, wanted = np.asarray(value, np.float64), np.asarray(wanted, np.float64)
        error, scale = np.linalg.norm(value - wanted), np.linalg.norm(wanted)
        assert error <= 1e-5 * scale, f"{jax.tree_util.keystr(path)}: {error:.3g} of {scale:.3g}"

    jax.tree_util.tree_map_with_path(check, found, expected)


@pytest.mark.parametrize("dispatch", DISPATCH)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", chosen(MESHES))
def test_three_steps_are_those_of_one_device(name, model, dispatch):
    found = three_steps(model, dispatch, make_mesh(MeshConfig(**{"data": 1} | MESHES[name])))
    expected = three_steps(model)
    assert all(step[3]["finite"] == 1 for step in expected)
    assert model == "v2" or not np.array_equal(expected[0][2], expected[-1][2])  # the bias moves
    assert_same(found, expected)
