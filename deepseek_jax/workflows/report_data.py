"""What a run has written so far."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deepseek_jax.files import read_json_lines, read_json_object
from deepseek_jax.train.metrics import FILE_NAME, read_metrics
from deepseek_jax.train.run_lock import is_held
from deepseek_jax.workflows.report_rollouts import Rollouts, read_rollouts

DEMO_TITLES = {"pretrain": "Pretraining", "sft": "Cold-start SFT", "grpo": "GRPO"}
TITLES = {  # of runs by what they are, and of R1's stages by their folders, in their order
    "data": "Data",
    "pretrain": "Pretraining",
    "zero": "R1-Zero",
    "zero_longer": "R1-Zero, longer answers",
    "cold_start_samples": "Cold-start samples",
    "cold_start": "Cold start",
    "reasoning": "Reasoning RL",
    "samples": "Samples",
    "sft": "SFT",
    "grpo": "GRPO",
    "ppo": "PPO",
    "reward_model": "Reward model",
    "rejection": "Rejection sampling",
    "helpful": "Helpfulness",
    "harmless": "Harmlessness",
    "all_scenarios": "RL for all scenarios",
    "preferences": "RL with preferences",
    "student_base": "Student's base",
    "student": "Student",
    "eval": "Evaluation",
    "evaluation": "Evaluation",
}
SERIES = "r1.json"  # of a folder whose sub-folders are runs: their names in their order, as "stages"
SHOWN_ROLLOUTS = 240  # of a stage
SCALING = "scaling.json"  # accuracy against what an answer may cost
EXPERT_SHARES = "experts.json"  # which experts serve which kind of token
_TELLING = {"settings.json": "eval", SCALING: "scaling", "kept.jsonl": "rejection"}  # files of what is no stage


@dataclass(frozen=True)
class Stage:
    """What a stage has written so far; everything may be missing while the run is still going."""

    name: str
    """What it is: grpo, sft, ..."""
    title: str
    folder: Path
    began: str
    """The folder beside its own that it began with, or nothing."""
    metrics: list[dict[str, Any]]
    result: dict[str, Any]
    samples: list[dict[str, Any]]
    experts: dict[str, Any]
    config: dict[str, Any]
    running: bool
    """Whether a process holds its folder."""
    drawn: set[str] = field(default_factory=set)
    """What of its metrics `points` has been asked for."""

    @cached_property
    def rollouts(self) -> Rollouts:
        """Answers that it trained on."""
        return read_rollouts(self.folder, SHOWN_ROLLOUTS)

    @property
    def reinforced(self) -> bool:
        """Whether it learns from answers of its own."""
        return self.name in ("grpo", "ppo") or self.logs("response_length")

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
            points = self.values(key)
            return float(np.median(points[:, 1])) if len(points) else None
        logged = [line[name] for line in self.metrics for name in (f"eval/{key}", key) if name in line]
        return logged[-1] if logged else None

    def points(self, key: str, scale: float = 1.0, *, over: str = "step") -> np.ndarray:
        """`values` to be drawn."""
        self.drawn.add(key)
        return self.values(key, scale, over=over)

    def values(self, key: str, scale: float = 1.0, *, over: str = "step") -> np.ndarray:
        """(points, 3): step (or what else of a line is named), value, standard error of a logged scalar, non-finite
        values left out."""
        lines = [line for line in self.metrics if key in line and over in line]
        rows = [(line[over], line[key], line.get(f"{key}_stderr", 0.0)) for line in lines]
        points = np.array(rows, np.float64).reshape(-1, 3) * (1.0, scale, scale)
        return points[np.isfinite(points).all(axis=1)]

    def logs(self, *keys: str) -> bool:
        """Whether any of these has been logged."""
        return any(key in line for line in self.metrics for key in keys)

    def undrawn(self) -> list[str]:
        """The scalars that have been logged and nothing has asked for, without what only counts or stands in the
        summary."""
        found = dict.fromkeys(
            key for line in self.metrics for key, value in line.items() if isinstance(value, int | float)
        )
        shown = {*self.drawn, "step", "time", "seconds", "tokens", "tokens_seen", "finite"}
        shown |= {"peak_bytes_device", "peak_bytes_process"}
        return [key for key in found if key not in shown and not key.endswith(("_stderr", "_of"))]

    def evaluations(self) -> list[str]:
        """The ``eval/...`` that have been logged, in their order, without accuracies, standard errors and counts."""
        found = dict.fromkeys(key for line in self.metrics for key in line if key.startswith("eval/"))
        return [key for key in found if not key.startswith("eval/accuracy_") and not key.endswith(("_stderr", "_of"))]

    def rewards(self) -> list[str]:
        """The names of the rewards that graded, in their order; see ``Grades.metrics``."""
        others = ("timeouts", "crashes", "errors", "seconds")
        found = dict.fromkeys(key for line in self.metrics for key in line if key.startswith("reward_"))
        return [name for key in found if (name := key.removeprefix("reward_")) not in others]

    def loads(self) -> np.ndarray | None:
        """(logged steps, MoE layers, experts): the share of each expert, or None."""
        loads = [line["load"] for line in self.metrics if "load" in line]
        return np.array(loads, np.float64) if loads else None


def layout(run_dir: Path) -> Literal["stage", "demo", "series"]:
    """Whether a folder is a stage's own, or a demo's, or another whose sub-folders are runs.

    FileNotFoundError where there is no folder, ValueError where there is no run in it.
    """
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir} does not exist" if not run_dir.exists() else f"{run_dir} is no folder")
    if _kind(run_dir):
        return "stage"
    others = any(folder.name not in DEMO_TITLES for folder in _runs(run_dir))
    if (run_dir / SERIES).exists() or (others and not (run_dir / "corpus" / "meta.json").exists()):
        return "series"
    if any((run_dir / name).is_dir() for name in DEMO_TITLES):
        return "demo"
    raise ValueError(
        f"{run_dir} holds no run: neither a stage's config.json, which is written before its first step, nor "
        f"{', '.join(DEMO_TITLES)} of a demo, nor a folder with a config.json of its own"
    )


def read_stages(run_dir: Path) -> list[Stage]:
    """The stage whose folder it is; the stages of a demo or of a series, in their order, whether they have begun or
    not. Raises what `layout` does."""
    found = layout(run_dir)
    if found == "stage":
        return [_read_stage(run_dir, TITLES, name=_kind(run_dir))]
    if found == "demo":
        before = ["", *DEMO_TITLES]
        return [
            _read_stage(run_dir / name, DEMO_TITLES, name=name, began=began)
            for name, began in zip(DEMO_TITLES, before, strict=False)
        ]
    stages = {folder.name: _read_stage(folder, TITLES) for folder in _runs(run_dir)}
    if named := read_json_object(run_dir / SERIES).get("stages"):
        order = dict.fromkeys([*map(str, named), *stages])
        return [stages.get(name) or _read_stage(run_dir / name, TITLES) for name in order]
    if all(name in TITLES for name in stages):
        return [stages[name] for name in TITLES if name in stages]
    return sorted(stages.values(), key=_time)


def start_of(stage: Stage, stages: Sequence[Stage]) -> Stage | None:
    """The one of these that it began with."""
    return next((other for other in stages if other is not stage and other.folder.name == stage.began), None)


def _runs(run_dir: Path) -> list[Path]:
    return [folder for folder in sorted(run_dir.iterdir()) if folder.is_dir() and _kind(folder)]


def _kind(folder: Path) -> str:
    """What the run in a folder is, "" where there is none."""
    named = str(read_json_object(folder / "config.json").get("stage", ""))
    return named or next((kind for file, kind in _TELLING.items() if (folder / file).exists()), "")


def _time(stage: Stage) -> float:
    """When its run began, as far as its files say."""
    if stage.metrics and "time" in stage.metrics[0]:
        return float(stage.metrics[0]["time"])
    return min(path.stat().st_mtime for path in stage.folder.iterdir())


def _read_stage(folder: Path, titles: dict[str, str], *, name: str = "", began: str = "") -> Stage:
    """name: what it is; of one of a series what its files say, and the folder's name is its title."""
    kind = name or _kind(folder)
    config = read_json_object(folder / "config.json") or read_json_object(folder / "settings.json")  # eval's
    title = titles.get(name or folder.name) or name or folder.name
    return Stage(
        kind,
        title,
        folder,
        _beside(config.get("recipe", {})) or began,
        read_metrics(folder) if (folder / FILE_NAME).exists() else [],
        read_json_object(folder / "result.json"),
        _lines(folder / "samples.jsonl"),
        read_json_object(folder / EXPERT_SHARES),
        config,
        is_held(folder),
    )


def _beside(recipe: dict[str, Any]) -> str:
    """The name of the folder beside `run_dir` that `init_from` is, however both were named and moved since."""
    start, own = recipe.get("init_from"), recipe.get("run_dir")
    if not (isinstance(start, str) and isinstance(own, str) and start and own):
        return ""
    steps = Path(os.path.relpath(start, own)).parts
    return steps[1] if steps[0] == ".." and len(steps) == 2 and steps[1] != ".." else ""


def _lines(path: Path) -> list[dict[str, Any]]:
    return read_json_lines(path) if path.exists() else []
