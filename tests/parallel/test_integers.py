"""Weights in int8 and int4 on meshes of emulated devices: each reads its part, and they compute what one does."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.tiny import V3, config, relative_error, weights, whole
from small import tokenizer

from deepseek_jax import ComputeConfig, Engine, SamplingParams, load, save_hf
from deepseek_jax.checkpoint.model import Model
from deepseek_jax.inference.serving_config import ServingConfig
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_kernels import BlockScaled
from deepseek_kernels.block_fp8 import BLOCK

# A device's part of the experts' width is whole blocks, as integers must have it where tensor splits it.
NETWORK = config(
    V3,
    num_hidden_layers=2,
    vocab_size=300,
    hidden_size=32,
    moe_intermediate_size=2 * BLOCK,
    n_routed_experts=4,
    n_group=2,
    topk_group=1,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    num_nextn_predict_layers=0,
)
TOKENS = jnp.arange(48, dtype=jnp.int32).reshape(4, 12)
MESHES = [{"expert": 2}, {"tensor": 2}, {"expert": 2, "tensor": 2}]
ALL = {"data": 2, "expert": 2, "tensor": 2}
COMPUTE = ComputeConfig(dtype="float32", param_dtype="bfloat16")


@pytest.fixture(scope="module", params=[8, 4])
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("integers") / f"int{request.param}"
    save_hf(whole(NETWORK, *weights(NETWORK), tokenizer()), path, dtype=path.name)
    return path


def on(folder: Path, **sizes: Any) -> Model:
    axes: dict[str, Any] = {"data": 1} | sizes
    devices = jax.devices()[: math.prod(axes.values())]
    return load(folder, compute=COMPUTE, mesh=make_mesh(MeshConfig(**axes), devices))


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "-".join(sizes))
def test_the_network_is_that_of_one_device(folder, sizes):
    alone, spread = on(folder), on(folder, **sizes)
    kept = 0
    for one, part in zip(_leaves(alone), _leaves(spread), strict=True):
        if isinstance(one, BlockScaled):
            assert part.dtype == one.dtype == (jnp.int8 if folder.name == "int8" else jnp.int4)
            kept += 1
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(part), strict=True):
            np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))
    assert kept > 8
    experts = spread.params["moe_layers"]["mlp"]["wi"].values
    assert experts.addressable_shards[0].data.size * sizes.get("expert", 1) * sizes.get("tensor", 1) == experts.size
    assert relative_error(spread(TOKENS).logits, alone(TOKENS).logits) < 1e-5


def test_answers_are_those_of_one_device(folder):
    """Requests as they come where jax has programs for them, else rows that are answered together."""
    serving = ServingConfig(slots=2, pages=32, page=4, context=32, chunk=8, turns=3)
    engines = [Engine(on(folder, **sizes), serving=serving) for sizes in ({}, ALL)]
    prompts, greedy = [[5, 9, 2, 7], [8, 8, 1] * 3, [30]], SamplingParams(temperature=0.0, max_tokens=8)
    if folder.name == "int4" and jax.__version_info__ < (0, 11):
        found, expected = ([*engine.generate(prompts, greedy)] for engine in engines)
    else:
        found, expected = ([answer for (answer,) in engine.answer(prompts, greedy)] for engine in engines)
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def _leaves(model: Model) -> list:
    return jax.tree.leaves(model.params, is_leaf=lambda leaf: isinstance(leaf, BlockScaled))
