"""A released model's folder to a checkpoint of our own, piece by piece, so that what was killed goes on where it was.

Orbax commits a save whole or not at all. So the arrays are written beside it, in the layout that Orbax has without
OCDBT: a leaf is the zarr array ``state/<path joined by dots>``, a file for each chunk. A piece is a chunk. tensorstore
writes one under another name, syncs and renames it: a chunk's file is there if and only if the piece is finished.
Orbax then writes all but the arrays, and the inventory comes last.

Relied on, as of orbax-checkpoint 0.12 and tensorstore 0.1.86: that layout, which readers know by "use_ocdbt" in
``_METADATA``; a ``TypeHandler`` may leave the arrays to others; the file driver renames what it has written.
"""

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from deepseek_jax.checkpoint.faults import silence_repeats, without_warnings
from deepseek_jax.checkpoint.hf_load import Released
from deepseek_jax.checkpoint.hf_names import ALL, HFTensor, LeafPath, leaf_shapes
from deepseek_jax.checkpoint.reading import FORMAT_VERSION, describe_arrays, nest
from deepseek_jax.checkpoint.store import write_inventory

PIECE_BYTES = 2**28  # at most, but for a leaf that has no axis of layers or experts to cut
LAYOUT = f"{FORMAT_VERSION} {PIECE_BYTES}"  # what else must be the same for pieces to fit together
_UNFINISHED = ".__lock"  # how tensorstore's file driver names what it has not renamed yet


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A chunk of a leaf: where it lies in the grid of chunks, and what fills it, indices counting from its start."""

    at: tuple[int, ...]
    tensors: list[HFTensor]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A leaf cut into pieces of one shape."""

    path: LeafPath
    leaf: jax.ShapeDtypeStruct
    chunk: tuple[int, ...]
    pieces: list[_Piece]


def state_of(released: Released) -> dict[LeafPath, jax.ShapeDtypeStruct]:
    """The leaves of the checkpoint's state, by their path in the model."""
    shapes = leaf_shapes(released.config)
    return {path: jax.ShapeDtypeStruct(shape, released.leaf_dtype(path)) for path, shape in shapes.items()}


def size_of(released: Released) -> int:
    """Bytes of the arrays of the checkpoint; compressed they take less."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in state_of(released).values())


def write_checkpoint(
    released: Released,
    folder: Path,
    *,
    meta: Mapping[str, Any],
    on_start: Callable[[int], None] = lambda total: None,
    on_tensor: Callable[[int], None] = lambda size: None,
) -> None:
    """Write the folder of one checkpoint, such as ``CheckpointStore.save`` makes of the loaded model.

    Pieces that an earlier call for the same files left in ``folder`` are kept. The folder is whole once this returns;
    until then it belongs under a name that nobody reads. Two pieces are in memory: one read, one written.

    Args:
        on_start: gets the bytes to be read in all; on_tensor: those of each tensor read, and of what is there already.

    Raises:
        OSError, ValueError: whatever the disk refuses, see ``faults.no_room``.
    """
    silence_repeats()
    state = folder / "state"
    for torn in state.rglob(f"*{_UNFINISHED}"):
        torn.unlink()
    leaves = state_of(released)
    plans = [_plan(path, leaf, released.tensors) for path, leaf in leaves.items()]
    on_start(released.size(released.tensors))
    todo = [dataclasses.replace(plan, pieces=[*_missing(state, plan)]) for plan in plans]
    on_tensor(released.size(released.tensors) - sum(released.size(p.tensors) for plan in todo for p in plan.pieces))
    writing = None
    for plan in todo:
        for piece in plan.pieces:
            array = released.read(piece.tensors, {plan.path: plan.chunk}, on_tensor=on_tensor)[plan.path]
            if writing is not None:
                writing.result()
            writing = _write(state, plan, piece, np.asarray(array))
    if writing is not None:
        writing.result()
    named = {_name(path): leaf for path, leaf in leaves.items()}
    _write_rest(folder, named, {**meta, "format": FORMAT_VERSION})
    write_inventory(folder, describe_arrays(named))


def _name(path: LeafPath) -> LeafPath:
    """A leaf's path in the state."""
    return path if path == ("router_bias",) else ("params", *path)


def _plan(path: LeafPath, leaf: jax.ShapeDtypeStruct, tensors: Sequence[HFTensor]) -> _Plan:
    """Cut the axes that tell one tensor from another, layers before experts, as far as PIECE_BYTES asks for."""
    own = [tensor for tensor in tensors if tensor.path == path]
    chunk = list(leaf.shape)
    for axis in range(min(tensor.index.index(ALL) for tensor in own)):
        rest = math.prod(chunk[:axis]) * math.prod(chunk[axis + 1 :]) * leaf.dtype.itemsize
        fits = [n for n in range(1, chunk[axis] + 1) if chunk[axis] % n == 0 and n * rest <= PIECE_BYTES]
        chunk[axis] = max(fits, default=1)
        if fits:
            break
    pieces: dict[tuple[int, ...], list[HFTensor]] = {}
    for tensor in own:
        pairs = [*zip(tensor.index, chunk, strict=True)]
        at = tuple(i // n if isinstance(i, int) else 0 for i, n in pairs)
        inside = tuple(i % n if isinstance(i, int) else i for i, n in pairs)
        pieces.setdefault(at, []).append(dataclasses.replace(tensor, index=inside))
    return _Plan(path, leaf, tuple(chunk), [_Piece(at, filling) for at, filling in pieces.items()])


def _place(state: Path, path: LeafPath) -> Path:
    return state / ".".join(_name(path))


def _missing(state: Path, plan: _Plan) -> Iterator[_Piece]:
    for piece in plan.pieces:
        if not (_place(state, plan.path) / ".".join(map(str, piece.at))).exists():
            yield piece


def _write(state: Path, plan: _Plan, piece: _Piece, array: np.ndarray) -> ts.WriteFutures:
    """Begin to write one piece, in Orbax's own terms: zstd, zeros too."""
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{_place(state, plan.path)}{os.sep}"},
        "metadata": {
            "shape": plan.leaf.shape,
            "chunks": plan.chunk,
            "compressor": {"id": "zstd", "level": 1},
            "dimension_separator": ".",
        },
        "store_data_equal_to_fill_value": True,
    }
    store = ts.open(spec, dtype=array.dtype, open=True, create=True).result()
    part = tuple(slice(i * n, (i + 1) * n) for i, n in zip(piece.at, plan.chunk, strict=True))
    return store[part].write(array, can_reference_source_data_indefinitely=True)


class _Elsewhere(ocp.type_handlers.TypeHandler):
    """Saves a ShapeDtypeStruct as an array that somebody else writes."""

    def typestr(self) -> str:
        return "np.ndarray"  # which Orbax restores without being told a sharding, or to the one it is told

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
        return []

    async def deserialize(self, infos: Any, args: Any = None) -> Any:
        raise AssertionError("used for saving alone")

    async def metadata(self, infos: Any) -> Any:
        raise AssertionError("used for saving alone")


def _write_rest(folder: Path, leaves: Mapping[LeafPath, jax.ShapeDtypeStruct], meta: Mapping[str, Any]) -> None:
    """All of a checkpoint but its arrays and the inventory: saved by Orbax elsewhere, moved to its place."""
    types = ocp.type_handlers.create_type_handler_registry((jax.ShapeDtypeStruct, _Elsewhere()))
    items = ocp.args.Composite(
        state=ocp.args.PyTreeSave(nest(leaves)), loader=ocp.args.JsonSave({}), meta=ocp.args.JsonSave(dict(meta))
    )
    aside = folder.with_name(f"{folder.name}.rest")
    with without_warnings():
        handler = ocp.CompositeCheckpointHandler(
            state=ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=types),
            loader=ocp.JsonCheckpointHandler(),
            meta=ocp.JsonCheckpointHandler(),
        )
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(aside, args=items, force=True)
    for file in [file for file in aside.rglob("*") if file.is_file()]:
        target = folder / file.relative_to(aside)
        target.parent.mkdir(exist_ok=True)
        file.replace(target)
    shutil.rmtree(aside)
