"""What a run has written so far."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.files import read_json_lines, read_json_object
from deepseek_jax.train.metrics import FILE_NAME, read_metrics
from deepseek_jax.train.run_lock import is_held

TITLES = {"pretrain": "Pretraining", "sft": "SFT", "grpo": "GRPO"}
DEMO_TITLES = TITLES | {"sft": "Cold-start SFT"}
EXPERT_SHARES = "experts.json"  # which experts serve which kind of token


@dataclass(frozen=True)
class Stage:
    """What a stage has written so far; everything may be missing while the run is still going."""

    name: str
    title: str
    metrics: list[dict[str, Any]]
    result: dict[str, Any]
    samples: list[dict[str, Any]]
    experts: dict[str, Any]
    config: dict[str, Any]
    running: bool
    """Whether a process holds its folder."""

    @property
    def status(self) -> str:
        if self.result:
            return "finished"
        if self.running:
            return f"running, step {self.last_step:,}" if self.metrics else "running, no step logged yet"
        return f"stopped at step {self.last_step:,}" if self.metrics else "not started"

    @property
    def last_step(self) -> int:
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    def number(self, key: str) -> float | None:
        """The final `key`, or the last logged one while the stage has no result; of speeds the median."""
        if key in self.result:
            return self.result[key]
        if key == "tokens_per_second":
            points = self.points(key)
            return float(np.median(points[:, 1])) if len(points) else None
        logged = [line[name] for line in self.metrics for name in (f"eval/{key}", key) if name in line]
        return logged[-1] if logged else None

    def points(self, key: str, scale: float = 1.0, *, over: str = "step") -> np.ndarray:
        """(points, 3): step (or what else of a line is named), value, standard error of a logged scalar, non-finite
        values left out."""
        lines = [line for line in self.metrics if key in line and over in line]
        rows = [(line[over], line[key], line.get(f"{key}_stderr", 0.0)) for line in lines]
        points = np.array(rows, np.float64).reshape(-1, 3) * (1.0, scale, scale)
        return points[np.isfinite(points).all(axis=1)]

    def logs(self, *keys: str) -> bool:
        """Whether any of these has been logged."""
        return any(key in line for line in self.metrics for key in keys)

    def evaluations(self) -> list[str]:
        """The ``eval/...`` that have been logged, in their order, without accuracies and standard errors."""
        found = dict.fromkeys(key for line in self.metrics for key in line if key.startswith("eval/"))
        return [key for key in found if not key.startswith("eval/accuracy_") and not key.endswith("_stderr")]

    def rewards(self) -> list[str]:
        """The names of the rewards that graded, in their order; see ``Grades.metrics``."""
        counts = ("timeouts", "crashes", "errors")
        found = dict.fromkeys(key for line in self.metrics for key in line if key.startswith("reward_"))
        return [name for key in found if (name := key.removeprefix("reward_")) not in counts]

    def loads(self) -> np.ndarray | None:
        """(logged steps, MoE layers, experts): the share of each expert, or None."""
        loads = [line["load"] for line in self.metrics if "load" in line]
        return np.array(loads, np.float64) if loads else None


def read_stages(run_dir: Path) -> list[Stage]:
    """The stages of a demo's folder in their order, whether they have begun or not, or the one of a stage's own folder.

    FileNotFoundError where there is no folder, ValueError where there is no run in it.
    """
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir} does not exist" if not run_dir.exists() else f"{run_dir} is no folder")
    if name := str(read_json_object(run_dir / "config.json").get("stage", "")):
        return [_read_stage(run_dir, name, TITLES.get(name, name))]
    if not any((run_dir / name).is_dir() for name in DEMO_TITLES):
        raise ValueError(
            f"{run_dir} holds no run: neither a stage's config.json, which is written before its first step, nor "
            f"{', '.join(DEMO_TITLES)} of a demo"
        )
    return [_read_stage(run_dir / name, name, title) for name, title in DEMO_TITLES.items()]


def _read_stage(folder: Path, name: str, title: str) -> Stage:
    return Stage(
        name,
        title,
        read_metrics(folder) if (folder / FILE_NAME).exists() else [],
        read_json_object(folder / "result.json"),
        _lines(folder / "samples.jsonl"),
        read_json_object(folder / EXPERT_SHARES),
        read_json_object(folder / "config.json"),
        is_held(folder),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    return read_json_lines(path) if path.exists() else []
