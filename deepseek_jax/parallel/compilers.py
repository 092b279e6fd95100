"""Where the compilers for machines that are not here are looked for, besides the environment's packages.

Apart from them, since every other command would look for a TPU or a GPU and complain. jax looks once, when it is
imported: import this first.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIBTPU, CUDA = Path(sys.prefix) / "libtpu", Path(sys.prefix) / "cuda"


def add_compilers() -> None:
    """Put what is there behind the places that Python looks in; where jax is imported already, nothing."""
    if "jax" in sys.modules:
        return
    sys.path += [str(folder) for folder in (LIBTPU, CUDA) if folder.is_dir() and str(folder) not in sys.path]
    # libtpu asks no metadata server, leaves its lock to others, and keeps its warnings to itself.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_STDERR_LOG_LEVEL": "3"}
    os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    if flags := os.environ.pop("XLA_FLAGS", ""):
        print(
            f"XLA_FLAGS={flags}: left out, as libtpu ends the process at a flag that it does not know", file=sys.stderr
        )
    with silenced():
        importlib.import_module("jax")


def found(name: str) -> bool:
    """Whether a module, of a package perhaps, can be imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@contextmanager
def silenced() -> Iterator[None]:
    """Without what libraries in C++ write to standard error as they start: that there is no TPU, no driver."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
