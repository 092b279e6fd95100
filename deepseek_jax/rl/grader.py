"""Completions to rewards: rewards by specification, in this process or in one that can be killed."""

import contextlib
import itertools
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np
from jax.sharding import Mesh

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.rl.grades import Grades
from deepseek_jax.rl.reward_spec import RewardSpec, parse_reward
from deepseek_jax.rl.rewards.model import ModelReward
from deepseek_jax.rl.rewards.named import NAMED
from deepseek_jax.rl.tasks import Reward, Row, Steps, Task, where
from deepseek_jax.rl.workers import Outcome, WorkerPool

logger = logging.getLogger(__name__)

Score = float | Steps | None
_Seen = tuple[str, Row]
_BY_ANSWER = ("timeout", "crash")  # how an answer ends a reward of the package
_FAILURES, _UNJUDGED = ("timeout", "crash", "error"), ("unjudged",)  # of a call of a file's, of a model's


class Grader:
    """Grades completions by one or several rewards.

        with Grader(("accuracy=1.0", "mine.py:score=0.5"), task=task) as grader:
            grades = grader.grade(completions, rows)

    A reward is `score(completion: str, row: Mapping) -> float | None`; None: the row is not graded by it. One of steps
    (a process reward) gives a list of (end, number), each step's end in characters of the completion. `accuracy` is
    the task's, the others of the package are in `rewards`; `model:PATH` is a reward model's (`ModelReward`), called
    `model.` and the last part of its path in metrics; an answer too long for it has no score, which is counted
    (`reward_unjudged`). A function of a file runs in one of `workers` processes, as
    `maths` does, and a call that takes more than `time_limit` seconds, or ends its process, has no score: that is
    counted, and the process is replaced. So is a call that raises, and the first of each reward is logged with its
    row; when every call of a reward in a batch raises or ends its process, the reward is taken to be wrong and `grade`
    raises ValueError. Where one of the package runs out of time or ends its process, the answer is to blame: 0, and
    counted. The first batch in which a reward has no score at all is logged too.
    """

    def __init__(
        self,
        specs: Sequence[str],
        *,
        task: Task | None = None,
        time_limit: float = 10.0,
        workers: int | None = None,
        compute: ComputeConfig = ComputeConfig(),
        mesh: Mesh | None = None,
    ):
        """compute, mesh: of reward models; by default one device."""
        self._specs = [parse_reward(text) for text in specs]
        counts = Counter(spec.name for spec in self._specs)
        if not counts or max(counts.values()) > 1:
            raise ValueError(f"rewards {', '.join(specs) or '()'}: expected at least one, none of the same name twice")
        if not 0 < time_limit < math.inf:
            raise ValueError(f"time_limit={time_limit}: expected seconds")
        for spec in self._specs:
            named = spec.named
            if task is None and named and (named.compares or named.several or spec.name == "accuracy"):
                raise ValueError(f"reward {spec.name} needs a task, which says what is right")
        self._task, self._devices = task, (compute, mesh)
        own = {spec.name: _own(spec, task) for spec in self._specs if not spec.source}
        self._models = {name: reward for name, reward in own.items() if isinstance(reward, ModelReward)}
        self._here = {name: reward for name, reward in own.items() if not isinstance(reward, ModelReward)}
        self._functions = {spec.name: spec.source for spec in self._specs if spec.source}
        self._logged: set[tuple[str, str]] = set()
        self._pool: WorkerPool | None = None
        if self._functions:
            sources = [(str(Path(file).resolve()), function, 2) for file, function in self._functions.values()]
            count = workers or min(4, os.cpu_count() or 1)
            self._pool = WorkerPool(sources, count=count, time_limit=time_limit)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes. It may be called twice."""
        if self._pool is not None:
            self._pool.close()

    def check(self, rows: Sequence[Row]) -> None:
        """ValueError for the first row that a reward of the package cannot use: better known before training. Rows
        without the right answer that it compares with are counted in a warning."""
        for spec in self._specs:
            seen = self._seen(spec, [""] * len(rows), rows, [True] * len(rows))
            if spec.name in self._here:
                scores = self._grade_here(spec.name, seen, rows)
                compares = spec.name == "accuracy" or (spec.named is not None and spec.named.compares)
                if compares and (apart := sum(score is None for score in scores)):
                    logger.warning("reward %s does not apply to %d of %d rows", spec.name, apart, len(rows))

    def grade(
        self,
        completions: Sequence[str],
        rows: Sequence[Row],
        *,
        ended: Sequence[bool] | None = None,
        whole: Sequence[str] | None = None,
    ) -> Grades:
        """The rewards of each completion, which answers the row at its place.

        ended: whether it ended by itself (by default all). The package's rewards of answers take one that was cut off
        for an empty text, whatever it says so far; those of how it is written, and functions of files, get it as it
        stands.

        whole: all turns of each, where the completion is the last (by default it is all); that is what a reward model
        gets which judges everything.
        """
        ended = [True] * len(rows) if ended is None else ended
        if not len(completions) == len(rows) == len(ended) or not rows:
            raise ValueError(f"{len(completions)} completions of {len(rows)} rows: expected as many, at least one")
        failures = {name: Counter(dict.fromkeys(_FAILURES, 0)) for name in self._functions}
        failures |= {name: Counter(dict.fromkeys(_UNJUDGED, 0)) for name in self._models}
        seen = {spec.name: self._seen(spec, completions, rows, ended) for spec in self._specs}
        everything = list(zip(completions if whole is None else whole, rows, strict=True))
        seen |= {name: everything for name, model in self._models.items() if model.judges == "all"}
        scores: dict[str, Sequence[Score]] = {name: self._grade_here(name, seen[name], rows) for name in self._here}
        failed_N = np.zeros(len(rows), bool)
        for name, outcomes in itertools.chain(self._judge(seen, rows), self._grade_there(seen, rows)):
            scores[name] = self._settle(name, outcomes, rows, failures, failed_N)
        rewards = {spec.name: np.array([*map(_summed, scores[spec.name])], np.float64) for spec in self._specs}
        self._report_none(rewards, failed_N)
        total_N = np.array([self._total(scores, index) for index in range(len(rows))])
        steps_N = [self._steps(scores, index) for index in range(len(rows))]
        return Grades(total_N, steps_N, failed_N, rewards, failures)

    def _total(self, scores: Mapping[str, Sequence[Score]], index: int) -> float:
        given = ((spec.weight, scores[spec.name][index]) for spec in self._specs)
        return math.fsum(weight * score for weight, score in given if isinstance(score, int | float))

    def _steps(self, scores: Mapping[str, Sequence[Score]], index: int) -> Steps:
        given = ((spec.weight, scores[spec.name][index]) for spec in self._specs)
        return [(end, weight * score) for weight, steps in given if isinstance(steps, Sequence) for end, score in steps]

    def _seen(
        self, spec: RewardSpec, completions: Sequence[str], rows: Sequence[Row], ended: Sequence[bool]
    ) -> list[_Seen]:
        """What a reward gets of each completion and its row, see ``Named``."""
        named = spec.named
        if named is not None and not named.cut:
            completions = [text if end else "" for text, end in zip(completions, ended, strict=True)]
        if named is None or not named.compares:
            return list(zip(completions, rows, strict=True))
        assert self._task is not None
        answers = []
        for row in rows:
            with _telling(spec.name, row):
                answers.append({"answer": self._task.right(row)})
        return list(zip(completions, answers, strict=True))

    def _grade_here(self, name: str, seen: Sequence[_Seen], rows: Sequence[Row]) -> Sequence[Score]:
        reward = self._here[name]

        def score(arguments: _Seen, row: Row) -> Score:
            with _telling(name, row):
                return reward(*arguments)

        with ThreadPoolExecutor(getattr(reward, "threads", 1), thread_name_prefix="reward") as threads:
            return list(threads.map(score, seen, rows))

    def _judge(
        self, seen: Mapping[str, Sequence[_Seen]], rows: Sequence[Row]
    ) -> Iterator[tuple[str, Sequence[Outcome]]]:
        for name, model in self._models.items():
            assert self._task is not None
            model.open(*self._devices)
            yield name, model.score_all([text for text, _ in seen[name]], rows, self._task)

    def _grade_there(
        self, seen: Mapping[str, Sequence[_Seen]], rows: Sequence[Row]
    ) -> Iterator[tuple[str, Sequence[Outcome]]]:
        if self._pool is None:
            return
        requests = [(index, *arguments) for index, name in enumerate(self._functions) for arguments in seen[name]]
        outcomes = [
            _scored(outcome, text) for (_, text, _), outcome in zip(requests, self._pool.call(requests), strict=True)
        ]
        for index, name in enumerate(self._functions):
            own = outcomes[index * len(rows) : (index + 1) * len(rows)]
            if name in NAMED:
                own = [outcome._replace(value=0.0) if outcome.failure in _BY_ANSWER else outcome for outcome in own]
            if all(outcome.failure and outcome.value is None for outcome in own):
                what = f"for {where(rows[0])}: {own[0].failure}: {own[0].text}"
                raise ValueError(f"reward {name} fails for every completion; {what}")
            yield name, own

    def _settle(
        self,
        name: str,
        outcomes: Sequence[Outcome],
        rows: Sequence[Row],
        failures: Mapping[str, Counter[str]],
        failed_N: np.ndarray,
    ) -> list[Score]:
        """The scores; what failed is counted and marked, and the first of each kind told."""
        failures[name].update(outcome.failure for outcome in outcomes if outcome.failure)
        failed_N |= [outcome.failure != "" and outcome.value is None for outcome in outcomes]
        for outcome, row in zip(outcomes, rows, strict=True):
            if outcome.failure and (name, outcome.failure) not in self._logged:
                self._logged.add((name, outcome.failure))
                what = (name, outcome.failure, where(row), outcome.text)
                logger.warning("reward %s: %s for %s (%s); from now on only counted", *what)
        return [outcome.value for outcome in outcomes]

    def _report_none(self, rewards: Mapping[str, np.ndarray], failed_N: np.ndarray) -> None:
        """Say once of a reward that it has no score for any of a batch: None alone, as from a forgotten return."""
        for name, scores in rewards.items():
            if np.isnan(scores).all() and not failed_N.any() and (name, "none") not in self._logged:
                self._logged.add((name, "none"))
                message = "reward %s: None for all %d completions of a batch, which it teaches nothing; said once"
                logger.warning(message, name, len(scores))


def _scored(outcome: Outcome, completion: str) -> Outcome:
    """The outcome, its value a float, steps or None; a value that is no score is an error."""
    value = outcome.value
    if value is None:
        return outcome
    if _is_number(value):
        return Outcome(float(value))
    if not isinstance(value, list):
        return Outcome(None, "error", f"returned {value!r:.200}; a score is a finite number or None")
    for step in value:
        pair = isinstance(step, list) and len(step) == 2 and all(map(_is_number, step))
        if not pair or step[0] not in range(len(completion) + 1):
            what = f"is no (end, number) of a step, with an end of 0…{len(completion)} characters"
            return Outcome(None, "error", f"returned a list in which {step!r:.200} {what}")
    return Outcome([(int(end), float(score)) for end, score in value])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _summed(score: Score) -> float:
    """As a number, NaN for None."""
    if isinstance(score, Sequence):
        return math.fsum(number for _, number in score)
    return math.nan if score is None else score


@contextlib.contextmanager
def _telling(name: str, row: Row) -> Iterator[None]:
    """A ValueError inside says of which reward and row it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where(row)}: reward {name}: {error}") from error


def _own(spec: RewardSpec, task: Task | None) -> Reward | ModelReward:
    if spec.named is not None and spec.named.make is not None:
        return spec.named.make(*spec.arguments)
    assert task is not None
    return task.accuracy
