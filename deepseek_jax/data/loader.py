"""Loaders: shuffled, repeated batches whose state is one global batch index.

Row i of the shuffled and repeated data belongs to global batch i // B, whatever the number of processes; each
process reads its own share of the batch. So a state saved by any number of hosts serves any other.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Required, TypedDict, TypeVar, Unpack, cast

import grain

Batch = TypeVar("Batch")

_AHEAD = 2  # batches that are read while the step before them runs


class LoaderOptions(TypedDict, total=False):
    """What every loader takes by name."""

    batch_size: Required[int]  # of all processes together
    seed: Required[int]
    shuffle: bool  # True
    repeat: bool  # True
    process_index: int  # 0
    process_count: int  # 1


class BatchLoader(Generic[Batch]):
    """Iterator over this process' share of the global batches of a random-access source, read ahead by a thread.

    The order is shuffled anew in each epoch, by `seed`. With `repeat` it never ends, and a batch may hold the
    end of one epoch and the start of the next: no row is left out. Without, the remainder of the one epoch
    is dropped. ValueError when the sizes do not fit or make no batch.
    """

    def __init__(
        self,
        source: Any,
        *,
        fingerprint: str,
        batch_fn: Callable[[Sequence[Any]], Batch] | None,
        **options: Unpack[LoaderOptions],
    ):
        """`source` has `len` and `[i]`; `batch_fn` joins its elements (None: dicts of arrays are stacked)."""
        batch_size, seed = options["batch_size"], options["seed"]
        shuffle, repeat = options.get("shuffle", True), options.get("repeat", True)
        process_index, process_count = options.get("process_index", 0), options.get("process_count", 1)
        if batch_size < 1 or batch_size % process_count:
            raise ValueError(f"batch_size={batch_size} does not split over process_count={process_count}")
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index={process_index} is not below process_count={process_count}")
        if len(source) == 0 or (not repeat and len(source) < batch_size):
            raise ValueError(f"{len(source)} rows make no batch of batch_size={batch_size}")
        self._identity = {
            "fingerprint": fingerprint,
            "batch_size": batch_size,
            "seed": seed,
            "shuffle": shuffle,
            "repeat": repeat,
        }
        self._process_index, self._process_count = process_index, process_count
        self._position = 0
        rows = grain.MapDataset.source(source).seed(seed)
        rows = rows.shuffle() if shuffle else rows
        rows = rows.repeat() if repeat else rows
        # Batches of one process' size: numbers i*P to i*P + P-1 make up global batch i.
        self._shares = rows.batch(batch_size // process_count, drop_remainder=True, batch_fn=batch_fn)
        self._length = len(rows) // batch_size
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: deque[Future[Batch]] = deque()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._position >= self._length:
            raise StopIteration
        while len(self._ahead) <= _AHEAD and (position := self._position + len(self._ahead)) < self._length:
            self._ahead.append(self._reader.submit(self._read, position))
        share = self._ahead[0].result()
        self._ahead.popleft()
        self._position += 1
        return share

    def _read(self, position: int) -> Batch:
        return cast(Batch, self._shares[position * self._process_count + self._process_index])

    def state(self) -> dict[str, Any]:
        """What `restore` needs, fit for JSON: the next global batch's index, and what it is an index into."""
        return {"position": self._position} | self._identity

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken. ValueError when data, seed, global batch size or order differ."""
        for name, ours in self._identity.items():
            if name not in state or state[name] != ours:
                raise ValueError(
                    f"the saved loader state has {name}={state.get(name)!r}, this loader {name}={ours!r}: "
                    "it would go on with other batches"
                )
        position = state.get("position")
        if not isinstance(position, int) or position < 0:
            raise ValueError(f"the saved loader state has position={position!r}; it must be a batch index")
        self._ahead.clear()  # what was read ahead is not counted in any state
        self._position = position
