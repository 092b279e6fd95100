"""Stop a run from outside without losing a step."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PATIENCE = 0.5  # seconds in which the main thread may take a signal itself


class Preempted(KeyboardInterrupt):
    """A signal to this process, or to another of the run, ended it after `step`; a checkpoint of that step is saved."""

    def __init__(self, number: int, step: int, directory: object) -> None:
        super().__init__(
            f"{signal.Signals(number).name}: stopped after step {step}, saved in {directory}; "
            "the same command goes on from there"
        )
        self.signal, self.step = number, step


class Stop:
    """The SIGTERMs and SIGINTs received. One raises KeyboardInterrupt, or is noted while there is a step to finish."""

    def __init__(self, when: str) -> None:
        self.when, self.saving, self.received = when, False, list[int]()

    @property
    def number(self) -> int:
        """Of the first, 0 where none has come."""
        return self.received[0] if self.received else 0

    def note(self, number: int, frame: object) -> None:
        del frame
        self.received.append(number)
        name = signal.Signals(number).name
        if not self.saving:
            raise KeyboardInterrupt(f"{name}: stopped{self.when}")
        if len(self.received) > 1:
            raise KeyboardInterrupt(f"second {name}: stopped without saving")
        text = f"\n{name}: finishing this step and saving; again to stop at once\n"
        os.write(2, text.encode())  # print is not safe within a signal handler


@contextmanager
def stop_signals(when: str) -> Iterator[Stop]:
    """Receive them: at first one raises at once, saying `when`; from `saving = True` on the first is only noted.

    Python hands a signal on when the call that it met has returned; of the compiler's that may be minutes. So a thread
    says meanwhile that it came, and ends the process at a second one.
    """
    stop = Stop(when)
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield stop
        return
    before = {number: signal.signal(number, stop.note) for number in _SIGNALS}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    listened = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_listen, args=(reader, stop), daemon=True)
    thread.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(listened)
        os.write(writer, b"\0")  # not its closing: a process that was forked may hold it too
        thread.join()
        os.close(writer)
        os.close(reader)
        for number, handler in before.items():  # one that was not set from Python is not to be had
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _listen(reader: int, stop: Stop) -> None:
    """Of the signals whose numbers come through a pipe, tell those that the main thread has no time for."""
    told = False
    while (number := os.read(reader, 1)) != b"\0":
        if number[0] not in _SIGNALS or stop.saving or stop.received:
            continue
        name = signal.Signals(number[0]).name
        if told:
            os.write(2, f"\nsecond {name}: stopped at once\n".encode())
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(128 + number[0])
        time.sleep(_PATIENCE)
        if not stop.received:
            os.write(2, f"\n{name}: stopping as soon as the compiler returns; again to stop at once\n".encode())
            told = True
