"""Completions to rewards: rewards by specification, in this process or in one that can be killed."""

import dataclasses
import logging
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from deepseek_jax.rl.rewards import format_reward
from deepseek_jax.rl.tasks import Reward, Row, Steps, Task, split_function, where
from deepseek_jax.rl.workers import Outcome, WorkerPool

logger = logging.getLogger(__name__)

NAMES = ("accuracy", "format")
Score = float | Steps | None
_PLURALS = {"timeout": "timeouts", "crash": "crashes", "error": "errors"}


@dataclasses.dataclass(frozen=True)
class RewardSpec:
    """`NAME[=WEIGHT]` or `file.py:function[=WEIGHT]`, see ``parse_reward``; name: what metrics call it."""

    name: str
    weight: float
    source: tuple[str, str] | None = None  # file and function


def parse_reward(text: str) -> RewardSpec:
    """One of the package's rewards or a function of a file, and its weight (1 if left out).

    ValueError names an unknown reward, a missing file, and a weight that is no finite number.
    """
    found = re.fullmatch(r"(.+\.py:[^:/=]*|[^=]*?)(?:=([^=]*))?", text)
    if found is None:
        raise ValueError(f"reward {text!r}: expected NAME[=WEIGHT] or file.py:function[=WEIGHT]")
    name, spelled = found.groups()
    try:
        weight = float("1" if spelled is None else spelled)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(f"reward {text!r}: the weight {spelled!r} is no finite number")
    source = split_function(name)
    if source is not None:
        return RewardSpec(f"{Path(source[0]).stem}.{source[1]}", weight, source)
    if name not in NAMES:
        raise ValueError(f"reward {text!r}: expected one of {', '.join(NAMES)}, or file.py:function")
    return RewardSpec(name, weight)


@dataclasses.dataclass(frozen=True)
class Grades:
    """The rewards of n completions.

    total_N: Σ weight · reward of each (float64); a reward that has no score adds nothing.
    steps_N: of each the steps that rewards of steps gave, weighted.
    rewards: by name, unweighted, (n,), the sum of steps; NaN where the reward gave None or failed.
    failed_N: completions on which a call ended by timeout, crash or error. failures: by name, how many of each.
    """

    total_N: np.ndarray
    steps_N: Sequence[Steps]
    failed_N: np.ndarray
    rewards: Mapping[str, np.ndarray]
    failures: Mapping[str, Mapping[str, int]]

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Those of several calls of one grader, one behind the other."""
        first = parts[0]
        return cls(
            np.concatenate([part.total_N for part in parts]),
            [steps for part in parts for steps in part.steps_N],
            np.concatenate([part.failed_N for part in parts]),
            {name: np.concatenate([part.rewards[name] for part in parts]) for name in first.rewards},
            {name: sum((Counter(part.failures[name]) for part in parts), Counter()) for name in first.failures},
        )

    def metrics(self) -> dict[str, float]:
        """`reward`, the mean of the totals, steps included; `reward_NAME`, of what it graded (0 if nothing); the
        failures' counts."""
        total_N = self.total_N + [math.fsum(score for _, score in steps) for steps in self.steps_N]
        found = {"reward": float(total_N.mean())}
        for name, scores in self.rewards.items():
            found[f"reward_{name}"] = float(np.nanmean(scores)) if np.isfinite(scores).any() else 0.0
        for failure, plural in _PLURALS.items() if self.failures else ():
            found[f"reward_{plural}"] = float(sum(counts[failure] for counts in self.failures.values()))
        return found


class Grader:
    """Grades completions by one or several rewards.

        with Grader(("accuracy=1.0", "mine.py:score=0.5"), task=task) as grader:
            grades = grader.grade(completions, rows)

    A reward is `score(completion: str, row: Mapping) -> float | None`; None: the row is not graded by it. One of steps
    (a process reward) gives a list of (end, number), each step's end in characters of the completion. `accuracy` is
    the task's, `format` asks for thinking and a one-line answer. A function of a file runs in one of `workers`
    processes, and a call that takes more than `time_limit` seconds, or ends its process, has no score: that is
    counted, and the process is replaced. So is a call that raises, and the first of each reward is logged with its
    row; when every call of a reward in a batch raises or ends its process, the reward is taken to be wrong and `grade`
    raises ValueError.
    """

    def __init__(
        self, specs: Sequence[str], *, task: Task | None = None, time_limit: float = 10.0, workers: int | None = None
    ):
        self._specs = [parse_reward(text) for text in specs]
        counts = Counter(spec.name for spec in self._specs)
        if not counts or max(counts.values()) > 1:
            raise ValueError(f"rewards {', '.join(specs) or '()'}: expected at least one, none of the same name twice")
        if not 0 < time_limit < math.inf:
            raise ValueError(f"time_limit={time_limit}: expected seconds")
        self._here: dict[str, Reward] = {spec.name: _own(spec.name, task) for spec in self._specs if not spec.source}
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
        """ValueError for the first row that a reward of the package cannot use: better known before training."""
        for name in self._here:
            self._grade_here(name, [""] * len(rows), rows)

    def grade(self, completions: Sequence[str], rows: Sequence[Row], *, ended: Sequence[bool] | None = None) -> Grades:
        """The rewards of each completion, which answers the row at its place.

        ended: whether it ended by itself (by default all). The package's rewards take one that was cut off for an
        empty text, whatever it says so far; a function of a file gets it as it stands.
        """
        ended = [True] * len(rows) if ended is None else ended
        if not len(completions) == len(rows) == len(ended) or not rows:
            raise ValueError(f"{len(completions)} completions of {len(rows)} rows: expected as many, at least one")
        failures = {name: Counter[str]() for name in self._functions}
        whole = [text if end else "" for text, end in zip(completions, ended, strict=True)]
        scores = {name: self._grade_here(name, whole, rows) for name in self._here}
        failed_N = np.zeros(len(rows), bool)
        scores |= self._grade_there(completions, rows, failures, failed_N)
        rewards = {spec.name: np.array([*map(_summed, scores[spec.name])], np.float64) for spec in self._specs}
        total_N = np.array([self._total(scores, index) for index in range(len(rows))])
        steps_N = [self._steps(scores, index) for index in range(len(rows))]
        return Grades(total_N, steps_N, failed_N, rewards, failures)

    def _total(self, scores: Mapping[str, Sequence[Score]], index: int) -> float:
        given = ((spec.weight, scores[spec.name][index]) for spec in self._specs)
        return math.fsum(weight * score for weight, score in given if isinstance(score, int | float))

    def _steps(self, scores: Mapping[str, Sequence[Score]], index: int) -> Steps:
        given = ((spec.weight, scores[spec.name][index]) for spec in self._specs)
        return [(end, weight * score) for weight, steps in given if isinstance(steps, Sequence) for end, score in steps]

    def _grade_here(self, name: str, completions: Sequence[str], rows: Sequence[Row]) -> list[Score]:
        scores = []
        for completion, row in zip(completions, rows, strict=True):
            try:
                scores.append(self._here[name](completion, row))
            except ValueError as error:
                raise ValueError(f"{where(row)}: reward {name}: {error}") from error
        return scores

    def _grade_there(
        self,
        completions: Sequence[str],
        rows: Sequence[Row],
        failures: Mapping[str, Counter[str]],
        failed_N: np.ndarray,
    ) -> dict[str, list[Score]]:
        if self._pool is None:
            return {}
        answers = list(zip(completions, rows, strict=True))
        requests = [(index, *answer) for index in range(len(self._functions)) for answer in answers]
        outcomes = [
            _scored(outcome, text) for (_, text, _), outcome in zip(requests, self._pool.call(requests), strict=True)
        ]
        scores = {}
        for index, name in enumerate(self._functions):
            own = outcomes[index * len(rows) : (index + 1) * len(rows)]
            failures[name].update(outcome.failure for outcome in own if outcome.failure)
            failed_N |= [bool(outcome.failure) for outcome in own]
            self._report(name, own, rows)
            scores[name] = [outcome.value for outcome in own]
        return scores

    def _report(self, name: str, outcomes: Sequence[Outcome], rows: Sequence[Row]) -> None:
        if all(outcome.failure for outcome in outcomes):
            first = outcomes[0]
            raise ValueError(
                f"reward {name} fails for every completion; for {where(rows[0])}: {first.failure}: {first.text}"
            )
        for outcome, row in zip(outcomes, rows, strict=True):
            if outcome.failure and (name, outcome.failure) not in self._logged:
                self._logged.add((name, outcome.failure))
                what = (name, outcome.failure, where(row), outcome.text)
                logger.warning("reward %s: %s for %s (%s); from now on only counted", *what)


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


def _own(name: str, task: Task | None) -> Reward:
    if name == "format":
        return format_reward
    if task is None:
        raise ValueError("reward accuracy needs a task, which says what is right")
    return task.accuracy
