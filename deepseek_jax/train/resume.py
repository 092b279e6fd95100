"""What a run that goes on may have changed since its checkpoint, and a record of what it did change."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_jax.checkpoint import CheckpointStore
from deepseek_jax.checkpoint.model import CHECKPOINTS
from deepseek_jax.files import read_json_object

_OWN = (
    "format",
    "bad_steps",
    "seconds",
    "tokens_seen",
    "schedule_steps",
    "model",
)  # not settings, or compared by the store
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
    there, here = dict(flat(saved)), dict(flat(json.loads(json.dumps(wanted))))
    if there.get("stage") != here.get("stage"):
        raise ValueError(
            f"{run_dir} holds a run of the stage {there.get('stage')}, not {here.get('stage')}: choose another run_dir"
        )
    allowed = [*_OWN, *(f"recipe.{path}" for path in may_change)]
    differ = [
        f"{name.removeprefix('recipe.')} is {was!r} there and {now!r} here"
        for name, (was, now) in differences(saved, wanted).items()
        if not any(name == path or name.startswith(path + ".") for path in allowed)
    ]
    if there.get(_STEPS, 0) > here.get(_STEPS, 0):
        differ.append(f"loop.steps is {there[_STEPS]} there and {here[_STEPS]} here, which is fewer")
    if differ:
        raise ValueError(
            f"{run_dir} holds a run with other settings: {'; '.join(differ)}. Going on it may change "
            f"{', '.join(may_change)} alone, with no fewer loop.steps; choose another run_dir for the rest"
        )


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings of two trees that differ, by dotted path, as JSON has them."""
    was, now = dict(flat(there)), dict(flat(json.loads(json.dumps(here))))
    pairs = {name: (was.get(name, _ABSENT), now.get(name, _ABSENT)) for name in sorted(was.keys() | now.keys())}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def with_history(path: Path, step: int, content: dict[str, Any]) -> dict[str, Any]:
    """What the config.json at ``path`` is to say now, with the ``history`` of the one that is there: an entry
    {"time", "step", "changed": {setting: [from, to]}} for each time that the run went on with other settings."""
    if step == 0 or not path.exists():
        return content
    try:
        before = read_json_object(path)
    except ValueError as error:
        raise ValueError(f"{error}, so what was changed before is lost; delete it to go on") from error
    settings = "recipe" if "recipe" in content else "loop"
    changed = differences(before.get(settings, {}), content[settings])
    history = list(before.get("history", []))
    if changed:
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        history.append({"time": now, "step": step, "changed": {name: list(pair) for name, pair in changed.items()}})
    return content | ({"history": history} if history else {})


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every leaf of a tree."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
