"""Packs documents or samples of any length into rows of one length.

A row is a dict of arrays of length S in the batch format of `deepseek_jax.data`.
"""

import logging
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from deepseek_jax.data.special_tokens import PAD_ID

logger = logging.getLogger(__name__)

Row = dict[str, np.ndarray]
Piece = tuple[Sequence[int], Sequence[int]]  # ids and loss mask of one segment


def segment_positions(segment_ids_S: np.ndarray) -> np.ndarray:
    """Positions that follow from the segments: 0, 1, 2, ... in each, 0 in the padding (int32)."""
    index_S = np.arange(len(segment_ids_S))
    starts_S = np.diff(segment_ids_S, prepend=-1) != 0
    first_S = np.maximum.accumulate(np.where(starts_S, index_S, 0))
    return np.where(segment_ids_S == 0, 0, index_S - first_S).astype(np.int32)


def pack_stream(docs: Iterable[Sequence[int]], seq_len: int, *, pad_id: int = PAD_ID) -> Iterator[Row]:
    """Pretraining rows: documents one after another, cut wherever a row is full.

    No token is lost or repeated; only the last row is padded. What a cut leaves over opens the next row as a
    segment of its own. Every token is a target but the first of each segment, before which nothing stands
    that could predict it.
    """
    _check_seq_len(seq_len)
    pieces: list[Piece] = []
    room = seq_len
    for doc in docs:
        start = 0
        while start < len(doc):
            ids = doc[start : start + room]
            pieces.append((ids, [1] * len(ids)))
            start += len(ids)
            room -= len(ids)
            if room == 0:
                yield _row(pieces, seq_len, pad_id)
                pieces, room = [], seq_len
    if pieces:
        yield _row(pieces, seq_len, pad_id)


def pack_samples(
    samples: Iterable[Piece],
    seq_len: int,
    *,
    pad_id: int = PAD_ID,
    drop_long: bool = False,
    skipped: Counter[str] | None = None,
) -> list[Row]:
    """SFT rows: whole samples (ids, loss mask), never cut, placed by best fit with the longest first.

    Deterministic. A sample longer than `seq_len` is a ValueError that names its index and length, unless
    `drop_long`: then it is left out, counted in `skipped["too long"]`, and the number is logged.
    """
    _check_seq_len(seq_len)
    skipped = Counter() if skipped is None else skipped
    fitting: list[Piece] = []
    dropped = 0
    for index, (ids, mask) in enumerate(samples):
        if not ids or len(ids) != len(mask):
            raise ValueError(f"sample {index} has {len(ids)} ids and {len(mask)} mask values; they must be as many")
        if len(ids) <= seq_len:
            fitting.append((ids, mask))
        elif drop_long:
            dropped += 1
        else:
            raise ValueError(
                f"sample {index} has {len(ids)} tokens, more than seq_len={seq_len}; drop_long leaves it out"
            )
    if dropped:
        skipped["too long"] += dropped
        logger.warning("left out %d samples longer than seq_len=%d", dropped, seq_len)
    rows = best_fit([len(ids) for ids, _ in fitting], seq_len)
    return [_row([fitting[index] for index in row], seq_len, pad_id) for row in rows]


def best_fit(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Rows of what has these lengths, by index: each, from the longest, goes where it leaves the least room; a new row
    where it fits nowhere."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        place = bisect_left(rooms, (length, 0))
        if place == len(rooms):
            rows.append([index])
            room, row = seq_len, len(rows) - 1
        else:
            room, row = rooms.pop(place)
            rows[row].append(index)
        if room > length:
            insort(rooms, (room - length, row))
    return rows


def _row(pieces: list[Piece], seq_len: int, pad_id: int) -> Row:
    tokens_S = np.full(seq_len, pad_id, np.int32)
    segment_ids_S = np.zeros(seq_len, np.int32)
    loss_mask_S = np.zeros(seq_len, np.float32)
    start = 0
    for segment, (ids, mask) in enumerate(pieces, start=1):
        stop = start + len(ids)
        assert stop <= seq_len
        tokens_S[start:stop] = ids
        segment_ids_S[start:stop] = segment
        loss_mask_S[start + 1 : stop] = mask[1:]
        start = stop
    return {
        "tokens": tokens_S,
        "segment_ids": segment_ids_S,
        "positions": segment_positions(segment_ids_S),
        "loss_mask": loss_mask_S,
    }


def _check_seq_len(seq_len: int) -> None:
    if seq_len < 2:
        raise ValueError(f"seq_len={seq_len}: a row needs at least 2 tokens, one to predict the other")
