"""Fresh weights, drawn together: XLA:CPU takes a third of a second to compile each drawing of normal numbers.

A weight's key is ``fold_in(its stream's key, the keys that the stream gave before)``; the layers of a stack have
streams of their own, split from a key of the main one. That is ``nnx.Rngs``'s own rule, so these are the numbers that
drawing one weight after the other gives.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

_LARGEST = 2**20  # numbers; a larger weight is drawn alone and in its own shape, which splits over devices
_SPREAD = 4  # weights are drawn at the length of one that is at most so many bits of length larger


@dataclasses.dataclass(frozen=True)
class Pending:
    """A weight yet to be drawn from N(0, scale²), in the ``stream`` (0: the main one) by its ``number``-th key."""

    shape: tuple[int, ...]
    scale: float
    dtype: Any
    stream: int
    number: int
    layers: int | None  # that are stacked

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Together:
    """Stands for ``nnx.Rngs`` while a network is built, and draws afterwards all that was asked for."""

    def __init__(self, rngs: nnx.Rngs):
        self._rngs = rngs
        self._taken = [0]  # keys, by stream
        self._stacks: list[tuple[int, int]] = []
        self._stream = 0

    def pending(self, shape: tuple[int, ...], scale: float, dtype: Any) -> Pending:
        """The next weight of the stream."""
        self._taken[self._stream] += 1
        layers = self._stacks[self._stream - 1][1] if self._stream else None
        return Pending(shape, scale, dtype, self._stream, self._taken[self._stream] - 1, layers)

    def stacked(self, make: Callable[[], Any], layers: int) -> Any:
        """The module that ``make`` makes as a stack of ``layers``, each drawn by keys of its own."""
        self._stacks.append((self._taken[0], layers))
        self._taken[0] += 1
        self._taken.append(0)
        self._stream = len(self._stacks)
        graph, state = nnx.split(make())
        self._stream = 0
        repeat = lambda leaf: leaf if isinstance(leaf, Pending) else jnp.broadcast_to(leaf, (layers, *leaf.shape))  # noqa: E731
        return nnx.merge(graph, jax.tree.map(repeat, state))

    def draw(self, module: nnx.Module) -> None:
        """Give every pending weight of ``module`` its numbers."""
        found = [leaf for _, leaf in nnx.iter_graph(module) if isinstance(leaf, nnx.Param)]
        found = [variable for variable in found if isinstance(variable.get_raw_value(), Pending)]
        weights = tuple(variable.get_raw_value() for variable in found)
        source = self._rngs.params
        key = source.key[...]
        plan = _Plan(weights, tuple(self._taken), tuple(self._stacks), _shorter_is_the_beginning(key))
        # Two programs, which become one under jit: rounded as each weight by itself would be, here and there.
        normals = _normals(key, source.count[...], plan=plan)
        for variable, value in zip(found, _weights(normals, plan=plan), strict=True):
            variable.set_raw_value(value)
        source.count[...] += plan.taken[0]


Source = nnx.Rngs | Together  # what a part of a network draws from


def _shorter_is_the_beginning(key: jax.Array) -> bool:
    """Whether a key's first n numbers are the same however many are drawn, and in whatever shape."""
    return str(jax.random.key_impl(key)) == "threefry2x32" and jax.config.jax_threefry_partitionable  # pyright: ignore


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The weights to draw; the keys taken from each stream; of each stack the number of its key in the main stream and
    its layers; whether weights may be drawn at another's length."""

    weights: tuple[Pending, ...]
    taken: tuple[int, ...]
    stacks: tuple[tuple[int, int], ...]
    mixed: bool

    @property
    def groups(self) -> list[tuple[tuple[int, ...], list[Pending]]]:
        """(The shape to draw, the weights that are drawn in it)."""
        groups: dict[Any, list[Pending]] = {}
        for weight in self.weights:
            together = self.mixed and weight.size <= _LARGEST
            groups.setdefault(weight.size.bit_length() // _SPREAD if together else weight, []).append(weight)
        longest = [max(weight.size for weight in group) for group in groups.values()]
        shapes = [(n,) if isinstance(kind, int) else kind.shape for kind, n in zip(groups, longest, strict=True)]
        return [*zip(shapes, groups.values(), strict=True)]


@functools.partial(jax.jit, static_argnames="plan")
def _normals(key: Any, first: Any, *, plan: _Plan) -> list[jax.Array]:
    """For each group normal numbers, a row for each weight and layer."""
    keys, place = _keys(key, first, plan)
    drawn = []
    for shape, group in plan.groups:
        normal = functools.partial(jax.random.normal, shape=shape, dtype=jnp.float32)
        drawn.append(jax.vmap(normal)(keys[np.concatenate([place(weight) for weight in group])]))
    return drawn


@functools.partial(jax.jit, static_argnames="plan")
def _weights(normals: list[jax.Array], *, plan: _Plan) -> list[jax.Array]:
    """Cut the weights out of the rows."""
    made: dict[Pending, jax.Array] = {}
    for (_, group), rows in zip(plan.groups, normals, strict=True):
        rows, at = group[0].scale * rows, 0
        for weight in group:
            assert weight.scale == group[0].scale
            mine = rows[at : at + (weight.layers or 1)]
            mine = mine[:, : weight.size] if rows.ndim == 2 else mine
            shape = weight.shape if weight.layers is None else (weight.layers, *weight.shape)
            made[weight] = mine.reshape(shape).astype(weight.dtype)
            at += weight.layers or 1
    return [made[weight] for weight in plan.weights]


def _keys(key: Any, first: Any, plan: _Plan) -> tuple[jax.Array, Callable[[Pending], np.ndarray]]:
    """The keys of all streams in one array, and where in it a weight's are, layer by layer."""
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    keys = fold(key, first + jnp.arange(plan.taken[0], dtype=jnp.uint32))
    if not plan.stacks:
        return keys, lambda weight: np.array([weight.number])
    split = jnp.concatenate([jax.random.split(keys[at], layers) for at, layers in plan.stacks])
    most = max(plan.taken[1:])
    inner = jax.vmap(fold, (0, None))(split, jnp.arange(most, dtype=jnp.uint32))
    firsts = np.cumsum([0, *(layers for _, layers in plan.stacks)])

    def place(weight: Pending) -> np.ndarray:
        if weight.layers is None:
            return np.array([weight.number])
        rows = firsts[weight.stream - 1] + np.arange(weight.layers)
        return plan.taken[0] + rows * most + weight.number

    return jnp.concatenate([keys, inner.reshape(-1)]), place
