"""Load a released model's folder: config.json and safetensors, streamed tensor by tensor to where the weights live.

Worker threads read a tensor from its mapped file, turn it to our layout and send it to the device; a jitted program
casts or dequantises it into its place of the (donated) stacked parameter. Every tensor of the files is used or named.
"""

import collections
import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from deepseek_jax.checkpoint.hf_check import check_tensors, find_mtp
from deepseek_jax.checkpoint.hf_names import HFTensor, LeafPath, flatten, leaf_shapes
from deepseek_jax.checkpoint.integers import KEPT_INTEGERS, Integers, packed_names
from deepseek_jax.checkpoint.reading import nest
from deepseek_jax.checkpoint.safetensors import TensorFiles, TensorInfo
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.model import parameters
from deepseek_jax.parallel.legal import check_layout
from deepseek_jax.parallel.sharding import named_sharding
from deepseek_kernels.block_fp8 import BLOCK, FP8, BlockScaled, Groups, scales_shape, split_shape

KEPT_FP8 = "float8_e4m3"
KEPT = (KEPT_FP8, *KEPT_INTEGERS)
DTYPES = ("bfloat16", "float32", *KEPT)
_WORKERS = 2
_IN_FLIGHT = 2**28  # bytes sent to the devices before they are waited for
_Sent = tuple[LeafPath, Any, Any, np.ndarray]  # leaf, device, piece, where the piece starts in the device's buffer


def released_config(path: str | Path, ignore_config: Sequence[str] = ()) -> ModelConfig:
    """The network that a released folder's config.json describes and its files hold."""
    with TensorFiles(path) as files:
        return find_mtp(ModelConfig.from_hf(path, ignore_config=ignore_config), files)


def read_released(
    path: str | Path, compute: ComputeConfig, mesh: Mesh, ignore_config: Sequence[str] = ()
) -> tuple[ModelConfig, dict[str, Any], jax.Array | None]:
    """Configuration, parameters in ``compute.param_dtype`` on ``mesh``, and routing bias of a released folder.

    FP8 checkpoints are dequantised; with ``param_dtype="float8_e4m3"`` their matrices stay as they are
    (``BlockScaled``). Matrices in integers stay so, and with ``"int8"`` and ``"int4"`` become so. ValueError, naming
    tensor or field, for whatever is missing, unknown, misshapen or damaged. An MTP module that config.json announces
    and the files lack altogether is left out with a warning.
    """
    keep_fp8 = compute.param_dtype == KEPT_FP8
    config = ModelConfig.from_hf(path, ignore_config=ignore_config)
    place = functools.partial(named_sharding, mesh, rules=compute.rules)
    with TensorFiles(path) as files:
        config = find_mtp(config, files)
        check_layout(config, compute, mesh.shape)
        integers = integers_of(path, compute.param_dtype)
        tensors = check_tensors(config, files, keep_fp8=keep_fp8, integers=integers)
        of_rest = jnp.bfloat16 if compute.param_dtype in KEPT else compute.param_dtype
        kept = _kept(tensors, files, keep_fp8, integers, compute.param_dtype)
        leaves = _Leaves(config, tensors, np.dtype(of_rest), kept, integers, place)
        _stream(files, tensors, leaves)
        arrays = leaves.finish()
    router_bias = arrays.pop(("router_bias",), None)
    return config, nest(arrays), router_bias


@dataclasses.dataclass(frozen=True)
class _Kept:
    """How a leaf is kept as a BlockScaled."""

    dtype: np.dtype
    scales: np.dtype
    groups: Groups


def integers_of(path: str | Path, param_dtype: str) -> Integers | None:
    """What a released folder's matrices are in, or are to become. ValueError where they are in others."""
    wanted, found = Integers.named(param_dtype), Integers.of_folder(path)
    if found and (param_dtype == KEPT_FP8 or (wanted and wanted.bits != found.bits)):
        raise ValueError(f"param_dtype={param_dtype!r}: the matrices of {path} are in int{found.bits}")
    return found or wanted


def _kept(
    tensors: Sequence[HFTensor], files: TensorFiles, keep_fp8: bool, integers: Integers | None, param_dtype: str
) -> dict[LeafPath, _Kept]:
    kept: dict[LeafPath, _Kept] = {}
    for tensor in tensors:
        if keep_fp8 and tensor.quantised:
            kept[tensor.path] = _Kept(np.dtype(FP8), np.dtype(np.float32), tensor.groups)
        elif integers is not None and (
            integers.names(tensor)[0] in files.tensors or (param_dtype in KEPT_INTEGERS and integers.takes(tensor))
        ):
            kept[tensor.path] = _Kept(integers.dtype, np.dtype(jnp.bfloat16), integers.groups(tensor))
    return kept


def dtype_name(dtype: Any) -> str:
    """One of DTYPES; ValueError for another."""
    name = KEPT_FP8 if dtype in (KEPT_FP8, FP8) else dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r}: must be one of {', '.join(DTYPES)}")
    return name


class _Leaves:
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
        kept: Mapping[LeafPath, _Kept],
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


def _stream(files: TensorFiles, tensors: Sequence[HFTensor], leaves: _Leaves) -> None:
    """Fill the leaves in the order of the files, a few tensors at a time."""
    queue: collections.deque = collections.deque()
    sent, touched = 0, set()

    def place(info: TensorInfo) -> tuple[Path, int]:
        return info.file, info.start

    def take_one() -> None:
        nonlocal sent, touched
        tensor, size, future = queue.popleft()
        for path, device, piece, starts in future.result():
            leaves.fill(path, device, piece, starts)
            touched.add(path)
        sent += size
        if sent > _IN_FLIGHT:
            leaves.wait(touched)
            sent, touched = 0, set()

    with concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:
        try:
            main = {tensor.name: files.tensors[stored_name(tensor, files)] for tensor in tensors}
            for tensor in sorted(tensors, key=lambda tensor: place(main[tensor.name])):
                info = main[tensor.name]
                queue.append((tensor, info.end - info.start, pool.submit(_send, files, tensor, leaves)))
                while len(queue) > 2 * _WORKERS:
                    take_one()
            while queue:
                take_one()
        finally:
            pool.shutdown(cancel_futures=True)


def _send(files: TensorFiles, tensor: HFTensor, leaves: _Leaves) -> list[_Sent]:
    """Read one tensor, and its scales, and send each device its part."""
    if tensor.path in leaves.vectors:
        vectors = leaves.vectors[tensor.path]
        vectors[tensor.index] = files.array(tensor.name).reshape(tensor.kept).astype(vectors.dtype)
        return []
    name = stored_name(tensor, files)
    scaled = files.tensors[name].dtype == FP8
    sent = [
        (path, device, leaves.sent(path, device, piece), starts)
        for path, device, piece, starts in _parts(files, tensor, leaves, scaled)
    ]
    jax.block_until_ready([piece for _, _, piece, _ in sent])
    for read in (name, tensor.scale_name) if scaled else (name,):
        files.forget(read)
    return sent


def _parts(files: TensorFiles, tensor: HFTensor, leaves: _Leaves, scaled: bool) -> Iterator[_Sent]:
    """The parts of a tensor as views of its file, or of what was made of it."""
    kept = tensor.path in leaves.kept
    if kept and leaves.integers is not None:
        array, scales = leaves.integers.read(tensor, files)
        scales = scales.T
    else:
        array, scales = files.array(tensor.name), files.array(tensor.scale_name).T if scaled else None
    values = _our_layout(array, tensor)
    place = [
        (i, i + 1) if isinstance(i, int) else (0, size) for i, size in zip(tensor.index, values.shape, strict=True)
    ]
    for device, cut, starts in leaves.pieces(tensor.path, place):
        piece = values[cut] if kept or scales is None else _scaled(values[cut], cut, scales, tensor)
        yield tensor.path, device, piece, starts
    if kept and scales is not None:
        path = (*tensor.path, "scales")
        lead = len(place) - sum(axes for axes, _ in tensor.groups)
        between = [span for span, i in zip(place[lead:], tensor.index[lead:], strict=True) if isinstance(i, int)]
        place = [*place[:lead], (0, scales.shape[0]), *between, (0, scales.shape[1])]
        scales = scales.reshape([high - low for low, high in place])
        for device, cut, starts in leaves.pieces(path, place):
            yield path, device, scales[cut], starts


def stored_name(tensor: HFTensor, files: TensorFiles) -> str:
    """Of the tensor that holds its numbers."""
    packed = packed_names(tensor.name)[0]
    return packed if packed in files.tensors else tensor.name


def _our_layout(array: np.ndarray, tensor: HFTensor) -> np.ndarray:
    """A view of a released tensor with the axes of its leaf; those of an index have size 1."""
    inputs, outputs = tensor.kept[: tensor.inputs], tensor.kept[tensor.inputs :]
    array = array.reshape(*outputs, *inputs)
    array = array.transpose(*range(len(outputs), array.ndim), *range(len(outputs)))
    return np.expand_dims(array, [axis for axis, i in enumerate(tensor.index) if isinstance(i, int)])


def _scaled(piece: np.ndarray, cut: tuple[slice, ...], scales: np.ndarray, tensor: HFTensor) -> BlockScaled:
    """Part of a released FP8 matrix with its part of the scales. Where a device's part begins within a block, the
    scales are repeated so that it begins a smaller one."""
    lead = piece.ndim - sum(axes for axes, _ in tensor.groups)
    groups, at = [], lead
    for n, (axes, block) in enumerate(tensor.groups):
        if block > 1:
            axis = min(n, 1)
            inner = int(np.prod([1, *piece.shape[at + 1 : at + axes]]))
            start, size = cut[at].start * inner, int(np.prod(piece.shape[at : at + axes]))
            block = int(np.gcd(BLOCK, start))
            scales = np.repeat(scales, BLOCK // block, axis=axis)
            part = slice(start // block, -(-(start + size) // block))
            scales = scales[part] if axis == 0 else scales[:, part]
        groups.append((axes, block))
        at += axes
    between = (1,) * (len(groups) - 2)
    return BlockScaled(piece, scales.reshape(*(1,) * lead, scales.shape[0], *between, scales.shape[1]), tuple(groups))
