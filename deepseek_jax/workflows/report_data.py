"""What a demo run has written so far, and its summary: the report and the terminal show the same numbers."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TITLES = {"pretrain": "Pretraining", "sft": "Cold-start SFT", "grpo": "GRPO"}
NOTHING = "\N{EN DASH}"
EXPERT_SHARES = "experts.json"  # which experts serve which kind of token


@dataclass(frozen=True)
class Stage:
    """What a stage has written so far; everything may be missing while the run is still going."""

    name: str
    metrics: list[dict[str, Any]]
    result: dict[str, Any]
    samples: list[dict[str, Any]]
    experts: dict[str, Any]
    config: dict[str, Any]

    @property
    def title(self) -> str:
        return TITLES[self.name]

    @property
    def status(self) -> str:
        if self.result:
            return "finished"
        return f"running, step {self.last_step:,}" if self.metrics else "not started"

    @property
    def last_step(self) -> int:
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    def number(self, key: str) -> float | None:
        """The final `key`, or the last logged one while the stage has no result."""
        if key in self.result:
            return self.result[key]
        logged = [line[name] for line in self.metrics for name in (f"eval/{key}", key) if name in line]
        return logged[-1] if logged else None

    def points(self, key: str, scale: float = 1.0) -> np.ndarray:
        """(points, 3): step, value, standard error of a logged scalar, non-finite values left out."""
        rows = [(line["step"], line[key], line.get(f"{key}_stderr", 0.0)) for line in self.metrics if key in line]
        points = np.array(rows, np.float64).reshape(-1, 3) * (1.0, scale, scale)
        return points[np.isfinite(points).all(axis=1)]

    def loads(self) -> np.ndarray | None:
        """(logged steps, MoE layers, experts): the share of each expert, or None."""
        loads = [line["load"] for line in self.metrics if "load" in line]
        return np.array(loads, np.float64) if loads else None


def read_stages(run_dir: Path) -> list[Stage]:
    """The stages of the run in their order, whether they have begun or not."""
    return [
        Stage(
            name,
            _read_lines(run_dir / name / "metrics.jsonl"),
            read_json(run_dir / name / "result.json"),
            _read_lines(run_dir / name / "samples.jsonl"),
            read_json(run_dir / name / EXPERT_SHARES),
            read_json(run_dir / name / "config.json"),
        )
        for name in TITLES
    ]


def summary_rows(stages: Sequence[Stage]) -> list[tuple[str, list[str]]]:
    """(label, a cell per stage) of the headline table; rows that no stage has a number for are left out."""
    rows = [("status", [stage.status for stage in stages])]
    for mode in ("greedy", "sampled"):
        before = [accuracy_before(stages, index, mode) for index in range(len(stages))]
        after = [accuracy_after(stage, mode) for stage in stages]
        rows.append((f"{mode} accuracy before", [show_accuracy(value) for value in before]))
        rows.append((f"{mode} accuracy after", [show_accuracy(value) for value in after]))
    formats = {
        "problems": ("held-out problems", "{:,.0f}"),
        "bits_per_byte": ("bits per byte, held-out text", "{:.3f}"),
        "tokens_per_second": ("tokens per second", "{:,.0f}"),
        "steps": ("steps", "{:,.0f}"),
        "seconds": ("time", ""),
        "parameters_total": ("parameters", "{:,.0f}"),
        "parameters_active": ("parameters active per token", "{:,.0f}"),
        "cache_numbers_per_token_layer": ("cached numbers per token and layer", "{:,.0f}"),
    }
    for key, (label, form) in formats.items():
        values = [stage.number(key) for stage in stages]
        show = form.format if form else _duration
        rows.append((label, [NOTHING if value is None else show(value) for value in values]))
    return [(label, cells) for label, cells in rows if any(cell != NOTHING for cell in cells)]


def accuracy_after(stage: Stage, mode: str) -> tuple[float, float] | None:
    value, error = (stage.number(f"accuracy_{mode}{end}") for end in ("", "_stderr"))
    return None if value is None else (value, error or 0.0)


def accuracy_before(stages: Sequence[Stage], index: int, mode: str) -> tuple[float, float] | None:
    """A stage's own evaluation at step 0, or else what the stage before it ended with."""
    points = stages[index].points(f"eval/accuracy_{mode}")
    if len(points) and points[0, 0] == 0:
        return float(points[0, 1]), float(points[0, 2])
    begun = index > 0 and stages[index].status != "not started"
    return accuracy_after(stages[index - 1], mode) if begun else None


def show_accuracy(value: tuple[float, float] | None) -> str:
    return NOTHING if value is None else f"{100 * value[0]:.1f} ± {100 * value[1]:.1f}%"


def show_percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.1f}%"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


def read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg}); delete it and run its stage again") from error


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, [] if there is none. A last line without line end is ignored."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not a line of JSON ({error.msg})") from error
    return rows
