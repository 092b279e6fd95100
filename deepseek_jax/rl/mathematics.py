r"""Mathematics whose answers are LaTeX or numbers: MATH, AIME and their like, compared by value."""

import logging
import weakref

from deepseek_jax.rl.answers import final_answer
from deepseek_jax.rl.rewards.named import NAMED, check_arguments
from deepseek_jax.rl.tasks import Row, Task, TaskConfig, make_rows_task
from deepseek_jax.rl.workers import WorkerPool

logger = logging.getLogger(__name__)

TEMPLATE = "{prompt}\nReason step by step, and put the final answer within \\boxed{}."
_SECONDS = 10.0


def make(config: TaskConfig) -> Task:
    """Columns `problem` and `answer` unless the configuration names others; an answer with a box (MATH's `solution`)
    is what stands in its last. Accuracy is what the reward `maths` says, in a process of its own."""
    check_arguments("maths", ())  # that math-verify is there
    told: list[str] = []
    rows = make_rows_task(config, prompt="problem", template=TEMPLATE, answer=right_answer)
    pool: list[WorkerPool] = []  # started when first needed: training grades by the grader's own

    def accuracy(completion: str, row: Row) -> float | None:
        right = rows.right(row)
        if right is None:
            return None
        if not pool:
            pool.append(WorkerPool([(str(NAMED["maths"].file), "score", 2)], count=1, time_limit=_SECONDS))
            weakref.finalize(accuracy, pool[0].close)
        (outcome,) = pool[0].call([(0, completion, {"answer": right})])
        if outcome.failure == "error" and not told:
            told.append(outcome.text)
            logger.warning("maths: an answer is wrong because of an error (%s); said once", outcome.text)
        return outcome.value or 0.0  # what takes its time, breaks math-verify or ends the process is wrong

    # Wrong answers are told apart by their text: one value written in two ways has two votes.
    said = lambda completion, row: final_answer(completion)[0] or None  # noqa: E731
    return Task(rows.ask, accuracy, rows.right, ("maths=1.0", "format=0.2"), config.system, said)


def right_answer(text: str) -> str:
    """What is boxed last; all of it where nothing is. ValueError where nothing is left."""
    found = final_answer(text)[0] if "\\boxed" in text else text.strip()
    if not found:
        raise ValueError(f"no answer in {text[-40:]!r}")
    return found
