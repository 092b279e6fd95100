"""The shapes that are compiled for requests: few, since XLA compiles, and large enough for what comes."""

import bisect
import dataclasses
import math
from collections.abc import Sequence

from deepseek_jax.inference.plans import Piece
from deepseek_jax.inference.serving_config import ServingConfig

RATIO = 4  # from one size of a bucket to the next
_BUSY = 2048  # tokens that keep a device busy: of fewer, those that only fill a shape up cost little


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The shapes that are compiled. slots: rows of a decoding step. chunks: (rows, tokens of each) that are read in.
    tables: pages of a row. cut: tokens from which on two pieces cost less than a shape that they would fill by half."""

    slots: tuple[int, ...]
    chunks: tuple[tuple[int, int], ...]
    tables: tuple[int, ...]
    cut: int

    @property
    def long(self) -> tuple[int, ...]:
        """The tables for which more of a prompt is read in: it is seldom short, and each is a program a chunk."""
        return self.tables[-2:]

    @classmethod
    def of(cls, config: ServingConfig, context: int, *, gathers: bool, least: int = 16) -> "Buckets":
        """context: tokens of a row at most; no shape is longer than that needs. gathers: a row costs what its table has
        room for, since no kernel reads pages. least: tokens of a chunk, fewer of which would not be read in sooner."""
        most = -(-context // config.page)
        busy = min(config.chunk, _BUSY)
        chunks = {(rows, size) for size in _sizes(config.chunk, least) for rows in _sizes(config.chunk // size, 1)}
        by_need = sorted(
            (shape for shape in chunks if shape[0] in (1, config.chunk // shape[1]) or math.prod(shape) >= busy),
            key=lambda shape: (shape[1], shape[0]),
        )
        made = cls(_sizes(config.slots, 1), tuple(by_need), _sizes(most, 4) if gathers else (most,), cut=4 * least)
        largest = fitting([size for _, size in by_need], made.piece(max(context - 1, 1)))
        return dataclasses.replace(made, chunks=tuple(shape for shape in by_need if shape[1] <= largest))

    def piece(self, unread: int) -> int:
        """How many of so many tokens to read in: as many as a chunk takes; but of those that would fill their shape by
        half or less as many as the next smaller one has room for."""
        sizes = [size for _, size in self.chunks]
        whole = min(unread, sizes[-1])
        below = sizes[max(sizes.index(fitting(sizes, whole)) - 1, 0)]
        return below if self.cut <= below < whole <= 2 * below else whole

    def reads(self, pieces: Sequence[Sequence[Piece]]) -> list[tuple[tuple[int, int], list[Sequence[Piece]]]]:
        """Lanes' pieces of prompts, and the shape that each lane has to hold them: one for all, or where one has many
        that are short and another a long one, the short ones by themselves first."""
        rows, sizes = max(map(len, pieces)), [max((piece.count for piece in some), default=0) for some in pieces]
        if shape := next((shape for shape in self.chunks if shape[0] >= rows and shape[1] >= max(sizes)), None):
            return [(shape, [*pieces])]
        size = fitting([size for _, size in self.chunks], min(filter(None, sizes)))
        short = [some if most <= size else [] for some, most in zip(pieces, sizes, strict=True)]
        long = [[] if most <= size else some for some, most in zip(pieces, sizes, strict=True)]
        return [*self.reads(short), *self.reads(long)]


def fitting(sizes: Sequence[int], need: int) -> int:
    """The smallest of these ascending sizes that holds so many."""
    return sizes[bisect.bisect_left(sizes, need)]


def _sizes(most: int, least: int) -> tuple[int, ...]:
    sizes = [most]
    while sizes[-1] // RATIO >= least:
        sizes.append(sizes[-1] // RATIO)
    return tuple(sizes[::-1])
