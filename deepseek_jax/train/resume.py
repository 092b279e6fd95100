"""What a run that goes on may have changed since its checkpoint."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_jax.checkpoint import CheckpointStore
from deepseek_jax.checkpoint.model import CHECKPOINTS

_OWN = ("format", "bad_steps", "schedule_steps", "model")  # not settings, or compared by the store
_STEPS = "recipe.loop.steps"
_ABSENT = "(absent)"


def saved_meta(run_dir: str | Path) -> dict[str, Any] | None:
    """The metadata of the checkpoint that a run goes on from; None where there is none. ValueError: an older format."""
    with CheckpointStore(Path(run_dir) / CHECKPOINTS, keep=1) as store:
        return None if store.latest_step() is None else store.read_meta(going_on=True)


def check_resume(
    run_dir: str | Path, saved: Mapping[str, Any], wanted: Mapping[str, Any], may_change: Sequence[str]
) -> None:
    """ValueError naming every setting that differs from the checkpoint's, but for those under ``may_change``.

    ``may_change``: dotted paths in the recipe. Of ``loop.steps`` a larger number is right: the learning rate's schedule
    keeps the length that it began with. A smaller one would cut it short, and is refused.
    """
    there, here = dict(_flat(saved)), dict(_flat(json.loads(json.dumps(wanted))))
    if there.get("stage") != here.get("stage"):
        raise ValueError(
            f"{run_dir} holds a run of the stage {there.get('stage')}, not {here.get('stage')}: choose another run_dir"
        )
    allowed = [*_OWN, *(f"recipe.{path}" for path in may_change)]
    differ = [
        f"{name.removeprefix('recipe.')} is {there.get(name, _ABSENT)!r} there and {here.get(name, _ABSENT)!r} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name, _ABSENT) != here.get(name, _ABSENT)
        and not any(name == path or name.startswith(path + ".") for path in allowed)
    ]
    if there.get(_STEPS, 0) > here.get(_STEPS, 0):
        differ.append(f"loop.steps is {there[_STEPS]} there and {here[_STEPS]} here, which is fewer")
    if differ:
        raise ValueError(
            f"{run_dir} holds a run with other settings: {'; '.join(differ)}. Going on it may change "
            f"{', '.join(may_change)} alone, with no fewer loop.steps; choose another run_dir for the rest"
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
