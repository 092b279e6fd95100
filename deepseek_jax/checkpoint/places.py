"""Where checkpoints lie: a folder, or one of a bucket of Google Cloud Storage, which Orbax writes to by itself.

`RUN/checkpoints` is either the folder or a small file that names another place; `resolved` follows it. A bucket has no
folders to rename, so there a checkpoint counts once Orbax has put `commit_success.txt` into it.
"""

import contextlib
import importlib.util
import tempfile
from glob import has_magic
from pathlib import Path

from etils import epath

Folder = Path | epath.Path

_BUCKET = "gs://"
_COMMITTED = "commit_success.txt"


def resolved(directory: str | Folder) -> Folder:
    """The folder that is meant, absolute: of a file that names one, that one."""
    text = str(directory)
    if not text.startswith(_BUCKET) and (path := Path(directory)).is_file():
        text = path.read_text(encoding="utf-8").strip()
    return epath.Path(text) if text.startswith(_BUCKET) else Path(text).absolute()


def point_to(checkpoints: Path, place: str) -> None:
    """Make ``RUN/checkpoints`` name another place. ValueError where the run has some already, elsewhere."""
    if checkpoints.is_file() and checkpoints.read_text(encoding="utf-8").strip() == place:
        return
    if committed_steps(before := resolved(checkpoints)):
        raise ValueError(
            f"loop.checkpoints={place!r}: {before} holds checkpoints of this run. To go on from them, copy them there "
            f"and move {checkpoints} away"
        )
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        checkpoints.rmdir()
    checkpoints.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=checkpoints.parent, delete=False) as file:  # several processes at once
        file.write(place + "\n")
    Path(file.name).chmod(0o644)
    Path(file.name).replace(checkpoints)


def check_directory(place: str | Folder) -> None:
    """ValueError for a place where no checkpoint can be written."""
    text = str(place)
    if text.startswith(_BUCKET):
        if importlib.util.find_spec("gcsfs") is None:
            raise ValueError(f"checkpoints on {place} need the package gcsfs: pip install gcsfs")
        if has_magic(text) or len(text.removeprefix(_BUCKET).strip("/").split("/")) < 2:
            raise ValueError(f"checkpoints on {place}: expected gs://BUCKET/FOLDER, without any of [ * ?")
    elif "://" in text:
        raise ValueError(
            f"checkpoints go to a local or mounted folder or to gs://BUCKET/FOLDER, not to {place}. Orbax takes it for "
            "a path here: once a checkpoint is committed, its folder RUN/checkpoints/STEP can be copied there (for "
            "s3://: aws s3 sync), and back to go on from it"
        )
    elif has_magic(absolute := str(Path(text).absolute())):
        raise ValueError(f"checkpoints cannot be written to a path with any of [ * ? in it, as {absolute} is")


def committed_steps(directory: Folder) -> list[int]:
    """The committed steps in a folder of checkpoints, oldest first; others carry another name or lack the mark."""
    if isinstance(directory, Path):
        names = [entry.name for entry in directory.iterdir()] if directory.is_dir() else []
    else:
        system, root = _listing(directory)
        names = [found.split("/")[-2] for found in system.glob(f"{root}/*/{_COMMITTED}")]
    return sorted(int(name) for name in names if name.isdecimal())


def sizes(folder: Folder) -> dict[str, int]:
    """Bytes of every file in and below a folder, by its path there."""
    if isinstance(folder, Path):
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}
    system, root = _listing(folder)
    return {name.removeprefix(f"{root}/"): each["size"] for name, each in system.find(root, detail=True).items()}


def put_aside(checkpoint: Folder, name: str) -> None:
    """Have a checkpoint count no more: renamed, or on a bucket without its mark, so that Orbax clears it away."""
    if isinstance(checkpoint, Path):
        checkpoint.rename(checkpoint.with_name(name))
    else:
        (checkpoint / _COMMITTED).unlink()


def _listing(folder: epath.Path):
    """fsspec's view of a bucket, as it is now: what tensorstore writes, its memory knows nothing of."""
    import fsspec

    system, root = fsspec.core.url_to_fs(str(folder))
    system.invalidate_cache()
    return system, root
