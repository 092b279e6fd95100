"""Joining the other processes of a run, and saying what happened where one of them is lost."""

import errno
import faulthandler
import os
import socket
import subprocess
import sys
import threading
import time

import jax

from deepseek_jax.parallel.peers import COORDINATOR, DISTRIBUTED, Peers, find_peers

JOIN_SECONDS = "DEEPSEEK_JAX_JOIN_SECONDS"
_JOIN_SECONDS = 300  # the first start of a container on one host, while another has it
_HEARTBEAT_SECONDS = 20  # without a sign of life, and a process counts as dead
_LEAVE_SECONDS = 10  # for the others to fail of the same mistake, so that each ends by itself


def join_hosts() -> Peers | None:
    """Connect to the other processes of a run, where there are some: see ``find_peers``, which says who they are.

    Must run before anything touches a device. From then on a process that dies, or that none hears of for 20 s, ends
    all others: jax's coordination service aborts them, and a line of our own says that the run can go on.

    Raises:
        ValueError: settings that contradict each other, no coordinator within ``DEEPSEEK_JAX_JOIN_SECONDS`` (300), its
            port taken, or jax finds no other processes where ``DEEPSEEK_JAX_DISTRIBUTED=1`` says that there are some.
    """
    if jax.distributed.is_initialized() or (peers := find_peers(os.environ)) is None:
        return None
    seconds = _join_seconds()
    began = time.monotonic()
    if peers.coordinator is not None:
        if peers.index == 0:
            _check_port(peers)
            others = f"{(peers.processes or 1) - 1} others"
            print(f"deepseek-jax: waiting for {others} at {peers.coordinator}, {seconds} s at most", file=sys.stderr)
        else:
            _await_coordinator(peers, seconds)
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    watch = _Watch(seconds)
    left = max(1, round(seconds - (time.monotonic() - began)))
    detect = None if peers.coordinator is None else "deactivate"
    try:
        jax.distributed.initialize(
            peers.coordinator,
            peers.processes,
            peers.index,
            None if peers.devices is None else list(peers.devices),
            cluster_detection_method=detect,
            initialization_timeout=left,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        if peers.coordinator is not None:
            raise
        raise ValueError(
            f"{peers.by}, but jax finds no other processes here: {error} Start it with srun, mpirun, on the workers of "
            f"a TPU pod or in a JobSet, or set {COORDINATOR} and its like (docs/many-hosts.md)"
        ) from error
    watch.joined()
    return peers


def leave_soon() -> bool:
    """Called where an error ends this process; whether it is one of several. Its end would wait for the others, which
    may wait for it: they have a few seconds to end of the same mistake, and are then ended as by any death."""
    if several := jax.distributed.is_initialized():
        threading.Thread(target=_leave, daemon=True).start()
    return several


def _leave() -> None:
    time.sleep(_LEAVE_SECONDS)
    os._exit(1)


def _join_seconds() -> int:
    given = os.environ.get(JOIN_SECONDS, str(_JOIN_SECONDS))
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"{JOIN_SECONDS}={given!r}: expected a number of seconds, at least 1")
    return int(given)


def _check_port(peers: Peers) -> None:
    """gRPC shares a port with whoever has it: two runs would meet there."""
    assert peers.coordinator is not None
    port = int(peers.coordinator.rpartition(":")[2])
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        with socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6):
            pass
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise ValueError(
            f"{COORDINATOR}={peers.coordinator} ({peers.by}): port {port} of this host, that of process 0, cannot be "
            f"had ({os.strerror(error.errno)}); set {COORDINATOR} to HOST:PORT with another for all processes"
        ) from error


def _await_coordinator(peers: Peers, seconds: int) -> None:
    """Return once process 0 listens. jax would abort the process where it does not, without naming what it tried."""
    assert peers.coordinator is not None
    host, _, port = peers.coordinator.rpartition(":")
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=max(0.1, end - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > end - 0.5:
                raise ValueError(
                    f"{COORDINATOR}={peers.coordinator} ({peers.by}): process {peers.index} of {peers.processes} has "
                    f"not reached process 0 there within {seconds} s ({error}). Was it started, does its host have "
                    f"that name, is the port open? {JOIN_SECONDS} waits longer, {DISTRIBUTED}=0 works alone"
                ) from error
        time.sleep(0.5)


class _Watch:
    """Another process that sees this one abort, and says why: jax's service gives a Python program no time to.

    Python's fault handler writes what it sees into a pipe; the watcher reads it and ends with the pipe.
    """

    def __init__(self, seconds: int) -> None:
        command = [sys.executable, "-I", "-S", "-c", _WATCHER, str(seconds)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE)
        assert self._process.stdin is not None
        self._pipe = self._process.stdin
        faulthandler.enable(file=self._pipe, all_threads=False)
        _watches.append(self)

    def joined(self) -> None:
        self._pipe.write(b"joined\n")
        self._pipe.flush()


_watches: list[_Watch] = []  # its pipe lives as long as the process
_WATCHER = """
import signal, sys
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
joined = crashed = False
for line in sys.stdin:
    joined = joined or line == "joined\\n"
    if line.startswith("Fatal Python error: Aborted"):
        if joined:
            text = (
                "this process was aborted, as jax does where another one of the run is lost. What that one, or its "
                "scheduler, said last tells why. The same command, started again on all, goes on from the last "
                "checkpoint."
            )
        else:
            text = f"not all processes of this run came together within {sys.argv[1]} s: has each been started?"
        print(f"deepseek-jax: {text}", file=sys.stderr, flush=True)
    crashed = crashed or line.startswith("Fatal Python error") and "Aborted" not in line
    if crashed:
        print(line, end="", file=sys.stderr, flush=True)
"""
