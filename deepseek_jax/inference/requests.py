"""Prompts and how each is to be answered, as arrays: what may differ between two calls and compile nothing.

Shapes alone are compiled for, and they come in powers of two.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import NamedSharding

from deepseek_jax.inference.sampling import SamplingParams


@struct.dataclass
class Requests:
    """A row for each prompt; rows behind the last prompt have limit 0 and are never run on.

    tokens_BP: prompts on the left, ``pad`` behind. lengths_B: theirs. keys_B, rows_B: row b draws its token n with
    ``fold_in(fold_in(keys[b], rows[b]), n)``. stops_BX: ids that end an answer, -1 behind them. limit_B: tokens of an
    answer at most. answers, columns: room for an answer, and for prompt and answer together. prompt_B: where there are
    fewer prompts than rows, the one that row b asks, counted from the first of its device's; see ``shared``.
    """

    tokens_BP: Any
    lengths_B: Any
    keys_B: Any
    rows_B: Any
    temperature_B: Any
    top_p_B: Any
    top_k_B: Any
    limit_B: Any
    stops_BX: Any
    pad: Any
    answers: int = struct.field(pytree_node=False)
    columns: int = struct.field(pytree_node=False)
    prompt_B: Any = None


@dataclasses.dataclass(frozen=True)
class Room:
    """What requests have room for: rows, tokens of a prompt and of an answer, stop ids of a row."""

    rows: int
    prompt: int = 1
    answer: int = 1
    stops: int = 0

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], each: Sequence[SamplingParams], stop_ids: Sequence[int] = ()) -> Self:
        longest, most = max(map(len, prompts), default=1), max((params.max_tokens for params in each), default=1)
        return cls(
            len(prompts), longest, most, len(stop_ids) + max((len(params.stop_token_ids) for params in each), default=0)
        )


def as_ids(prompt: Iterable[Any]) -> list[int]:
    """A prompt's ids. ValueError for what is none: a float would be cut off, and a bool be 0 or 1."""
    ids = prompt.tolist() if isinstance(prompt, np.ndarray | jax.Array) else list(prompt)
    kinds = dict.fromkeys(map(type, ids))
    if wrong := [kind.__name__ for kind in kinds if issubclass(kind, bool) or not issubclass(kind, int | np.integer)]:
        raise ValueError(f"a prompt has ids of type {', '.join(wrong)}: expected ints")
    return ids if kinds.keys() <= {int} else [*map(int, ids)]


def make_requests(
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams | Sequence[SamplingParams],
    key: jax.Array | None = None,
    *,
    stop_ids: Sequence[int] = (),
    pad_id: int = 0,
    width: int = 0,
    ways: int = 1,
    room: Room | None = None,
    first: int = 0,
) -> Requests:
    """Requests to answer ``prompts``.

    Args:
      sampling: for all prompts, of which the i-th then draws with ``fold_in(key, i)``; or one for each, with which it
        draws what it would draw alone, whatever stands beside it.
      key: instead of the seeds.
      stop_ids: beside those of ``sampling``.
      width: of the prompts' rows, instead of the next power of two.
      ways: the batch is a multiple of it.
      room: by default what these prompts need; other processes' may need more.
      first: the number of the first prompt, where it is not the first of all processes'.

    Raises ValueError for a prompt without tokens or wider than ``width``, and for what requests alone can ask for.
    """
    shared = isinstance(sampling, SamplingParams)
    each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
    for params in dict.fromkeys(each):
        params.check_drawn_in_batches()
    if len(each) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, but {len(each)} sampling parameters: expected one, or one for each")
    room = room or Room.of(prompts, each, stop_ids)
    longest = width or room.prompt
    limits = [params.max_tokens for params in each]
    batch = -(-round_up(room.rows) // ways) * ways
    tokens_BP, lengths_B = pad_prompts(prompts, pad_id, width or round_up(longest, 16))
    stops = [(*stop_ids, *params.stop_token_ids) for params in each]
    stops_BX = np.full((batch, round_up(room.stops, 4)), -1, np.int32)
    for row, ids in enumerate(stops):
        stops_BX[row, : len(ids)] = ids
    rows = batch - len(prompts)
    return Requests(
        tokens_BP=np.pad(tokens_BP, ((0, rows), (0, 0)), constant_values=pad_id),
        lengths_B=np.pad(lengths_B, (0, rows), constant_values=1),
        keys_B=_keys([params.seed for params in each] or [0] if key is None else key, batch),
        rows_B=np.arange(first, first + batch, dtype=np.uint32) * np.uint32(shared or key is not None),
        temperature_B=np.array([params.temperature for params in each] + [0.0] * rows, np.float32),
        top_p_B=np.array([params.top_p for params in each] + [1.0] * rows, np.float32),
        top_k_B=np.array([params.top_k for params in each] + [0] * rows, np.int32),
        limit_B=np.array(limits + [0] * rows, np.int32),
        stops_BX=stops_BX,
        pad=np.int32(pad_id),
        answers=round_up(room.answer, 16),
        columns=max(tokens_BP.shape[1], round_up(longest + room.answer, 16)),
    )


def shared(requests: Requests, parts: int, agree: Callable[[int], int] = lambda rows: rows) -> Requests:
    """The same requests with each prompt once in each of so many ``parts`` of their rows, one for each device; as they
    are where that does not halve the prompts.

    There is room for as many prompts as there were if more of the kind filled the batch: so one that is not full is of
    the same shape. agree: of several processes' numbers, the one for all.
    """
    size, need, found = len(requests.limit_B) // parts, 1, list[dict[bytes, int]]()
    prompt_B = np.zeros(len(requests.limit_B), np.int32)
    for part in range(parts):
        known, rows = (
            dict[bytes, int](),
            np.flatnonzero(requests.limit_B[part * size : (part + 1) * size]) + part * size,
        )
        for row in rows:
            prompt = requests.tokens_BP[row, : requests.lengths_B[row]].tobytes()
            prompt_B[row] = known.setdefault(prompt, len(known))
        need = max(need, -(-len(known) * size // max(len(rows), 1)))
        found.append(known)
    prompts = agree(round_up(need))
    if 2 * prompts > size:
        return requests
    tokens_UP = np.full((parts * prompts, requests.tokens_BP.shape[1]), requests.pad, np.int32)
    for part, known in enumerate(found):
        for row, prompt in enumerate(known, part * prompts):
            ids = np.frombuffer(prompt, np.int32)
            tokens_UP[row, : len(ids)] = ids
    return dataclasses.replace(requests, tokens_BP=tokens_UP, prompt_B=prompt_B)


def spread(requests: Requests, rows: NamedSharding) -> Requests:
    """Each process's requests, of equal shapes, as arrays that all of them share."""

    def put(x: Any) -> Any:
        if np.ndim(x) == 0:
            return x
        if isinstance(x, jax.Array):  # keys
            data = put(np.asarray(jax.random.key_data(x)))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        return jax.make_array_from_process_local_data(rows, x)

    return jax.tree.map(put, requests)


def pad_prompts(prompts: Sequence[Sequence[int]], pad_id: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts on the left of rows of ``width`` -> (tokens (B P), lengths (B))."""
    tokens_BP = np.full((len(prompts), width), pad_id, np.int32)
    for row, ids in enumerate(prompts):
        if not 0 < len(ids) <= width:
            raise ValueError(f"prompt {row} has {len(ids)} tokens: expected 1…{width}")
        tokens_BP[row, : len(ids)] = ids
    return tokens_BP, np.array([len(ids) for ids in prompts], np.int32)


def round_up(n: int, least: int = 1) -> int:
    """The next power of two, at least ``least``."""
    return max(least, 1 << (n - 1).bit_length())


def _keys(seeds: Sequence[int] | jax.Array, batch: int) -> jax.Array:
    """A key for each row, put together on the host: nothing is compiled for another number of prompts."""
    if isinstance(seeds, jax.Array):
        keys = [seeds]
    else:
        made = {seed: jax.random.key(seed) for seed in dict.fromkeys(seeds)}
        keys = [made[seed] for seed in seeds]
    data = [np.asarray(jax.random.key_data(key)) for key in keys]
    data += data[:1] * (batch - len(data))
    return jax.random.wrap_key_data(jnp.asarray(np.stack(data)), impl=jax.random.key_impl(keys[0]))
