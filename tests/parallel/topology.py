"""Python for TPUs that are not here, in a process apart: libtpu is none of this one's packages."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from deepseek_kernels import compile_tpu

needs_libtpu = pytest.mark.skipif(not compile_tpu.available(), reason="libtpu is not installed")

_ROOT = Path(__file__).parents[2]
_OWN = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "0",
}


def run_apart(program: str, *, limit: float = 240) -> str:
    """What the program prints; it can ask ``topologies.get_topology_desc`` for devices, and import from tests/."""
    places = [_ROOT, _ROOT / "kernels", _ROOT / "tests", compile_tpu.FOLDER]
    own = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    own["PYTHONPATH"] = os.pathsep.join(map(str, places))
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, env=own | _OWN, capture_output=True, text=True, timeout=limit)
    assert not done.returncode, done.stderr[-2000:]
    return done.stdout
