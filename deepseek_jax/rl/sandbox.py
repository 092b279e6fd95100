"""Python programs that nobody has read, run where they can do no harm.

    sandbox = Sandbox()
    sandbox.run("print(int(input()) + 1)", "41")  # Ran(ended="exit", code=0, stdout="42\\n", stderr="", seconds=0.03)

Each runs under bubblewrap: namespaces of its own, so no network and no other processes; a read-only file system that
holds `/usr` and the interpreter; a private `/tmp`; no home, no `/etc`, no environment. A filter refuses the system
calls that lead out (``seccomp``). From root it runs as a user that nobody is, because root is bound by no limit on
processes. What the kernel limits by itself is given to it (`prlimit`); time, memory and output of all the processes
together are watched from here. The call ends when the last process of the program has.
"""

import contextlib
import dataclasses
import json
import math
import os
import platform
import queue
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from deepseek_jax.rl.seccomp import system_call_filter

_TICK = 0.02  # seconds between two looks at the processes
_MOST = 32  # programs at a time unless told otherwise: each is a thread here, and ten open files
_APART = """
    --unshare-pid --unshare-net --unshare-ipc --unshare-uts --unshare-cgroup-try --hostname sandbox
    --die-with-parent --new-session
"""
_FILE = 3 << 9  # bytes that the kernel has for an empty file: 980, and 500 more where its name is long
_PROGRAM = "/program/main.py"
_ENVIRONMENT = {
    **{"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8"},
    **{"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
}


class SandboxError(RuntimeError):
    """The sandbox itself failed, whatever the program is."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one program may use, its children included unless said otherwise.

    seconds: by the clock. cpu_seconds: of the processors. memory: bytes resident, pages that processes share counted
    for each, and 1.5 KiB for each file, however empty; a single process may reserve twice as many. processes: at a
    time, threads too. file_bytes: in the private folder. output: bytes of standard output and error.
    """

    seconds: float = 10.0
    cpu_seconds: float = 10.0
    memory: int = 1 << 30
    processes: int = 32
    file_bytes: int = 1 << 24
    output: int = 1 << 20

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value}: a limit is a positive number")


class Ran(NamedTuple):
    """How a program ended: by itself (`exit`; code: its own, or 128 + the signal's number), or at which limit.

    seconds: by the clock, the sandbox's own included.
    """

    ended: Literal["exit", "seconds", "cpu_seconds", "memory", "output"]
    code: int | None
    stdout: str
    stderr: str
    seconds: float


class Sandbox:
    """Runs programs, `count` at a time (by default one for each processor, at most 32); more wait for their turn.

    python: the interpreter, by default this one's own without its virtual environment. `run` may be called from any
    number of threads. ValueError at once where bubblewrap is missing, or does not work here.
    """

    def __init__(self, *, count: int | None = None, limits: Limits | None = None, python: str | None = None):
        self._bwrap, self._prlimit = _find("bwrap", "bubblewrap"), _find("prlimit", "util-linux")
        self._setpriv = _find("setpriv", "util-linux") if _is_root() else None
        if not Path("/proc/thread-self/children").exists():
            raise ValueError("the sandbox sums what processes use by /proc/PID/task/TID/children, which is not here")
        self.limits = limits or Limits()
        self._python = Path(python or sys.executable).resolve()
        self._view = [*_system(), *_interpreter(self._python)]
        self._filter = system_call_filter(platform.machine())
        self.count = count or min(_MOST, len(os.sched_getaffinity(0)))
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(self.count):
            self._slots.put(slot)
        try:
            tried = self.run("print(6 * 7)")
        except SandboxError as error:
            raise ValueError(f"bubblewrap does not work here: {error}") from error
        if tried.stdout != "42\n":
            raise ValueError(f"{self._python} does not work in the sandbox: {tried.ended} {tried.code}: {tried.stderr}")

    def run(self, source: str, stdin: str = "", *, limits: Limits | None = None) -> Ran:
        """Runs `source`, as the main module, to its end. Raises SandboxError where that cannot be done."""
        slot = self._slots.get()
        try:
            return self._run(_encode(source), _encode(stdin), limits or self.limits, slot)
        finally:
            self._slots.put(slot)

    def _run(self, source: bytes, stdin: bytes, limits: Limits, slot: int) -> Ran:
        start = time.monotonic()
        with contextlib.ExitStack() as files:
            status, to_status = (files.enter_context(end) for end in _pipe())
            held, release = (files.enter_context(end) for end in _pipe())
            given, program, refused = (files.enter_context(_file(text)) for text in (stdin, source, self._filter))
            inherited = {"program": program, "filter": refused, "status": to_status, "held": held}
            fds = {name: file.fileno() for name, file in inherited.items()}
            process = subprocess.Popen(
                self._command(fds, limits, slot),
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                pass_fds=list(fds.values()),
                cwd="/",
                env={},
                start_new_session=True,  # Ctrl-C is the parent's business
            )
            files.enter_context(process)
            files.callback(process.kill)  # whatever goes wrong, and with it the sandbox: it dies with its parent
            to_status.close()
            first = status.readline()
            if not first:
                raise SandboxError(_complaint(process))
            pid = json.loads(first)["child-pid"]  # the sandbox's init: no process of the program outlives it
            try:
                pidfd = os.pidfd_open(pid)  # it waits for `release`, so this is no other process of the same number
            except ProcessLookupError as error:  # it could not be made, which was found out behind that line
                raise SandboxError(_complaint(process)) from error
            files.callback(os.close, pidfd)
            watch = _Watch(process, pid, pidfd, limits)
            try:
                release.write(b"x")
                ended = watch.until(start + limits.seconds)
            finally:
                _end(pidfd, process)
            code = json.loads(status.readline() or "{}").get("exit-code")
        stdout, stderr = (text.decode(errors="replace") for text in watch.said.values())
        if ended == "exit" and code is None:  # bubblewrap gives one for each program that it has started
            raise SandboxError(stderr.strip() or "it has ended without an exit code")
        return Ran(ended, code if ended == "exit" else None, stdout, stderr, time.monotonic() - start)

    def _command(self, fds: dict[str, int], limits: Limits, slot: int) -> list[str]:
        own, drop = ["--unshare-user"], []
        if self._setpriv:
            user = str((1 << 30) + (os.getpid() << 7) + slot)  # nobody else's, so that its processes are counted alone
            ids = ["--reuid", user, "--regid", user, "--clear-groups", "--inh-caps=-all"]
            own, drop = ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"], [self._setpriv, *ids, "--"]
        folder = f"--perms 1777 --size {limits.file_bytes} --tmpfs"
        # /proc/1: without root, a program is the same user as its init, which is bubblewrap's, and could write to it.
        options = f"""
            --proc /proc --tmpfs /proc/1 --remount-ro /proc/1 --dev /dev {folder} /dev/shm {folder} /tmp
            --dir /program --perms 0444 --ro-bind-data {fds["program"]} {_PROGRAM}
            --remount-ro /dev --remount-ro / --chdir /tmp --clearenv
            --seccomp {fds["filter"]} --json-status-fd {fds["status"]} --block-fd {fds["held"]}
        """
        bounds = {"nproc": limits.processes, "as": 2 * limits.memory, "cpu": math.ceil(limits.cpu_seconds) + 1}
        bounds |= {"fsize": limits.file_bytes, "nofile": 128, "core": 0}
        return [
            *(self._bwrap, *own, *_APART.split(), *self._view, *options.split()),
            *(word for item in _ENVIRONMENT.items() for word in ("--setenv", *item)),
            *("--", *drop, self._prlimit, *(f"--{name}={most}" for name, most in bounds.items()), "--"),
            *(str(self._python), "-s", "-P", "-B", _PROGRAM),
        ]


class _Watch:
    """Reads what a program says and looks at what it uses, until it ends or is over a limit."""

    def __init__(self, process: subprocess.Popen[bytes], pid: int, pidfd: int, limits: Limits):
        assert process.stdout is not None and process.stderr is not None
        self.said = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
        self._pid, self._pidfd, self._limits = pid, pidfd, limits
        self._poll = select.poll()
        for fd in (pidfd, *self.said):
            self._poll.register(fd, select.POLLIN)

    def until(self, end: float) -> Literal["exit", "seconds", "cpu_seconds", "memory", "output"]:
        limits, look, alive = self._limits, 0.0, True
        while alive:
            ready = dict(self._poll.poll(_TICK * 1000))
            alive = self._pidfd not in ready
            for fd in self.said.keys() & ready.keys():
                if not self._read(fd):
                    self._poll.unregister(fd)
            if sum(map(len, self.said.values())) > limits.output:
                return "output"
            now = time.monotonic()
            if alive and now > end:
                return "seconds"
            if alive and now > look:
                memory, seconds = _used(self._pid)
                if memory + _files(self._pid) * _FILE > limits.memory:
                    return "memory"
                if seconds > limits.cpu_seconds:
                    return "cpu_seconds"
                look = now + _TICK
        for fd in self.said:  # nobody writes any more
            while self._read(fd):
                pass
        return "exit" if sum(map(len, self.said.values())) <= limits.output else "output"

    def _read(self, fd: int) -> bool:
        part = os.read(fd, 1 << 16)
        self.said[fd] += part
        return bool(part)


def _used(pid: int) -> tuple[int, float]:
    """Bytes resident and seconds of CPU of a process and all that descend from it, those that have ended included."""
    pages = ticks = 0
    waiting = [pid]
    while waiting:
        folder = f"/proc/{waiting.pop()}"
        with contextlib.suppress(OSError):  # it has ended meanwhile; another one has its children and its time
            fields = Path(folder, "stat").read_bytes().rpartition(b")")[2].split()  # from the third on, proc(5)
            pages += int(fields[21])
            ticks += sum(map(int, fields[11:15]))
            for thread in os.listdir(f"{folder}/task"):
                waiting += map(int, Path(folder, "task", thread, "children").read_bytes().split())
    return pages * os.sysconf("SC_PAGE_SIZE"), ticks / os.sysconf("SC_CLK_TCK")


def _files(pid: int) -> int:
    """The files, directories and links in the private folders, whose size bounds their content and not their number."""
    root, count = f"/proc/{pid}/root", 0
    with contextlib.suppress(OSError):  # it has ended meanwhile, or has no such folders yet
        if os.stat(root).st_dev != os.stat("/").st_dev:  # which at first are this machine's own
            for folder in ("tmp", "dev/shm"):
                held = os.statvfs(f"{root}/{folder}")
                count += held.f_files - held.f_ffree
    return count


def _end(pidfd: int, process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    ended = select.poll()
    ended.register(pidfd, select.POLLIN)
    ended.poll()  # the kernel ends an init after all the processes under it
    process.wait()
    with contextlib.suppress(ChildProcessError):
        # It has become this process's child where that is the machine's init; its number may be another's by now.
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)


def _is_root() -> bool:
    """Whether this is the machine's root, not that of a user namespace."""
    return os.geteuid() == 0 and Path("/proc/self/uid_map").read_text().split() == ["0", "0", str((1 << 32) - 1)]


def _system() -> Iterator[str]:
    yield from ("--ro-bind", "/usr", "/usr")
    for path in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(path):
            yield from ("--symlink", os.readlink(path), path)
        elif os.path.isdir(path):
            yield from ("--ro-bind", path, path)
    for path in ("/etc/ld.so.cache", "/etc/alternatives"):
        yield from ("--ro-bind-try", path, path)


def _interpreter(python: Path) -> Iterator[str]:
    prefix = python.parent.parent
    if prefix.is_relative_to("/usr"):
        return
    if not any(prefix.glob("lib*/python3*")):  # never a home, because a program stands in its bin
        raise ValueError(f"python={python}: there is no {prefix}/lib/python3…, so it is not a whole installation")
    for parent in [*prefix.parents][-2::-1]:
        yield from ("--dir", str(parent))  # bubblewrap's own would be closed to other users
    yield from ("--ro-bind", str(prefix), str(prefix))


def _find(tool: str, package: str) -> str:
    found = shutil.which(tool)
    if found is None:
        raise ValueError(f"there is no {tool}: the sandbox needs the package {package} (apt-get install {package})")
    return found


def _encode(text: str) -> bytes:
    return text.encode(errors="replace")  # a lone surrogate is what a model may well write


def _complaint(process: subprocess.Popen[bytes]) -> str:
    """What bubblewrap said as it ended."""
    return process.communicate()[1].decode(errors="replace").strip() or "it has not started"


def _pipe() -> tuple[BinaryIO, BinaryIO]:
    reading, writing = os.pipe()
    return os.fdopen(reading, "rb", 0), os.fdopen(writing, "wb", 0)


def _file(text: bytes) -> BinaryIO:
    file = os.fdopen(os.memfd_create("sandbox"), "w+b")
    file.write(text)
    file.seek(0)
    return file
