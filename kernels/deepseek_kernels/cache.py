"""Where what was built once is kept for later: the user's cache folder, or a temporary one."""

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

NAME = "deepseek-jax"


def cache_folder() -> Path:
    """`user_folder`; where that cannot be had, a folder of this process alone, which goes with it: in one that others
    may write to, what is loaded could be theirs."""
    return user_folder() or _temporary()


def user_folder() -> Path | None:
    """``$XDG_CACHE_HOME/deepseek-jax``, else ``~/.cache/deepseek-jax``; None where that cannot be had."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / NAME
        folder.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, OSError):  # a user without a home directory, or one that is not theirs
        return None
    return folder if os.access(folder, os.W_OK) else None


@functools.cache
def _temporary() -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"{NAME}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
