"""How tokens and experts come together on a mesh; what the experts compute is the caller's. See docs/parallel.md."""

import dataclasses
import functools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from deepseek_jax.parallel.dispatch import Dispatch, by_copies, by_gathering
from deepseek_jax.parallel.mesh import current_mesh
from deepseek_jax.parallel.rounds import Experts, in_rounds
from deepseek_jax.parallel.sharding import ShardingRules
from deepseek_kernels.block_fp8 import BLOCK, BlockScaled
from deepseek_kernels.weights import InStack, block_scaled

logger = logging.getLogger(__name__)


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

    Over ``rules.expert_embed`` matrices are gathered, in x's dtype, and their gradients reduce-scattered; those in FP8
    as they are. Where ``rules.expert_mlp`` splits their width F, the partial sums are added up.
    """
    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        y_TD = experts(_flat(x_BSD), _flat(weights_BSK), _flat(experts_BSK), wi_ED2F, wo_EFD, None)
        return y_TD.reshape(x_BSD.shape), jnp.float32(0)
    ways = lambda names: math.prod(mesh.shape[name] for name in names)  # noqa: E731
    embed, width = rules.expert_embed, rules.expert_mlp
    if block_scaled(wi_ED2F) is not None or block_scaled(wo_EFD) is not None:
        embed, width = (), _width_in_blocks(width, ways(width), wo_EFD.shape[1])
    else:
        wi_ED2F, wo_EFD = (_ready(w, x_BSD.dtype, ways(embed)) for w in (wi_ED2F, wo_EFD))
    copied = dispatch.how == "all_to_all" and ways(rules.experts) > 1
    ours = tuple(name for name in rules.experts if name in (*rules.batch, *rules.sequence))
    if copied and ours != rules.experts:
        raise ValueError(f"dispatch='all_to_all' with experts over {rules.experts}: tokens are split over {ours} alone")
    others = (*(name for name in rules.experts if name not in ours), *width)

    def on_device(x_BSD, weights_BSK, experts_BSK, wi_ED2F, wo_EFD):
        if ways(embed) > 1:
            wi_ED2F = jax.lax.all_gather(wi_ED2F, embed, axis=1, tiled=True)
            wo_EFD = jax.lax.all_gather(wo_EFD, embed, axis=2, tiled=True)
        mean, own = experts_BSK.size * ways(ours) // ways(rules.experts), wo_EFD.shape[0]
        local = lambda x, weights, ours: in_rounds(experts, mean, x, weights, ours, wi_ED2F, wo_EFD)  # noqa: E731
        tokens = _flat(x_BSD), _flat(weights_BSK).astype(jnp.float32), _flat(experts_BSK)
        if copied:
            y_TD, dropped = by_copies(local, tokens, rules.experts, ways(rules.experts), own, dispatch)
        else:
            first = jax.lax.axis_index(rules.experts) * own if rules.experts else 0
            y_TD, dropped = by_gathering(local, tokens, ours, first), jnp.float32(0)
        return jax.lax.psum(y_TD, others).reshape(x_BSD.shape), dropped[None]

    tokens = rules.spec(("batch", "sequence", None))
    specs = _spec(wi_ED2F, rules.experts, embed, None, width), _spec(wo_EFD, rules.experts, width, embed)
    y_BSD, dropped = jax.shard_map(
        on_device,
        in_specs=(tokens, tokens, tokens, *specs),
        out_specs=(tokens, PartitionSpec((*rules.batch, *rules.sequence))),
        check_vma=False,
    )(x_BSD, weights_BSK, experts_BSK, wi_ED2F, wo_EFD)
    return y_BSD, jnp.sum(dropped) if copied else jnp.float32(0)


def _flat(x_BSN: jax.Array) -> jax.Array:
    return x_BSN.reshape(-1, x_BSN.shape[2])


def _ready(w: Any, dtype: Any, gathered: int) -> Any:
    """In the dtype in which it is multiplied, and its gradient added up over devices. A layer of a stack stays there if
    it can be read where it lies."""
    return w if isinstance(w, InStack) and gathered == 1 else w.astype(dtype)


def _width_in_blocks(names: tuple[str, ...], ways: int, width: int) -> tuple[str, ...]:
    """The axes that split the width of experts in FP8: none where a block would be cut."""
    if ways == 1 or width % (ways * BLOCK) == 0:
        return names
    why = f"experts' width {width} in FP8 blocks of {BLOCK} is not split {ways} ways"
    _say(f"{why}: each device of {', '.join(names)} multiplies by all of it")
    return ()


def _spec(w: Any, *axes: Any) -> Any:
    """How a weight whose axes are split by these comes to a device; one in FP8 has the same axes in its scales."""
    if isinstance(w, InStack):
        stack = jax.tree.map(lambda spec: PartitionSpec(None, *spec), _spec(w.stack, *axes))
        return InStack(stack, PartitionSpec())
    if not isinstance(w, BlockScaled):
        return PartitionSpec(*axes)
    assert all(merged == 1 for merged, _ in w.groups), w.groups
    spec = PartitionSpec(axes[0], *axes[2:], axes[1]) if w.terms_last else PartitionSpec(*axes)
    return dataclasses.replace(w, values=spec, scales=spec)


@functools.cache
def _say(what: str) -> None:
    logger.warning("%s", what)
