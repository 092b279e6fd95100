"""How tokens and experts come together on a mesh; what the experts compute is the caller's. See docs/parallel.md."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from deepseek_jax.parallel.dispatch import Dispatch, by_copies, by_gathering
from deepseek_jax.parallel.mesh import current_mesh
from deepseek_jax.parallel.rounds import Experts, in_rounds
from deepseek_jax.parallel.sharding import ShardingRules
from deepseek_kernels.block_fp8 import BlockScaled
from deepseek_kernels.weights import InStack, block_scaled


def exchange(
    experts: Experts,
    x_BSD: jax.Array,
    weights_BSK: jax.Array,
    experts_BSK: jax.Array,
    wi_ED2F: Any,
    wo_EFD: Any,
    rules: ShardingRules,
    dispatch: Dispatch = Dispatch(),
) -> tuple[jax.Array, jax.Array]:
    """``experts(x_TD, weights_TK, experts_TK, wi, wo, most) -> y_TD`` on a mesh -> (y_BSD, choices that were dropped).

    Without a mesh, or on one of a single device, a plain call. On others experts stay where ``rules.experts`` has put
    them and tokens come to them, as ``dispatch`` says. ``experts`` then gets a device's own matrices, and numbers that
    count from its first: what is not among them adds nothing. No more than ``most`` are, but for None.

    Over ``rules.expert_embed`` and ``experts_gathered`` matrices are gathered, in x's dtype, and their gradients
    reduce-scattered, in their own; those in FP8 as they are. Where ``expert_mlp`` splits their width F, the partial
    sums are added up.
    """
    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        y_TD = experts(_flat(x_BSD), _flat(weights_BSK), _flat(experts_BSK), wi_ED2F, wo_EFD, None)
        return y_TD.reshape(x_BSD.shape), jnp.float32(0)
    ways = lambda names: math.prod(mesh.shape[name] for name in names)  # noqa: E731
    group = check_exchange(rules, mesh.shape, dispatch.how, dispatch.nodes)
    lie, embed, width = rules.experts, rules.expert_embed, rules.expert_mlp
    if block_scaled(wi_ED2F) is not None or block_scaled(wo_EFD) is not None:
        lie, embed = group, ()
        block = max((w.groups[0][1] for w in map(block_scaled, (wi_ED2F, wo_EFD)) if w is not None), default=1)
        assert ways(width) == 1 or wo_EFD.shape[1] % (ways(width) * block) == 0, "check_layout refuses a block in parts"
    elif ways(embed) * ways(rules.experts_gathered) > 1:  # no longer layers of a stack
        wi_ED2F, wo_EFD = (w.astype(x_BSD.dtype) if isinstance(w, InStack) else w for w in (wi_ED2F, wo_EFD))
    ours = tuple(name for name in group if name in (*rules.batch, *rules.sequence))
    others = tuple(name for name in (*group, *width) if name not in ours and mesh.shape[name] > 1)
    own, copied = wo_EFD.shape[0] // ways(group), dispatch.how != "gather" and ways(group) > 1

    def on_device(x_BSD, weights_BSK, experts_BSK, wi_ED2F, wo_EFD):
        for names, wi_axis, wo_axis in ((embed, 1, 2), (lie[len(group) :], 0, 0)):
            if ways(names) > 1:
                wi_ED2F = _gathered(wi_ED2F, names, wi_axis, x_BSD.dtype)
                wo_EFD = _gathered(wo_EFD, names, wo_axis, x_BSD.dtype)
        mean = experts_BSK.size * ways(ours) // ways(group)
        local = lambda x, weights, ours: in_rounds(experts, mean, x, weights, ours, wi_ED2F, wo_EFD)  # noqa: E731
        tokens = _flat(x_BSD), _flat(weights_BSK).astype(jnp.float32), _flat(experts_BSK)
        if copied:
            y_TD, dropped = by_copies(local, tokens, group, ways(group), own, dispatch)
        else:
            first = jax.lax.axis_index(group) * own if group else 0
            y_TD = by_gathering(local, tokens, tuple(name for name in ours if mesh.shape[name] > 1), first)
            dropped = jnp.float32(0)
        y_TD = jax.lax.psum(y_TD, others) if others else y_TD
        return y_TD.reshape(x_BSD.shape), dropped[None]

    tokens = rules.spec(("batch", "sequence", None))
    y_BSD, dropped = jax.shard_map(
        on_device,
        in_specs=(*[tokens] * 3, weight_spec(wi_ED2F, lie, embed, None, width), weight_spec(wo_EFD, lie, width, embed)),
        out_specs=(tokens, PartitionSpec((*rules.batch, *rules.sequence))),
        check_vma=False,
    )(x_BSD, weights_BSK, experts_BSK, wi_ED2F, wo_EFD)
    return y_BSD, jnp.sum(dropped) if copied else jnp.float32(0)


def check_exchange(rules: ShardingRules, sizes: Mapping[str, int], how: str, nodes: int) -> tuple[str, ...]:
    """The mesh axes over which tokens come to experts. ValueError for rules or nodes with which they cannot."""
    group = tuple(name for name in rules.experts if name not in rules.experts_gathered)
    if group + rules.experts_gathered != rules.experts:
        raise ValueError(f"experts_gathered={rules.experts_gathered}: must be the last of experts={rules.experts}")
    ways = math.prod(sizes[name] for name in group)
    if how == "gather" or ways == 1:
        return group
    ours = tuple(name for name in group if name in (*rules.batch, *rules.sequence))
    if ours != group:
        raise ValueError(f"dispatch={how!r}: experts are split over {group}, tokens over {ours} of these alone")
    if ways % nodes:
        legal = [str(count) for count in range(1, ways + 1) if ways % count == 0]
        raise ValueError(
            f"dispatch_nodes={nodes} does not divide the {ways} devices of {', '.join(group)}: "
            f"{', '.join(legal[:-1])} or {legal[-1]} do"
        )
    return group


def _flat(x_BSN: jax.Array) -> jax.Array:
    return x_BSN.reshape(-1, x_BSN.shape[2])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(w: jax.Array, names: tuple[str, ...], axis: int, dtype: Any) -> jax.Array:
    """The parts of ``w`` along ``axis`` on the devices along ``names``, put together in ``dtype``. The gradient's sums
    are of w's own dtype.

    They are joined in front, whatever the axis, and moved there on the device: an XLA for TPUs that is to scatter sums
    along the last axis adds them up whole."""
    whole = jax.lax.all_gather(w.astype(dtype), names)
    return jnp.moveaxis(whole, 0, axis).reshape(*w.shape[:axis], -1, *w.shape[axis + 1 :])


def _scattered(names, axis, dtype, like, dw):
    parts = jnp.moveaxis(dw.reshape(*like.shape[:axis], -1, *like.shape[axis:]), axis, 0)
    return (jax.lax.psum_scatter(parts.astype(like.dtype), names),)


_gathered.defvjp(lambda w, names, axis, dtype: (_gathered(w, names, axis, dtype), w), _scattered)


def weight_spec(w: Any, *axes: Any) -> Any:
    """How a weight whose axes are split by these comes to a device; one in FP8 has the same axes in its scales."""
    if isinstance(w, InStack):
        stack = jax.tree.map(lambda spec: PartitionSpec(None, *spec), weight_spec(w.stack, *axes))
        return InStack(stack, PartitionSpec())
    if not isinstance(w, BlockScaled):
        return PartitionSpec(*axes)
    assert all(merged == 1 for merged, _ in w.groups), w.groups
    spec = PartitionSpec(axes[0], *axes[2:], axes[1]) if w.terms_last else PartitionSpec(*axes)
    return dataclasses.replace(w, values=spec, scales=PartitionSpec(*axes) if w.own_scales else spec)
