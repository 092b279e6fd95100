"""How tokens and experts come together on a mesh; what the experts compute is the caller's."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from deepseek_jax.parallel.mesh import current_mesh
from deepseek_jax.parallel.sharding import ShardingRules

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
    them, gathered over every axis but those that split their width F, whose partial sums are added up.
    """
    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return experts(x_BSD, weights_BSK, experts_BSK, wi_ED2F, wo_EFD)
    tokens, width = rules.spec(("batch", "sequence", None)), rules.expert_mlp
    # Blocks of a scaled weight need not end where a device's part does: on a mesh its values are spelled out.
    wi_ED2F, wo_EFD = (w if isinstance(w, jax.Array) else w.astype(x_BSD.dtype) for w in (wi_ED2F, wo_EFD))

    def local(*operands):
        return jax.lax.psum(experts(*operands), width)

    matrices = PartitionSpec(None, None, None, width), PartitionSpec(None, width, None)
    return jax.shard_map(local, in_specs=(tokens, tokens, tokens, *matrices), out_specs=tokens, check_vma=False)(
        x_BSD, weights_BSK, experts_BSK, wi_ED2F, wo_EFD
    )
