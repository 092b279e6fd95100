"""What the engine keeps of the tokens it has seen: a buffer for each layer, and rows that have lengths of their own.

The network knows of it only that a memory takes new entries and returns all there are (``Memory.write``).
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Num

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.parallel.sharding import constrain
from deepseek_kernels import InStack, Visible
from deepseek_kernels.tpu import LANES


@struct.dataclass
class Memory:
    """One layer's part of the cache; of layers that are scanned one for them all, with the layers in front, which each
    layer is handed as its ``InStack``: it writes and reads where they lie.

    buffer_BTW: column t holds what attention keeps of the row's token t. start_B: the column of the next token; None
    where nothing has been written yet, so that what is new is all there is to see, and no empty column is looked at.
    """

    buffer_BTW: Any
    start_B: Any

    def write(self, entry_BSW: Float[Array, "B S W"]) -> tuple[Self, Float[Array, "B T W"] | InStack]:
        """Put S new tokens behind each row's others -> (the memory with them, all entries of each row, with whatever
        zeros the cache keeps behind each)."""
        kept, start = self.buffer_BTW, self.start_B
        entry_BSW = entry_BSW.astype(kept.dtype)
        wide_BSW = as_wide(entry_BSW, kept.shape[-1])
        if isinstance(kept, InStack):
            if start is None:
                at = (kept.layer, 0, 0, 0)
                kept = InStack(jax.lax.dynamic_update_slice(kept.stack, wide_BSW[None], at), kept.layer)
                return dataclasses.replace(self, buffer_BTW=kept), entry_BSW
            kept = InStack(write_rows(kept.stack, wide_BSW, start.astype(jnp.int32), kept.layer), kept.layer)
        elif start is None:
            kept = jax.lax.dynamic_update_slice(kept, wide_BSW, (0, 0, 0))
            return dataclasses.replace(self, buffer_BTW=kept), entry_BSW
        else:
            kept = write_rows(kept, wide_BSW, start)
        return dataclasses.replace(self, buffer_BTW=kept), kept


def entry_width(config: ModelConfig, compute: ComputeConfig) -> int:
    """Numbers that are kept of a token in a layer.

    On a TPU MLA's entries are as wide as whole vector registers. Between programs XLA lays out what is not with tokens
    along the lanes, to save room; kernels want the entry there, so each call would copy the cache twice."""
    width = config.cache_numbers_per_token_layer
    if config.attention == "mla" and compute.kernels.platform == "tpu":
        return -(-width // LANES) * LANES
    return width


def as_wide(entry_BSW: jax.Array, width: int) -> jax.Array:
    """With zeros behind each entry."""
    more = width - entry_BSW.shape[-1]
    return jnp.pad(entry_BSW, ((0, 0), (0, 0), (0, more))) if more else entry_BSW


def write_rows(
    buffer_BTW: Num[Array, "*L B T W"], entry_BSW: Num[Array, "B S W"], start_B: Int[Array, "B"], layer: Any = None
) -> Num[Array, "*L B T W"]:
    """Put S columns into each row from the row's own ``start`` on; what lies past the last column is dropped.

    layer: of a stack (L B T W), which of them is written."""
    where = () if layer is None else (layer,)

    def write(buffer_TW, entry_SW, start):  # a row by itself, for a mesh that splits them
        columns = start + jnp.arange(len(entry_SW), dtype=jnp.int32)
        options = {"mode": "drop", "unique_indices": True, "indices_are_sorted": layer is None}
        return buffer_TW.at[(*where, columns)].set(entry_SW, **options)

    axis = len(where)
    return jax.vmap(write, (axis, 0, 0), axis)(buffer_BTW, entry_BSW, start_B)


@struct.dataclass
class Cache:
    """Rows b of ``lengths_B[b]`` tokens each, on the left of T columns.

    layers: a buffer (B T W) for each layer, so that a step writes in place instead of copying a stack; with
    ``scan_decode`` one (L B T W) for each stack of layers. mtp: the MTP module's (B T W), where it was asked for.
    """

    layers: tuple[jax.Array, ...]
    mtp: jax.Array | None
    lengths_B: jax.Array

    @classmethod
    def empty(cls, config: ModelConfig, compute: ComputeConfig, batch: int, columns: int, *, mtp: bool = False) -> Self:
        """No token yet, in ``compute.dtype``; rows are split over the mesh as a batch is."""
        shape = (batch, columns, entry_width(config, compute))

        def buffer(*stack: int) -> jax.Array:
            zeros = jnp.zeros((*stack, *shape), compute.dtype)
            return constrain(zeros, compute.rules, *[None] * len(stack), "batch", None, None)

        stacks = [count for count in (config.num_dense_layers, config.num_moe_layers) if count]
        scanned = compute.scan_decode
        layers = tuple(map(buffer, stacks)) if scanned else tuple(buffer() for _ in range(config.num_hidden_layers))
        return cls(layers, buffer() if mtp else None, jnp.zeros(batch, jnp.int32))

    def memories(self, *, first: bool = False) -> tuple[Memory, ...]:
        """What the network's layers take. first: nothing has been written yet."""
        return tuple(self._memory(buffer, first) for buffer in self.layers)

    def mtp_memory(self, *, first: bool = False) -> Memory:
        """The same for the MTP module."""
        assert self.mtp is not None, "the cache was made without a slot for the MTP module"
        return self._memory(self.mtp, first)

    def _memory(self, buffer: jax.Array, first: bool) -> Memory:
        return Memory(buffer, None if first else jnp.broadcast_to(self.lengths_B, buffer.shape[:-2]))

    def positions(self, size: int) -> Int[Array, "B S"]:
        """Of each row's next ``size`` tokens."""
        return self.lengths_B[:, None] + jnp.arange(size, dtype=jnp.int32)

    def visible(self, size: int) -> Visible:
        """Each of the next ``size`` tokens sees its row up to itself."""
        return Visible(q_positions_BS=self.positions(size), lengths_B=self.lengths_B + size)

    def grown(self, memories: tuple[Memory, ...], count_B: Int[Array, "B"], mtp: Memory | None = None) -> Self:
        """With what the layers wrote, of which the first ``count_B[b]`` tokens count: later ones write over others."""
        slot: dict[str, Any] = {} if mtp is None else {"mtp": mtp.buffer_BTW}
        layers = tuple(memory.buffer_BTW for memory in memories)
        return dataclasses.replace(self, layers=layers, lengths_B=self.lengths_B + count_B, **slot)
