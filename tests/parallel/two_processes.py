"""Real processes on one machine: each with emulated CPU devices of its own, joined by jax.distributed over gloo.

A collective of gloo gives up where a process comes 30 s after another, so what compiles meets before it computes (see
``parallel.processes``); a process that dies is missed after ``HEARTBEAT`` seconds.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEARTBEAT = 10
_JOIN = f"""
import sys
import jax
address, count, index, *arguments = sys.argv[1:]
jax.distributed.initialize(
    address, int(count), int(index), initialization_timeout=60, heartbeat_timeout_seconds={HEARTBEAT},
    shutdown_timeout_seconds=20,
)
sys.argv = ["-", *arguments]
"""


@dataclass(frozen=True)
class Ended:
    """code: the exit status, negative for a signal. out: without the lines that gloo writes there."""

    code: int
    out: str
    err: str


class Group:
    """Processes that run the same program. Each writes into files, so that none waits for a reader."""

    def __init__(self, processes: Sequence[subprocess.Popen], folder: Path):
        self.processes, self.folder = processes, folder

    def signal(self, index: int, number: signal.Signals) -> None:
        self.processes[index].send_signal(number)

    def wait(self, timeout: float = 120.0) -> list[Ended]:
        """All ends, in order. AssertionError, with what they said, where one does not come."""
        end = time.monotonic() + timeout
        for index, process in enumerate(self.processes):
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.kill()
                said = "\n".join(f"--- process {i}\n{self._said(i).err[-3000:]}" for i in range(len(self.processes)))
                raise AssertionError(f"process {index} did not end within {timeout} s\n{said}") from None
        return [self._said(index) for index in range(len(self.processes))]

    def done(self, timeout: float = 120.0) -> list[Ended]:
        """``wait``, and AssertionError where one did not end well."""
        ended = self.wait(timeout)
        for index, process in enumerate(ended):
            assert process.code == 0, f"process {index} ended with {process.code}:\n{process.err[-5000:]}"
        return ended

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def _said(self, index: int) -> Ended:
        out, err = ((self.folder / f"{index}.{name}").read_text(errors="replace") for name in ("out", "err"))
        out = "".join(line for line in out.splitlines(keepends=True) if not line.startswith("[Gloo]"))
        code = self.processes[index].poll()
        return Ended(-999 if code is None else code, out, err)


@contextlib.contextmanager
def start(
    program: str | Path,
    arguments: Sequence[object] = (),
    *,
    folder: Path,
    processes: int = 2,
    devices: int = 4,
    environment: Mapping[str, str] | None = None,
    join: bool = True,
) -> Iterator[Group]:
    """``processes`` processes that run Python ``program`` (a text, or a file), each on ``devices`` devices of its own.

    Args:
      folder: where what they say is written, and the coordinator is agreed.
      join: have them joined before the program; else it is told ``DEEPSEEK_JAX_COORDINATOR``, … in its environment.

    At the end of the block what still runs is killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    address = f"127.0.0.1:{free_port()}"
    text = program.read_text(encoding="utf-8") if isinstance(program, Path) else program
    started = []
    for index in range(processes):
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]),
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            **(environment or {}),
        }
        for name in [name for name in env if "proxy" in name.lower()]:  # jax warns of them
            del env[name]
        command = [sys.executable, "-c", text, *map(str, arguments)]
        if join and processes > 1:
            command = [sys.executable, "-c", _JOIN + text, address, str(processes), str(index), *map(str, arguments)]
        elif processes > 1:
            env |= {
                "DEEPSEEK_JAX_DISTRIBUTED": "1",
                "DEEPSEEK_JAX_COORDINATOR": address,
                "DEEPSEEK_JAX_PROCESSES": str(processes),
                "DEEPSEEK_JAX_PROCESS": str(index),
            }
        with (folder / f"{index}.out").open("w") as out, (folder / f"{index}.err").open("w") as err:
            started.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=err))
    group = Group(started, folder)
    try:
        yield group
    finally:
        group.kill()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
