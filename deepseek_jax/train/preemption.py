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


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The SIGTERMs and SIGINTs received: the first is only noted, a second one raises KeyboardInterrupt."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt(f"second {signal.Signals(number).name}: stopped without saving")
        text = f"\n{signal.Signals(number).name}: finishing this step and saving; again to stop at once\n"
        os.write(2, text.encode())  # print is not safe within a signal handler

    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield received
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
