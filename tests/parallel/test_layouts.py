"""What devices send each other in a compiled train step, and how large their arrays are."""

import dataclasses
import functools
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from parallel.test_meshes import MODELS
from parallel.topology import needs_libtpu, run_apart

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.parallel.collectives import Collective, collectives
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.parallel.sharding import ShardingRules, by_rows, named_sharding
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.train.optimizer import OptimizerConfig, make_optimizer
from deepseek_jax.train.state import abstract_state
from deepseek_jax.train.step import StepConfig, make_step

MODEL = dataclasses.replace(MODELS["v3"], num_nextn_predict_layers=0)
ROWS, COLUMNS = 24, 20  # no width of the model, nor their product


@functools.cache
def program(chunk: int = 5, data: int = 1, **sizes: Any) -> str:
    mesh = make_mesh(MeshConfig(data=data, **sizes))
    optimizer, compute = make_optimizer(OptimizerConfig(), MODEL, 10), ComputeConfig()
    state = abstract_state(MODEL, optimizer, mesh, compute=compute)
    place = named_sharding(mesh, ("batch", "sequence"), (ROWS, COLUMNS))
    array = functools.partial(jax.ShapeDtypeStruct, (ROWS, COLUMNS), sharding=place)
    batch = {name: array(jnp.int32) for name in ("tokens", "segment_ids", "positions")}
    batch["loss_mask"] = array(jnp.float32)
    step = make_step(MODEL, LanguageModelLoss(chunk=chunk), optimizer, StepConfig(), compute=compute)
    with jax.set_mesh(mesh):
        return jax.jit(step).lower(state, batch).compile().as_text() or ""


def of_loss(text: str) -> list[Collective]:
    """What is as large as the head's gradient, or a part of it."""
    return [
        each
        for each in collectives(text)
        if "jvp(loss)" in each.scope and each.group_size > 1 and each.shape_bytes > 1000
    ]


@pytest.mark.parametrize("sizes", [dict(data=4, tensor=2), dict(data=2, fsdp=2, context=2)], ids=str)
def test_no_array_has_the_tokens_of_all_devices(sizes):
    text = program(**sizes)
    tokens = re.compile(rf"(?:f32|bf16)\[(?:{ROWS},{COLUMNS}|{ROWS * COLUMNS}),\d+")
    assert not tokens.findall(text)
    assert re.search(rf"f32\[{ROWS // 4},{COLUMNS // sizes.get('context', 1)},16\]", text)  # a device's own


def test_a_layout_in_memory_gathers_nothing():
    """The compiler does not split what asks for one, so each device does for its own rows; and so does the gradient."""
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, context=2))
    place = named_sharding(mesh, ("batch", "sequence", None), (8, 16, 32))
    x = jax.ShapeDtypeStruct((8, 16, 32), jnp.float32, sharding=place)
    with jax.set_mesh(mesh):
        both = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(by_rows(jnp.sin(x), ShardingRules(), "cuda"))))
        lowered = jax.jit(both).lower(x)
    assert "LayoutConstraint" in lowered.as_text()
    compiled = lowered.compile().as_text()
    assert compiled and {one.kind for one in collectives(compiled)} == {"all-reduce"}


def test_tensor_parallelism_gathers_nothing():
    """Heads, widths, experts' widths and the vocabulary are multiplied in parts, and sums of those are added up."""
    found = {each.kind for each in collectives(program(data=4, tensor=2)) if each.group_size > 1}
    assert found == {"all-reduce"}


def test_the_heads_gradient_is_summed_once_whatever_the_chunks():
    """To its parts under fsdp; then those over the others."""
    for chunk in (20, 5):
        found = of_loss(program(chunk=chunk, data=2, fsdp=2, context=2))
        assert [each.times for each in found if each.kind == "reduce-scatter"] == [1]
        assert all(each.times == 1 for each in found)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the compiler takes minutes, beside other work many
@needs_libtpu
def test_gradients_on_a_tpu_are_scattered_and_in_bfloat16():
    """Of a step with fsdp and ZeRO-1: what chips add up is in bfloat16 but for the smallest, and goes for the most part
    straight to where the optimizer's state lies; with ``gradient_sums`` float32 it is float32."""
    sizes = {"data": 2, "fsdp": 4}
    cases: list[Any] = [(sizes, {"state": ("data",)}, {}), (sizes, {}, {"gradient_sums": "float32"})]
    output = run_apart(f"from parallel.compiled_step import main\nmain(*{cases!r})", limit=1500)
    half, wide = (json.loads(line) for line in output.splitlines() if line.startswith("{"))
    assert half["reduce-scatter bf16"] > half["all-reduce bf16"] > 50 * half["all-reduce f32"]
    assert wide["reduce-scatter f32"] > 50 * sum(size for kind, size in wide.items() if "bf16" in kind)
