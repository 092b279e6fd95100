"""Stages in a row, each in a folder of its own under one run's: what has its result is not run again."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_jax.files import read_json_object
from deepseek_jax.parallel.processes import first_host_alone, gather
from deepseek_jax.train.preemption import stop_signals
from deepseek_jax.train.resume import check_resume, differences, saved_meta
from deepseek_jax.train.run_lock import run_lock
from deepseek_jax.workflows.recipe import as_now
from deepseek_jax.workflows.stage_config import StageConfig
from deepseek_jax.workflows.stage_result import read_result

_SAYING = ("run_dir", "quiet")  # no part of what is made


class Link(NamedTuple):
    """A stage: its name, its function and what that takes, which has a ``run_dir`` in the chain's folder."""

    name: str
    run: Callable[[Any], Any]
    config: Any


@contextmanager
def held(run_dir: str | Path) -> Iterator[None]:
    """Hold the chain's folder, of several processes the first, and listen for signals. ValueError where another run
    works in it."""
    with ExitStack() as stack:
        stack.enter_context(stop_signals("; the same command goes on from what was saved"))
        first_host_alone(lambda: stack.enter_context(run_lock(run_dir)))
        yield


def run_chain(
    links: Sequence[Link], say: Callable[[str, str], None], *, after: Callable[[str], None] = lambda name: None
) -> None:
    """Run what has no result yet; one that was stopped goes on by itself. ``after`` follows each, done before or now.

    ValueError where a stage has a result of other settings.
    """
    for name, run, config in links:
        if gather(is_done(config))[0]:  # of several processes the first may see its end sooner
            say(name, " is done already")
        else:
            say(name, f" → {config.run_dir}")
            run(config)
        after(name)


def is_done(config: Any) -> bool:
    """Whether the stage has its result. ValueError where that is of settings which a run cannot change."""
    folder = Path(config.run_dir)
    trains = isinstance(config, StageConfig)
    saved = saved_meta(folder) if trains else read_json_object(folder / "config.json")
    if not saved or read_result(folder) is None:
        return False
    wanted = {**saved, "recipe": dataclasses.asdict(config)}
    there = as_now(saved, wanted, config)
    check_resume(folder, there, wanted, getattr(config, "MAY_CHANGE", _SAYING))
    if not trains:
        return differences(there, wanted).keys() <= {f"recipe.{name}" for name in _SAYING}
    by_epochs = getattr(config, "epochs", 0)  # which then say how many steps
    recipe = there["recipe"]
    return recipe["epochs"] == by_epochs if by_epochs else recipe["loop"]["steps"] == config.loop.steps
