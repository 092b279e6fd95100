"""Read safetensors files, trusting nothing that a file says about itself.

A file is: the header's length (8 bytes, little endian), the header (JSON: name -> dtype, shape and the data's place),
the data. The tensors must fill the data without gap or overlap. A model is one ``model.safetensors`` or several shards
with ``model.safetensors.index.json``, which says which tensor lies in which shard.

Reading maps the files, so nothing is copied before it is used.
"""

import dataclasses
import json
import math
import mmap
import os
import reprlib
import stat
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # the format's own limit
_SPELLER = reprlib.Repr()
_SPELLER.maxstring = _SPELLER.maxother = 120  # a shard's or tensor's name whole, a lie of megabytes not
_brief = _SPELLER.repr
METADATA = "__metadata__"
_MAX_RANK = 64  # numpy's

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
}


class DamagedFileError(ValueError):
    """A safetensors file or index that is cut short, contradicts itself or is not one at all."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: bytes ``start`` to ``end`` of ``file``, counted from the file's first byte."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of one file in the order of their data, and its metadata.

    Raises:
        DamagedFileError: anything in the file that the format does not allow. It names the file and the tensor.
        OSError: the file cannot be opened or read.
    """
    file = Path(file)
    if not stat.S_ISREG(os.stat(file).st_mode):  # opening a pipe would wait for ever
        raise DamagedFileError(f"{file}: not a regular file")
    with open(file, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise DamagedFileError(f"{file}: {size} bytes are too few for a safetensors file")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER or length > size - 8:
            raise DamagedFileError(
                f"{file}: claims a header of {length} bytes; the file has {size} bytes and the limit is {MAX_HEADER}"
            )
        raw = stream.read(length)
    if len(raw) < length:
        raise DamagedFileError(f"{file}: header cut short, {len(raw)} of {length} bytes")
    if not raw.startswith(b"{"):
        raise DamagedFileError(f"{file}: the header is not a JSON object")
    entries = _parse(file, raw, parse_int=_natural, parse_float=_refuse_number)

    metadata = entries.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DamagedFileError(f"{file}: {METADATA} must map strings to strings, got {_brief(metadata)}")
    data = 8 + length
    tensors = [_tensor(file, name, entry, data) for name, entry in entries.items()]
    tensors.sort(key=lambda info: (info.start, info.end))
    position = data
    for info in tensors:
        if info.start != position:
            what = "overlaps the one before" if info.start < position else "leaves a gap before it"
            raise DamagedFileError(
                f"{file}: tensor {_brief(info.name)} {what}: it starts at byte {info.start}, not {position}"
            )
        position = info.end
    if position != size:
        what = "cut short" if position > size else "bytes behind the last tensor"
        raise DamagedFileError(f"{file}: {what}: its tensors end at byte {position}, the file at {size}")
    return {info.name: info for info in tensors}, metadata


class TensorFiles:
    """The tensors of a model: a folder with one file or with an index and shards, or a single file.

    All headers are read and checked here, against each other and the index; data is touched by ``array`` alone.

    Raises:
        DamagedFileError: as `read_header`; also an index that names a file outside the folder or one that is missing,
            and any tensor that index and shards do not agree on.
        FileNotFoundError: nothing of that name, or a folder without safetensors.
    """

    path: Path
    tensors: dict[str, TensorInfo]  # by file, then in the order of the data

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        self.tensors = _read_folder(path) if path.is_dir() else read_header(path)[0]
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()
        self._closed = False

    def array(self, name: str) -> np.ndarray:
        """The tensor as a read-only view into its file. It stays valid after `close`; do not cut the file short
        meanwhile, the operating system kills a process that reads what is gone.

        Raises:
            KeyError: no tensor has this name.
            DamagedFileError: the file has become shorter since its header was read.
        """
        info = self.tensors[name]
        with self._lock:
            if self._closed:
                raise ValueError(f"TensorFiles is closed, cannot read {name!r}")
            mapped = self._maps.get(info.file)
            if mapped is None:
                with open(info.file, "rb") as stream:
                    if os.fstat(stream.fileno()).st_size < info.end:
                        raise DamagedFileError(f"{info.file}: became shorter while it was in use")
                    mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
                self._maps[info.file] = mapped
        if len(mapped) < info.end:
            raise DamagedFileError(f"{info.file}: became shorter while it was in use")
        return np.ndarray(info.shape, info.dtype, buffer=mapped, offset=info.start)

    def forget(self, name: str) -> None:
        """Give the tensor's pages back: it will not be read again. (If it is, it comes from the file as before.)"""
        info = self.tensors[name]
        start = -(-info.start // mmap.PAGESIZE) * mmap.PAGESIZE
        end = info.end // mmap.PAGESIZE * mmap.PAGESIZE
        with self._lock:
            mapped = self._maps.get(info.file)
            if mapped is not None and start < end and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED, start, end - start)

    def close(self) -> None:
        """Let go of the files. One whose arrays are still about is unmapped with the last of them."""
        with self._lock:
            self._closed = True
            self._maps.clear()

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _parse(file: Path, raw: bytes, **numbers: Any) -> dict[str, Any]:
    """The JSON object in ``raw``. No key twice, no NaN, nothing that is not Unicode."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            name, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise ValueError(f"the key {_brief(name)} occurs twice")
        for key, value in pairs:
            key.encode()  # JSON can spell half a surrogate pair, which no file name or terminal takes
            if isinstance(value, str):
                value.encode()
        return values

    try:
        parsed = json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=_refuse_number, **numbers)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise DamagedFileError(f"{file}: not a JSON object")
    return parsed


def _natural(digits: str) -> int:
    if digits.startswith("-") or len(digits) > 19 or int(digits) > sys.maxsize:
        _refuse_number(digits)
    return int(digits)


def _refuse_number(spelling: str) -> NoReturn:
    raise ValueError(f"no size or offset can be {spelling[:30]}")


def _tensor(file: Path, name: str, entry: Any, data: int) -> TensorInfo:
    """One entry of a header, checked by itself. data: where the file's data begins."""

    def refuse(what: str) -> NoReturn:
        raise DamagedFileError(f"{file}: tensor {_brief(name)}: {what}")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        refuse(f"needs exactly dtype, shape and data_offsets, got {_brief(entry)}")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        refuse(f"unknown dtype {_brief(dtype_name)}")
    if not _naturals(shape) or len(shape) > _MAX_RANK:
        refuse(f"shape must be a list of at most {_MAX_RANK} sizes, got {_brief(shape)}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        refuse(f"data_offsets must be [start, end], got {_brief(offsets)}")
    start, end = offsets
    # numpy multiplies the sizes that are not 0 even where one is.
    if math.prod(size for size in shape if size) * dtype.itemsize > sys.maxsize:
        refuse(f"shape {_brief(shape)} is too large")
    needed = math.prod(shape) * dtype.itemsize
    if end - start != needed:
        refuse(f"{dtype_name} of shape {_brief(shape)} takes {needed} bytes, data_offsets give it {end - start}")
    return TensorInfo(name, dtype, tuple(shape), file, data + start, data + end)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)  # the parser let no negative through


def _read_folder(folder: Path) -> dict[str, TensorInfo]:
    single, index = folder / SINGLE, folder / INDEX
    if not index.exists():
        if not single.exists():
            raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}")
        return read_header(single)[0]
    weight_map = _read_index(index)
    files = sorted(set(weight_map.values()))
    if single.exists() and files != [SINGLE]:
        raise DamagedFileError(f"{folder} has both {SINGLE} and an index of other files; remove one of them")

    tensors: dict[str, TensorInfo] = {}
    for file in files:
        try:
            header, _ = read_header(folder / file)
        except OSError as error:
            reason = error.strerror or error
            raise DamagedFileError(f"{index}: cannot read the shard {_brief(file)}: {reason}") from error
        for name in header:
            listed = weight_map.get(name)
            if listed != file:
                where = "does not list it" if listed is None else f"says {_brief(listed)}"
                raise DamagedFileError(f"{folder / file}: holds tensor {_brief(name)}, but the index {where}")
        tensors.update(header)
    for name, file in weight_map.items():
        if name not in tensors:
            raise DamagedFileError(f"{folder / file}: lacks tensor {_brief(name)}, which the index lists there")
    return tensors


def _read_index(index: Path) -> dict[str, str]:
    """The index's weight_map: tensor -> shard, each a plain file name. (`metadata.total_size` is often wrong.)"""
    size = os.stat(index).st_size
    if size > MAX_HEADER:
        raise DamagedFileError(f"{index}: {size} bytes are more than {MAX_HEADER}")
    weight_map = _parse(index, index.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict):
        raise DamagedFileError(f"{index}: weight_map must be an object, got {_brief(weight_map)}")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file not in ("", ".", "..") and not set(file) & set("/\\:\0")
        if not plain:
            raise DamagedFileError(
                f"{index}: weight_map[{_brief(name)}] must be the name of a file in this folder, got {_brief(file)}"
            )
    return weight_map
