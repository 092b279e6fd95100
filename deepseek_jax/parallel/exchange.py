"""How tokens and experts come together on a mesh; what the experts compute is the caller's."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from deepseek_jax.parallel.mesh import current_mesh
from deepseek_jax.parallel.sharding import ShardingRules
from deepseek_kernels.weights import block_scaled

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
    *,
    in_fp8: bool = False,
) -> jax.Array:
    """``experts(x, weights, experts, wi, wo) -> y``, run on each device's own tokens.

    Without a mesh, or on one of a single device, a plain call. On others tokens stay and the experts' matrices come to
    them, gathered over every axis but those that split their width F, whose partial sums are added up.

    in_fp8: the experts need weights in FP8; a ValueError on a mesh, which dequantises them.
    """
    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return experts(x_BSD, weights_BSK, experts_BSK, wi_ED2F, wo_EFD)
    tokens, width = rules.spec(("batch", "sequence", None)), rules.expert_mlp
    # Blocks of a scaled weight need not end where a device's part does: on a mesh its values are spelled out.
    if block_scaled(wi_ED2F) is not None or block_scaled(wo_EFD) is not None:
        why = f"a mesh of {mesh.size} devices makes a copy of the experts' FP8 weights in {x_BSD.dtype.name}"
        if in_fp8:
            raise ValueError(f"grouped_matmul='hopper_fp8' cannot run: {why}")
        _say(why)
    wi_ED2F, wo_EFD = (w if isinstance(w, jax.Array) else w.astype(x_BSD.dtype) for w in (wi_ED2F, wo_EFD))

    def local(*operands):
        return jax.lax.psum(experts(*operands), width)

    matrices = PartitionSpec(None, None, None, width), PartitionSpec(None, width, None)
    return jax.shard_map(local, in_specs=(tokens, tokens, tokens, *matrices), out_specs=tokens, check_vma=False)(
        x_BSD, weights_BSK, experts_BSK, wi_ED2F, wo_EFD
    )


@functools.cache
def _say(what: str) -> None:
    logger.warning("%s", what)
