"""Packing: every token once, in order; samples whole; positions and segments as the batch format has them."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.data.packing import Row, pack_samples, pack_stream

PAD = 77
documents = st.lists(st.lists(st.integers(3, 60), max_size=25), max_size=12)
sample = st.lists(st.tuples(st.integers(3, 60), st.integers(0, 1)), min_size=1, max_size=10)


def segments(row: Row) -> list[slice]:
    """The slices of segments 1, 2, ...; checks all that the batch format says of a row."""
    ids = row["segment_ids"]
    assert [row[k].dtype for k in ("tokens", "segment_ids", "positions", "loss_mask")] == [
        np.int32,
        np.int32,
        np.int32,
        np.float32,
    ]
    found, start = [], 0
    for segment in range(1, ids.max() + 1):
        length = int((ids == segment).sum())
        part = slice(start, start + length)
        assert length and (ids[part] == segment).all()
        assert row["positions"][part].tolist() == list(range(length))
        assert row["loss_mask"][start] == 0
        found.append(part)
        start += length
    rest = slice(start, None)
    assert (ids[rest] == 0).all() and (row["positions"][rest] == 0).all() and (row["loss_mask"][rest] == 0).all()
    assert (row["tokens"][rest] == PAD).all()
    return found


@given(docs=documents, seq_len=st.integers(2, 12))
def test_stream_loses_nothing(docs: list[list[int]], seq_len: int) -> None:
    rows = list(pack_stream(iter(docs), seq_len, pad_id=PAD))
    assert len(rows) == -(-sum(map(len, docs)) // seq_len)
    tokens, starts = [], set()
    for number, row in enumerate(rows):
        assert len(row["tokens"]) == seq_len
        parts = segments(row)
        starts |= {number * seq_len + part.start for part in parts}
        for part in parts:
            tokens += row["tokens"][part].tolist()
            assert (row["loss_mask"][part][1:] == 1).all()
        if number < len(rows) - 1:
            assert (row["segment_ids"] > 0).all()
    assert tokens == [token for doc in docs for token in doc]
    # A segment starts where a document or a row does, and nowhere else.
    filled = [doc for doc in docs if doc]
    begins = np.cumsum([0, *(len(doc) for doc in filled)])[:-1] if filled else []
    assert starts == {int(b) for b in begins} | {n * seq_len for n in range(len(rows))}


def test_stream_is_lazy() -> None:
    def endless():
        while True:
            yield [5, 6, 7]

    rows = pack_stream(endless(), 4)
    assert next(rows)["tokens"].tolist() == [5, 6, 7, 5]
    assert next(rows)["segment_ids"].tolist() == [1, 1, 2, 2]


@given(drawn=st.lists(sample, max_size=20), seq_len=st.integers(10, 16))
def test_samples_stay_whole(drawn: list[list[tuple[int, int]]], seq_len: int) -> None:
    samples = [([t for t, _ in s], [m for _, m in s]) for s in drawn]
    rows = pack_samples(samples, seq_len, pad_id=PAD)
    packed = [
        (tuple(row["tokens"][part].tolist()), tuple(row["loss_mask"][part].tolist()))
        for row in rows
        for part in segments(row)
    ]
    assert Counter(packed) == Counter((tuple(ids), (0.0, *map(float, mask[1:]))) for ids, mask in samples)
    free = sorted(int((row["segment_ids"] == 0).sum()) for row in rows)
    if len(rows) > 1:  # the two emptiest rows could not have been one
        assert (seq_len - free[-1]) + (seq_len - free[-2]) > seq_len


def test_best_fit_fills_the_rows() -> None:
    lengths = [7, 3, 6, 4, 5, 5, 8, 2]
    rows = pack_samples([(list(range(3, 3 + n)), [1] * n) for n in lengths], 10)
    assert len(rows) == 4 and all((row["segment_ids"] > 0).all() for row in rows)


def test_long_samples(caplog: pytest.LogCaptureFixture) -> None:
    samples = [([1, 2], [1, 1]), ([1] * 9, [1] * 9)]
    with pytest.raises(ValueError, match="sample 1 has 9 tokens, more than seq_len=8"):
        pack_samples(samples, 8)
    skipped: Counter[str] = Counter()
    assert len(pack_samples(samples, 8, drop_long=True, skipped=skipped)) == 1
    assert skipped == {"too long": 1}
    assert "left out 1 samples longer than seq_len=8" in caplog.text


@pytest.mark.parametrize("wrong", [([], []), ([1, 2], [1])])
def test_misfitting_samples_are_named(wrong: tuple[list[int], list[int]]) -> None:
    with pytest.raises(ValueError, match="sample 1 has"):
        pack_samples([([1], [1]), wrong], 8)


def test_seq_len_is_checked() -> None:
    with pytest.raises(ValueError, match="seq_len=1"):
        pack_samples([], 1)
    with pytest.raises(ValueError, match="seq_len=0"):
        next(pack_stream([], 0))
