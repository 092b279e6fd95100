"""V2's devices as training knows them: groups of experts whose work is kept even, by losses and by dropping choices.

Which machine runs it is another matter: the losses and what is dropped are the same on any mesh.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.router import device_size, segment_bounds
from deepseek_kernels.kept import kept


@struct.dataclass
class Balancing:
    """What a loss asks of the routers: ``devices`` groups of neighbouring experts; ``capacity``: choices that each may
    compute over the mean (0: all); ``spared_BS``: tokens that lose none, or None."""

    devices: int = struct.field(pytree_node=False)
    capacity: float = struct.field(pytree_node=False, default=0.0)
    spared_BS: jax.Array | None = None


def spared_tokens(tokens_BS: Int[Array, "B S"], segment_ids_BS: Int[Array, "B S"], share: float) -> Bool[Array, "B S"]:
    """The tokens of about ``share`` of the sequences, which nothing but their content decides: the same in every layer
    and epoch, on every mesh. A sequence is a segment of a packed row."""
    first_BS, end_BS = segment_bounds(segment_ids_BS)
    sums_BS = jnp.pad(jnp.cumsum(tokens_BS.astype(jnp.uint32) + 1, axis=1), ((0, 0), (1, 0)))  # modulo 2³²
    hash_BS = jnp.take_along_axis(sums_BS, end_BS, axis=1) - jnp.take_along_axis(sums_BS, first_BS, axis=1)
    for factor in (0x85EBCA6B, 0xC2B2AE35):  # murmur3's finalizer
        hash_BS = (hash_BS ^ (hash_BS >> 16)) * jnp.uint32(factor)
    return ((hash_BS ^ (hash_BS >> 16)) >> 8).astype(jnp.float32) < share * 2.0**24


def drop(
    config: ModelConfig,
    balancing: Balancing,
    experts_BSK: Int[Array, "B S K"],
    weights_BSK: Float[Array, "B S K"],
    scores_BSE: Float[Array, "B S E"],
    segment_ids_BS: Int[Array, "B S"],
) -> tuple[Int[Array, "B S K"], Float[Array, "B S K"], Float[Array, ""]]:
    """What of a batch's choices is computed -> (experts, weights, how many are dropped): V2 section 2.2.4.

    A device's budget is ``capacity`` times the mean over the devices of the batch's choices. Of more, those of the
    least affinity are dropped until it holds; of equal ones the later in the batch. A spared token counts in the
    budget and loses no choice, be the budget exceeded by such alone. A dropped choice becomes -1 with weight 0, and so
    does padding's, which counts nowhere.
    """
    D, (*_, K) = balancing.devices, experts_BSK.shape
    real_BS1 = (segment_ids_BS > 0)[:, :, None]
    spared_BS1 = jnp.zeros_like(real_BS1) if balancing.spared_BS is None else balancing.spared_BS[:, :, None]
    affinity_BSK = jax.lax.stop_gradient(jnp.take_along_axis(scores_BSE, experts_BSK, axis=2))
    key_BSK = (
        jax.lax.bitcast_convert_type(affinity_BSK, jnp.int32) + 1
    )  # in the order of the numbers, which are positive
    key_BSK = jnp.where(spared_BS1, jnp.iinfo(jnp.int32).max, key_BSK)
    on_BSKD = (experts_BSK // device_size(config, D))[..., None] == jnp.arange(D)
    on_BSKD &= real_BS1[..., None]
    choices = K * jnp.sum(real_BS1, dtype=jnp.int32)
    budget = jnp.floor(balancing.capacity * choices.astype(jnp.float32) / D).astype(jnp.int32)

    cut_D = _cut(key_BSK, on_BSKD, budget, 31)
    above_BSK, at_BSK = (
        jnp.any(on_BSKD & compare(key_BSK[..., None], cut_D), axis=3) for compare in (jnp.greater, jnp.equal)
    )
    # Of equal ones the first, as many as there is room for.
    room_D = budget - jnp.sum(on_BSKD & above_BSK[..., None], axis=(0, 1, 2), dtype=jnp.int32)
    place_BSK = experts_BSK.size - jnp.arange(experts_BSK.size, dtype=jnp.int32).reshape(experts_BSK.shape)
    on_BSKD &= at_BSK[..., None]
    first_BSK = jnp.any(
        on_BSKD & (place_BSK[..., None] > _cut(place_BSK, on_BSKD, room_D, place_BSK.size.bit_length())), axis=3
    )
    keep_BSK = real_BS1 & (spared_BS1 | above_BSK | first_BSK)
    # Kept with the rows that it sorted, as the router's choice.
    experts_BSK = kept(jnp.where(keep_BSK, experts_BSK, -1))
    dropped = jnp.sum(real_BS1 & (experts_BSK < 0)).astype(jnp.float32)
    return experts_BSK, jnp.where(experts_BSK < 0, 0, weights_BSK), dropped


def _cut(
    key_BSK: Int[Array, "B S K"], on_BSKD: Bool[Array, "B S K D"], room: Int[Array, "..."], bits: int
) -> Int[Array, "D"]:
    """For each device the greatest number such that more of its keys are at least that than it has room for; 0 if all
    fit. Keys are positive and have so many bits.

    Counted, a few bits at a time: a sort of what lies on many devices would bring it all together.
    """
    cut_D = jnp.zeros(on_BSKD.shape[-1], jnp.int32)
    for low in range((bits - 1) // 4 * 4, -1, -4):
        more_J = jnp.arange(1, 1 << min(4, bits - low), dtype=jnp.int32) << low
        reach_BSKDJ = on_BSKD[..., None] & (key_BSK[..., None, None] >= cut_D[:, None] + more_J)
        over_DJ = jnp.sum(reach_BSKDJ, axis=(0, 1, 2), dtype=jnp.int32) > jnp.reshape(room, (-1, 1))
        cut_D += jnp.sum(over_DJ, axis=1, dtype=jnp.int32) << low
    return cut_D
