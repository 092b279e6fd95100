"""Rows on disk (ArrayRecord) and the loaders that give them as batches.

A dataset is a folder with `rows.array_record` and `meta.json`. It appears under its name only when whole.
"""

import contextlib
import fnmatch
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from deepseek_jax.data import hub
from deepseek_jax.data.files import PathLike, describe, find_files, hash_file, try_lock
from deepseek_jax.data.loader import BatchLoader, LoaderOptions
from deepseek_jax.data.packing import Row, segment_positions
from deepseek_jax.data.text import Record, read_rows
from deepseek_jax.saying import say

FORMAT = 1
_ROWS = "rows.array_record"
_META = "meta.json"
SOURCES = "sources"
ABSENT = "(absent)"
_REQUIRED = ("vocab_size", "tokenizer_fingerprint")
# What a record holds, field after field. Positions follow from the segments.
_FIELDS = (("tokens", np.dtype("<u4")), ("segment_ids", np.dtype("<u2")), ("loss_mask", np.dtype("u1")))


def write_rows(path_dir: str | os.PathLike[str], rows: Iterable[Row], *, meta: dict[str, Any]) -> dict[str, Any]:
    """Writes a dataset into the new folder `path_dir` and returns the content of its meta.json.

    `meta` must hold `vocab_size` and `tokenizer_fingerprint`; what else it holds is kept. Added are `format`,
    `seq_len`, `count`, `bytes` and `fingerprint` (sha256 over all records). The work is done in
    `<path_dir>.partial`, renamed at the end: a killed writer leaves nothing that looks whole, and the
    next one starts afresh. ValueError for a folder that exists or that another process writes, for no rows, and for a
    row that breaks the batch format; OSError that names the folder for a disk that is full, known only at the end.
    """
    final = Path(path_dir)
    missing = [key for key in _REQUIRED if key not in meta]
    if missing:
        raise ValueError(f"meta lacks {', '.join(missing)}")
    if final.exists():
        raise ValueError(f"{final}: exists already; remove it or write to another folder")
    partial = final.with_name(final.name + ".partial")
    with _sole_writer(partial):
        try:
            written = meta | {"format": FORMAT} | _write_records(partial / _ROWS, rows, meta["vocab_size"])
            with open(partial / _META, "w", encoding="utf-8") as file:
                json.dump(written, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.rename(partial, final)
        except OSError as error:
            if error.filename is not None or error.errno is None:
                raise
            raise OSError(error.errno, f"{error.strerror}: the rows could not be written", str(final)) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # nothing is there after the rename
    return written


@contextlib.contextmanager
def _sole_writer(folder: Path) -> Iterator[None]:
    """The folder, new or emptied, for one process; ValueError where another has it. A killed one holds nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        if not try_lock(handle, folder) or not folder.exists() or not os.path.samestat(os.fstat(handle), folder.stat()):
            raise BlockingIOError  # the other is at it, or has just finished
        for left in folder.iterdir():
            left.unlink()
        yield
    except BlockingIOError as error:
        raise ValueError(
            f"{folder}: another process is packing rows there; wait for it, or choose another run_dir"
        ) from error
    finally:
        os.close(handle)


def _write_records(path: Path, rows: Iterable[Row], vocab_size: int) -> dict[str, Any]:
    digest = hashlib.sha256()
    count = seq_len = 0
    writer = ArrayRecordWriter(str(path), "group_size:1")  # one record a chunk: random access reads no neighbours
    try:
        for row in rows:
            seq_len = seq_len or len(row["tokens"])
            record = _encode_row(row, count, seq_len, vocab_size)
            digest.update(record)
            writer.write(record)
            count += 1
    finally:
        _close(writer, path.parent)
    if count == 0:
        raise ValueError(f"{path.parent.with_suffix('')}: there are no rows to write")
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {
        "seq_len": seq_len,
        "count": count,
        "bytes": path.stat().st_size,
        "fingerprint": digest.hexdigest(),
    }


def _close(writer: ArrayRecordWriter, folder: Path) -> None:
    """Closes the file: the writer works in the background and says only now that a write has failed."""
    try:
        writer.close()
    except RuntimeError as error:
        raise OSError(f"{folder}: the rows could not be written, nothing of them is kept ({error})") from error


def _encode_row(row: Row, index: int, seq_len: int, vocab_size: int) -> bytes:
    """The record of one row; refuses whatever would not come back the same."""
    lengths = {name: len(row[name]) for name in ("tokens", "segment_ids", "positions", "loss_mask")}
    if set(lengths.values()) != {seq_len}:
        raise ValueError(f"row {index} has lengths {lengths}; all must be {seq_len}")
    if row["tokens"].min() < 0 or row["tokens"].max() >= vocab_size:
        raise ValueError(f"row {index} has token {row['tokens'].max()}; ids must lie in [0, vocab_size={vocab_size})")
    record = b"".join(row[name].astype(dtype).tobytes() for name, dtype in _FIELDS)
    back = _decode_row(record, seq_len)
    wrong = [name for name in lengths if not np.array_equal(row[name], back[name])]
    if wrong:
        raise ValueError(
            f"row {index} breaks the batch format in {', '.join(wrong)}: segments count from 0 to 65535, "
            "positions restart at 0 in each, the loss mask is 0 or 1"
        )
    return record


def _decode_row(record: bytes, seq_len: int) -> Row:
    row: Row = {}
    offset = 0
    for name, dtype in _FIELDS:
        target = np.float32 if name == "loss_mask" else np.int32
        row[name] = np.frombuffer(record, dtype, count=seq_len, offset=offset).astype(target)
        offset += seq_len * dtype.itemsize
    assert offset == len(record)
    return row | {"positions": segment_positions(row["segment_ids"])}


class RowSource:
    """A dataset as a random-access source for grain: `source[i]` is row i; `source.meta` its meta.json."""

    def __init__(self, path: Path, meta: dict[str, Any]):
        self.meta = meta
        self._records = grain.sources.ArrayRecordDataSource(str(path))

    def __len__(self) -> int:
        return self.meta["count"]

    def __getitem__(self, index: int) -> Row:
        return _decode_row(self._records[index], self.meta["seq_len"])

    def __repr__(self) -> str:
        return f"RowSource({self.meta['count']} rows, fingerprint {self.meta['fingerprint'][:12]})"


def open_rows(path_dir: str | os.PathLike[str]) -> RowSource:
    """Opens what `write_rows` wrote; ValueError when it is missing, not whole or of another format."""
    folder = Path(path_dir)
    if not (folder / _META).is_file() or not (folder / _ROWS).is_file():
        raise ValueError(f"{folder}: no dataset here; {_ROWS} and {_META} are needed")
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        if not isinstance(meta, dict):
            raise ValueError(f"a {type(meta).__name__} where an object was written")
    except ValueError as error:
        raise ValueError(f"{folder / _META}: is damaged ({error}); remove {folder}, and it is packed anew") from error
    if meta.get("format") != FORMAT:
        raise ValueError(f"{folder / _META}: format {meta.get('format')!r}; this version reads format {FORMAT}")
    size = (folder / _ROWS).stat().st_size
    if size != meta["bytes"]:
        raise ValueError(f"{folder / _ROWS}: has {size} bytes where {meta['bytes']} were written; copy it anew")
    return RowSource(folder / _ROWS, meta)


def check_rows(path_dir: str | os.PathLike[str], made_of: Mapping[str, Any], paths: Iterable[PathLike] = ()) -> None:
    """ValueError naming what of ``made_of`` is not what the rows' meta.json says; what that lacks is taken to fit, but
    for a file of ``sources``. A file of those that is missing now is named too, unless the one of ``paths`` that it was
    found by is gone as a whole: packed rows outlive their source, which is said. Of the same files in the same order it
    does not matter where they lie."""
    meta = open_rows(path_dir).meta
    if (files := _files(made_of)) is not None and files == _files(meta):
        made_of = {name: value for name, value in made_of.items() if name not in (SOURCES, "sha256")}
        made_of["data"] = {name: value for name, value in made_of.get("data", {}).items() if name != "path"}
    differ = []
    for name, here in made_of.items():
        there = meta.get(name, here)
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            absent = {field: ABSENT if name == SOURCES else now for field, now in here.items()}
            fields = {f"{name}.{field}": (there.get(field, absent[field]), now) for field, now in here.items()}
        else:
            fields = {name: (there, here)}
        if name == SOURCES:
            missing = there.keys() - here.keys() - _outlived(paths, there, here)
            fields |= {f"{name}.{file}": (there[file], ABSENT) for file in sorted(missing)}
        differ += [f"{field} is {was!r} there and {now!r} here" for field, (was, now) in fields.items() if was != now]
    if differ:
        raise ValueError(
            f"{path_dir} was packed from other data or settings: {'; '.join(differ)}; choose another run_dir, "
            f"or remove {path_dir} where there is no checkpoint yet"
        )


def _files(made_of: Mapping[str, Any]) -> tuple[list[str], list[int]] | None:
    """The files that rows are made of, by content, and which of the paths that name them are the same; None where there
    is no file any more."""
    paths = [str(path) for path in made_of.get("data", {}).get("path", ())]
    contents = [*made_of.get("sha256", {}).values()]
    return (contents, [paths.index(path) for path in paths]) if contents else None


def _outlived(paths: Iterable[PathLike], there: Mapping[str, Any], here: Mapping[str, Any]) -> set[str]:
    """The files of those ``paths`` that have none of theirs any more."""
    outlived = set[str]()
    for given in paths:
        path = Path(os.path.expanduser(given))
        of_it = {name for name in there if path in (Path(name), *Path(name).parents)}
        of_it = of_it or set(fnmatch.filter(there, str(path).replace("**/", "*")))
        if of_it and not of_it & here.keys():
            say(f"{path}: is not to be had now; the rows that were packed from it are trained on")
            outlived |= of_it
    return outlived


def sources_of(paths: Iterable[PathLike], kinds: tuple[str, ...], memory: Path | None = None) -> dict[str, Any]:
    """What rows are made of, for ``check_rows``: a file that has been edited since is another. Those that are gone are
    left out, datasets of the hub that are not to be had too."""
    found: dict[str, dict[str, int | str]] = {}
    for path in paths:
        with contextlib.suppress(OSError, *([ValueError] if hub.is_hub(os.fspath(path)) else [])):
            found |= describe(find_files(path, kinds), memory)
    return {
        SOURCES: {name: about["bytes"] for name, about in found.items()},
        "sha256": {name: str(about["sha256"])[:16] for name, about in found.items()},
    }


class RowLoader(BatchLoader[Row]):
    """Batches (B/P S) of the rows in `path_dir`, in the batch format; `meta` is the dataset's."""

    def __init__(self, path_dir: str | os.PathLike[str], **options: Unpack[LoaderOptions]):
        source = open_rows(path_dir)
        self.meta = source.meta
        super().__init__(source, fingerprint=source.meta["fingerprint"], batch_fn=None, **options)


class PromptLoader(BatchLoader[list[Record]]):
    """Lists of B/P rows of JSONL or Parquet files, which are held in memory as `rows`: questions are few and short.

    keep: leaves out the rows that it is False for; `dropped` counts them. The fingerprint is that of the files' bytes,
    in their order, and of which rows are left.
    """

    def __init__(
        self,
        paths: PathLike | Sequence[PathLike],
        *,
        keep: Callable[[Record], bool] = lambda row: True,
        **options: Unpack[LoaderOptions],
    ):
        digests = [hash_file(path) for path in find_files(paths)]
        # One file's digest stands for itself: runs that were saved with it go on.
        joined = digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(d.digest() for d in digests))
        rows = list(read_rows(paths))
        if not rows:
            raise ValueError(f"{', '.join(map(str, find_files(paths)))}: no rows to ask")
        kept = [index for index, row in enumerate(rows) if keep(row)]
        self.rows, self.dropped = [rows[index] for index in kept], len(rows) - len(kept)
        if self.dropped:
            joined.update(json.dumps(kept).encode())
        super().__init__(self.rows, fingerprint=joined.hexdigest(), batch_fn=list, **options)
