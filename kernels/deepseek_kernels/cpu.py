"""Builds ``cpu.c`` for this processor and registers its functions with XLA.

XLA's own products of many small matrices reach a third of what one core can do; the C ones most of it. gcc (or ``CC``)
compiles them at their first use, once per machine and version, into the user's cache folder. Flags in ``CC`` come after
ours: ``CC="gcc -mno-avx512f"`` makes what a processor without AVX-512 gets.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp

from deepseek_kernels.cache import cache_folder

SOURCE = Path(__file__).with_name("cpu.c")
HEADERS = sorted(SOURCE.parent.glob("cpu_*.h"))
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC")
TARGETS = (
    "grouped_forward",
    "grouped_dx",
    "grouped_dw",
    "experts_forward",
    "experts_backward",
    "integers_forward",
    "attention_forward",
    "attention_backward",
    "few_along",
    "few_across",
    "paged",
)


@functools.cache
def available() -> bool:
    """Whether this host can build the C kernels, for programs that are for its CPU; if not, one warning says why."""
    try:
        if platform.system() != "Linux":
            raise OSError(f"{platform.system()} is not Linux")
        library = ctypes.CDLL(str(_built()))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        warnings.warn(f"XLA's slower CPU kernels are used: {SOURCE.name} cannot be built here ({said})", stacklevel=2)
        return False
    for target in TARGETS:
        handler = jax.ffi.pycapsule(getattr(library, f"deepseek_{target}"))
        jax.ffi.register_ffi_target(f"deepseek_{target}", handler, platform="cpu")
    return True


def registered() -> str:
    """What a program that was traced by another process needs of this one: its C functions, known to XLA -> the name of
    their build, by which programs differ; "" where there is none."""
    return _built().name if available() else ""


def lanes() -> int:
    """Floats in a vector of what was compiled: 16 with AVX-512, 8 with AVX2, else 4."""
    return ctypes.c_int.in_dll(ctypes.CDLL(str(_built())), "deepseek_lanes").value


def tiles() -> bool:
    """Whether products of few rows with bfloat16 weights are AMX's: compiled in, and permitted by Linux."""
    return bool(ctypes.CDLL(str(_built())).deepseek_tiles())


def call(target: str, shapes: list[tuple[int, ...]], *operands: jax.typing.ArrayLike) -> list[jax.Array]:
    """Call one of ``TARGETS``; float32 results of these shapes."""
    assert target in TARGETS and available()
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return [*jax.ffi.ffi_call(f"deepseek_{target}", results)(*operands)]


def _built() -> Path:
    """The shared library for this source, compiler and processor; made anew where there is none."""
    include = jax.ffi.include_dir()
    compiler = shlex.split(os.environ.get("CC", "gcc"))
    flags = next((i for i, word in enumerate(compiler) if word.startswith("-")), len(compiler))
    command = [*compiler[:flags], *FLAGS, *compiler[flags:]]
    about = Path("/proc/cpuinfo").read_text().splitlines()
    processor = {line for line in about if line.startswith(("flags", "Features"))}
    header = (Path(include) / "xla" / "ffi" / "api" / "c_api.h").read_bytes()
    sources = [file.read_bytes() for file in (SOURCE, *HEADERS)]
    identity = [*sources, header, repr((command, platform.machine(), sorted(processor))).encode()]
    cache = cache_folder()
    library = cache / f"cpu-{hashlib.sha256(b''.join(identity)).hexdigest()[:16]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / library.name
            command += [f"-I{include}", "-o", str(made), str(SOURCE), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(made, library)
    return library
