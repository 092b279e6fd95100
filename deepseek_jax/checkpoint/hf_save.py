"""Write a model as released ones are: safetensors with an index, config.json, and the tokenizer's files beside.

All goes into a folder that gets its name, or its files their places, when it is whole: see ``publishing``.
"""

import concurrent.futures
import functools
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.checkpoint.hf_leaves import from_bits, to_bits
from deepseek_jax.checkpoint.hf_load import KEPT, KEPT_FP8, dtype_name
from deepseek_jax.checkpoint.hf_names import HFTensor, flatten, hf_tensors, mtp_copies
from deepseek_jax.checkpoint.integers import Integers
from deepseek_jax.checkpoint.model import Model
from deepseek_jax.checkpoint.publishing import filling, publish
from deepseek_jax.checkpoint.safetensors_writing import Planned, planned_bytes, write_folder
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.model_folder import TextFiles
from deepseek_jax.model import transformer
from deepseek_kernels.block_fp8 import FP8, BlockScaled, quantise
from deepseek_kernels.integers import GROUP, bits_of, pack, quantise_groups

logger = logging.getLogger(__name__)
QUANTISED = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
_AHEAD = 4  # tensors made ready before they are written
_TILE = 128


def save_hf(
    model: Model | transformer.Transformer,
    path: str | Path,
    *,
    dtype: Any = "bfloat16",
    group: int = GROUP,
    max_shard_bytes: int = 5 * 10**9,
    tokenizer_from: str | Path | None = None,
) -> None:
    """Write a folder that transformers, vLLM and ``load`` read, a ``Model``'s tokenizer and template with it.

    Args:
      dtype: "bfloat16", "float32" or "float8_e4m3": matrices in FP8 with scales for blocks of 128 × 128 and the rest in
        bfloat16, as V3 is released; "int8" or "int4", with a scale for each ``group`` terms of an output, as
        compressed-tensors has them (integers.py). What was loaded in one of these is written number for number. The
        routing bias is float32.
      group: even; of a width that is no multiple the last group is shorter, which is read here, not by others.
      max_shard_bytes: of one file; a larger tensor has one to itself.
      tokenizer_from: a folder whose files about text are written in place of the model's own. A ``Transformer``'s own
        are those of the folder that it was loaded from, if any.

    Raises FileExistsError where ``path`` is taken, OSError where the disk is too small, in one sentence; neither leaves
    anything behind. ValueError for arguments, and for a model that lies on several hosts.
    """
    if isinstance(model, transformer.Transformer):
        tokenizer_from, model = tokenizer_from or model.source, Model.of(model)
    text = None if tokenizer_from is None else TextFiles.read(Path(tokenizer_from))
    write_model(model, Path(path), dtype, group=group, text=text, max_shard_bytes=max_shard_bytes)


def write_model(
    model: Model,
    path: Path,
    dtype: Any,
    *,
    group: int = GROUP,
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
    released = model.config.to_hf() | {"torch_dtype": "bfloat16" if name in KEPT else name}
    layout = _Layout(model.config, name, group)
    if name in KEPT:
        released["quantization_config"] = QUANTISED if layout.integers is None else layout.integers.content()
    writer = _Writer(layout, model.params, model.router_bias)
    total = sum(map(planned_bytes, writer.layout.plan))
    stored = name if layout.integers is None else f"{name} {group}"
    task = f"{resume_as} {stored} {max_shard_bytes}" if resume_as else None
    with filling(path, total, task) as partial:
        on_start(total)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            write_folder(
                partial,
                writer.layout.plan,
                writer.ahead(pool),
                max_shard_bytes=max_shard_bytes,
                on_tensor=on_tensor,
                resume=resume_as is not None,
            )
        if text is not None:
            text.write(partial)
            released |= (text.with_padding() if model.config.num_labels else text).ids
            _check_padding(released, model.config)
        (partial / "config.json").write_text(json.dumps(released, indent=2) + "\n", encoding="utf-8")
        publish(partial, path)


def _check_padding(released: dict[str, Any], config: ModelConfig) -> None:
    pad, eos = released.get("pad_token_id"), released.get("eos_token_id")
    if config.num_labels and pad is not None and pad in (eos if isinstance(eos, list) else [eos]):
        logger.warning(
            "pad_token_id=%d ends a sentence too: transformers' classifier scores the token before an answer's end, "
            "and not the end itself as here; name another token to pad with in the folder's config.json",
            pad,
        )


def released_bytes(config: ModelConfig, dtype: Any, group: int = GROUP) -> int:
    """What the weights of a released folder take."""
    return sum(map(planned_bytes, _Layout(config, dtype_name(dtype), group).plan))


class _Layout:
    """The tensors of a released folder, those that repeat others and the scales of FP8 ones and integers."""

    def __init__(self, config: ModelConfig, dtype: str, group: int = GROUP):
        self.dtype, self.integers = dtype, Integers.named(dtype, group)
        self.tensors = hf_tensors(config)
        self.copies: dict[str, list[str]] = {}
        for copy, original in mtp_copies(config).items() if config.num_nextn_predict_layers else ():
            self.copies.setdefault(original, []).append(copy)
        self.plan = [planned for tensor in self.tensors for planned in self.planned(tensor)]

    def dtypes(self, tensor: HFTensor) -> tuple[np.dtype, np.dtype | None]:
        """Of the tensor and of its scales, if any, in the file."""
        if tensor.path == ("router_bias",) or self.dtype == "float32":
            return np.dtype(np.float32), None
        if self.dtype == KEPT_FP8 and tensor.quantised:
            return np.dtype(FP8), np.dtype(np.float32)
        if self.integers is not None and self.integers.takes(tensor):
            return self.integers.dtype, np.dtype(jnp.bfloat16)
        return np.dtype(jnp.bfloat16), None

    def planned(self, tensor: HFTensor) -> Iterator[Planned]:
        dtype, scales = self.dtypes(tensor)
        if self.integers is not None and scales is not None:
            kinds = np.dtype(np.int32), scales, np.dtype(np.int64)
            for name, kind, shape in zip(self.integers.names(tensor), kinds, self.integers.shapes(tensor), strict=True):
                yield Planned(name, kind, shape)
            return
        for name in (tensor.name, *self.copies.get(tensor.name, ())):
            yield Planned(name, dtype, tensor.shape)
        if scales is not None:
            yield Planned(tensor.scale_name, scales, tensor.scale_shape)


class _Writer:
    """Each tensor of a layout when its turn comes."""

    def __init__(self, layout: _Layout, params: dict[str, Any], router_bias: jax.Array | None):
        self.leaves: dict[tuple[str, ...], Any] = dict(flatten(params)) | {("router_bias",): router_bias}
        for path, leaf in self.leaves.items():
            if not all(array.is_fully_addressable for array in jax.tree.leaves(leaf)):
                raise ValueError(f"{'.'.join(path)} lies on several hosts; one process cannot write it")
        self.layout = layout

    def ahead(self, pool: concurrent.futures.Executor) -> Callable[[str], np.ndarray]:
        """A function that gives the tensors in the plan's order, some left out, while threads make the next ones."""
        names = [[planned.name for planned in self.layout.planned(tensor)] for tensor in self.layout.tensors]
        owner = {name: i for i, group in enumerate(names) for name in group}
        jobs: dict[int, concurrent.futures.Future] = {}
        ready: dict[str, np.ndarray] = {}

        def produce(name: str) -> np.ndarray:
            if name not in ready:
                first = owner[name]
                for i in range(first, min(first + _AHEAD, len(names))):
                    if i not in jobs:
                        jobs[i] = pool.submit(self._make, self.layout.tensors[i])
                arrays = jobs.pop(first).result()
                ready.clear()
                copies = len(names[first]) - len(arrays)
                ready.update(zip(names[first], [arrays[0]] * (copies + 1) + arrays[1:], strict=True))
            return ready.pop(name)

        return produce

    def _make(self, tensor: HFTensor) -> list[np.ndarray]:
        """A tensor, and its scales if it has any, as they stand in the file."""
        starts = np.array([i if isinstance(i, int) else 0 for i in tensor.index], np.int32)
        dtype, scales = self.layout.dtypes(tensor)
        integers = self.layout.integers
        pieces = _take(
            self.leaves[tensor.path],
            starts,
            index=tuple(isinstance(i, int) for i in tensor.index),
            inputs=tensor.inputs,
            dtype=dtype,
            group=0 if integers is None else integers.group,
        )
        if integers is not None and scales is not None:
            numbers, scale = (
                _released(np.asarray(piece), shape, tensor.inputs)
                for piece, shape in zip(pieces, (tensor.shape, integers.shapes(tensor)[1]), strict=True)
            )
            return [pack(numbers, integers.bits), scale, np.array(tensor.shape, np.int64)]
        shapes = [tensor.shape] if scales is None else [tensor.shape, tensor.scale_shape]
        return [_released(np.asarray(piece), shape, tensor.inputs) for piece, shape in zip(pieces, shapes, strict=True)]


@functools.partial(jax.jit, static_argnames=("index", "inputs", "dtype", "group"))
def _take(
    leaf: Any, starts: Any, *, index: tuple[bool, ...], inputs: int, dtype: np.dtype, group: int
) -> list[jax.Array]:
    """One tensor out of its leaf, in our layout and of ``dtype``; with FP8 and integers its scales too."""
    bits = bits_of(dtype)

    def cut(array: jax.Array) -> jax.Array:
        sizes = [1 if picked else size for picked, size in zip(index, array.shape, strict=True)]
        return from_bits(jax.lax.dynamic_slice(to_bits(array), list(starts), sizes), array.dtype)

    def cut_scales(scaled: BlockScaled) -> jax.Array:
        at = scaled.values.ndim - sum(axes for axes, _ in scaled.groups)
        firsts = list(starts[:at])
        for axes, _ in scaled.groups:  # a picked axis lies alone between the others
            firsts.append(starts[at])
            at += axes
        lead = scaled.scales.ndim - len(scaled.groups)
        between = [1] * (len(scaled.groups) - 2)
        sizes = [1] * lead + [scaled.scales.shape[lead], *between, scaled.scales.shape[-1]]
        return jax.lax.dynamic_slice(scaled.scales, firsts, sizes)

    if isinstance(leaf, BlockScaled):
        leaf = leaf.with_terms_last(False)
        piece = BlockScaled(cut(leaf.values), cut_scales(leaf), leaf.groups)
        if piece.dtype == dtype and (not bits or leaf.groups[0][1] == group):
            return [piece.values, piece.scales]
        piece = piece.astype(jnp.float32 if bits or dtype == FP8 else dtype)
    else:
        piece = cut(leaf)
    if dtype != FP8 and not bits:
        return [piece.astype(dtype)]
    sizes = [size for picked, size in zip(index, piece.shape, strict=True) if not picked]
    matrix = piece.reshape(math.prod(sizes[:inputs]), -1)
    return list(quantise_groups(matrix, bits, group) if bits else quantise(matrix))


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
