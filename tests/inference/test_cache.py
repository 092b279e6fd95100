"""The cache: rows of their own lengths, written in pieces, and the MTP module's slot."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from model.tiny import QWEN, V3, config, weights

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.inference.cache import Cache, write_rows
from deepseek_jax.model import parameters
from deepseek_jax.parallel.collectives import collectives
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh

LENGTHS, COLUMNS = (5, 2, 7), 12
MODELS = {"v3": config(V3), "qwen": config(QWEN)}


def test_columns_are_written_where_each_row_ends():
    rng = np.random.default_rng(0)
    buffer, entry = rng.standard_normal((3, 5, 2), np.float32), rng.standard_normal((3, 2, 2), np.float32)
    expected = buffer.copy()
    expected[0, 1:3], expected[1, 0:2], expected[2, 4] = entry[0], entry[1], entry[2, 0]
    found = write_rows(jnp.asarray(buffer), jnp.asarray(entry), jnp.array([1, 0, 4]))
    np.testing.assert_array_equal(found, expected)  # the last row's second column would be past the end
    stack = jnp.stack([jnp.asarray(buffer)] * 2)
    found = write_rows(stack, jnp.asarray(entry), jnp.array([1, 0, 4]), jnp.int32(1))
    np.testing.assert_array_equal(found, [buffer, expected])


@pytest.mark.parametrize("layer", [None, 1])
def test_a_device_writes_its_rows_by_itself(layer):
    mesh = make_mesh(MeshConfig(expert=4), jax.devices()[:4])
    buffer = jnp.zeros((*([] if layer is None else [2]), 8, 5, 2))
    rows = [NamedSharding(mesh, PartitionSpec(*[None] * axis, "expert")) for axis in (buffer.ndim - 3, 0, 0)]
    given = [jnp.ones((8, 1, 2)), jnp.arange(8) % 5]
    write = jax.jit(functools.partial(write_rows, layer=layer), in_shardings=rows, out_shardings=rows[0])
    compiled = write.lower(buffer, *given).compile()
    assert not collectives(compiled.as_text() or "")
    np.testing.assert_array_equal(compiled(buffer, *given), write_rows(buffer, given[0], given[1], layer))


def wider(cache: Cache, numbers: int) -> Cache:
    """With room behind each entry, as on a TPU."""
    return jax.tree.map(lambda x: x if x.ndim < 3 else jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, numbers)]), cache)


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize(("name", "behind"), [("v3", 0), ("v3", 4), ("qwen", 0)])
def test_pieces_through_the_cache_are_the_whole_row(name, behind, scanned):
    """Rows of different lengths go in as a first piece with filling behind it and then in pieces of two; the hidden
    states, and the MTP module's, are those of the pass over each whole row."""
    tiny, compute = MODELS[name], ComputeConfig(scan_decode=scanned, target="cpu")
    mtp = tiny.num_nextn_predict_layers > 0
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, tiny.vocab_size, (3, COLUMNS), np.int32))

    @jax.jit
    def whole(params, bias):
        network = parameters.merge(tiny, params, bias, compute)
        out = network(tokens, mtp=mtp, head=False)
        return out.hidden, out.mtp_hidden

    @jax.jit
    def pieces(params, bias):
        params = params if scanned else parameters.unstack(params)
        network = parameters.merge(tiny, params, bias, compute)
        cache = wider(Cache.empty(tiny, compute, 3, COLUMNS, mtp=mtp), behind)
        assert (cache.mtp is not None) == mtp
        count_B, found = jnp.array(LENGTHS), []
        for size, first in ((7, True), (2, False), (2, False)):
            at_BS = jnp.minimum(cache.positions(size + 1), COLUMNS - 1)
            piece = jnp.take_along_axis(tokens, at_BS, axis=1)
            context = network.context(piece[:, :-1], positions_BS=cache.positions(size), visible=cache.visible(size))
            x, _, memories = network.run_layers(
                network.embedded(piece[:, :-1]), context, memories=cache.memories(first=first), absorbed=not first
            )
            hidden, slot, guess = network.norm(x), None, x
            if mtp:
                memory = cache.mtp_memory(first=first)
                guess, _, slot = network.predict_next(hidden, piece[:, 1:], context, memory=memory)
            found.append((cache.positions(size), count_B, hidden, guess))
            cache = cache.grown(memories, count_B, slot)
            count_B = jnp.full(3, 2)
        return found

    hidden, mtp_hidden = whole(*weights(tiny))
    for positions, count, found, guess in pieces(*weights(tiny)):
        for row in range(3):
            where = positions[row, : count[row]]
            np.testing.assert_allclose(found[row, : count[row]], hidden[row, where], rtol=1e-4, atol=1e-4)
            if mtp:
                where = where[where < COLUMNS - 1]
                np.testing.assert_allclose(guess[row, : len(where)], mtp_hidden[row, where], rtol=1e-4, atol=1e-4)


def test_buffers_hold_what_a_token_takes_and_no_slot_that_is_not_asked_for():
    for dtype in ("float32", "bfloat16"):
        cache = Cache.empty(config(), ComputeConfig(dtype=dtype), 2, 16)
        assert [(buffer.shape, buffer.dtype) for buffer in cache.layers] == [((2, 16, 12), dtype)] * 3
        assert cache.mtp is None and cache.lengths_B.tolist() == [0, 0]
    stacks = Cache.empty(config(), ComputeConfig(scan_decode=True), 2, 16).layers
    assert [stack.shape for stack in stacks] == [(1, 2, 16, 12), (2, 2, 16, 12)]
    on_tpu = Cache.empty(config(), ComputeConfig(target="tpu:TPU v6e"), 2, 16).layers
    assert {buffer.shape for buffer in on_tpu} == {(2, 16, 128)}
