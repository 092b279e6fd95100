"""The sandbox: 45 programs that mean harm (`hostile.py`), what an honest one has, and what is refused."""

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hostile
import pytest

from deepseek_jax.rl import seccomp
from deepseek_jax.rl.sandbox import Limits, Sandbox, SandboxError

ROOT = Path(__file__).parents[2]
needs_bubblewrap = pytest.mark.skipif(bool(hostile.missing()), reason=hostile.missing())


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox(count=2)


@needs_bubblewrap
@pytest.mark.parametrize("name", hostile.PROGRAMS)
def test_harm_is_contained_and_nothing_is_left(sandbox: Sandbox, name: str):
    assert hostile.run(sandbox, name) == ""


@needs_bubblewrap
@pytest.mark.skipif(os.geteuid() != 0, reason="what every other test does: this one is for root")
def test_harm_is_contained_for_a_user_without_rights():
    """The other way in, by a user namespace: all of it again, as `nobody`, whom the system's own Python must do."""
    python = "/usr/bin/python3"
    command = [python, "-c", "import sys, deepseek_jax.rl.sandbox; sys.exit(sys.version_info < (3, 11))"]
    nobody = {"user": 65534, "group": 65534, "extra_groups": [], "capture_output": True, "text": True, "cwd": "/"}
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "PYTHONDONTWRITEBYTECODE": "1", "PATH": os.environ["PATH"]}
    if not os.path.exists(python) or subprocess.run(command, env=environment, **nobody).returncode:
        pytest.skip("nobody can read this folder, or has no Python 3.11 at /usr/bin/python3")
    done = subprocess.run([python, f"{ROOT}/tests/hostile.py"], env=environment, **nobody)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_bubblewrap
def test_an_honest_program_has_what_it_needs(sandbox: Sandbox):
    source = """
        import asyncio, multiprocessing, os, subprocess, sys, tempfile, threading

        async def later(x):
            await asyncio.sleep(0)
            return x

        def double(x):
            return 2 * x

        if __name__ == "__main__":
            print(ascii(sys.stdin.read()), "é")
            with tempfile.TemporaryFile() as file: print(file.write(b"abc"))
            print(subprocess.run(["echo", "hi"], capture_output=True, text=True).stdout.strip())
            print(asyncio.run(later(3)))
            with multiprocessing.Pool(2) as pool: print(pool.map(double, [1, 2]))
            print(hash("a") == hash("a"), os.getcwd(), threading.stack_size(1 << 26))
            print("to stderr", file=sys.stderr)
            sys.exit(3)
    """
    ran = sandbox.run(textwrap.dedent(source), "é\u2028\n")
    said = "'\\xe9\\u2028\\n' é\n3\nhi\n3\n[2, 4]\nTrue /tmp 0\n"
    assert ran[:4] == ("exit", 3, said, "to stderr\n")
    assert sandbox.run("import os; os.abort()").code == 128 + signal.SIGABRT
    assert sandbox.run("\ud800").code == 1


@needs_bubblewrap
def test_programs_wait_for_their_turn_and_leave_nothing_open(sandbox: Sandbox):
    source = "import time\nstart = time.monotonic()\ntime.sleep(0.2)\nprint(start, time.monotonic())"
    sandbox.run(source)
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(6) as threads:
        spans = [tuple(map(float, ran.stdout.split())) for ran in threads.map(sandbox.run, [source] * 6)]
    assert max(sum(start <= begin < end for start, end in spans) for begin, _ in spans) == 2
    assert len(os.listdir("/proc/self/fd")) == before


@needs_bubblewrap
def test_what_was_said_until_a_limit_is_kept(sandbox: Sandbox):
    ran = sandbox.run("print('so far', flush=True)\nwhile True: pass", limits=Limits(seconds=0.5))
    assert ran[:3] == ("seconds", None, "so far\n")


@needs_bubblewrap
def test_programs_die_with_the_process_that_runs_them(tmp_path: Path):
    source = "import os, time\nprint(os.readlink('/proc/self/ns/pid'), flush=True)\ntime.sleep(1000)"
    runner = f"""
        import threading, time
        from deepseek_jax.rl.sandbox import *
        sandbox = Sandbox(count=1, limits=Limits(seconds=1000))
        threading.Thread(target=sandbox.run, args=({source!r},)).start()
        print("started", flush=True)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(runner)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "started\n"
        namespaces = _wait(lambda: _namespaces_below(process.pid))
        process.kill()
    _wait(lambda: not any(hostile.survivors(namespace) for namespace in namespaces))


def _namespaces_below(pid: int) -> set[str]:
    found, waiting = set(), [pid]
    while waiting:
        folder = Path(f"/proc/{waiting.pop()}")
        try:
            found.add(os.readlink(folder / "ns/pid"))
            waiting += [int(child) for task in folder.glob("task/*/children") for child in task.read_text().split()]
        except OSError:
            continue
    return found - {os.readlink("/proc/self/ns/pid")}


def _wait(condition):
    end = time.monotonic() + 30
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def test_it_refuses_where_bubblewrap_is_missing_or_does_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for tool in ("prlimit", "setpriv"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or "/usr/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"no bwrap: .* the package bubblewrap \(apt-get install bubblewrap\)"):
        Sandbox()
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    with pytest.raises(ValueError, match="bubblewrap does not work here: bwrap: No permissions"):
        Sandbox()


@needs_bubblewrap
def test_an_interpreter_is_refused_that_is_none(tmp_path: Path):
    (tmp_path / "bin").mkdir()
    for path, message in ((tmp_path / "bin/python", "not a whole installation"), ("/usr/bin/false", "does not work")):
        with pytest.raises(ValueError, match=message):
            Sandbox(python=str(path))


@needs_bubblewrap
def test_a_sandbox_that_breaks_is_no_programs_fault(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "_view", [*sandbox._view, "--ro-bind", "/nowhere", "/nowhere"])
    with pytest.raises(SandboxError, match="/nowhere"):
        sandbox.run("print(1)")
    pidfd_open = os.pidfd_open  # it may have ended by then
    monkeypatch.setattr(os, "pidfd_open", lambda pid: (time.sleep(0.2), pidfd_open(pid))[1])
    with pytest.raises(SandboxError, match="/nowhere"):
        sandbox.run("print(1)")


@pytest.mark.parametrize(("field", "value"), [("seconds", 0), ("memory", -1), ("output", float("nan"))])
def test_limits_are_positive(field: str, value: Any):
    with pytest.raises(ValueError, match=rf"{field}={value}"):
        Limits(**{field: value})


@pytest.mark.parametrize(
    ("machine", "header"),
    [("x86_64", "x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "asm-generic/unistd.h")],
)
def test_system_calls_have_the_kernels_numbers(machine: str, header: str):
    path = Path("/usr/include", header)
    if not path.exists():
        pytest.skip(f"no {path} (apt-get install linux-libc-dev)")
    numbers = {
        name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text())
    }
    ours = seccomp._REFUSED[machine] | seccomp._EVERYWHERE
    ours |= {"clone": seccomp._CLONE[machine], "socket": seccomp._SOCKET[machine], "clone3": seccomp._CLONE3}
    assert {name: numbers.get(name, number) for name, number in ours.items()} == ours
    assert len(ours.keys() & numbers.keys()) >= 20
    assert len(seccomp.system_call_filter(machine)) % 8 == 0


def test_a_machine_is_refused_whose_system_calls_are_not_known():
    with pytest.raises(ValueError, match="not of riscv64"):
        seccomp.system_call_filter("riscv64")
