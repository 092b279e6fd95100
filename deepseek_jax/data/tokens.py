"""Tokens on disk: a corpus is tokenized once per tokenizer, by processes beside this one, and not once per run.

A corpus is a folder of shards named by the hash of all that its tokens depend on. Shards are written one by one, each
whole or not there, so that a killed run goes on where it was. Memory holds a shard per process, and four bytes a
document.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.data import hub
from deepseek_jax.data.files import ROWS, TEXTS, PathLike, describe, find_files, try_lock
from deepseek_jax.data.text import LONGEST_TEXT, read_documents
from deepseek_jax.data.token_writers import TokenWriters
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.files import write_json
from deepseek_jax.saying import say

FORMAT = 1
SHARD_BYTES = 8 * 2**20  # of text
MOST_WORKERS = 6
_META = "meta.json"


class Tokens:
    """The ids of a corpus' documents: `len`, and arrays by index, read from disk one by one.

    skipped: broken lines that were left out, by file.
    """

    def __init__(self, folder: Path, files: Sequence[Path]):
        """ValueError where a shard is missing or not whole."""
        self.folder = folder
        self.meta: dict[str, Any] = _read_meta(folder)
        self._dtype = np.dtype(self.meta["dtype"])
        self._shards = [_shard(folder, number) for number in range(self.meta["shards"])]
        self._ends = [_ends(path, self._dtype) for path in self._shards]
        self.skipped = {str(file): n for file, n in zip(files, self.meta["skipped"], strict=True) if n}
        self._first = [0, *accumulate(len(ends) for ends in self._ends)]

    def __len__(self) -> int:
        return self._first[-1]

    @property
    def count(self) -> int:
        """Ids of all documents together."""
        return sum(int(ends[-1]) for ends in self._ends if len(ends))

    def __getitem__(self, index: int) -> np.ndarray:
        shard = bisect_right(self._first, index) - 1
        at, ends = index - self._first[shard], self._ends[shard]
        begin, end = int(ends[at - 1]) if at else 0, int(ends[at])
        file = os.open(self._shards[shard], os.O_RDONLY)  # a mapping's pages would count as memory of this process
        try:
            read = os.pread(file, (end - begin) * self._dtype.itemsize, begin * self._dtype.itemsize)
        finally:
            os.close(file)
        return np.frombuffer(read, self._dtype).astype(np.int32)


def tokenize(
    paths: PathLike | Iterable[PathLike],
    tokenizer: Tokenizer,
    cache: Path,
    *,
    text_field: str = "text",
    skip_broken: bool = False,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tokens:
    """The tokens of the documents that `read_documents` reads, in its order, from `cache` or made there.

    Shards that an earlier call has finished are kept. Of several processes that want the same corpus one works, the
    others say so and wait for it. workers: processes; 0 for one per core, at most six. progress: called with bytes read
    and their total. ValueError and OSError as of `read_documents`, an OSError that names the file where one cannot be
    written, and a ValueError that names a file that changes meanwhile.
    """
    files = find_files(paths, (*TEXTS, *ROWS))
    states = {file: _state(file) for file in files}
    sources = describe(files, cache / "hashes")
    _check_unchanged(states)
    made_of = {
        "format": FORMAT,
        "shard": [SHARD_BYTES, LONGEST_TEXT],
        "tokenizer": tokenizer.fingerprint,
        "text_field": text_field,
        "skip_broken": skip_broken,
        # By content and kind, not by name: a corpus that has moved is the same.
        "sources": [["".join(file.suffixes[-2:]), *sources[str(file)].values()] for file in files],
    }
    folder = cache / hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]
    with _sole_writer(folder):
        if not (folder / _META).exists():
            for left in folder.glob("*.tokens.*"):  # by a machine that went down
                left.unlink()
            skipped, read = Counter[str](), Counter[str]()
            total = sum(int(source["bytes"]) for source in sources.values())
            documents = read_documents(
                files, text_field=text_field, skip_broken=skip_broken, skipped=skipped, read=read
            )
            dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
            workers = 0 if total <= SHARD_BYTES else workers or min(_cores(), MOST_WORKERS)
            typecode = "H" if dtype.itemsize == 2 else "I"
            with _of_unchanged(states, folder), TokenWriters(tokenizer, typecode, workers) as writers:
                shards = 0
                for shards, group in enumerate(_groups(documents), start=1):
                    if not (path := _shard(folder, shards - 1)).exists():
                        writers.write(group, path)
                    progress(sum(read.values()), total)
            meta = made_of | {"shards": shards, "dtype": dtype.str, "skipped": [skipped[str(file)] for file in files]}
            write_json(folder / _META, meta, indent=None)
    return Tokens(folder, files)


def _state(file: Path) -> tuple[int, int] | None:
    """Size and time of a file; None of a dataset of the hub."""
    if hub.is_hub(str(file)):
        return None
    about = file.stat()
    return about.st_size, about.st_mtime_ns


def _check_unchanged(states: Mapping[Path, tuple[int, int] | None]) -> None:
    for file, state in states.items():
        if state is not None and not (file.is_file() and _state(file) == state):
            raise ValueError(f"{file}: was changed or taken away while it was read; start again when it is whole")


@contextlib.contextmanager
def _of_unchanged(states: Mapping[Path, tuple[int, int] | None], folder: Path) -> Iterator[None]:
    """Removes the shards of files that have changed meanwhile, as they are not of what the folder's name says."""
    try:
        yield
    finally:
        try:
            _check_unchanged(states)
        except ValueError:
            for shard in folder.glob("*.tokens"):
                shard.unlink()
            raise


def _groups(documents: Iterable[str]) -> Iterator[list[bytes]]:
    group, size = [], 0
    for document in documents:
        group.append(document.encode("utf-8"))
        size += len(group[-1])
        if size >= SHARD_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


@contextlib.contextmanager
def _sole_writer(folder: Path) -> Iterator[None]:
    """One process at a time, the others wait; a killed one holds nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        if not try_lock(handle, folder):
            say(f"another process is tokenising this corpus in {folder}; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.tokens"


def _ends(path: Path, dtype: np.dtype) -> np.ndarray:
    """Where in a shard each document's ids end (uint32)."""
    damaged = f"{path}: is missing or not whole; remove its folder, and it is made anew"
    if not path.is_file() or (size := path.stat().st_size) < 8:
        raise ValueError(damaged)
    with open(path, "rb") as file:
        file.seek(size - 8)
        documents = int(np.frombuffer(file.read(8), "<u8")[0])
        if not 0 <= documents <= size // 4:
            raise ValueError(damaged)
        file.seek(size - 8 - 4 * documents)
        ends = np.cumsum(np.frombuffer(file.read(4 * documents), "<u4"), dtype=np.uint32)
    if int(ends[-1]) * dtype.itemsize + 4 * documents + 8 != size:
        raise ValueError(damaged)
    return ends


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / _META).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / _META}: is damaged ({error}); remove its folder, and it is made anew") from error
