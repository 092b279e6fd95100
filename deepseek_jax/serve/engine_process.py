"""The engine's process: steps while there is anything to do, sleeps while there is not, and has the HTTP process as its
child."""

import contextlib
import dataclasses
import importlib.util
import selectors
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import jax

from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.events import Event
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.saying import say
from deepseek_jax.serve.asking import Served
from deepseek_jax.serve.config import ServeConfig
from deepseek_jax.serve.link import Closed, Frame, Link

_FAILURES = 3  # of steps, one after another, after which a new process is what helps
_IMPORTED = ("fastapi", "uvicorn", "httptools", "prometheus_client", "msgpack")  # by the child
_SECONDS = 10  # that the child is given to end by itself


class HttpProcess:
    """The child, and the address that it listens at; where the context is left, it is killed.

    OSError where the address is taken, OSError and ValueError of ``config.keys``, ValueError where what the child
    imports is not installed, before anything is loaded.
    """

    _child: subprocess.Popen[bytes] | None = None
    link: Link

    def __init__(self, config: ServeConfig):
        lacking = [name for name in _IMPORTED if importlib.util.find_spec(name) is None]
        if lacking:
            raise ValueError(f"not installed: {', '.join(lacking)}: pip install 'deepseek-jax[serve]'")
        config.keys()  # a file that cannot be read is told before anything is loaded, too
        self.config = config
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        self._listening = socket.socket(family)
        self._listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._listening.bind((config.host, config.port))
        except OSError as error:
            raise OSError(error.errno, f"{config.host}:{config.port}: {error.strerror}") from error
        self._listening.listen(config.connections)
        host = f"[{config.host}]" if ":" in config.host else config.host
        self.url = f"http://{host}:{self._listening.getsockname()[1]}"

    def start(self, tokenizer: str, chat_template: str, vocab_size: int) -> None:
        """Until it is told ``ready``, it answers that it is loading.

        tokenizer: a folder or file that the child reads, too.
        """
        ours, theirs = socket.socketpair()
        ends = self._listening.fileno(), theirs.fileno()
        command = [sys.executable, "-m", "deepseek_jax.serve.http_process", *map(str, ends)]
        # A terminal's Ctrl-C is for this process, which then tells the child.
        self._child = subprocess.Popen(command, pass_fds=ends, stdin=subprocess.DEVNULL, process_group=0)
        theirs.close()
        self._listening.close()
        self.link = Link(ours)
        start = {"tokenizer": tokenizer, "chat_template": chat_template, "vocab_size": vocab_size}
        self.link.send({"start": start | {"config": dataclasses.asdict(self.config)}})

    def check(self) -> None:
        """RuntimeError where it has ended: what loads or compiles for it need not go on."""
        assert self._child is not None
        if (status := self._child.poll()) is not None:
            raise RuntimeError(f"the HTTP process has ended, with status {status}")

    def end(self) -> int:
        """Its exit status, at its end or at the end of patience."""
        assert self._child is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._child.wait(_SECONDS)
        return self.kill()

    def kill(self) -> int:
        """Its exit status."""
        assert self._child is not None
        self._child.kill()
        return self._child.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._listening.close()
        if self._child is not None:
            self.kill()
            self.link.close()


class Stopping:
    """Counts how often this process was asked to stop; a selector wakes. While entered, SIGTERM and SIGINT ask, and the
    second one is KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.count = 0
        self._woken, self._wakes = socket.socketpair()
        self._wakes.setblocking(False)

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        self._fd = signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.set_wakeup_fd(self._fd)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self.close()

    def fileno(self) -> int:
        return self._woken.fileno()

    def close(self) -> None:
        self._woken.close()
        self._wakes.close()

    def clear(self) -> None:
        """It has been seen."""
        self._woken.recv(64)

    def ask(self) -> None:
        """As a signal does, from any thread."""
        self.count += 1
        self._wakes.send(b"x")

    def _note(self, number: int, frame: Any) -> None:
        self.count += 1
        if self.count > 1:
            raise KeyboardInterrupt("stopped at once")


def run(engine: Engine, http: HttpProcess, served: Served, stopping: Stopping, ready: Callable[[], None]) -> None:
    """Answer until told to stop. ready: called when the child refuses nobody any more for loading.

    Returns when all answers have ended; KeyboardInterrupt when told twice; RuntimeError where the child has ended by
    itself, or steps fail again and again."""
    told = False
    desk = Desk(engine, http.link.send)
    waiting = selectors.DefaultSelector()
    for end in (http.link, stopping):
        waiting.register(end, selectors.EVENT_READ)
    try:
        http.link.send({"ready": dataclasses.asdict(served)})
        while True:
            readable = {key.fileobj for key, _ in waiting.select(0 if engine.busy else None)}
            if stopping in readable:
                stopping.clear()
            if stopping.count and not told:
                told = True
                say("ending: answers that are under way are finished, others refused (once more: at once)")
                http.link.send({"drain": True})
            if http.link in readable:
                for frame in http.link.receive():
                    ready() if frame["op"] == "ready" else desk.take(frame)
            if engine.busy:
                desk.step()
    except Closed:
        status = http.end()
        if not told:
            raise RuntimeError(f"the HTTP process has ended, with status {status}") from None
    finally:
        waiting.close()


class Desk:
    """The HTTP process's requests, by its keys and the engine's numbers."""

    def __init__(self, engine: Engine, send: Callable[[Frame], None]):
        self._engine, self._send = engine, send
        self._numbers: dict[int, int] = {}
        self._keys: dict[int, int] = {}
        self._failures = 0

    def take(self, frame: Frame) -> None:
        """Do what it says."""
        if frame["op"] == "submit":
            self._submit(frame)
        elif frame["op"] == "cancel":
            if (number := self._numbers.get(frame["key"])) is not None:  # else it has just ended
                self._engine.cancel(number)
        else:
            assert frame["op"] == "metrics", frame["op"]
            self._send({"metrics": self._engine.metrics()})

    def _submit(self, frame: Frame) -> None:
        key = frame["key"]
        try:
            if behind := frame["sampling"].pop("behind", None):
                self._engine.held_to(SamplingParams(**behind))
            place = {"draw": frame["draw"], "begun": frame["sampling"].pop("begun", 0)}
            number = self._engine.submit(frame["ids"], sampling_of(frame["sampling"]), **place)
        except ValueError as error:
            self._send({"refused": key, "message": str(error)})
            return
        self._numbers[key], self._keys[number] = number, key
        self._send({"events": [[key, []]]})

    def step(self) -> None:
        """One of the engine's, told in one frame. A step that fails is tried again, as the engine does it; but where
        other processes have taken it, this one cannot go on with them."""
        try:
            brought = self._engine.step()
            if any(event.finish_reason != "cancelled" for event in brought):  # a step that is sent may still fail
                self._failures = 0
        except Closed:
            raise
        except Exception as error:
            self._failures += 1
            say(f"a step has failed ({self._failures}): {''.join(traceback.format_exception(error))}")
            if self._failures >= (most := _FAILURES if jax.process_count() == 1 else 1):
                raise RuntimeError(f"{most} steps one after another have failed, the last: {error}") from error
            return
        events = [event for event in brought if event.number in self._keys]
        if told := [self._told(event) for event in events if not event.error]:
            self._send({"events": told})
        for event in filter(lambda event: event.error, events):
            self._send({"lost" if event.ours else "refused": self._told(event)[0], "message": event.error})

    def _told(self, event: Event) -> list[Any]:
        key = self._keys[event.number]
        if event.finish_reason:
            del self._keys[event.number], self._numbers[key]
        prompt = None if event.prompt is None else [event.prompt.logprobs, event.prompt.alternatives]
        return [key, event.token_ids, event.logprobs, event.alternatives, event.finish_reason, event.cached, prompt]


def sampling_of(fields: dict[str, Any]) -> SamplingParams:
    """``SamplingParams`` of what came as lists. ValueError: they are none."""
    biases = tuple((token, bias) for token, bias in fields.pop("logit_bias", ()))
    return SamplingParams(**fields | {"stop_token_ids": tuple(fields.get("stop_token_ids", ())), "logit_bias": biases})
