"""What both kinds of attention share: who may attend to whom, the softmax, and the cache."""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax.config import ModelConfig


def packed_mask(segment_ids_BS: Int[Array, "B S"]) -> Bool[Array, "B S S"]:
    """Causal, and only within a segment of a packed row."""
    size = segment_ids_BS.shape[1]
    causal_SS = jnp.tril(jnp.ones((size, size), bool))
    return causal_SS & (segment_ids_BS[:, :, None] == segment_ids_BS[:, None, :])


def masked_softmax(scores: Float[Array, "B H S T"], mask_BST: Bool[Array, "B S T"]) -> Float[Array, "B H S T"]:
    """Softmax over the last axis in float32; a query that may attend to nothing gets a uniform row."""
    return jax.nn.softmax(jnp.where(mask_BST[:, None], scores.astype(jnp.float32), jnp.finfo(jnp.float32).min), axis=-1)


@struct.dataclass
class Cache:
    """Keys and values of a batch that is being generated.

    Each layer has a buffer of its own (B, T, numbers per token and layer), so that a step writes one column in place
    instead of copying a stack. All rows write to the same column: prompts of different lengths are padded on the left.

    layers: per layer what attention keeps: MLA the normalised latent (C) and the rotated shared key (R), GQA keys and
    values. positions_BT: the position of each column's token, -1 where there is none. length: columns written.
    """

    layers: tuple[jax.Array, ...]
    positions_BT: jax.Array
    length: jax.Array

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, columns: int, dtype: str = "float32") -> Self:
        width = config.cache_numbers_per_token_layer
        layers = tuple(jnp.zeros((batch, columns, width), dtype) for _ in range(config.num_hidden_layers))
        return cls(layers, jnp.full((batch, columns), -1, jnp.int32), jnp.int32(0))

    def claim(self, positions_BS: Int[Array, "B S"]) -> tuple[Self, Bool[Array, "B S T"]]:
        """Reserve columns for new tokens and say which columns each may attend to. Position -1 is padding."""
        start = (0, self.length)
        positions_BT = jax.lax.dynamic_update_slice(self.positions_BT, positions_BS, start)
        mask_BST = (positions_BT[:, None, :] >= 0) & (positions_BT[:, None, :] <= positions_BS[:, :, None])
        return dataclasses.replace(self, positions_BT=positions_BT), mask_BST


def write_columns(buffer_BTW: jax.Array, entry_BSW: jax.Array, length: jax.Array) -> jax.Array:
    """Put S new columns behind the first ``length``."""
    return jax.lax.dynamic_update_slice(buffer_BTW, entry_BSW.astype(buffer_BTW.dtype), (0, length, 0))


einsum32 = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
