"""A TPU's program up to its schedule: libtpu has optimised it and laid out its memory, and would go on to machine code,
which takes most of a compile's time and memory.

libtpu cannot be asked to stop there, so it runs in a process of its own, which is ended once it has written both.
"""

if __name__ == "__main__":  # before jax is imported
    from deepseek_jax.parallel.compilers import add_compilers

    add_compilers()

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.topology import OPTIONS, Topology
from deepseek_jax.typed import from_dict
from deepseek_jax.workflows.abstract import Work, abstract
from deepseek_jax.workflows.pretrain import PretrainConfig

_PROGRAM, _MEMORY = "*.after_optimizations.txt", "*.after_optimizations-memory-usage-report.txt"
_LAST = "*.after_optimizations_after_buffer_assignment.txt"  # written behind both, where the program fits
_TOLD = (ValueError, jax.errors.JaxRuntimeError)  # raised here as they are there


def scheduled(recipe: PretrainConfig, topology: Topology, work: Work, columns: int) -> tuple[str, int]:
    """The program's text, and the bytes that its arrays take of a device's memory.

    Raises JaxRuntimeError as the compiler does, where it does not fit, and RuntimeError where its process was killed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe)), encoding="utf-8")
        command = [sys.executable, "-m", __name__, name, str(topology), work, str(columns)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) as it:
            try:
                while it.poll() is None and not any(folder.glob(_LAST)):
                    time.sleep(0.2)
            finally:
                it.kill()
        if (error := folder / "error.json").exists():
            which, told = json.loads(error.read_text(encoding="utf-8"))
            raise _TOLD[which](told)
        if not any(folder.glob(_LAST)):
            why = "was killed, as for want of memory" if it.returncode == -9 else f"ended with {it.returncode}"
            raise RuntimeError(f"the compiler's process {why}")
        program, memory = (next(folder.glob(pattern)).read_text(encoding="utf-8") for pattern in (_PROGRAM, _MEMORY))
    total = re.search(r"Memory Space: default .*\nTotal bytes: (\d+)", memory)
    assert total is not None, memory[:200]
    return program, int(total[1])


def _compile(place: str, name: str, work: Any, columns: str) -> None:
    """What the process does; it ends with the one that started it."""
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    folder = Path(place)
    recipe = from_dict(PretrainConfig, json.loads((folder / "recipe.json").read_text(encoding="utf-8")))
    topology = Topology.parse(name)
    mesh = make_mesh(recipe.mesh, topology.devices())
    options = OPTIONS[topology.platform] | {"xla_dump_to": place}
    try:
        with jax.set_mesh(mesh):
            lowered = abstract(recipe, mesh, work, int(columns)).lower()
        lowered.compile(compiler_options=options)
    except _TOLD as error:
        which = int(isinstance(error, _TOLD[1]))
        (folder / "error.json").write_text(json.dumps([which, str(error)]), encoding="utf-8")


if __name__ == "__main__":
    _compile(*sys.argv[1:])
