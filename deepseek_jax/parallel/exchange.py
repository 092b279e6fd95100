"""How tokens and experts come together on a mesh; what the experts compute is the caller's."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from deepseek_jax.parallel.mesh import current_mesh
from deepseek_jax.parallel.sharding import ShardingRules
from deepseek_kernels.block_fp8 import BLOCK, BlockScaled
from deepseek_kernels.weights import InStack, block_scaled

logger = logging.getLogger(__name__)

Experts = Callable[[jax.Array, jax.Array, jax.Array, Any, Any], jax.Array]


def exchange(
    experts: Experts,
    x_BSD: jax.Array,
    weights_BSK: jax.Array,
    experts_BSK: jax.Array,
    wi_ED2F: Any,
    wo_EFD: Any,
    rules: ShardingRules,
) -> jax.Array:
    """``experts(x, weights, experts, wi, wo) -> y``, run on each device's own tokens.

    Without a mesh, or on one of a single device, a plain call. On others tokens stay and the experts' matrices come to
    them, gathered over every axis but those that split their width F, whose partial sums are added up. Matrices in FP8
    stay with their experts, and tokens come to them: ``experts`` then gets a device's own matrices, in FP8, with
    numbers of experts that count from its first; what is not among them adds nothing.
    """
    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return experts(x_BSD, weights_BSK, experts_BSK, wi_ED2F, wo_EFD)
    operands = x_BSD, weights_BSK, experts_BSK, wi_ED2F, wo_EFD
    tokens, width = rules.spec(("batch", "sequence", None)), rules.expert_mlp
    if block_scaled(wi_ED2F) is not None or block_scaled(wo_EFD) is not None:
        ways = math.prod(mesh.shape[name] for name in width)
        if ways > 1 and wo_EFD.shape[1] % (ways * BLOCK):
            why = f"experts' width {wo_EFD.shape[1]} in FP8 blocks of {BLOCK} is not split {ways} ways"
            _say(f"{why}: each device of {', '.join(width)} multiplies by all of it")
            width = ()
        split, axes = functools.partial(_by_experts, experts, rules, width), rules.experts
    else:
        wi_ED2F, wo_EFD = (w if isinstance(w, jax.Array) else w.astype(x_BSD.dtype) for w in (wi_ED2F, wo_EFD))
        split, axes = lambda *operands: jax.lax.psum(experts(*operands), width), ()
    specs = tokens, tokens, tokens, _spec(wi_ED2F, axes, None, None, width), _spec(wo_EFD, axes, width, None)
    return jax.shard_map(split, in_specs=specs, out_specs=tokens, check_vma=False)(*operands)


def _by_experts(experts, rules, width, x_BSD, weights_BSK, experts_BSK, wi_ED2F, wo_EFD):
    """The tokens of all devices that the experts are split over, by this device's experts; sums go back to them."""
    ours = [name for name in rules.experts if name in (*rules.batch, *rules.sequence)]
    others = [name for name in (*rules.experts, *width) if name not in ours]
    for name in ours:
        x_BSD, weights_BSK, experts_BSK = (
            jax.lax.all_gather(x, name, tiled=True) for x in (x_BSD, weights_BSK, experts_BSK)
        )
    first = jax.lax.axis_index(rules.experts) * wo_EFD.shape[0] if rules.experts else 0
    y_BSD = jax.lax.psum(experts(x_BSD, weights_BSK, experts_BSK - first, wi_ED2F, wo_EFD), others)
    for name in reversed(ours):
        y_BSD = jax.lax.psum_scatter(y_BSD, name, tiled=True)
    return y_BSD


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
