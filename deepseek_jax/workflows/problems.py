"""Held-out accuracy at the end of a stage: greedy and sampled, with samples to look at."""

import dataclasses
from pathlib import Path
from typing import Any

from deepseek_jax.checkpoint.model import Model
from deepseek_jax.config import check_types
from deepseek_jax.evals.accuracy import accuracy, accuracy_by_kind, answer
from deepseek_jax.rl.problems import read_jsonl
from deepseek_jax.workflows.stage import write_samples


@dataclasses.dataclass(frozen=True)
class ProblemEval:
    """path: held-out problems, empty for none. max_tokens: of an answer. keep_samples: completions of each mode to
    write down."""

    path: str = ""
    max_tokens: int = 32
    batch_size: int = 128
    keep_samples: int = 24

    def __post_init__(self) -> None:
        check_types(self)


def evaluate_problems(model: Model, config: ProblemEval, run_dir: Path, *, stage: str, seed: int) -> dict[str, Any]:
    """Accuracy and standard error over all held-out problems, greedy and sampled at temperature 1; by kind as well."""
    if not config.path:
        return {}
    problems = read_jsonl(config.path)
    found: dict[str, Any] = {"problems": len(problems), "by_kind": {}}
    for mode, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        answered = answer(
            model,
            problems,
            max_tokens=config.max_tokens,
            temperature=temperature,
            batch_size=config.batch_size,
            seed=seed,
        )
        found[f"accuracy_{mode}"], found[f"accuracy_{mode}_stderr"] = accuracy(answered)
        for kind, share in accuracy_by_kind(answered).items():
            found["by_kind"].setdefault(kind, {})[mode] = share
        write_samples(run_dir / "samples.jsonl", stage, "after", mode, answered[: config.keep_samples])
    return found
