"""Write safetensors files and folders; one tensor is in memory at a time."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.checkpoint.safetensors import (
    DTYPES,
    INDEX,
    MAX_HEADER,
    METADATA,
    SINGLE,
    DamagedFileError,
    read_header,
)

_FORMAT: Mapping[str, str] = {"format": "pt"}  # transformers refuses a file without it
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Planned:
    """A tensor that is to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]


def write_folder(
    folder: Path,
    plan: Sequence[Planned],
    produce: Callable[[str], np.ndarray],
    *,
    max_shard_bytes: int = 5 * 10**9,
    metadata: Mapping[str, str] = _FORMAT,
    on_tensor: Callable[[int], None] | None = None,
    resume: bool = False,
) -> None:
    """Write a model's tensors into ``folder``: `model.safetensors`, or shards and their index.

    ``produce(name)`` is called once for each tensor, in the plan's order, and its array is dropped before the next.
    A shard ends before the tensor that would take it beyond ``max_shard_bytes`` of data. Within a shard wide dtypes
    come first, so that every tensor is aligned: torch cannot read others. Each file gets its header last and is
    fsynced; one that was not finished has a header of length 0 and is refused. on_tensor: called with each tensor's
    size in bytes once it is written. resume: shards that an earlier call with this plan and these arrays finished are
    kept, others written anew.

    Raises:
        ValueError: a name twice or reserved, a dtype the format lacks, max_shard_bytes < 1.
        FileExistsError: ``folder`` holds weights already.
    """
    folder = Path(folder)
    _check_plan(plan, max_shard_bytes)
    shards: list[list[Planned]] = [[]]
    filled = 0
    for tensor in plan:
        if shards[-1] and filled + planned_bytes(tensor) > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += planned_bytes(tensor)

    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if resume:
        (folder / INDEX).unlink(missing_ok=True)
    for present in (SINGLE, INDEX):  # either would make two models of the folder
        if (folder / present).exists() and not resume:
            raise FileExistsError(f"{folder} holds {present} already")
    for name, shard in zip(names, shards, strict=True):
        if resume and _finished(folder / name, shard):
            if on_tensor is not None:
                for tensor in shard:
                    on_tensor(planned_bytes(tensor))
            continue
        if resume:
            (folder / name).unlink(missing_ok=True)
        _write_file(folder / name, shard, produce, metadata, on_tensor)
    if count > 1:
        index = {
            "metadata": {"total_size": sum(map(planned_bytes, plan))},
            "weight_map": {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
        }
        with open(folder / INDEX, "x", encoding="utf-8") as stream:
            json.dump(index, stream, indent=2, sort_keys=True)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
    _sync_folder(folder)


def _check_plan(plan: Sequence[Planned], max_shard_bytes: int) -> None:
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
    seen: set[str] = set()
    for tensor in plan:
        if tensor.name == METADATA or tensor.name in seen:
            raise ValueError(f"tensor name {tensor.name!r} is reserved or planned twice")
        if np.dtype(tensor.dtype) not in _NAMES:
            raise ValueError(f"tensor {tensor.name!r}: safetensors has no dtype {tensor.dtype}")
        seen.add(tensor.name)


def planned_bytes(tensor: Planned) -> int:
    """What the tensor takes in the file."""
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def _finished(file: Path, shard: Sequence[Planned]) -> bool:
    """Whether a file holds just these tensors; one that was being written has no header."""
    try:
        found, _ = read_header(file)
    except (FileNotFoundError, DamagedFileError):
        return False
    wanted = {tensor.name: (np.dtype(tensor.dtype), tensor.shape) for tensor in shard}
    return {name: (info.dtype, info.shape) for name, info in found.items()} == wanted


def _write_file(
    file: Path,
    shard: Sequence[Planned],
    produce: Callable[[str], np.ndarray],
    metadata: Mapping[str, str],
    on_tensor: Callable[[int], None] | None,
) -> None:
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    places: dict[str, int] = {}
    end = 0
    for tensor in sorted(shard, key=lambda tensor: -np.dtype(tensor.dtype).itemsize):
        start, end = end, end + planned_bytes(tensor)
        places[tensor.name] = start
        header[tensor.name] = {
            "dtype": _NAMES[np.dtype(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER:
        raise ValueError(f"max_shard_bytes: {len(shard)} tensors in one file need a header of {len(raw)} bytes")

    with open(file, "xb", buffering=0) as stream:
        for tensor in shard:
            array = produce(tensor.name)
            assert array.shape == tensor.shape and array.dtype == tensor.dtype, (
                f"{tensor.name}: planned {tensor.dtype}{tensor.shape}, got {array.dtype}{array.shape}"
            )
            stream.seek(8 + len(raw) + places[tensor.name])
            _write_all(stream, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            del array
            if on_tensor is not None:
                on_tensor(planned_bytes(tensor))
        stream.seek(0)
        _write_all(stream, memoryview(len(raw).to_bytes(8, "little") + raw))
        os.fsync(stream.fileno())


def _write_all(stream: Any, left: memoryview) -> None:
    while left:  # one write moves at most 2 GiB
        left = left[stream.write(left) :]


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # which does not open folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
