"""A folder that appears whole: filled under another name, then given its own.

An empty folder that exists already, which may be a mount point or what a link points to, is filled from within:
``config.json``, without which it is no model, comes last.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepseek_jax.checkpoint.faults import no_room

PARTIAL = ".partial"
_TASK = "task"  # the file in it that names what it is to become
_NOT_OURS = ("lost+found", PARTIAL)  # what an empty folder may hold


def check_place(path: Path, total: int = 0) -> None:
    """Whether a folder of ``total`` bytes can come to be at ``path``: for who has long work to do first.

    FileExistsError where it holds anything, NotADirectoryError where it lies in a file, OSError where the disk is too
    small, in one sentence.
    """
    place, partial = _places(path)
    held = place if place.exists() else next(parent for parent in place.parents if parent.exists())
    if not held.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(held))
    present = sum(file.stat().st_size for file in partial.rglob("*")) if partial.exists() else 0
    if shutil.disk_usage(held).free + present < total:
        raise _too_small(errno.ENOSPC, total, held)


@contextmanager
def filling(path: Path, total: int, task: str | None = None) -> Iterator[Path]:
    """A folder to be filled with ``total`` bytes and then published; see ``check_place``.

    What a killed process left there is removed, unless it was working at the same ``task``; then it goes on. An error
    removes it where there is no task. Want of room always does.
    """
    check_place(path, total)
    place, partial = _places(path)
    mark = partial / _TASK
    same = task is not None and mark.is_file() and mark.read_text(encoding="utf-8") == task
    if partial.parent == place and (moved := _held(place)):  # killed while it was published
        if not same:
            raise _taken(path)
        for file in moved:
            os.replace(file, partial / file.name)
    if partial.exists() and not same:
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
            raise _too_small(number, total, partial.parent) from error
        raise


def publish(partial: Path, path: Path) -> None:
    """Give a finished folder its name."""
    place, _ = _places(path)
    if partial.parent != place:
        os.rename(partial, place)
        (place / _TASK).unlink(missing_ok=True)  # last: a kill in between would have it all done again
        return
    for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
        if file.name != _TASK:
            os.replace(file, place / file.name)
    shutil.rmtree(partial)


def _places(path: Path) -> tuple[Path, Path]:
    """(Where ``path`` leads, the folder to fill); FileExistsError where something is there."""
    place = path.resolve()
    if not place.exists():
        return place, place.with_name(place.name + PARTIAL)
    partial = place / PARTIAL
    if not place.is_dir() or (_held(place) and not (partial / _TASK).is_file()):
        raise _taken(path)
    return place, partial


def _held(place: Path) -> list[Path]:
    return [file for file in place.iterdir() if file.name not in _NOT_OURS]


def _taken(path: Path) -> FileExistsError:
    return FileExistsError(f"{path} exists already; choose another name or remove it")


def _too_small(number: int, total: int, place: Path) -> OSError:
    return OSError(number, f"{os.strerror(number)}: the model's {total:,} bytes do not fit in {place}")
