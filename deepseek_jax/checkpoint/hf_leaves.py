"""A released model's parameters while they are loaded: buffers on the devices, filled tensor by tensor.

A jitted program casts or dequantises a piece of a tensor into its place of the (donated) stacked parameter.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from deepseek_jax.checkpoint.hf_names import HFTensor, LeafPath, flatten, leaf_shapes
from deepseek_jax.checkpoint.integers import Integers
from deepseek_jax.config import ModelConfig
from deepseek_jax.model import parameters
from deepseek_kernels.block_fp8 import BlockScaled, Groups, scales_shape, split_shape


@dataclasses.dataclass(frozen=True)
class Kept:
    """How a leaf is kept as a BlockScaled."""

    dtype: np.dtype
    scales: np.dtype
    groups: Groups


class Leaves:
    """The parameters while they fill: of each leaf a buffer on every device that this process feeds.

    A leaf kept in FP8 or integers is two: its values, and its scales under the path + ("scales",). Vectors are gathered
    in host memory: they are small, and each would need a program of its own. So is what a CPU keeps in int4, a number a
    byte until all is there: XLA would go through the whole leaf for each tensor, 23 ns a number.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: Sequence[HFTensor],
        dtype: np.dtype,
        kept: Mapping[LeafPath, Kept],
        integers: Integers | None,
        place: Callable[[tuple[str | None, ...], tuple[int, ...]], Any],
    ):
        axes = dict(flatten(parameters.logical_axes(config))) | {("router_bias",): (None, None)}
        self.kept, self.integers = kept, integers
        self.shapes: dict[LeafPath, tuple[int, ...]] = {}
        self.shardings: dict[LeafPath, Any] = {}
        dtypes: dict[LeafPath, Any] = {}

        def add(path: LeafPath, shape: tuple[int, ...], dtype: Any, axes: tuple[str | None, ...]) -> None:
            self.shapes[path], dtypes[path] = shape, np.dtype(dtype)
            self.shardings[path] = place(axes, shape)

        for path, shape in leaf_shapes(config).items():
            how = kept.get(path)
            wide = np.float32 if path == ("router_bias",) else dtype
            add(path, shape, how.dtype if how else wide, axes[path])
            if how:
                lead, _ = split_shape(shape, how.groups)
                add(
                    (*path, "scales"),
                    scales_shape(shape, how.groups),
                    how.scales,
                    (*axes[path][: len(lead)], *(None,) * len(how.groups)),
                )
        vectors = {tensor.path for tensor in tensors if len(tensor.shape) == 1}
        self.vectors = {path: np.zeros(self.shapes[path], dtypes[path]) for path in vectors}
        large = [path for path in self.shapes if path not in vectors]
        self.buffers: dict[LeafPath, dict[Any, Any]] = {path: {} for path in large}
        for device in self.shardings[large[0]].addressable_devices if large else ():
            on_host = {path for path in large if device.platform == "cpu" and dtypes[path] == jnp.int4}
            here = {path: (self.shardings[path].shard_shape(self.shapes[path]), dtypes[path]) for path in large}
            for path in on_host:
                self.buffers[path][device] = np.zeros(*here.pop(path))
            for path, buffer in zip(here, _zeros(tuple(here.values()), device)(), strict=True):
                self.buffers[path][device] = buffer

    def pieces(
        self, path: LeafPath, place: list[tuple[int, int]]
    ) -> Iterator[tuple[Any, tuple[slice, ...], np.ndarray]]:
        """(device, slices of the place, where they start in the device's buffer) for all that hold some of it."""
        shape = self.shapes[path]
        for device, index in self.shardings[path].addressable_devices_indices_map(shape).items():
            held = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
            cut = [(max(p[0], h[0]), min(p[1], h[1])) for p, h in zip(place, held, strict=True)]
            if all(low < high for low, high in cut):
                slices = tuple(slice(low - p[0], high - p[0]) for (low, high), p in zip(cut, place, strict=True))
                yield device, slices, np.array([low - h[0] for (low, _), h in zip(cut, held, strict=True)], np.int32)

    def sent(self, path: LeafPath, device: Any, piece: Any) -> Any:
        """The piece where its buffer is."""
        return piece if isinstance(self.buffers[path][device], np.ndarray) else jax.device_put(piece, device)

    def fill(self, path: LeafPath, device: Any, piece: Any, starts: np.ndarray) -> None:
        buffer = self.buffers[path][device]
        if isinstance(buffer, np.ndarray):
            at = tuple(slice(start, start + size) for start, size in zip(starts, piece.shape, strict=True))
            buffer.view(np.int8)[at] = piece.view(np.int8)  # numpy's own dtype is copied in rows
        else:
            self.buffers[path][device] = _fill(buffer, piece, starts)

    def wait(self, paths: set[LeafPath]) -> None:
        jax.block_until_ready([self.buffers[path] for path in paths])

    def finish(self) -> dict[LeafPath, Any]:
        arrays: dict[LeafPath, Any] = {}
        for path, shape in self.shapes.items():
            if path in self.vectors:
                arrays[path] = jax.make_array_from_callback(shape, self.shardings[path], self.vectors[path].__getitem__)
            else:
                buffers = [jax.device_put(buffer, device) for device, buffer in self.buffers.pop(path).items()]
                arrays[path] = jax.make_array_from_single_device_arrays(shape, self.shardings[path], buffers)
        for path, how in self.kept.items():
            arrays[path] = BlockScaled(arrays[path], arrays.pop((*path, "scales")), how.groups)
        return arrays


@functools.cache
def _zeros(kinds: tuple[tuple[tuple[int, ...], np.dtype], ...], device: Any) -> Callable[[], list[jax.Array]]:
    """The program that makes arrays of these shapes and dtypes on one device."""
    return jax.jit(lambda: [jnp.zeros(*kind) for kind in kinds], out_shardings=SingleDeviceSharding(device))


@functools.partial(jax.jit, donate_argnums=0)
def _fill(buffer: Any, piece: Any, starts: Any) -> Any:
    """``buffer`` with ``piece`` (an array or BlockScaled of its rank) at ``starts``, in place.

    Moved as whole numbers: XLA:CPU takes bf16 and FP8 through float32, ten times slower.
    """
    filled = jax.lax.dynamic_update_slice(to_bits(buffer), to_bits(piece.astype(buffer.dtype)), list(starts))
    return from_bits(filled, buffer.dtype)


def to_bits(x: jax.Array) -> jax.Array:
    """The same memory as unsigned integers, integers as they are; within a jitted program it costs nothing."""
    if jnp.issubdtype(x.dtype, jnp.integer):
        return x
    return jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])


def from_bits(x: jax.Array, dtype: Any) -> jax.Array:
    """The inverse of ``to_bits``."""
    if x.dtype == dtype:
        return x
    return jax.lax.bitcast_convert_type(x, dtype)
