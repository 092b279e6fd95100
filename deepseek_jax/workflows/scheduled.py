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
_LAST = "*.after_optimizations_after_buffer_assignment.txt"  # written behind both where the program fits, but on tpu7x
_SURELY = 0.95  # of a device's memory: what takes no more of it fits, whatever else the compiler counts
_ELEMENT = re.compile(r"(%[\w.\-]+)#(\d+)")
_TUPLE = re.compile(r"\s+(?:ROOT )?(%[\w.\-]+) = (\(.*\)) [\w\-]+\(")
_TOLD = (ValueError, jax.errors.JaxRuntimeError)  # raised here as they are there


def scheduled(recipe: PretrainConfig, topology: Topology, work: Work, columns: int) -> tuple[str, int]:
    """The program's text, and the bytes that its arrays take of a device's memory.

    Raises JaxRuntimeError as the compiler does, where it does not fit, and RuntimeError where its process was killed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, stopped = Path(name), False
        (folder / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe)), encoding="utf-8")
        command = [sys.executable, "-m", __name__, name, str(topology), work, str(columns)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) as it:
            try:
                while it.poll() is None and not (stopped := _fits(folder, topology)):
                    time.sleep(0.2)
            finally:
                it.kill()
        if (error := folder / "error.json").exists():
            which, told = json.loads(error.read_text(encoding="utf-8"))
            raise _TOLD[which](told)
        if it.returncode and not stopped:
            why = "was killed, as for want of memory" if it.returncode == -9 else f"ended with {it.returncode}"
            raise RuntimeError(f"the compiler's process {why}")
        return plain(next(folder.glob(_PROGRAM)).read_text(encoding="utf-8")), _total(folder)


def _fits(folder: Path, topology: Topology) -> bool:
    """Whether program and memory are known, and the compiler would not refuse them."""
    total = _total(folder)
    return 0 < total < _SURELY * topology.chip.hbm or any(folder.glob(_LAST))


def _total(folder: Path) -> int:
    """Bytes of all that is laid out, 0 before it is."""
    report = next(folder.glob(_MEMORY), None)
    found = report and re.search(r"Memory Space: default .*\nTotal bytes: (\d+) ", report.read_text(encoding="utf-8"))
    return int(found[1]) if found else 0


def plain(text: str) -> str:
    """A dumped program as a compiled one's ``as_text()`` is: libtpu of jax 0.11 dumps ``%loop#3`` for what is an
    instruction there, ``get-tuple-element(%loop), index=3``."""
    lines, tuples = [], {}
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY ")):
            tuples, named = {}, set()
        for name, index in dict.fromkeys(_ELEMENT.findall(line)):
            if name not in tuples:
                continue
            element = f"{name}.element.{index}"
            line = re.sub(rf"{re.escape(name)}#{index}\b", element, line)
            if element not in named:
                named.add(element)
                shape = _elements(tuples[name])[int(index)]
                lines.append(f"  {element} = {shape} get-tuple-element({name}), index={index}")
        lines.append(line)
        if found := _TUPLE.match(line):
            tuples[found[1]] = found[2]
    return "\n".join(lines)


def _elements(shape: str) -> list[str]:
    """Of a tuple's shape, ``(f32[2]{0}, (s32[], pred[]))``: those between its own commas."""
    found, depth = [""], 0
    for part in re.findall(r"[(\[{]|[)\]}]|,|[^(\[{)\]},]+", re.sub(r"/\*.*?\*/", "", shape)[1:-1]):
        depth += (part in "([{") - (part in ")]}")
        if part == "," and not depth:
            found.append("")
        else:
            found[-1] += part
    return [one.strip() for one in found]


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
