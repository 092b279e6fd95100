"""From logical axes to mesh axes.

A parameter or activation names what its axes mean (``("embed", "mlp")``); ``ShardingRules`` says which mesh axes
split each of those. Nothing else in the project mentions a mesh axis.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from deepseek_jax.parallel.mesh import current_mesh
from deepseek_jax.parallel.processes import row_groups

Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Mesh axes that split each logical axis; an empty tuple keeps the axis whole."""

    batch: tuple[str, ...] = ("data", "fsdp", "expert")
    """Mesh axes that split the batch."""
    sequence: tuple[str, ...] = ("context",)
    """Mesh axes that split the sequence."""
    embed: tuple[str, ...] = ("fsdp",)
    """Mesh axes that split the model width."""
    latent: tuple[str, ...] = ("fsdp",)
    """Mesh axes that split the latents' widths of MLA's up-projections."""
    heads: tuple[str, ...] = ("tensor",)
    """Mesh axes that split the heads."""
    mlp: tuple[str, ...] = ("tensor",)
    """Mesh axes that split the dense feed-forward width."""
    vocab: tuple[str, ...] = ("tensor",)
    """Mesh axes that split the vocabulary."""
    experts: tuple[str, ...] = ("expert",)
    """Mesh axes that split the routed experts."""
    experts_gathered: tuple[str, ...] = ()
    """The last of these over which a layer gathers its experts; over the others tokens come to them. With experts
    ("expert", "fsdp") and expert_embed () whole experts are gathered over fsdp: no copy is needed to join their parts,
    but expert × fsdp must divide their number."""
    expert_embed: tuple[str, ...] = ("fsdp",)
    """Mesh axes that split the experts' model width."""
    expert_mlp: tuple[str, ...] = ("tensor",)
    """Mesh axes that split the experts' feed-forward width."""
    layers: tuple[str, ...] = ()
    """Mesh axes that split the layers of a stack."""
    state: tuple[str, ...] = ()
    """Mesh axes that split what is kept beside a parameter, the optimizer's moments and the running mean, along its
    largest axis that they divide, beyond what splits the parameter itself: data is ZeRO-1."""

    def spec(self, axes: Axes) -> PartitionSpec:
        """The partition of an array with these logical axes.

        Raises ValueError for an unknown logical axis, and when two axes of one array claim the same mesh axis.
        """
        parts, used = [], {}
        for axis in axes:
            if axis is not None and not hasattr(self, axis):
                raise ValueError(f"no sharding rule for the logical axis {axis!r} of {axes}")
            split = () if axis is None else getattr(self, axis)
            for mesh_axis in split:
                if mesh_axis in used:
                    raise ValueError(
                        f"axes {used[mesh_axis]!r} and {axis!r} of {axes} both claim the mesh axis {mesh_axis!r}"
                    )
                used[mesh_axis] = axis
            parts.append(split or None)
        return PartitionSpec(*parts)


def named_sharding(
    mesh: Mesh | AbstractMesh, axes: Axes, shape: tuple[int, ...], rules: ShardingRules = ShardingRules()
) -> NamedSharding:
    """Where an array of ``shape`` lives. Raises ValueError, naming axis and sizes, where a split would be uneven."""
    spec = rules.spec(axes)
    for axis, size in zip(axes, shape, strict=True):
        split = () if axis is None else getattr(rules, axis)
        check_axes(mesh.shape, axis, split)
        ways = math.prod(mesh.shape[name] for name in split)
        if size % ways:
            raise ValueError(
                f"{axis} of size {size} cannot be split {ways} ways over the mesh axes {split}; choose a mesh whose "
                f"{' × '.join(split)} divides it"
            )
    return NamedSharding(mesh, spec)


def tree_shardings(mesh: Mesh, axes_tree: Any, arrays_tree: Any, rules: ShardingRules = ShardingRules()) -> Any:
    """Shardings for a pytree of arrays (or their shapes) from a tree of the same structure of logical axes."""
    return jax.tree.map(lambda array, axes: named_sharding(mesh, axes, array.shape, rules), arrays_tree, axes_tree)


def state_sharding(
    mesh: Mesh | AbstractMesh, axes: Axes, shape: tuple[int, ...], rules: ShardingRules = ShardingRules()
) -> NamedSharding:
    """Where the optimizer's moments of a parameter live: with it, and split by ``rules.state`` as well, where they
    divide any of its axes."""
    sharding = named_sharding(mesh, axes, shape, rules)
    parts = [() if axis is None else getattr(rules, axis) for axis in axes]
    check_axes(mesh.shape, "state", rules.state)
    more = tuple(name for name in rules.state if mesh.shape[name] > 1 and not any(name in part for part in parts))
    for i in sorted(range(len(shape)), key=lambda i: -shape[i]):
        if more and axes[i] != "layers" and shape[i] % math.prod(mesh.shape[name] for name in (*parts[i], *more)) == 0:
            parts[i] = (*parts[i], *more)
            return NamedSharding(mesh, PartitionSpec(*(part or None for part in parts)))
    return sharding


def placed(
    tree: Any, axes_tree: Any, rules: ShardingRules, where: Callable[..., NamedSharding] = named_sharding
) -> Any:
    """Arrays under jit where parameters live, or ``where`` their moments do. On one device they stay as they are."""
    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return tree
    place = lambda x, axes: jax.lax.with_sharding_constraint(x, where(mesh, axes, x.shape, rules))  # noqa: E731
    return jax.tree.map(place, tree, axes_tree)


def placed_as_state(tree: Any, axes_tree: Any, rules: ShardingRules) -> Any:
    """Gradients under jit where ``state_sharding`` has the moments. By way of the parameters' places: so the compiler
    scatters twice, over fsdp and then over data, where it would add all up on all to cut along two axes at once."""
    return placed(placed(tree, axes_tree, rules), axes_tree, rules, state_sharding)


def place_batch(
    batch: dict[str, Any], mesh: Mesh, rules: ShardingRules = ShardingRules(), *, whole: bool = False
) -> dict[str, jax.Array]:
    """Put this process's rows (B S …), or (B 1), of a batch on the mesh, split by row and sequence; see ``row_groups``.

    whole: every process has all the rows, as an evaluation does, not its own ones alone, as from a loader.

    Raises ValueError where the mesh does not divide them.
    """

    def put(value: Any) -> jax.Array:
        axes = ("batch", "sequence" if value.shape[1] > 1 else None, *[None] * (value.ndim - 2))
        rows = value.shape[0] * (1 if whole else row_groups(mesh, rules.batch)[1])
        sharding = named_sharding(mesh, axes, (rows, *value.shape[1:]), rules)
        if whole:
            return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
        return jax.make_array_from_process_local_data(sharding, value, (rows, *value.shape[1:]))

    return {name: put(value) for name, value in batch.items()}


def constrain(x: jax.Array, rules: ShardingRules, *axes: str | None) -> jax.Array:
    """Tell the compiler how an activation is split on the current mesh; without a mesh, nothing."""
    if (mesh := current_mesh()) is None:
        return x
    for axis in axes:
        check_axes(mesh.shape, axis, () if axis is None else getattr(rules, axis))
    return jax.lax.with_sharding_constraint(x, rules.spec(axes))


def by_rows(x: jax.Array, rules: ShardingRules, platform: str) -> jax.Array:
    """An activation, and its gradient, with its last axis together in memory.

    Where the model's width is split, XLA for GPUs brings weights that it gathers along their last axis to where that
    comes first, and has cuBLAS write rows of tokens as columns: what adds these to others reads single numbers."""
    if platform != "cuda" or not split_by(rules.embed):
        return x
    axes: Axes = ("batch", "sequence", None)  # each device its own: the compiler would gather all for a layout
    return per_device(lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim)))), rules, (x,), (axes,), axes)


def check_axes(sizes: Mapping[str, int], axis: str | None, split: Sequence[str]) -> None:
    """ValueError where a logical axis is split over mesh axes of which a mesh of these sizes has none."""
    for name in split:
        if name not in sizes:
            raise ValueError(
                f"{axis} is split over the mesh axis {name!r}, which the mesh lacks: it has {', '.join(sizes)} "
                "(parallel.mesh.make_mesh makes one with all that the default rules name)"
            )


def per_batch_shard(
    function: Callable[..., tuple[Any, Any, Any]],
    rules: ShardingRules,
    split: Sequence[jax.Array],
    w_DW: jax.Array,
) -> tuple[Any, Any, Any]:
    """``function(*split, w_DW) -> (by position, sums, dw_DW)`` on each device's own rows, positions and columns of w.

    split: arrays (B S …), as are the results by position, which devices with other columns must agree on (the axes
    between them are ``split_by(rules.vocab)``). sums, and dw, the gradient of w or None, are over the device's own rows
    and positions: the mesh adds them once, whatever loops are inside, dw in its dtype and straight to where w's parts
    lie. On one device a plain call.
    """
    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return function(*split, w_DW)
    axes = (*rules.batch, *rules.sequence)
    scattered = tuple(name for name in rules.embed if name in axes)
    others = tuple(name for name in axes if name not in scattered)
    rows, columns = rules.spec(("batch", "sequence")), rules.spec((None, "vocab"))

    def local(*args):
        by_position, sums, dw_DW = function(*args)
        if dw_DW is not None:
            dw_DW = jax.lax.psum(jax.lax.psum_scatter(dw_DW, scattered, tiled=True) if scattered else dw_DW, others)
        return by_position, jax.tree.map(lambda total: jax.lax.psum(total, axes), sums), dw_DW

    gradient = PartitionSpec(scattered or None, *columns[1:])
    specs = {"in_specs": (*[rows] * len(split), columns), "out_specs": (rows, PartitionSpec(), gradient)}
    return jax.shard_map(local, **specs, check_vma=False)(*split, w_DW)


def split_by(axes: Sequence[str]) -> tuple[str, ...]:
    """Those of these mesh axes over which the current mesh has several devices."""
    mesh = current_mesh()
    return () if mesh is None else tuple(name for name in axes if mesh.shape[name] > 1)


def per_device(function: Callable[..., Any], rules: ShardingRules, operands: Any, axes: Any, out_axes: Axes) -> Any:
    """``function(*operands)`` on each device's own part, where none needs another's: for kernels, which the compiler
    does not split. axes: of each operand, a tree of the same structure. On one device a plain call."""
    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return function(*operands)
    specs = jax.tree.map(lambda _, axes: rules.spec(axes), operands, axes)
    return jax.shard_map(function, in_specs=specs, out_specs=rules.spec(out_axes), check_vma=False)(*operands)


def per_rows(function: Callable[[jax.Array, Any], jax.Array], rules: ShardingRules, x: jax.Array, w: Any) -> jax.Array:
    """``function(x, w)`` on each device's own rows of x (B …), with the whole of a dense layer's weight. A plain call
    where the mesh splits such weights, or rows unevenly."""
    mesh = current_mesh()
    split = split_by((*rules.heads, *rules.mlp, *rules.embed, *rules.latent, *rules.sequence))
    if mesh is None or split or len(x) % math.prod(mesh.shape[name] for name in rules.batch):
        return function(x, w)
    return per_device(function, rules, (x, w), (("batch",), jax.tree.map(lambda _: (), w)), ("batch",))


def split_rows(arrays: Any, parts: int, rules: ShardingRules, name: str) -> Any:
    """Each array (B …) as (parts B/parts …): row r goes to part r mod parts, so that every device has some of each.

    Raises ValueError, calling the number of parts ``name``, where they or the mesh do not divide the rows.
    """
    rows = len(jax.tree.leaves(arrays)[0])
    if rows % parts:
        raise ValueError(f"{name}={parts} does not divide the batch's {rows} rows")
    if (mesh := current_mesh()) is not None:
        try:
            named_sharding(mesh, ("batch",), (rows // parts,), rules)
        except ValueError as error:
            raise ValueError(f"{name}={parts} of {rows} rows: {error}") from error
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(rows // parts, parts, *x.shape[1:]), 0, 1), arrays)
