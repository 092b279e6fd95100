"""Stop a run from outside without losing a step."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Preempted(KeyboardInterrupt):
    """A signal ended the run after `step`; a checkpoint of that step is saved."""

    def __init__(self, number: int, step: int, directory: Path) -> None:
        super().__init__(
            f"{signal.Signals(number).name}: stopped after step {step}, saved in {directory}; "
            "the same command goes on from there"
        )
        self.signal, self.step = number, step


class Stop:
    """The SIGTERMs and SIGINTs received. One raises KeyboardInterrupt, or is noted while there is a step to finish."""

    def __init__(self, when: str) -> None:
        self.when, self.saving, self.received = when, False, list[int]()

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
    """Receive them: at first one raises at once, saying `when`; from `saving = True` on the first is only noted."""
    stop = Stop(when)
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield stop
        return
    before = {number: signal.signal(number, stop.note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
