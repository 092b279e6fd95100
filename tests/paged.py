"""A cache in pages, made of rows: in any order, one for what rows share, anything in the table behind a row."""

import numpy as np


def in_pages(rows_LBTW, lengths, page, seed=0):
    """(pages (L, P, N, W), table (B, J)) of rows whose T is a multiple of N = ``page``."""
    rows, rng = np.asarray(rows_LBTW), np.random.default_rng(seed)
    layers, batch, columns, width = rows.shape
    count = batch * (columns // page) + 2
    order, known = rng.permutation(count), {}
    pages = np.full((layers, count, page, width), 9, rows.dtype)
    table = rng.integers(-5, count + 5, (batch, columns // page)).astype(np.int32)
    for b, j in np.ndindex(table.shape):
        if j * page < lengths[b]:
            block = rows[:, b, j * page : (j + 1) * page]
            table[b, j] = known.setdefault(block.tobytes(), order[len(known)])
            pages[:, table[b, j]] = block
    return pages, table
