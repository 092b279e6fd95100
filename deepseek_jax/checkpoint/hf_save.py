"""Write a model as released ones are: safetensors with an index, config.json, and the tokenizer's files beside.

All goes into ``<name>.partial``, which gets its own name when it is whole.
"""

import concurrent.futures
import errno
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.checkpoint.faults import no_room
from deepseek_jax.checkpoint.hf_load import KEPT_FP8, dtype_name, from_bits, to_bits
from deepseek_jax.checkpoint.hf_names import HFTensor, flatten, hf_tensors, mtp_copies
from deepseek_jax.checkpoint.model import Model
from deepseek_jax.checkpoint.safetensors_writing import Planned, planned_bytes, write_folder
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.model_folder import TextFiles
from deepseek_jax.model import transformer
from deepseek_kernels.block_fp8 import FP8, BlockScaled, quantise

PARTIAL = ".partial"
_TASK = "task"  # the file in it that names what it is to become
QUANTISED = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
_AHEAD = 4  # tensors made ready before they are written
_TILE = 128


def save_hf(
    model: Model | transformer.Transformer,
    path: str | Path,
    *,
    dtype: Any = "bfloat16",
    max_shard_bytes: int = 5 * 10**9,
    tokenizer_from: str | Path | None = None,
) -> None:
    """Write a folder that transformers, vLLM and ``load`` read, a ``Model``'s tokenizer and template with it.

    Args:
      dtype: "bfloat16", "float32" or "float8_e4m3": matrices in FP8 with scales for blocks of 128 × 128 and the rest in
        bfloat16, as V3 is released. What was loaded in FP8 is written byte for byte. The routing bias is float32.
      max_shard_bytes: of one file; a larger tensor has one to itself.
      tokenizer_from: a folder whose files about text are written in place of the model's own. A ``Transformer``'s own
        are those of the folder that it was loaded from, if any.

    Raises FileExistsError where ``path`` is taken, OSError where the disk is too small, in one sentence; neither leaves
    anything behind. ValueError for arguments, and for a model that lies on several hosts.
    """
    if isinstance(model, transformer.Transformer):
        tokenizer_from, model = tokenizer_from or model.source, Model.of(model)
    text = None if tokenizer_from is None else TextFiles.read(Path(tokenizer_from))
    write_model(model, Path(path), dtype, text=text, max_shard_bytes=max_shard_bytes)


def write_model(
    model: Model,
    path: Path,
    dtype: Any,
    *,
    text: TextFiles | None = None,
    max_shard_bytes: int = 5 * 10**9,
    resume_as: str | None = None,
    on_start: Callable[[int], None] = lambda total: None,
    on_tensor: Callable[[int], None] = lambda size: None,
) -> None:
    """``save_hf`` that reports: on_start gets the bytes to write, on_tensor those of each tensor.

    text: the files about it, by default those of the model's tokenizer. resume_as: names these very arrays; finished
    files that a killed call with the same name left are kept.
    """
    text = model.tokenizer.files if text is None and model.tokenizer is not None else text
    name = dtype_name(dtype)
    released = model.config.to_hf() | {"torch_dtype": "bfloat16" if name == KEPT_FP8 else name}
    if name == KEPT_FP8:
        released["quantization_config"] = QUANTISED
    writer = _Writer(model.config, model.params, model.router_bias, name)
    total = sum(map(planned_bytes, writer.plan))
    task = f"{resume_as} {name} {max_shard_bytes}" if resume_as else None
    with filling(path, total, task) as partial:
        on_start(total)
        present = sum(file.stat().st_size for file in partial.iterdir())
        if shutil.disk_usage(partial).free + present < total:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            write_folder(
                partial,
                writer.plan,
                writer.ahead(pool),
                max_shard_bytes=max_shard_bytes,
                on_tensor=on_tensor,
                resume=resume_as is not None,
            )
        if text is not None:
            text.write(partial)
            released |= text.ids
        (partial / "config.json").write_text(json.dumps(released, indent=2) + "\n", encoding="utf-8")
        publish(partial, path)


@contextmanager
def filling(path: Path, total: int, task: str | None = None) -> Iterator[Path]:
    """``<path>.partial``, to be filled with ``total`` bytes and published.

    What a killed process left there is removed, unless it was working at the same ``task``; then it goes on. An error
    removes it where there is no task. Want of room always does, and is said in one sentence. FileExistsError where
    ``path`` holds anything.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists already; choose another name or remove it")
    partial = path.absolute().with_name(path.absolute().name + PARTIAL)
    mark = partial / _TASK
    if partial.exists() and (task is None or not mark.is_file() or mark.read_text(encoding="utf-8") != task):
        shutil.rmtree(partial)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        if task is not None and not mark.exists():  # the mark of finished work is not opened for writing
            mark.write_text(task, encoding="utf-8")
        yield partial
    except BaseException as error:
        number = no_room(error)
        if task is None or number is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if number is not None:
            what = f"{os.strerror(number)}: the model's {total:,} bytes do not fit in {partial.parent}"
            raise OSError(number, what) from error
        raise


def publish(partial: Path, path: Path) -> None:
    """Give a finished folder its name."""
    os.rename(partial, path)  # an empty folder of that name gives way
    (path / _TASK).unlink(missing_ok=True)  # last: a kill in between would have it all done again


class _Writer:
    """What is to be written, and each tensor of it when its turn comes."""

    def __init__(self, config: ModelConfig, params: dict[str, Any], router_bias: jax.Array | None, dtype: str):
        self.leaves: dict[tuple[str, ...], Any] = dict(flatten(params)) | {("router_bias",): router_bias}
        for path, leaf in self.leaves.items():
            if not all(array.is_fully_addressable for array in jax.tree.leaves(leaf)):
                raise ValueError(f"{'.'.join(path)} lies on several hosts; one process cannot write it")
        self.dtype = dtype
        self.tensors = hf_tensors(config)
        self.copies: dict[str, list[str]] = {}
        for copy, original in mtp_copies(config).items() if config.num_nextn_predict_layers else ():
            self.copies.setdefault(original, []).append(copy)
        self.plan = [planned for tensor in self.tensors for planned in self._planned(tensor)]

    def _dtypes(self, tensor: HFTensor) -> tuple[np.dtype, np.dtype | None]:
        """Of the tensor and of its scales, if any, in the file."""
        if tensor.path == ("router_bias",) or self.dtype == "float32":
            return np.dtype(np.float32), None
        if self.dtype == KEPT_FP8 and tensor.quantised:
            return np.dtype(FP8), np.dtype(np.float32)
        return np.dtype(jnp.bfloat16), None

    def _planned(self, tensor: HFTensor) -> Iterator[Planned]:
        dtype, scales = self._dtypes(tensor)
        for name in (tensor.name, *self.copies.get(tensor.name, ())):
            yield Planned(name, dtype, tensor.shape)
        if scales is not None:
            yield Planned(tensor.scale_name, scales, tensor.scale_shape)

    def ahead(self, pool: concurrent.futures.Executor) -> Callable[[str], np.ndarray]:
        """A function that gives the tensors in the plan's order, some left out, while threads make the next ones."""
        names = [[planned.name for planned in self._planned(tensor)] for tensor in self.tensors]
        owner = {name: i for i, group in enumerate(names) for name in group}
        jobs: dict[int, concurrent.futures.Future] = {}
        ready: dict[str, np.ndarray] = {}

        def produce(name: str) -> np.ndarray:
            if name not in ready:
                first = owner[name]
                for i in range(first, min(first + _AHEAD, len(names))):
                    if i not in jobs:
                        jobs[i] = pool.submit(self._make, self.tensors[i])
                arrays = jobs.pop(first).result()
                ready.clear()
                copies = len(names[first]) - len(arrays)
                ready.update(zip(names[first], [arrays[0]] * (copies + 1) + arrays[1:], strict=True))
            return ready.pop(name)

        return produce

    def _make(self, tensor: HFTensor) -> list[np.ndarray]:
        """A tensor, and its scales if it has any, as they stand in the file."""
        starts = np.array([i if isinstance(i, int) else 0 for i in tensor.index], np.int32)
        dtype, scales = self._dtypes(tensor)
        pieces = _take(
            self.leaves[tensor.path],
            starts,
            index=tuple(isinstance(i, int) for i in tensor.index),
            inputs=tensor.inputs,
            dtype=dtype,
        )
        shapes = [tensor.shape] if scales is None else [tensor.shape, tensor.scale_shape]
        return [_released(np.asarray(piece), shape, tensor.inputs) for piece, shape in zip(pieces, shapes, strict=True)]


@functools.partial(jax.jit, static_argnames=("index", "inputs", "dtype"))
def _take(leaf: Any, starts: Any, *, index: tuple[bool, ...], inputs: int, dtype: np.dtype) -> list[jax.Array]:
    """One tensor out of its leaf, in our layout and of ``dtype``; with dtype FP8 its scales too."""

    def cut(array: jax.Array) -> jax.Array:
        sizes = [1 if picked else size for picked, size in zip(index, array.shape, strict=True)]
        return from_bits(jax.lax.dynamic_slice(to_bits(array), list(starts), sizes), array.dtype)

    def cut_scales(scaled: BlockScaled) -> jax.Array:
        at = scaled.values.ndim - sum(axes for axes, _ in scaled.groups)
        firsts = list(starts[:at])
        for axes, _ in scaled.groups:
            firsts.append(starts[at])
            at += axes
        lead = scaled.scales.ndim - len(scaled.groups)
        between = [1] * (len(scaled.groups) - 2)
        sizes = [1] * lead + [scaled.scales.shape[lead], *between, scaled.scales.shape[-1]]
        return jax.lax.dynamic_slice(scaled.scales, firsts, sizes)

    if isinstance(leaf, BlockScaled):
        piece = BlockScaled(cut(leaf.values), cut_scales(leaf), leaf.groups)
        return [piece.values, piece.scales] if dtype == FP8 else [piece.astype(dtype)]
    piece = cut(leaf)
    if dtype != FP8:
        return [piece.astype(dtype)]
    sizes = [size for picked, size in zip(index, piece.shape, strict=True) if not picked]
    return list(quantise(piece.reshape(math.prod(sizes[:inputs]), -1)))


def _released(piece: np.ndarray, shape: tuple[int, ...], inputs: int) -> np.ndarray:
    """From our (in, out) to the file's (out, in)."""
    return transpose(piece.reshape(shape[::-1])) if inputs else piece.reshape(shape)


def transpose(matrix: np.ndarray) -> np.ndarray:
    """A contiguous transpose, tile by tile and as whole numbers: numpy's own is several times slower."""
    bits = matrix.view(f"u{matrix.dtype.itemsize}")
    turned = np.empty(bits.shape[::-1], bits.dtype)
    for i in range(0, bits.shape[0], _TILE):
        for j in range(0, bits.shape[1], _TILE):
            turned[j : j + _TILE, i : i + _TILE] = bits[i : i + _TILE, j : j + _TILE].T
    return turned.view(matrix.dtype)
