"""Which files a path names, how each is opened, and what it holds: the hash that other work is told apart by."""

import fcntl
import glob
import gzip
import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path

from deepseek_jax.data import hub

logger = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]

LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
ROWS = (*LINES, ".parquet")
TEXTS = (".txt", ".md")

_LARGE = 64 * 2**20  # hashing less takes no time that anybody notices
_SETTLED = 2.0  # seconds after which another write is sure to show in a file's times


def find_files(paths: PathLike | Iterable[PathLike], kinds: tuple[str, ...] = ROWS) -> list[Path]:
    """The files that are meant, in the order of `paths`: of a folder those of `kinds` in it and below, and what a glob
    matches (`**`: at any depth), each sorted by name. Hidden ones are passed over; `hf:...` stands for itself.

    FileNotFoundError where there is nothing, ValueError for a folder that has no file of these kinds.
    """
    found: list[Path] = []
    for given in [paths] if isinstance(paths, str | os.PathLike) else paths:
        name = os.path.expanduser(given)
        if not name:
            raise ValueError("an empty path: give none for no files, or . for this folder")
        if "://" in name:
            raise ValueError(f"{name}: files are local or mounted, or hf:NAME:SPLIT of the hub; no URL: copy it first")
        path = Path(name)
        if hub.is_hub(name) or path.is_file():
            found.append(path)
        elif path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.name.endswith(kinds) and file.is_file())
            inside = [file for file in inside if not any(p.startswith(".") for p in file.relative_to(path).parts)]
            if not inside:
                raise ValueError(f"{name}: this folder holds no file of the kinds {', '.join(kinds)}")
            found += inside
        else:
            matching = sorted(match for match in glob.glob(name, recursive=True) if os.path.isfile(match))
            if not matching:
                what = "file that matches" if glob.has_magic(name) else "such file or folder"
                raise FileNotFoundError(f"{name}: there is no {what}")
            found += map(Path, matching)
    return found


def open_file(path: Path) -> tuple[io.BufferedIOBase, io.BufferedReader]:
    """The content, decompressed where the name says so, and the file itself, whose position tells how much is read."""
    raw = open(path, "rb")  # noqa: SIM115  closing the content closes it, but for gzip
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw), raw
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), 2**16), raw
    return raw, raw


def describe(paths: Iterable[Path], memory: Path | None = None) -> dict[str, dict[str, int | str]]:
    """Size and SHA-256 of each of the files that are there, by name.

    memory: a folder where the hashes of large files are kept, to be taken again while size and times are the same.
    """
    found: dict[str, dict[str, int | str]] = {}
    for path in paths:
        if hub.is_hub(str(path)):
            found[str(path)] = hub.describe(str(path))
        elif path.is_file():
            found[str(path)] = {"bytes": path.stat().st_size, "sha256": _digest(path, memory)}
    return found


def _digest(path: Path, memory: Path | None) -> str:
    about = path.stat()
    if memory is None or about.st_size < _LARGE:
        return hash_file(path).hexdigest()
    now = [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]
    note = memory / (hashlib.sha256(str(path.absolute()).encode(errors="surrogateescape")).hexdigest()[:32] + ".json")
    if note.is_file():
        try:
            then, digest = json.loads(note.read_text(encoding="utf-8"))
            if then == now:
                return digest
        except ValueError:
            pass  # a damaged note is as good as none
    settled = time.time() - max(about.st_mtime, about.st_ctime) > _SETTLED
    digest = hash_file(path).hexdigest()
    if settled:
        memory.mkdir(parents=True, exist_ok=True)
        temporary = note.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps([now, digest]), encoding="utf-8")
        os.replace(temporary, note)
    return digest


def try_lock(handle: int, folder: Path) -> bool:
    """Whether the folder that is open as `handle` is this process's now; where locks do not work, that is warned of."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning("%s: locks do not work there (%s): see that no other process writes there", folder, error)
    return True


def hash_file(path: Path) -> "hashlib._Hash":
    """SHA-256 of a file's bytes; of a dataset of the hub, of its fingerprint."""
    if hub.is_hub(str(path)):
        return hashlib.sha256(str(hub.describe(str(path))["sha256"]).encode())
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256")
