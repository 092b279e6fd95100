"""Find, check and read the checkpoints of a run; nothing in this module writes.

A checkpoint is the folder `<directory>/<step>`, which Orbax writes under another name and renames at the end (on a
bucket: see `places`):

    state/           the arrays, one for each leaf of the state, named by their path in the pytree
    reference/       the same of a reference that moves with the run, where there is one
    loader/, meta/   JSON: where the data loader stands; the model's configuration, format version, stage
    inventory.json   size of every file, shape and dtype of every array; written just before the rename

Without the inventory, lost files would show only as a storm of errors out of the middle of a read.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import orbax.checkpoint as ocp

from deepseek_jax.checkpoint.faults import silence_repeats
from deepseek_jax.checkpoint.finding import checkpoint_steps
from deepseek_jax.checkpoint.places import Folder, resolved, sizes

INVENTORY = "inventory.json"
FORMAT_VERSION = 2
READABLE = (1, 2)  # version 1 is read for its model; a run that wrote it is not gone on with
_COMPUTE = ("dtype", "param_dtype", "remat", "scan_unroll")  # version 1 recorded them as the model's
_LISTED = 5  # differences that an error message spells out

LeafPath = tuple[str, ...]
T = TypeVar("T")


class DamagedCheckpointError(ValueError):
    """A checkpoint folder whose files are missing, cut short or corrupt."""


def named_leaves(tree: Any) -> dict[LeafPath, Any]:
    """The leaves of a pytree by path. A dataclass field and a dict key of one name are the same, so that a
    dict of two fields can read a part of what a dataclass wrote."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf for path, leaf in pairs}
    assert len(named) == len(pairs), "two leaves of the state have the same path"
    return named


def nest(named: Mapping[LeafPath, Any]) -> dict[str, Any]:
    """Nested dicts out of leaves by path: the form in which Orbax stores a state."""
    tree: dict[str, Any] = {}
    for path, leaf in named.items():
        folder = tree
        for key in path[:-1]:
            folder = folder.setdefault(key, {})
        folder[path[-1]] = leaf
    return tree


def describe_arrays(named: Mapping[LeafPath, Any]) -> dict[str, list[Any]]:
    """{name: [shape, dtype]} as the inventory holds it."""
    return {"/".join(path): [list(leaf.shape), str(leaf.dtype)] for path, leaf in named.items()}


def file_sizes(folder: Folder) -> dict[str, int]:
    """Bytes of every file in the items of a checkpoint. Orbax's own marks beside them may change later."""
    return {name: size for name, size in sizes(folder).items() if "/" in name}


def read_inventory(folder: Folder) -> dict[str, Any]:
    """The inventory of an intact checkpoint.

    Raises:
        DamagedCheckpointError: naming the folder, and the file that is missing or of another size.
    """
    try:
        inventory = json.loads((folder / INVENTORY).read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise DamagedCheckpointError(f"checkpoint {folder} is damaged: {INVENTORY} is missing or cut short") from error
    found = file_sizes(folder)
    for name, size in inventory["files"].items():
        if found.get(name) != size:
            state = f"has {found[name]} bytes instead of {size}" if name in found else "is missing"
            raise DamagedCheckpointError(f"checkpoint {folder} is damaged: {name} {state}")
    return inventory


def read_json(folder: Folder, item: str, *, versions: tuple[int, ...] = READABLE) -> dict[str, Any]:
    """The JSON item (`loader` or `meta`) of an intact checkpoint, which must be of one of these format versions."""
    content = json.loads((folder / item / "metadata").read_text())
    if item == "meta" and content["format"] not in versions:
        raise ValueError(
            f"checkpoint {folder} has format version {content['format']}; here {', '.join(map(str, versions))} is "
            "needed: go on with the release that wrote it, or start another run from it (--init-from)"
        )
    if item == "meta" and "model" in content:
        content["model"] = {name: value for name, value in content["model"].items() if name not in _COMPUTE}
    return content


def newest_intact(directory: Folder, read: Callable[[Folder], T]) -> tuple[int, T, list[int]]:
    """`read` the newest checkpoint that is not damaged -> (step, what was read, damaged steps passed over).

    Raises:
        FileNotFoundError: there is no checkpoint.
        DamagedCheckpointError: there are some, but all are damaged.
    """
    steps = checkpoint_steps(directory)
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {directory}")
    damaged: list[DamagedCheckpointError] = []
    for step in reversed(steps):
        try:
            content = read(directory / str(step))
        except DamagedCheckpointError as error:
            damaged.append(error)
            continue
        for error in damaged:
            warnings.warn(f"{error}; step {step} is used instead", stacklevel=3)
        return step, content, steps[len(steps) - len(damaged) :]
    raise DamagedCheckpointError(
        f"every checkpoint in {directory} is damaged; move the folder away to begin again. "
        + "; ".join(str(error) for error in damaged)
    )


def check_same_model(folder: Folder, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """ValueError naming the fields in which two `meta["model"]` differ; silent where one of them has none."""
    if "model" not in saved or "model" not in wanted:
        return
    here, there = json.loads(json.dumps(wanted["model"])), saved["model"]
    if "hidden_size" in there:  # of a release that had no such head
        there = {"num_labels": 0} | there
    absent = "(absent)"
    _refuse(
        f"checkpoint {folder} is of another model",
        [
            f"{name} is {there.get(name, absent)!r} there and {here.get(name, absent)!r} here"
            for name in sorted(here.keys() | there.keys())
            if here.get(name, absent) != there.get(name, absent)
        ],
    )


def check_same_arrays(
    folder: Folder, saved: Mapping[str, list[Any]], wanted: Mapping[str, list[Any]], *, part: bool
) -> None:
    """ValueError naming the arrays that differ. Orbax itself would cut, pad and cast without a word.

    With `part` the checkpoint may hold more than is wanted, and another dtype is a request to cast.
    """
    differences = [f"{name} is missing there" for name in wanted if name not in saved]
    if not part:
        differences += [f"{name} is unknown here" for name in saved if name not in wanted]
    for name, (shape, dtype) in wanted.items():
        if name in saved and (saved[name][0] != shape or (saved[name][1] != dtype and not part)):
            there = f"{saved[name][1]}{saved[name][0]}"
            differences.append(f"{name} is {there} there and {dtype}{shape} here")
    _refuse(f"checkpoint {folder} does not fit this state", differences)


def _refuse(what: str, differences: list[str]) -> None:
    if differences:
        more = f"; and {len(differences) - _LISTED} more" if len(differences) > _LISTED else ""
        raise ValueError(f"{what}: " + "; ".join(differences[:_LISTED]) + more)


def read_state(
    folder: Folder, abstract: Any, *, part: bool = False, item: Literal["state", "reference"] = "state"
) -> Any:
    """Read the arrays of one checkpoint straight to their devices.

    Args:
        abstract: pytree of ShapeDtypeStruct. Each device reads its shard only; an array without a sharding
            goes to the first device.
        part: the checkpoint may hold more than is asked for, and arrays are cast to the dtype asked for.

    Raises:
        DamagedCheckpointError: a file is missing, cut short or fails its checksum.
        ValueError: arrays are missing, unknown, or of another shape (or dtype).
    """
    silence_repeats()
    named = named_leaves(abstract)
    inventory = read_inventory(folder)["arrays" if item == "state" else item]
    check_same_arrays(folder, inventory, describe_arrays(named), part=part)
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or first)
        for path, leaf in named.items()
    }
    tree = nest(placed)
    arguments = ocp.args.PyTreeRestore(
        item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=part
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            restored = checkpointer.restore(folder / item, args=arguments)
        except ValueError as error:  # how tensorstore reports all that it finds wrong with its files
            if str(error).startswith(("DATA_LOSS", "NOT_FOUND", "FAILED_PRECONDITION", "INVALID_ARGUMENT")):
                raise DamagedCheckpointError(f"checkpoint {folder} is damaged: {error}") from error
            raise
    arrays = named_leaves(restored)
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[path] for path in named])


def restore_params(directory: str | Path, abstract: Any, *, step: int | None = None) -> tuple[Any, dict[str, Any]]:
    """Read a part of a training state, for inference: no optimiser state is built or read.

    Args:
        directory: the run's `checkpoints` folder.
        abstract: pytree of ShapeDtypeStruct with the paths of the state that was saved, for example
            `{"params": ..., "router_bias": ...}`. Arrays come with the dtype and sharding asked for.
        step: None takes the newest intact one, with a warning if a newer one is damaged.

    Returns:
        (pytree of arrays like `abstract`, meta).

    Raises:
        FileNotFoundError, DamagedCheckpointError, ValueError: see `read_state`.
    """

    def read(folder: Folder) -> tuple[Any, dict[str, Any]]:
        return read_state(folder, abstract, part=True), read_json(folder, "meta")

    folder = resolved(directory)
    if step is None:
        return newest_intact(folder, read)[1]
    return read(existing(folder, step))


def existing(directory: Folder, step: int) -> Folder:
    """The folder of a step; FileNotFoundError naming the steps that there are."""
    if step not in checkpoint_steps(directory):
        raise FileNotFoundError(f"no checkpoint of step {step} in {directory}: {checkpoint_steps(directory) or 'none'}")
    return directory / str(step)
