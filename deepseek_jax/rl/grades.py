"""What a grader found of a batch of completions."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from deepseek_jax.rl.tasks import Steps

_PLURALS = {"timeout": "timeouts", "crash": "crashes", "error": "errors", "unjudged": "unjudged"}


@dataclasses.dataclass(frozen=True)
class Grades:
    """The rewards of n completions.

    total_N: Σ weight · reward of each (float64); a reward that has no score adds nothing.
    steps_N: of each the steps that rewards of steps gave, weighted.
    rewards: by name, unweighted, (n,), the sum of steps; NaN where the reward gave None or failed.
    failed_N: completions on which a call ended by timeout, crash or error, or which a model cannot judge. failures: by
    name, how many of each.
    """

    total_N: np.ndarray
    steps_N: Sequence[Steps]
    failed_N: np.ndarray
    rewards: Mapping[str, np.ndarray]
    failures: Mapping[str, Mapping[str, int]]

    def to_json(self) -> dict[str, Any]:
        """For another process, whose ``from_json`` makes the same of it."""
        return {
            "total_N": self.total_N.tolist(),
            "steps_N": [[*map(list, steps)] for steps in self.steps_N],
            "failed_N": self.failed_N.tolist(),
            "rewards": {name: scores.tolist() for name, scores in self.rewards.items()},
            "failures": {name: dict(counts) for name, counts in self.failures.items()},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        return cls(
            np.array(content["total_N"], np.float64),
            [[(end, score) for end, score in steps] for steps in content["steps_N"]],
            np.array(content["failed_N"], bool),
            {name: np.array(scores, np.float64) for name, scores in content["rewards"].items()},
            content["failures"],
        )

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Those of several calls of one grader, or of each process's, one behind the other."""
        first = parts[0]
        return cls(
            np.concatenate([part.total_N for part in parts]),
            [steps for part in parts for steps in part.steps_N],
            np.concatenate([part.failed_N for part in parts]),
            {name: np.concatenate([part.rewards[name] for part in parts]) for name in first.rewards},
            {
                name: {kind: sum(part.failures[name][kind] for part in parts) for kind in kinds}
                for name, kinds in first.failures.items()
            },
        )

    def metrics(self) -> dict[str, float]:
        """`reward`, the mean of the totals, steps included; `reward_NAME`, of what it graded (0 if nothing); the
        failures' counts."""
        total_N = self.total_N + [math.fsum(score for _, score in steps) for steps in self.steps_N]
        found = {"reward": float(total_N.mean())}
        for name, scores in self.rewards.items():
            found[f"reward_{name}"] = float(np.nanmean(scores)) if np.isfinite(scores).any() else 0.0
        for counts in self.failures.values():
            for kind, count in counts.items():
                found[f"reward_{_PLURALS[kind]}"] = found.get(f"reward_{_PLURALS[kind]}", 0.0) + count
        return found
