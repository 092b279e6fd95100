"""Experts in several places: the answers of one place each, and the work of the busy ones shared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.test_moe import in_fp8
from model.tiny import weights, whole
from parallel.test_meshes import SPEAKERS
from small import tokenizer

from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.model.parameters import logical_axes
from deepseek_jax.parallel.copies import Placed, place_experts
from deepseek_jax.parallel.eplb import place
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.parallel.sharding import ShardingRules, tree_shardings

TINY = SPEAKERS["v3"]
PLACES = place(np.random.default_rng(0).gamma(0.3, size=(TINY.num_moe_layers, 8)), 12, devices=4, groups=1)


def answers(mesh, placement=None):
    params, bias = weights(TINY)
    params = jax.device_put(params, tree_shardings(mesh, logical_axes(TINY), params))
    engine = Engine(whole(TINY, params, bias, tokenizer(), mesh), placement=placement)
    prompts = [[5, 9, 2, 7], [3], [8, 8, 1, 30, 22]] * 3
    out = engine.generate_ids(prompts, SamplingParams(temperature=0.0, max_tokens=8), experts=True)
    assert out.experts_LBTK is not None
    return jax.device_get((out.tokens_BN[:9, :8], out.experts_LBTK[:, :9], out.logprobs_BN[:9, :8])), engine


@pytest.mark.parametrize("sizes", [{}, {"expert": 4, "tensor": 2}, {"fsdp": 2, "expert": 2, "data": 2}], ids=str)
def test_answers_are_those_of_one_place_for_each(sizes):
    """The choices that are told too: they are the router's, of experts."""
    mesh = make_mesh(MeshConfig(**sizes), None if sizes else jax.devices()[:1])
    (found, engine), (expected, _) = answers(mesh, PLACES.tolist()), answers(make_mesh(devices=jax.devices()[:1]))
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[2], expected[2], atol=1e-5)
    wi = engine.model.weights()[0]["layers"][-1]["mlp"]["wi"]
    assert isinstance(wi, Placed) and wi.weight.shape[0] == 12
    assert {shard.data.shape[0] for shard in wi.weight.addressable_shards} == {12 // sizes.get("expert", 1)}
    np.testing.assert_array_equal(wi.weight, np.asarray(weights(TINY)[0]["moe_layers"]["mlp"]["wi"][-1])[PLACES[-1]])


def test_copies_take_turns():
    places = Placed(None, jnp.array([[0, 3, 4], [1, 1, 1], [2, 5, 2]]), jnp.array([3, 1, 2]))
    chosen = places.choose(jnp.broadcast_to(jnp.arange(3), (4, 6, 3)))
    counts = np.bincount(np.ravel(chosen), minlength=6)
    assert counts.tolist() == [8, 24, 12, 8, 8, 12]


def test_matrices_in_fp8_go_with_their_scales():
    _, _, _, wi, wo = in_fp8()
    expert_P = np.array([3, 0, 1, 2, 3, 3])
    with jax.set_mesh(make_mesh(MeshConfig(data=2, expert=2, tensor=2))):
        placed = place_experts(wi, wo, expert_P, 4, ShardingRules(expert_embed=()))
    for found, given in ((placed[0].weight, wi), (placed[1], wo)):
        assert found.values.dtype == given.values.dtype and found.groups == given.groups
        for x, of in zip(jax.tree.leaves(found), jax.tree.leaves(given), strict=True):
            np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(of, np.float32)[expert_P])
    assert {shard.data.shape for shard in placed[0].weight.values.addressable_shards} == {(3, 128, 2, 128)}


def test_placements_of_other_models_and_meshes_are_refused():
    mesh = make_mesh(MeshConfig(expert=8))
    for placement, message in (
        (PLACES.repeat(2, 0).tolist(), "a placement of 2 layers, and the model has 1 with experts"),
        (np.where(PLACES == 3, 2, PLACES).tolist(), r"MoE layer 0: expected each of 0…7 in a place or more"),
        (PLACES.tolist(), "12 places are not split over 8 devices; the nearest is 16"),
        ([[0, 1], [0]], r"a placement with layers of \[1, 2\] places"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(whole(TINY, *weights(TINY), tokenizer(), mesh), placement=placement)
