"""One process at a time writes in a run's folder."""

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

LOCK = "lock.json"

_held: set[Path] = set()  # by this process, which the system would let in again


@contextmanager
def run_lock(run_dir: str | Path) -> Iterator[None]:
    """Hold the folder, which is made, for this process; what was made and is empty at the end goes again.

    It is a POSIX record lock: the system frees it however the process ends, and children, which may live longer, have
    no part in it. Of the processes of one run the first alone takes it.

    Raises:
        ValueError: another process holds it; says which, where, and since when. Nothing was touched.
    """
    folder = Path(run_dir)
    path = folder.resolve() / LOCK
    if path in _held:
        raise ValueError(f"{folder}: this process trains there already")
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    if (taken := next((place for place in (folder, *folder.parents) if place.is_file()), None)) is not None:
        raise ValueError(f"run_dir={str(run_dir)!r}: {taken} is a file; a run takes a folder")
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _take(path, folder)
    _held.add(path)
    try:
        _sign(descriptor, path)
        yield
    finally:
        _held.discard(path)
        path.unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # it holds something: a run
            for place in made:
                place.rmdir()


def is_held(run_dir: str | Path) -> bool:
    """Whether a process works in the folder now; where locks do not work, whether one has begun to."""
    path = Path(run_dir).resolve() / LOCK
    if path in _held:  # closing another descriptor of the file would free it
        return True
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _take(path: Path, folder: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 4096)
            if isinstance(error, BlockingIOError | PermissionError):  # EAGAIN or EACCES: as POSIX has it
                os.close(descriptor)
                raise ValueError(f"{folder}: {_who(holder)}; wait for it, or choose another run_dir") from error
            logger.warning("%s: locks do not work there (%s): see that no other process trains in it", folder, error)
            return descriptor
        if _is_there(path, descriptor):
            return descriptor
        os.close(descriptor)  # its holder has just ended and removed it


def _sign(descriptor: int, path: Path) -> None:
    about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(about).encode() + b"\n")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _is_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _who(holder: bytes) -> str:
    try:
        about = json.loads(holder)
        return f"process {about['pid']} on {about['host']} has trained there since {about['since']}"
    except (ValueError, KeyError, TypeError):  # it has not written that yet
        return "another process has just begun to train there"
