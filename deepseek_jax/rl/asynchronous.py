"""Rollouts ahead of the training: a thread samples and grades while the devices train on what was sampled before."""

import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from deepseek_jax.inference.engine import Engine
from deepseek_jax.train.state import TrainState

T = TypeVar("T")
# (engine with the policy, step that it is for, to be called when the devices have been given the sampling)
Make = Callable[[Engine, int, Callable[[], None]], T]


@dataclasses.dataclass(frozen=True)
class _Job(Generic[T]):
    policy: int  # the step that it is of
    begun: threading.Event
    made: Future[T]


class Ahead(Generic[T]):
    """What each step trains on, made with the policy of ``len(engines)`` updates before.

    Of step t that is always the policy of step t - n, or the one that this process began with where that is newer: so
    a run that is repeated is the same, whichever thread was the faster. Policies wait as their engines' weights: as
    many copies as updates, and none beside what rollouts need at once where that is one.

    The devices are given the sampling before the step that runs beside it, and work in this order: what no longer holds
    them up is the grading.
    """

    def __init__(self, make: Make[T], engines: Sequence[Engine], *, steps: int):
        """steps: of the run; nothing is made for those behind its last."""
        self._make, self._engines, self._steps = make, engines, steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._jobs: deque[_Job[T]] = deque()  # in the order of steps
        self._closed = threading.Event()

    def take(self, state: TrainState) -> tuple[T, int]:
        """What the state's step trains on, and how many updates old its policy is; raises what making it did.

        ``state`` may be donated afterwards: what is made with it later is made with a copy.
        """
        step, behind, first = int(state.step), len(self._engines), not self._jobs
        if first:  # what is behind it is by the same policy
            self._publish(state, range(step, step + behind + 1))
        job = self._jobs.popleft()
        made = job.made.result()  # from here on nothing reads the engine of step - behind
        if not first:
            self._publish(state, range(step + behind, step + behind + 1))
        running = next((job for job in self._jobs if not job.made.done()), None)
        if running is not None:
            running.begun.wait()
        return made, step - job.policy

    def _publish(self, state: TrainState, steps: range) -> None:
        """Have the thread make what these steps need with the state's policy."""
        policy = int(state.step)
        engine = self._engines[policy % len(self._engines)]
        engine.update(state.params, state.router_bias)
        for step in steps:
            if step < self._steps:
                begun = threading.Event()
                self._jobs.append(_Job(policy, begun, self._thread.submit(self._run, engine, step, begun)))

    def _run(self, engine: Engine, step: int, begun: threading.Event) -> T:
        def dispatched() -> None:
            begun.set()
            if self._closed.is_set():
                raise CancelledError

        try:
            return self._make(engine, step, dispatched)
        finally:
            begun.set()

    def close(self) -> None:
        """End the thread, which finishes what it samples or grades just now."""
        self._closed.set()
        self._thread.shutdown(cancel_futures=True)
