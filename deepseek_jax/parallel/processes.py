"""What the processes of a run agree on, and which rows are whose. One process agrees with itself at once.

Hosts talk through the coordination service of ``jax.distributed``, which waits as long as work takes, not through the
devices: a collective of gloo gives up after 30 s, and one that waits keeps its device from all else. Who waits for a
process that dies is ended by the service, see ``hosts``. All processes must call these functions in the same order.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # the service's client, which jax.distributed starts and does not show
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Found = TypeVar("Found")

_PATIENCE = 7 * 24 * 3600 * 1000  # ms; a peer that is gone ends the wait long before
_rounds = itertools.count()


def gather(value: Any) -> list[Any]:
    """The ``value`` of each process, in their order: JSON, of what one host can hold. It returns when all have come."""
    count, index = jax.process_count(), jax.process_index()
    if count == 1:
        return [value]
    client = distributed.global_state.client
    assert client is not None
    number = next(_rounds)
    keys = [f"deepseek_jax/{number}/{i}" for i in range(count)]
    if index:
        client.key_value_set(keys[index], json.dumps(value))
        return json.loads(client.blocking_key_value_get(keys[0], _PATIENCE))
    others = [client.blocking_key_value_get(key, _PATIENCE) for key in keys[1:]]
    text = f"[{','.join([json.dumps(value), *others])}]"
    client.key_value_set(keys[0], text)
    for key in (*keys[1:], *([f"deepseek_jax/{number - 1}/0"] if number else [])):  # who has come has read the last
        client.key_value_delete(key)
    return json.loads(text)


def meet() -> None:
    """Return when all processes have come here."""
    gather(None)


def together(function: jax.stages.Wrapped) -> Callable[..., Any]:
    """The jitted function, which no process runs before all have compiled it: those who were first would wait in its
    collectives, see above."""
    compiled = set[Any]()

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if jax.process_count() > 1:
            leaves = jax.tree.leaves((args, options))
            shapes = tuple((x.shape, x.dtype) if hasattr(x, "shape") else x for x in leaves)
            if shapes not in compiled:
                function.lower(*args, **options).compile()
                meet()
                compiled.add(shapes)
        return function(*args, **options)

    return call


def any_process(flag: bool) -> bool:
    """Whether one of them says so."""
    return any(gather(bool(flag)))


def first_host_alone(work: Callable[[], object]) -> None:
    """``work()`` on process 0, for which the others wait; what it leaves is in a folder that all share.

    Raises what ``work`` does; on the others, ValueError with its words.
    """
    failed = None
    if jax.process_index() == 0:
        try:
            work()
        except Exception as error:
            failed = error
    if said := gather(str(failed) or type(failed).__name__ if failed else "")[0]:
        raise failed or ValueError(f"process 0: {said}")


def require_one_process(what: str) -> None:
    """ValueError where there are several: ``what`` is not split among them."""
    if (count := jax.process_count()) > 1:
        raise ValueError(f"{what} is the work of one process, and here are {count}: start it without the others")


def own_part(items: Sequence[Found]) -> Sequence[Found]:
    """This process's part of what all of them hold: parts are of equal size, but for one, and follow one another."""
    count, index = jax.process_count(), jax.process_index()
    return items[len(items) * index // count : len(items) * (index + 1) // count]


@functools.cache
def row_groups(mesh: Mesh, axes: tuple[str, ...]) -> tuple[int, int]:
    """(i, n): this process's devices hold the i-th of n equal parts of a batch that ``axes`` split.

    Processes hold the same part where the mesh splits a row among them, by tensor or context. ValueError for a mesh on
    which parts overlap in another way.
    """
    if jax.process_count() == 1:
        return 0, 1
    ways = math.prod(mesh.shape[axis] for axis in axes)
    held: dict[int, set[int]] = {}
    for device, (rows,) in NamedSharding(mesh, PartitionSpec(axes)).devices_indices_map((ways,)).items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, parts)) != ways or len({*map(len, parts)}) > 1:
        shape = ", ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1)
        raise ValueError(
            f"the mesh {shape} gives processes parts of a batch that overlap: expected {' × '.join(axes)} such that "
            "each has rows of its own, or the same as others"
        )
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def require_own_rows(mesh: Mesh, axes: tuple[str, ...], what: str) -> None:
    """ValueError where processes share rows: ``what`` gives each its own."""
    count, parts = jax.process_count(), row_groups(mesh, axes)[1]
    if parts != count:
        raise ValueError(
            f"{what}: the mesh splits a batch into {parts} parts for {count} processes, each of which needs one of its "
            f"own: expected {' × '.join(axes)} a multiple of {count}"
        )


def own_rows(array: jax.Array, axis: int = 0) -> np.ndarray:
    """The rows of an array, split by row over the mesh, that this process's devices hold."""
    if array.is_fully_addressable:
        return np.asarray(array)
    shards = {shard.index[axis].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)], axis)


class Agreement:
    """A number that all processes know in the same step: the largest that one has given, at once or a step late.

    It is asked for on the devices, behind the step that is running, and read when the next one has been dispatched, so
    that nobody waits for it.
    """

    def __init__(self) -> None:
        self._asked: jax.Array | None = None

    def largest(self, number: int, *, now: bool = False) -> int:
        """What was the largest number at the call before, 0 at the first; of this call where devices are waited for
        ``now``.

        Of one process, ``number``.
        """
        if jax.process_count() == 1:
            return number
        asked, self._asked = self._asked, _largest(number)
        found = self._asked if now else asked
        return 0 if found is None else int(found)


def _largest(number: int) -> jax.Array:
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    here = np.full(jax.local_device_count(), number, np.int32)
    each = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("devices")), here)
    with jax.set_mesh(mesh):
        return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))(each)
