"""Programs that mean harm, and what must become of each. Run as a script it tries them all, as whoever runs it.

Behind `ESCAPED` a program says what it got away with. An attempt is contained where it is refused, or where the whole
program is ended at the limit that stands beside it.
"""

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deepseek_jax.rl.sandbox import Limits, Sandbox

# Long enough for a busy machine; what waits for the end is given a second.
LIMITS = Limits(seconds=60, cpu_seconds=1, memory=1 << 29, processes=24, file_bytes=1 << 22, output=1 << 18)
# Those that end at another limit than that of the processors are not to end at that one first.
OF = {"seconds": dataclasses.replace(LIMITS, seconds=1), "memory": dataclasses.replace(LIMITS, cpu_seconds=20)}

PRELUDE = """
import ctypes, errno, mmap, os, resource, signal, socket, subprocess, sys, threading, time
print(os.readlink("/proc/self/ns/pid"), flush=True)
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p

def attempt(action, *arguments):
    try:
        result = action(*arguments)
    except (OSError, ValueError):
        return
    if result not in (-1, "", b""):
        print("ESCAPED", action, arguments, result, flush=True)

def read(path):
    with open(path, "rb") as file:
        return file.read(100)

def write(path):
    with open(path, "w") as file:
        return file.write("x")

def forked(count, action):
    for _ in range(count):
        if os.fork() == 0:
            action()
            os._exit(0)
"""

# Name → how it ends, and the program.
PROGRAMS = {
    "fork bomb": ("cpu_seconds", "while True:\n  try: os.fork()\n  except OSError: pass"),
    "more processes than allowed": (
        "exit",
        """
        def child():
            time.sleep(0.5)
        for count in range(100):
            try: forked(1, child)
            except OSError: break
        if count > 24: print("ESCAPED", count)
        """,
    ),
    "thread bomb": (
        "exit",
        """
        threading.stack_size(1 << 16)
        try:
            for count in range(100):
                threading.Thread(target=time.sleep, args=(0.5,), daemon=True).start()
        except RuntimeError: os._exit(0)
        print("ESCAPED", count)
        """,
    ),
    "a chain of processes, each of which ends at once": (
        "cpu_seconds",
        """
        if os.fork(): time.sleep(100)
        while True:
            try:
                if os.fork(): os._exit(0)
            except BlockingIOError: pass  # the dead are counted until they are reaped
            sum(range(100000))
        """,
    ),
    "programs that start programs": ("cpu_seconds", "while True: os.system('true')"),
    "memory of one process": ("memory", "a = []\nwhile True: a.append(bytearray(1 << 20))"),
    "memory reserved at once": ("exit", "try: bytearray(1 << 32)\nexcept MemoryError: pass\nelse: print('ESCAPED')"),
    "memory of many processes": (
        "memory",
        """
        def child():
            a = bytearray(1 << 26)
            time.sleep(100)
        forked(20, child)
        time.sleep(100)
        """,
    ),
    "memory shared by processes": ("memory", "m = mmap.mmap(-1, 900 << 20)\nwhile m.write(bytes(1 << 20)): pass"),
    "memory in anonymous files": ("exit", "attempt(os.memfd_create, 'x')\nattempt(libc.syscall, 447, 0)"),
    "memory in System V segments": (
        "exit",
        "attempt(libc.shmget, 0, 1 << 20, 0o1600)\nattempt(libc.msgget, 0, 0o1600)",
    ),
    "memory in the private folder": (
        "exit",
        """
        written = 0
        try:
            for index in range(100):
                with open(f"/tmp/{index}", "wb") as file: written += file.write(bytes(1 << 20))
        except OSError: pass
        if written > 1 << 22: print("ESCAPED", written)
        """,
    ),
    "memory in /dev/shm": (
        "exit",
        """
        for index in range(4):
            with open(f"/dev/shm/{index}", "wb") as file: file.write(bytes(1 << 20))
        attempt(write, "/dev/shm/more")
        """,
    ),
    "memory of empty files": (
        "memory",
        """
        for index in range(1 << 20):
            for folder in "/tmp", "/dev/shm": os.mknod(f"{folder}/{index}")
        """,
    ),
    "one large file": ("exit", "attempt(os.truncate, os.open('/tmp/x', os.O_CREAT | os.O_RDWR), 1 << 23)"),
    "network by address": (
        "exit",
        """
        for family in socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET, socket.AF_VSOCK:
            for kind in socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW:
                attempt(socket.socket, family, kind)
        """,
    ),
    "network by name": ("exit", "attempt(socket.create_connection, ('pypi.org', 443), 1)"),
    "sockets of other programs": (
        "exit",
        """
        for name in "/run/systemd/private", "/var/run/docker.sock", "\\0/tmp/.X11-unix/X0":
            attempt(socket.socket(socket.AF_UNIX).connect, name)
        if len(open("/proc/net/unix").readlines()) > 4: print("ESCAPED")
        """,
    ),
    "the home folders": (
        "exit",
        """
        for path in "/root/.bashrc", "/root/.ssh", "/root/.cache", "/root/.pyenv/version", "/home":
            attempt(os.stat, path)
        attempt(os.listdir, os.path.expanduser("~root/.config"))
        """,
    ),
    "other people's files": (
        "exit",
        """
        for path in "/etc/passwd", "/etc/shadow", "/etc/hosts", "/proc/1/environ", "/proc/kcore":
            attempt(read, path)
        for path in "/work", "/var", "/sys", "/run", "/opt":
            attempt(os.stat, path)
        """,
    ),
    "the environment": ("exit", "if {*os.environ} & {'USER', 'PYTHONPATH', 'OLDPWD', 'SHLVL'}: print('ESCAPED')"),
    "files that were open": ("exit", "if len(os.listdir('/proc/self/fd')) > 4: print('ESCAPED')"),
    "writing outside": (
        "exit",
        """
        for folder in "/", "/usr", "/usr/bin", "/etc", "/program", "/dev", "/proc", "/lib", "/root", sys.prefix:
            attempt(write, f"{folder}/hostile")
        attempt(write, __file__)
        attempt(write, sys.executable)
        attempt(os.chmod, sys.executable, 0o777)
        attempt(os.unlink, "/usr/bin/env")
        attempt(os.rename, "/usr", "/tmp/usr")
        """,
    ),
    "symlinks": (
        "exit",
        """
        os.symlink("/", "/tmp/root")
        os.symlink("/usr/bin/env", "/tmp/env")
        attempt(write, "/tmp/env")
        attempt(write, "/tmp/root/usr/hostile")
        attempt(read, "/tmp/root/etc/passwd")
        attempt(os.link, "/usr/bin/env", "/tmp/hard")
        attempt(read, "/tmp/../../../../etc/passwd")
        """,
    ),
    "/proc": (
        "exit",
        """
        for path in "sysrq-trigger", "sys/kernel/core_pattern", "sys/vm/drop_caches", "sys/kernel/hostname":
            attempt(write, f"/proc/{path}")
        for path in "1/mem", "1/maps", "1/fd/0", "1/root/etc/passwd", "self/root/etc/passwd", "1/cwd/../etc/passwd":
            attempt(read, f"/proc/{path}")
        attempt(write, "/proc/1/hostile")
        if len([name for name in os.listdir("/proc") if name.isdecimal()]) > 3: print("ESCAPED")
        """,
    ),
    "killing the parent": (
        "exit",
        """
        for pid in 1, os.getppid(), 0x7FFFFFF:
            for number in signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP:
                try: os.kill(pid, number)
                except OSError: pass
        time.sleep(0.1)
        """,
    ),
    "killing everything": ("exit", "attempt(os.kill, -1, signal.SIGKILL)\ntime.sleep(0.1)"),
    "ptrace": (
        "exit",
        """
        for pid in [1, os.getppid()]:
            attempt(libc.ptrace, 16, pid, 0, 0)
            attempt(libc.process_vm_readv, pid, 0, 0, 0, 0, 0)
        attempt(libc.ptrace, 0, 0, 0, 0)
        attempt(libc.syscall, 438, os.pidfd_open(1), 1, 0)
        """,
    ),
    "endless output": ("output", "while True: print('x' * 1000)"),
    "endless errors": ("output", "while True: os.write(2, bytes(100000))"),
    "output of many processes": (
        "output",
        "forked(10, lambda: [os.write(1, bytes(1000)) for _ in iter(int, 1)])\nos.wait()",
    ),
    "a daemon that outlives": (
        "exit",
        """
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                for fd in range(100):
                    try: os.close(fd)
                    except OSError: pass
                time.sleep(100)
            os._exit(0)
        os.wait()
        """,
    ),
    "children that hold the output open": ("exit", "forked(5, lambda: time.sleep(100))\nos._exit(0)"),
    "deaf to signals": (
        "cpu_seconds",
        """
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: pass
        """,
    ),
    "stopped": ("seconds", "os.kill(0, signal.SIGSTOP)\nos.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(100)"),
    "asleep": ("seconds", "time.sleep(100)"),
    "waiting for input": ("exit", "if sys.stdin.read(): print('ESCAPED')"),
    "a terminal": ("exit", "attempt(os.open, '/dev/tty', os.O_RDWR)"),
    "namespaces": (
        "exit",
        """
        for flag in 0x10000000, 0x20000, 0x40000000:
            attempt(libc.unshare, flag)
            attempt(libc.syscall, 56 if os.uname().machine == "x86_64" else 220, flag | signal.SIGCHLD, 0, 0, 0, 0)
        attempt(libc.syscall, 435, 0, 0)
        attempt(libc.mount, b"none", b"/tmp", b"tmpfs", 0, 0)
        attempt(os.chroot, "/tmp")
        """,
    ),
    "another user": (
        "exit",
        """
        for action in os.setuid, os.setgid, os.seteuid: attempt(action, 0)
        attempt(lambda: subprocess.run(["su", "-c", "id"], capture_output=True, input=b"").stdout.decode())
        """,
    ),
    "limits of its own": (
        "exit",
        """
        for name in "NPROC", "AS", "FSIZE", "CPU", "NOFILE", "CORE":
            attempt(resource.setrlimit, getattr(resource, f"RLIMIT_{name}"), (1 << 40, 1 << 40))
        attempt(os.nice, -10)
        attempt(os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(1))
        """,
    ),
    "devices": (
        "exit",
        """
        attempt(os.mknod, "/tmp/disk", 0o600 | 0o060000, os.makedev(8, 0))
        for path in "/dev/mem", "/dev/sda", "/dev/vda", "/dev/kmsg", "/dev/nvidia0", "/dev/kvm": attempt(read, path)
        """,
    ),
    "rare system calls": (
        "exit",
        """
        for number in 425, 430, 442 if os.uname().machine == "x86_64" else 430: attempt(libc.syscall, number, 0, 0)
        if os.uname().machine == "x86_64":
            for number in 321, 298, 323, 248, 250: attempt(libc.syscall, number, 0, 0, 0, 0, 0)
            attempt(libc.syscall, 0x40000000 + 39)
        """,
    ),
    "a crash of the interpreter": ("exit", "ctypes.string_at(0)"),
    "bytes that are no text": ("exit", "os.write(1, bytes(range(256)) + b'\\xf0\\x9f\\xed\\xa0\\x80')"),
}


def missing() -> str:
    """Why there can be no sandbox on this machine, "" where there can: told by bubblewrap, not by what is tested."""
    if shutil.which("bwrap") is None:
        return "the sandbox needs the package bubblewrap (apt-get install bubblewrap)"
    tried = subprocess.run(["bwrap", "--unshare-pid", "--ro-bind", "/", "/", "true"], capture_output=True, text=True)
    return f"bubblewrap does not work here: {tried.stderr}" if tried.returncode else ""


def run(sandbox: Sandbox, name: str) -> str:
    """What is wrong with how a program ended; "" where it was contained."""
    expected, source = PROGRAMS[name]
    ran = sandbox.run(PRELUDE + textwrap.dedent(source), limits=OF.get(expected, LIMITS))
    text = f"{name}: {ran.ended} {ran.code}, {ran.stdout[-2000:]} {ran.stderr[-2000:]}"
    starved = expected == "cpu_seconds" and ran.ended == "seconds"  # on a crowded machine the clock is first
    if "ESCAPED" in ran.stdout or not (ran.ended == expected or starved):
        return text
    if "Traceback" in ran.stderr:  # then it has not tried all
        return text
    left = survivors(ran.stdout.partition("\n")[0])
    return f"{text}: {left} are left" if left else ""


def survivors(namespace: str) -> list[str]:
    """The processes in a namespace that can be seen: by root all, by others their own."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
            if os.readlink(folder / "ns/pid") == namespace and state != "Z":  # a dead one that waits to be counted
                found.append(f"{folder.name} ({state})")
    return found


def main() -> None:
    sandbox, start = Sandbox(count=2), time.monotonic()
    with ThreadPoolExecutor(2) as threads:
        wrong = [text for text in threads.map(lambda name: run(sandbox, name), PROGRAMS) if text]
    print(f"{len(PROGRAMS)} programs in {time.monotonic() - start:.0f} s as user {os.geteuid()}", *wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
