"""A small tokenizer trained once, and small datasets."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deepseek_jax.data.packing import Row, pack_stream
from deepseek_jax.data.rows import write_rows
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.data.tokenizer_training import train_tokenizer

TEXTS = [
    "def add(a, b):\n    return a + b  # 12 + 34 = 46\n" * 4,
    "the quick brown fox jumps over the lazy dog, and the dog does not mind.\n" * 4,
    "12345 67890 数字 and words: ünïcödé ½\r\n\r\n" * 4,
]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return TEXTS


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 400)


@pytest.fixture
def make_rows() -> Callable[[int], list[Row]]:
    """Rows of 8 tokens whose first token is the row's number."""

    def make(count: int) -> list[Row]:
        return list(pack_stream(([row, *range(10, 17)] for row in range(count)), 8))

    return make


@pytest.fixture
def dataset(tmp_path: Path, make_rows: Callable[[int], list[Row]]) -> Path:
    """13 rows, so that neither 2 nor 4 divides an epoch."""
    write_rows(tmp_path / "rows", make_rows(13), meta={"vocab_size": 50, "tokenizer_fingerprint": "t"})
    return tmp_path / "rows"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
