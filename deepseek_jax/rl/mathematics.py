r"""Mathematics whose answers are LaTeX or numbers: MATH, AIME and their like, compared by value."""

import functools
import logging
import os
import threading
import weakref
from collections.abc import Callable

from deepseek_jax.rl.answers import final_answer
from deepseek_jax.rl.rewards.named import NAMED, check_arguments
from deepseek_jax.rl.tasks import Row, Task, TaskConfig, make_rows_task
from deepseek_jax.rl.workers import WorkerPool

logger = logging.getLogger(__name__)

TEMPLATE = "{prompt}\nReason step by step, and put the final answer within \\boxed{}."
_SECONDS = 10.0


def make(config: TaskConfig) -> Task:
    """Columns `problem` and `answer` unless the configuration names others; an answer with a box (MATH's `solution`)
    is what stands in its last. Accuracy is what the reward `maths` says, in processes of its own."""
    check_arguments("maths", ())  # that math-verify is there
    rows = make_rows_task(config, prompt="problem", template=TEMPLATE, answer=right_answer)
    # Wrong answers are told apart by their text: one value written in two ways has two votes.
    said = lambda completion, row: final_answer(completion)[0] or None  # noqa: E731
    return Task(rows.ask, _Accuracy(rows.right), rows.right, ("maths=1.0", "format=0.2"), config.system, said)


class _Accuracy:
    """threads: how many calls at a time are worth making, as each waits for a process."""

    def __init__(self, right: Callable[[Row], str | None]):
        self._right, self._starting, self._told = right, threading.Lock(), False
        self.threads = min(4, os.cpu_count() or 1)

    @functools.cached_property
    def _pool(self) -> WorkerPool:
        """Started when first needed: training grades by the grader's own."""
        pool = WorkerPool([(str(NAMED["maths"].file), "score", 2)], count=self.threads, time_limit=_SECONDS)
        weakref.finalize(self, pool.close)
        return pool

    def __call__(self, completion: str, row: Row) -> float | None:
        right = self._right(row)
        if right is None:
            return None
        with self._starting:  # one of the threads makes it
            pool = self._pool
        (outcome,) = pool.call([(0, completion, {"answer": right})])
        if outcome.failure == "error" and not self._told:
            self._told = True
            logger.warning("maths: an answer is wrong because of an error (%s); said once", outcome.text)
        return outcome.value or 0.0  # what takes its time, breaks math-verify or ends the process is wrong


def right_answer(text: str) -> str:
    """What is boxed last; all of it where nothing is. ValueError where nothing is left."""
    found = final_answer(text)[0] if "\\boxed" in text else text.strip()
    if not found:
        raise ValueError(f"no answer in {text[-40:]!r}")
    return found
