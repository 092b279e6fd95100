"""A run's numbers as a table: the report and the terminal show the same."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from deepseek_jax.evals.samples import margin
from deepseek_jax.workflows.report_data import Stage, start_of

NOTHING = "\N{EN DASH}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


NUMBERS: dict[str, tuple[str, Callable[[float], str]]] = {
    "problems": ("held-out problems", "{:,.0f}".format),
    "loss": ("last loss", "{:.4g}".format),
    "reward": ("last reward", "{:.4g}".format),
    "response_length": ("last mean length of an answer", lambda tokens: f"{tokens:,.4g} tokens"),
    "bits_per_byte": ("bits per byte, held-out text", "{:.3f}".format),
    "heldout_loss": ("held-out loss, nats per token", "{:.3f}".format),
    "max_vio": ("last MaxVio", "{:.3f}".format),
    "tokens_per_second": ("tokens per second", "{:,.0f}".format),
    "steps": ("steps", "{:,.0f}".format),
    "tokens_seen": ("tokens", "{:,.0f}".format),
    "seconds": ("time", _duration),
    "peak_bytes_device": ("peak memory of a device", lambda count: f"{count / 1e9:.2f} GB"),
    "peak_bytes_process": ("peak memory of the process", lambda count: f"{count / 1e9:.2f} GB"),
    "parameters_total": ("parameters", "{:,.0f}".format),
    "parameters_active": ("parameters active per token", "{:,.0f}".format),
    "cache_numbers_per_token_layer": ("cached numbers per token and layer", "{:,.0f}".format),
}


def summary_rows(stages: Sequence[Stage]) -> list[tuple[str, list[str]]]:
    """(label, a cell per stage) of the headline table; rows that no stage has a number for are left out."""
    rows = [("status", [stage.status for stage in stages])]
    for mode in ("greedy", "sampled"):
        before = [accuracy_before(stage, start_of(stage, stages), mode) for stage in stages]
        after = [accuracy_after(stage, mode) for stage in stages]
        rows.append((f"{mode} accuracy before", [show_accuracy(value) for value in before]))
        rows.append((f"{mode} accuracy after", [show_accuracy(value) for value in after]))
    rewards = dict.fromkeys(name for stage in stages for name in stage.rewards())
    graded = {f"reward_{name}": (f"last reward for {name}", "{:.4g}".format) for name in rewards}
    for key, (label, form) in (NUMBERS | graded).items():
        values = [stage.number(key) for stage in stages]
        rows.append((label, [NOTHING if value is None else form(value) for value in values]))
    others = dict.fromkeys(key for stage in stages for key, value in stage.result.items() if _is_other(key, value))
    for key in others:
        rows.append((key.replace("_", " "), [_show_other(stage.result, key) for stage in stages]))
    return [(label, cells) for label, cells in rows if any(cell != NOTHING for cell in cells)]


def _is_other(key: str, value: Any) -> bool:
    """Whether a number of a result is one that no row of its own shows."""
    known = key in NUMBERS or key.startswith("accuracy_") or key == "steps_here"
    return isinstance(value, int | float) and not known and not key.endswith("_stderr")


def _show_other(result: dict[str, Any], key: str) -> str:
    if result.get(key) is None:
        return NOTHING
    error = result.get(f"{key}_stderr")
    return f"{result[key]:.4g}" if error is None else f"{result[key]:.4g} ± {error:.2g}"


def accuracy_after(stage: Stage, mode: str) -> tuple[float, float] | None:
    value, error = (stage.number(f"accuracy_{mode}{end}") for end in ("", "_stderr"))
    return None if value is None else (value, error or 0.0)


def accuracy_before(stage: Stage, start: Stage | None, mode: str) -> tuple[float, float] | None:
    """A stage's own evaluation at step 0, or else what the one that it began with ended with."""
    points = stage.values(f"eval/accuracy_{mode}")
    if len(points) and points[0, 0] == 0:
        return float(points[0, 1]), float(points[0, 2])
    return accuracy_after(start, mode) if start and stage.status != "not started" else None


def came_to(result: dict[str, Any]) -> str:
    """The number of a stage that trains no language model, in words."""
    if "kept" in result:
        return f"kept {result['kept']:,} of {result.get('answers', 0):,}"
    if "agreement" in result:
        share, count = result["agreement"], int(result["agreement_of"])
        return f"agreement {100 * share:.1f} {margin(share, result.get('agreement_stderr'), count)}%"
    return NOTHING


def show_accuracy(value: tuple[float, float] | None) -> str:
    return NOTHING if value is None else f"{100 * value[0]:.1f} ± {100 * value[1]:.1f}%"


def show_percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.1f}%"
