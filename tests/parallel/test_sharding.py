"""Logical axes to mesh axes: where arrays go, and the splits that are refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from model.tiny import QWEN, V3, config, weights

from deepseek_jax.model.parameters import logical_axes
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.parallel.sharding import (
    ShardingRules,
    by_rows,
    constrain,
    named_sharding,
    place_batch,
    tree_shardings,
)


def test_rules_give_the_partition():
    assert ShardingRules().spec(("embed", "mlp")) == PartitionSpec(("fsdp",), ("tensor",))
    assert ShardingRules().spec(("layers", "experts", "embed", None, "mlp")) == PartitionSpec(
        None, ("expert",), ("fsdp",), None, ("tensor",)
    )
    assert ShardingRules().spec(("batch", "sequence")) == PartitionSpec(("data", "fsdp", "expert"), ("context",))
    assert ShardingRules().spec(()) == PartitionSpec()


def test_axes_that_collide_are_refused():
    with pytest.raises(ValueError, match="'heads' and 'mlp'.*both claim the mesh axis 'tensor'"):
        ShardingRules().spec(("heads", "mlp"))
    with pytest.raises(ValueError, match="'batch' and 'embed'.*'fsdp'"):
        ShardingRules().spec(("batch", None, "embed"))
    assert ShardingRules(heads=()).spec(("heads", "mlp")) == PartitionSpec(None, ("tensor",))


def test_an_unknown_axis_is_refused_by_name():
    with pytest.raises(ValueError, match="'width'"):
        ShardingRules().spec(("embed", "width"))


def test_an_uneven_split_is_refused_with_axis_and_sizes():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    assert named_sharding(mesh, ("embed", "mlp"), (12, 7)).shard_shape((12, 7)) == (3, 7)
    with pytest.raises(ValueError, match="embed of size 10 cannot be split 4 ways.*fsdp"):
        named_sharding(mesh, ("embed", "mlp"), (10, 7))
    with pytest.raises(ValueError, match="batch of size 4 cannot be split 8 ways.*data.*fsdp.*expert"):
        named_sharding(mesh, ("batch", None), (4, 7))


@pytest.mark.parametrize("tiny", [config(V3), config(QWEN)], ids=["v3", "dense"])
def test_every_parameter_is_placed_and_keeps_its_value(tiny):
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    params, _ = weights(tiny)
    shardings = tree_shardings(mesh, logical_axes(tiny), params)
    placed = jax.device_put(params, shardings)
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(placed), strict=True):
        np.testing.assert_array_equal(after, before)
    assert placed["embed"].sharding.shard_shape((40, 16)) == (20, 8)
    if tiny.n_routed_experts:
        wi = placed["moe_layers"]["mlp"]["wi"]
        assert wi.sharding.shard_shape(wi.shape) == (2, 4, 8, 2, 6)


def test_a_mesh_without_the_rules_axes_is_refused_by_name():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    message = "batch is split over the mesh axis 'data', which the mesh lacks: it has model"
    with pytest.raises(ValueError, match=message):
        named_sharding(mesh, ("batch",), (4,))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        constrain(jnp.ones((4, 2)), ShardingRules(), "batch", None)


def test_batches_are_split_by_row_and_sequence():
    mesh = make_mesh(MeshConfig(data=2, expert=2, context=2))
    batch = {
        "tokens": np.arange(64, dtype=np.int32).reshape(8, 8),
        "weight": np.arange(8, dtype=np.float32)[:, None],
    }
    placed = place_batch(batch, mesh)
    for name, value in batch.items():
        np.testing.assert_array_equal(placed[name], value)
        assert placed[name].dtype == value.dtype
    assert placed["tokens"].sharding.shard_shape((8, 8)) == (2, 4)
    assert placed["weight"].sharding.shard_shape((8, 1)) == (2, 1)
    starts = {
        shard.device.id: (shard.index[0].start, shard.index[1].start) for shard in placed["tokens"].addressable_shards
    }
    assert sorted(starts.values()) == [(row, column) for row in (0, 2, 4, 6) for column in (0, 4)]


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch of size 6 cannot be split 8 ways"):
        place_batch({"tokens": np.zeros((6, 4), np.int32)}, make_mesh())
    with pytest.raises(ValueError, match="sequence of size 5 cannot be split 2 ways"):
        place_batch({"tokens": np.zeros((8, 5), np.int32)}, make_mesh(MeshConfig(context=2)))


def test_constrain_places_on_the_current_mesh_and_does_nothing_without():
    x = jnp.zeros((8, 4, 6))
    assert constrain(x, ShardingRules(), "batch", "sequence", None) is x
    mesh = make_mesh(MeshConfig(data=4, context=2))
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: constrain(x + 1, ShardingRules(), "batch", "sequence", None))(x)
    assert isinstance(y.sharding, NamedSharding) and y.sharding.shard_shape(y.shape) == (2, 2, 6)


def test_rows_are_kept_on_gpus_that_split_the_width():
    """Of the gradient too; elsewhere nothing is asked of the compiler."""
    x, rules = jnp.ones((8, 2, 6)), ShardingRules()

    def asked(platform: str, **mesh: Any) -> int:
        with jax.set_mesh(make_mesh(MeshConfig(**mesh))):
            gradient = jax.grad(lambda x: jnp.sum(by_rows(jnp.sin(x), rules, platform) ** 2))
            return str(jax.make_jaxpr(gradient)(x)).count("layout_constraint")

    assert asked("cuda", fsdp=4, data=2) == 2
    assert asked("cuda", data=8) == asked("tpu", fsdp=8) == asked("cpu", fsdp=8) == 0
