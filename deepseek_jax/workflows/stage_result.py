"""What a training stage leaves in its folder beside checkpoints and metrics: ``result.json``."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from deepseek_jax import files
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.costs import count_parameters
from deepseek_jax.parallel.processes import first_host_alone, gather
from deepseek_jax.saying import say
from deepseek_jax.train.metrics import read_metrics
from deepseek_jax.train.resume import flat
from deepseek_jax.train.state import TrainState
from deepseek_jax.workflows.stage_config import StageConfig

RESULT = "result.json"


def read_result(run_dir: str | Path) -> dict[str, Any] | None:
    """A finished stage's result, or None."""
    return files.read_json_object(Path(run_dir) / RESULT) or None


def facts_of(run_dir: Path, model: ModelConfig, state: TrainState, taken: int) -> dict[str, Any]:
    """What there is to tell of a run that ended with this state, ``taken`` steps of it by this process."""
    return {
        **_measured_so_far(run_dir),
        "steps": int(state.step),
        "steps_here": taken,
        **count_parameters(model),
        "state_bytes": sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        "cache_numbers_per_token_layer": model.cache_numbers_per_token_layer,
    }


def _measured_so_far(run_dir: Path) -> dict[str, Any]:
    """What the lines of metrics say of the whole run, whichever process wrote them."""
    lines = read_metrics(run_dir)
    names = ("seconds", "tokens_seen", "loss", "reward")
    found = {name: lines[-1][name] for name in names if lines and name in lines[-1]}
    peaks = {
        name: [line[name] for line in lines if name in line] for name in ("peak_bytes_device", "peak_bytes_process")
    }
    return found | {name: max(values) for name, values in peaks.items() if values}


def finish(config: StageConfig, facts: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Write and return a stage's result: the ``facts`` of ``train_stage``, and what ``measure`` finds.

    A number that is not finite, as a perplexity past all floats, is null there, which is said. Where nothing was
    trained, the result that is there stands: ``train_stage`` leaves none of other settings.
    """
    path = Path(config.run_dir) / RESULT
    there = None if facts["steps_here"] else gather(read_result(config.run_dir))[0]
    if there is not None:
        say(f"{path} stands; remove it to measure again")
        return there | {"steps_here": 0}
    result = facts | measure()
    if past := [name for name, value in flat(result) if isinstance(value, float) and not math.isfinite(value)]:
        say(f"{path}: {', '.join(past)}: not finite, so null")
    first_host_alone(lambda: write_json(path, result))
    return read_result(config.run_dir) or {}


def write_json(path: Path, content: Any) -> None:
    """``files.write_json``; of several processes the first alone writes."""
    if jax.process_index() == 0:
        files.write_json(path, content)
