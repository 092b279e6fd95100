"""Rows that several devices share: the same numbers as on one, equal work, and nothing gathered but what is kept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.tiny import QWEN, V2, V3, config, weights
from train.cases import BATCH, TINY, on_device

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.inference.cache import Cache
from deepseek_jax.model import parameters
from deepseek_jax.model.router import router_stats
from deepseek_jax.parallel.collectives import collectives
from deepseek_jax.parallel.context import RowOrder, _placed, numbered, per_row_and_head, pieces
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.parallel.sharding import ShardingRules, named_sharding, place_batch, tree_shardings
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_kernels import Target, Visible, attention_hopper, mla_attention
from deepseek_kernels.attention_splash_blocks import Blocks, visited

RULES = ShardingRules()


def test_balanced_order_and_back():
    x = np.arange(2 * 24 * 3).reshape(2, 24, 3)
    for ways, data in (2, 2), (4, 1):
        with jax.set_mesh(make_mesh(MeshConfig(data=data, context=ways, tensor=2))):
            order = RowOrder.of(RULES, Visible(), (2, 24))
            spread = jax.jit(order.spread)(x)
            np.testing.assert_array_equal(
                spread, np.concatenate([np.split(x, 2 * ways, 1)[i] for i in pieces(ways)], 1)
            )
            np.testing.assert_array_equal(jax.jit(order.back)(spread), x)
            along = jax.jit(functools.partial(order.spread, axis=2))(x[None])
            np.testing.assert_array_equal(along[0], spread)


# A model, packed rows or not, a mesh, and how it is computed; more of V2 and V3: test_meshes.py.
SAME = {
    "v3, context 2, data 2, tensor 2": (V3, False, MeshConfig(context=2, data=2, tensor=2), {}),
    "v3 packed in blocks, context 8": (V3, True, MeshConfig(context=8), {"attention": "blockwise", "remat": "full"}),
    "gqa packed, context 4, tensor 2": (QWEN, True, MeshConfig(context=4, tensor=2), {}),
    "gqa, context 2, tensor 4": (QWEN, False, MeshConfig(context=2, tensor=4), {}),  # two heads of keys on four devices
}


@pytest.mark.parametrize("case", SAME)
def test_loss_and_gradients_are_those_of_one_device(case):
    base, isolate, mesh_config, options = SAME[case]
    tiny = config(base, num_hidden_layers=2) if base is not QWEN else config(base)
    params, bias = weights(tiny)
    loss = LanguageModelLoss(balance_weight=0.5, isolate=isolate, chunk=8)

    def run(compute, batch, params):
        def value(params):
            model = parameters.merge(tiny, params, bias, compute)
            return loss(model, batch, loss.normalisers(batch), jnp.int32(0))

        return jax.value_and_grad(value, has_aux=True)(params)

    expected = jax.jit(functools.partial(run, ComputeConfig()))(on_device(BATCH), params)
    mesh = make_mesh(mesh_config)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, tree_shardings(mesh, parameters.logical_axes(tiny), params))
        found = jax.jit(functools.partial(run, ComputeConfig(**options)))(place_batch(BATCH, mesh), placed)

    def close(path, value, wanted):
        error = np.linalg.norm(np.float64(value) - wanted)
        assert error <= 1e-5 * np.linalg.norm(np.float64(wanted)) + 1e-7, f"{jax.tree_util.keystr(path)}: {error}"

    jax.tree_util.tree_map_with_path(close, found, expected)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("balanced", [False, True])
def test_attention_of_split_rows_is_that_of_whole_ones(packed, balanced):
    """Queries on four devices, two heads on two, against the definition without a mesh; with its gradients."""
    rng = np.random.default_rng(0)
    operands = [
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(2, 16, 2, 6), (2, 16, 2, 8), (2, 16, 2)]
    ]
    ids = jnp.asarray(np.sort(rng.integers(0, 4, (2, 16)), axis=1))
    visible = Visible.rows(ids) if packed else Visible()

    def run(attend):
        loss = lambda *operands: jnp.sum(jnp.sin(attend(*operands)))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*operands)

    expected = run(functools.partial(mla_attention, visible=visible, scale=0.5, implementation="reference"))
    with jax.set_mesh(make_mesh(MeshConfig(context=4, tensor=2))):
        order = RowOrder.of(RULES, visible, (2, 16)) if balanced else RowOrder(RULES)
        inner = functools.partial(mla_attention, scale=0.5)

        def attend(*operands):
            return order.back(per_row_and_head(inner, RULES, [*map(order.spread, operands)], order.seen(visible)))

        found = run(attend)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)


def test_attention_of_split_rows_takes_the_kernel_of_a_tpu():
    shapes = (2, 512, 2, 192), (2, 512, 2, 256), (2, 512, 64)
    operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    inner = functools.partial(mla_attention, scale=0.1, target=Target("tpu", "TPU v5p"), implementation="splash")
    with jax.set_mesh(make_mesh(MeshConfig(data=2, context=4))):
        attend = lambda *operands: per_row_and_head(inner, RULES, operands, Visible())  # noqa: E731
        assert jax.eval_shape(attend, *operands).shape == (2, 512, 2, 128)


def test_rows_that_are_not_cut_evenly_keep_their_order(caplog):
    with jax.set_mesh(make_mesh(MeshConfig(context=4, data=2))):
        assert RowOrder.of(RULES, Visible(), (2, 12)).ways == 1
        assert "rows of 12 tokens are not cut into 8 pieces" in caplog.text
        assert RowOrder.of(RULES, Visible(causal=False), (2, 16)).ways == 1
        assert RowOrder.of(RULES, Visible(), (2, 16)).ways == 4
        with pytest.raises(ValueError, match="3 rows, which the mesh splits 2 ways"):
            RowOrder.of(RULES, Visible(), (3, 16))
    assert RowOrder.of(RULES, Visible(), (2, 16)).ways == 1


@pytest.mark.parametrize("balanced", [False, True])
def test_statistics_of_sequences_that_devices_share(balanced):
    """Segments of all lengths, over one device or many, an id that comes twice, padding before, between and behind."""
    tiny, rng = config(V2), np.random.default_rng(0)
    ids = np.repeat([[1, 0, 2, 3, 1, 0], [0, 5, 5, 2, 7, 7]], [3, 2, 25, 1, 13, 4], axis=1).astype(np.int32)
    scores = jnp.asarray(rng.random((2, 48, 8)), jnp.float32)
    experts = jnp.asarray(rng.integers(0, 8, (2, 48, 3)), jnp.int32)
    value = lambda scores, experts, ids: router_stats(tiny, experts, scores, ids).balance  # noqa: E731
    expected = jax.jit(jax.value_and_grad(value))(scores, experts, ids)
    with jax.set_mesh(make_mesh(MeshConfig(context=4, data=2))):
        order = RowOrder.of(RULES, Visible(), (2, 48)) if balanced else RowOrder(RULES)
        shared = lambda scores, ids: value(*map(order.spread, (scores, experts, numbered(ids, RULES))))  # noqa: E731
        found = jax.jit(jax.value_and_grad(shared))(scores, ids)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), found, expected)


# Who does what


@pytest.mark.parametrize("ways", [2, 4, 8])
def test_all_devices_go_over_as_many_blocks(ways):
    """Of scores, of the kernels of a TPU and of Hopper; in the row's own order the last does nearly twice the mean."""
    size, block = ways * 1024, 128

    def blocks(visible, device):
        mine = slice(device * size // ways, (device + 1) * size // ways)
        visible = dataclasses.replace(visible, q_positions_BS=visible.q_positions_BS[:, mine])
        counted = Blocks(rows=1, queries=block, keys=block, across=size // block, at_once=block, sums=False)
        on_tpu = visited(visible.limits(1, size // ways, size).reshape(-1) - 1, None, counted)
        _, plan = attention_hopper._plan(visible, jnp.zeros((1, size // ways)), jnp.zeros((1, size)))
        of_queries = 1 + np.asarray(plan.places_BI) - plan.of_queries[..., 0]
        of_keys = plan.of_keys[..., 2] - plan.of_keys[..., 0]
        return [int(np.sum(numbers)) for numbers in (on_tpu, of_queries, of_keys)]

    counts = {
        balanced: np.array([blocks(_placed(Visible(), size, ways, balanced), i) for i in range(ways)])
        for balanced in (False, True)
    }
    total = (size // block) * (size // block + 1) // 2
    for balanced, found in counts.items():
        assert np.all(found.sum(axis=0) == total) and np.all(found == found[:, :1]), balanced
    assert np.all(counts[True] == total // ways)
    assert counts[False][-1, 0] > 1.45 * total / ways


# What is sent


@pytest.mark.parametrize(("remat", "gathers"), [("none", 1), pytest.param("full", 2, marks=pytest.mark.slow)])
def test_what_is_gathered_is_what_is_kept_of_each_token(remat, gathers):
    """MLA's 576 numbers and not 2 heads' keys and values of 640; their gradient is scattered as it is added up."""
    widths = dict(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128)
    sent = sent_by_attention(config(V3, num_hidden_layers=4, **widths), ComputeConfig(remat=remat))
    of_rows = 5 * 2 * 64 * 576 * 4  # layers and MTP, rows of a device, tokens, numbers, bytes
    assert sent == {"all-gather": gathers * of_rows, "reduce-scatter": of_rows}


def test_what_is_gathered_of_grouped_heads():
    tiny = config(QWEN)
    of_rows = 3 * 2 * 64 * 2 * tiny.num_key_value_heads * tiny.head_dim * 4
    assert sent_by_attention(tiny, ComputeConfig()) == {"all-gather": of_rows, "reduce-scatter": of_rows}


def sent_by_attention(tiny, compute) -> dict[str, int]:
    """Bytes, whole, of collectives in the attention of a step's gradient, but for the weights' sums."""
    mesh, loss = make_mesh(MeshConfig(context=4, data=2)), LanguageModelLoss(isolate=True, chunk=8)
    params, bias = parameters.abstract_arrays(tiny, compute)
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    params = jax.tree.map(place, params, tree_shardings(mesh, parameters.logical_axes(tiny), params))
    row = jax.ShapeDtypeStruct((4, 64), jnp.int32, sharding=named_sharding(mesh, ("batch", "sequence"), (4, 64)))
    batch = {name: row for name in ("tokens", "segment_ids", "positions")}
    batch["loss_mask"] = jax.ShapeDtypeStruct(row.shape, jnp.float32, sharding=row.sharding)

    def value(params, bias, batch):
        model = parameters.merge(tiny, params, bias, compute)
        return loss(model, batch, loss.normalisers(batch), jnp.int32(0))

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(value, has_aux=True)).lower(params, bias, batch).compile().as_text() or ""
    sent: dict[str, int] = {}
    for one in collectives(text):
        if "/attend/" in one.scope and one.group_size > 1 and one.kind != "all-reduce":
            sent[one.kind] = sent.get(one.kind, 0) + one.shape_bytes * one.times
    return sent


def test_devices_share_a_prompt():
    """Each has a quarter of the queries, and all of the cache, to which more of the prompt is written afterwards."""
    tiny = dataclasses.replace(TINY, num_nextn_predict_layers=0)
    params, bias = weights(tiny)
    tokens = jnp.asarray(BATCH["tokens"])

    @jax.jit
    def prefill(params, tokens):
        model = parameters.merge(tiny, parameters.unstack(params), bias)
        cache = Cache.empty(tiny, ComputeConfig(), len(tokens), 20)
        first = model(tokens[:, :8], visible=Visible(), memories=cache.memories(first=True))
        cache = cache.grown(first.memories, jnp.full(len(tokens), 8))
        places = {"positions_BS": cache.positions(8), "visible": cache.visible(8)}
        then = model(tokens[:, 8:], memories=cache.memories(), **places)
        return first.logits, then.logits, cache.grown(then.memories, jnp.full(len(tokens), 8))

    expected = prefill(params, tokens)
    with jax.set_mesh(make_mesh(MeshConfig(context=4, tensor=2))):
        found = prefill(params, tokens)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, expected)
