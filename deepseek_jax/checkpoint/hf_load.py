"""Load a released model's folder: config.json and safetensors, streamed tensor by tensor to where the weights live.

Worker threads read a tensor from its mapped file, turn it to our layout and send it to the device, where it is put into
its place of the stacked parameter (``hf_leaves``). Every tensor of the files is used or named.
"""

import collections
import concurrent.futures
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from deepseek_jax.checkpoint.hf_check import check_tensors, find_mtp
from deepseek_jax.checkpoint.hf_leaves import Kept, Leaves
from deepseek_jax.checkpoint.hf_names import HFTensor, LeafPath
from deepseek_jax.checkpoint.integers import KEPT_INTEGERS, Integers, packed_names
from deepseek_jax.checkpoint.reading import nest
from deepseek_jax.checkpoint.safetensors import TensorFiles, TensorInfo
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.parallel.legal import check_layout
from deepseek_jax.parallel.sharding import named_sharding
from deepseek_kernels.block_fp8 import BLOCK, FP8, BlockScaled

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
        leaves = Leaves(config, tensors, np.dtype(of_rest), kept, integers, place)
        _stream(files, tensors, leaves)
        arrays = leaves.finish()
    router_bias = arrays.pop(("router_bias",), None)
    return config, nest(arrays), router_bias


def integers_of(path: str | Path, param_dtype: str) -> Integers | None:
    """What a released folder's matrices are in, or are to become. ValueError where they are in others."""
    wanted, found = Integers.named(param_dtype), Integers.of_folder(path)
    if found and (param_dtype == KEPT_FP8 or (wanted and wanted.bits != found.bits)):
        raise ValueError(f"param_dtype={param_dtype!r}: the matrices of {path} are in int{found.bits}")
    return found or wanted


def _kept(
    tensors: Sequence[HFTensor], files: TensorFiles, keep_fp8: bool, integers: Integers | None, param_dtype: str
) -> dict[LeafPath, Kept]:
    kept: dict[LeafPath, Kept] = {}
    for tensor in tensors:
        if keep_fp8 and tensor.quantised:
            kept[tensor.path] = Kept(np.dtype(FP8), np.dtype(np.float32), tensor.groups)
        elif integers is not None and (
            integers.names(tensor)[0] in files.tensors or (param_dtype in KEPT_INTEGERS and integers.takes(tensor))
        ):
            kept[tensor.path] = Kept(integers.dtype, np.dtype(jnp.bfloat16), integers.groups(tensor))
    return kept


def dtype_name(dtype: Any) -> str:
    """One of DTYPES; ValueError for another."""
    name = KEPT_FP8 if dtype in (KEPT_FP8, FP8) else dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r}: must be one of {', '.join(DTYPES)}")
    return name


def _stream(files: TensorFiles, tensors: Sequence[HFTensor], leaves: Leaves) -> None:
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


def _send(files: TensorFiles, tensor: HFTensor, leaves: Leaves) -> list[_Sent]:
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


def _parts(files: TensorFiles, tensor: HFTensor, leaves: Leaves, scaled: bool) -> Iterator[_Sent]:
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
