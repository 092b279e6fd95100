"""Three train steps, and answers, on meshes of every kind are those of one device, in float32 and without drops."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import numpy as np
import optax
import pytest
from model.tiny import V2, V3, config, weights, whole
from parallel.topology import run_apart
from small import tokenizer
from train.cases import BATCH

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.model.parameters import logical_axes
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.parallel.sharding import ShardingRules, place_batch, tree_shardings
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.train.state import TrainState, create_state, state_shardings
from deepseek_jax.train.step import StepConfig, make_step

# A dense layer and a MoE layer, with widths that eight devices split.
_WIDTHS: dict[str, Any] = dict(
    num_hidden_layers=2, num_attention_heads=8, intermediate_size=24, q_lora_rank=32, moe_intermediate_size=48
)
MODELS = {"v3": config(V3, **_WIDTHS), "v2": config(V2, **_WIDTHS)}
SPEAKERS = {name: dataclasses.replace(model, vocab_size=304) for name, model in MODELS.items()}
# All that drop nothing.
DISPATCH: dict[str, dict[str, Any]] = {
    "gather": {},
    "all_to_all": {"dispatch": "all_to_all", "dispatch_capacity": 100.0},
}
RULES = ShardingRules()
ONE = make_mesh(devices=jax.devices()[:1])
STEPS, LOSS = 3, LanguageModelLoss(balance_weight=0.01, isolate=True, chunk=6)


def named(**sizes: int) -> str:
    return "-".join(f"{axis}{ways}" for axis, ways in sizes.items())


# Each axis, each pair of axes, all threes of the last four; those four at once take 16 devices.
AXES = ("data", "fsdp", "expert", "context", "tensor")
SINGLE = [{axis: 8} for axis in AXES]
PAIRS = [{a: 2, b: 4} if (a, b) != ("data", "tensor") else {a: 4, b: 2} for a, b in itertools.combinations(AXES, 2)]
TRIPLES = [dict.fromkeys(axes, 2) for axes in itertools.combinations(AXES[1:], 3)]
MESHES: dict[str, dict[str, Any]] = {named(**sizes): {"data": 1} | sizes for sizes in (*SINGLE, *PAIRS, *TRIPLES)}
ALL = dict.fromkeys(AXES[1:], 2)

# What takes part in every run: eight meshes for a V3, the two others as far as they may differ there.
IN_CI = {(name, "v3", "gather") for name in ("expert8", "data2-fsdp4", "data2-context4", "data4-tensor2")}
IN_CI |= {(named(**sizes), "v3", "gather") for sizes in TRIPLES}
IN_CI |= {("fsdp2-expert2-tensor2", "v2", "all_to_all"), ("fsdp2-expert2-context2", "v2", "gather")}
SAMPLING_IN_CI = {("data4-tensor2", "v2"), ("fsdp2-expert2-tensor2", "v3")}


def cases(*choices: Any, always: Any) -> list[Any]:
    """Every combination; those that are not ``always`` run are marked slow."""
    every = itertools.product(*choices)
    return [pytest.param(*case, marks=() if case in always else pytest.mark.slow, id="-".join(case)) for case in every]


def kept_gradients() -> optax.GradientTransformation:
    """Plain descent whose state is the last gradient."""
    return optax.chain(optax.trace(0.0), optax.scale(-0.02))


def first_state(model: str, mesh=ONE, rules: ShardingRules = RULES) -> TrainState:
    params, bias = weights(MODELS[model])
    options: dict[str, Any] = {"compute": ComputeConfig(rules=rules), "params": params, "router_bias": bias}
    return create_state(MODELS[model], kept_gradients(), mesh, **options)


@functools.cache
def three_steps(model: str, dispatch: str = "gather", mesh=ONE, rules: ShardingRules = RULES) -> list[Any]:
    """Of each step (its gradient, the parameters and bias behind it, its metrics)."""
    compute, state = ComputeConfig(rules=rules, **DISPATCH[dispatch]), first_state(model, mesh, rules)
    options = StepConfig(bias_update_speed=0.01)
    step = jax.jit(make_step(MODELS[model], LOSS, kept_gradients(), options, compute=compute))
    found = []
    with jax.set_mesh(mesh):
        batch = place_batch(BATCH, mesh, rules)
        for _ in range(STEPS):
            state, metrics = step(state, batch)
            dropped = metrics.pop("dropped", np.zeros(1)), metrics.pop("dropped_sum", 0.0)
            assert not np.any(dropped[0]) and not dropped[1]
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


@pytest.mark.parametrize("name, model, dispatch", cases(MESHES, MODELS, DISPATCH, always=IN_CI))
def test_three_steps_are_those_of_one_device(name, model, dispatch):
    found = three_steps(model, dispatch, make_mesh(MeshConfig(**MESHES[name])))
    expected = three_steps(model)
    assert all(step[3]["finite"] == 1 for step in expected)
    assert model == "v2" or not np.array_equal(expected[0][2], expected[-1][2])  # the bias moves
    assert_same(found, expected)


def test_with_the_optimizers_state_split_too():
    """ZeRO-1: what stands beside the parameters lies in parts, which no parameter does."""
    mesh, rules = make_mesh(MeshConfig(data=4, tensor=2)), dataclasses.replace(RULES, state=("data",))
    assert_same(three_steps("v3", mesh=mesh, rules=rules), three_steps("v3"))
    places = state_shardings(MODELS["v3"], first_state("v3", mesh, rules), mesh, rules)
    split = lambda tree: [any("data" in (part or ()) for part in leaf.spec) for leaf in jax.tree.leaves(tree)]  # noqa: E731
    assert all(split(places.opt_state[0].trace)) and not any(split(places.params))


@functools.cache
def answers(model: str, mesh=ONE) -> tuple[np.ndarray, np.ndarray]:
    tiny = SPEAKERS[model]
    params, bias = weights(tiny)
    params = jax.device_put(params, tree_shardings(mesh, logical_axes(tiny), params))
    engine = Engine(whole(tiny, params, bias, tokenizer(), mesh))
    out = engine.generate_ids([[5, 9, 2, 7], [3], [8, 8, 1, 30, 22]] * 3, SamplingParams(temperature=0.0, max_tokens=8))
    return jax.device_get((out.tokens_BN[:9, :8], out.logprobs_BN[:9, :8]))


@pytest.mark.parametrize("name, model", cases(MESHES, SPEAKERS, always=SAMPLING_IN_CI))
def test_answers_are_those_of_one_device(name, model):
    found, expected = answers(model, make_mesh(MeshConfig(**MESHES[name]))), answers(model)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_all_four_axes_at_once(model):
    """On 16 devices, in a process apart."""
    run_apart(
        f"""
        from parallel.test_meshes import *

        mesh = make_mesh(MeshConfig(data=1, **ALL))
        for dispatch in DISPATCH:
            assert_same(three_steps("{model}", dispatch, mesh), three_steps("{model}"))
        np.testing.assert_array_equal(answers("{model}", mesh)[0], answers("{model}")[0])
        """,
        devices=16,
    )
