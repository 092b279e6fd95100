"""Loaders: the order of grain, one global index, exact restores, any number of processes."""

import json
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from deepseek_jax.data.loader import BatchLoader
from deepseek_jax.data.packing import Row
from deepseek_jax.data.rows import PromptLoader, RowLoader, write_rows

ROWS = 13


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps({"id": i, "prompt": f"{i}+1"}) + "\n" for i in range(ROWS)))
    return path


def numbers(batch: Any) -> list[int]:
    """Which rows or problems are in a batch."""
    return [p["id"] for p in batch] if isinstance(batch, list) else batch["tokens"][:, 0].tolist()


@pytest.fixture(params=[RowLoader, PromptLoader])
def make_loader(request: pytest.FixtureRequest, dataset: Path, problems: Path) -> Callable[..., Any]:
    path = dataset if request.param is RowLoader else problems

    def make(**options: Any) -> Any:
        return request.param(path, **{"batch_size": 4, "seed": 5} | options)

    return make


def take(loader: Any, count: int) -> list[list[int]]:
    return [numbers(batch) for batch in islice(loader, count)]


def test_batches_have_the_format(dataset: Path) -> None:
    batch = next(RowLoader(dataset, batch_size=4, seed=0))
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
        "tokens": ((4, 8), np.int32),
        "segment_ids": ((4, 8), np.int32),
        "positions": ((4, 8), np.int32),
        "loss_mask": ((4, 8), np.float32),
    }
    assert batch["positions"].tolist() == [list(range(8))] * 4


def test_every_epoch_has_every_row_once_in_its_own_order(make_loader: Callable[..., Any]) -> None:
    order = sum(take(make_loader(), 3 * ROWS), [])
    epochs = [order[i : i + ROWS] for i in range(0, len(order), ROWS)]
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert take(make_loader(), 3 * ROWS) == take(make_loader(), 3 * ROWS)
    assert take(make_loader(seed=6), 3) != take(make_loader(), 3)


def test_without_shuffle_and_repeat(make_loader: Callable[..., Any]) -> None:
    assert take(make_loader(shuffle=False), 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 0, 1, 2]]
    loader = make_loader(shuffle=False, repeat=False)
    assert [numbers(batch) for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert list(loader) == [] and loader.state()["position"] == 3


def test_restore_anywhere_gives_the_later_batches(make_loader: Callable[..., Any]) -> None:
    full = take(make_loader(), 12)  # 48 rows: three epoch boundaries
    loader = make_loader()
    for position in range(12):
        state = json.loads(json.dumps(loader.state()))
        assert state["position"] == position
        resumed = make_loader()
        resumed.restore(state)
        assert take(resumed, 12 - position) == full[position:]
        loader.restore(state)  # also in place
        assert numbers(next(loader)) == full[position]


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_global_batch(make_loader: Callable[..., Any], count: int) -> None:
    single = make_loader()
    shares = [make_loader(process_index=i, process_count=count) for i in range(count)]
    full = take(single, 10)
    assert [sum(parts, []) for parts in zip(*(take(share, 10) for share in shares), strict=True)] == full
    assert all(share.state() == single.state() for share in shares)
    # A state of one process serves any other number.
    resumed = make_loader(process_index=count - 1, process_count=count)
    resumed.restore(single.state())
    following = numbers(next(single))
    assert numbers(next(resumed)) == following[-4 // count :]


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"seed": 6}, "seed"),
        ({"batch_size": 8}, "batch_size"),
        ({"shuffle": False}, "shuffle"),
        ({"repeat": False}, "repeat"),
    ],
)
def test_another_order_is_refused_by_name(make_loader: Callable[..., Any], changed: dict, name: str) -> None:
    loader, other = make_loader(), make_loader(**changed)
    before = other.state()
    with pytest.raises(ValueError, match=f"has {name}={loader.state()[name]}, this loader {name}={before[name]}"):
        other.restore(loader.state())
    assert other.state() == before


def test_other_data_and_broken_states_are_refused(
    tmp_path: Path, dataset: Path, make_rows: Callable[[int], list[Row]], problems: Path
) -> None:
    write_rows(tmp_path / "b", make_rows(12), meta={"vocab_size": 50, "tokenizer_fingerprint": "t"})
    loader, other = RowLoader(dataset, batch_size=4, seed=0), RowLoader(tmp_path / "b", batch_size=4, seed=0)
    theirs, ours = loader.meta["fingerprint"], other.meta["fingerprint"]
    with pytest.raises(ValueError, match=f"has fingerprint='{theirs}', this loader fingerprint='{ours}'"):
        other.restore(loader.state())
    with pytest.raises(ValueError, match="fingerprint"):
        PromptLoader(problems, batch_size=4, seed=0).restore(loader.state())
    with pytest.raises(ValueError, match="fingerprint=None"):
        loader.restore({"position": 3})
    with pytest.raises(ValueError, match="position=-1"):
        loader.restore(loader.state() | {"position": -1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"process_count": 3}, "batch_size=4 does not split over process_count=3"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"process_index": 2, "process_count": 2}, "process_index=2 is not below process_count=2"),
        ({"batch_size": 16, "repeat": False}, "13 rows make no batch of batch_size=16"),
    ],
)
def test_sizes_that_do_not_fit(make_loader: Callable[..., Any], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_loader(**options)


def test_fewer_rows_than_a_batch_are_repeated_within_it(make_loader: Callable[..., Any]) -> None:
    batch = take(make_loader(batch_size=2 * ROWS), 1)[0]
    assert sorted(batch) == sorted([*range(ROWS), *range(ROWS)])


def test_broken_problems_are_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"a": 1}\n[1]\n')
    with pytest.raises(ValueError, match=r"p\.jsonl:2: a list; each line must be an object"):
        PromptLoader(path, batch_size=1, seed=0)
    path.write_text("")
    with pytest.raises(ValueError, match=r"p\.jsonl: no rows to ask"):
        PromptLoader(path, batch_size=1, seed=0)


def test_rows_of_several_files_and_kinds(tmp_path: Path, problems: Path) -> None:
    other = tmp_path / "more.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [ROWS, ROWS + 1], "prompt": ["?", "!"]}), other)
    loader = PromptLoader([problems, other], batch_size=ROWS + 2, seed=0)
    assert [row["id"] for row in loader.rows] == list(range(ROWS + 2))
    assert sorted(row.where for row in next(loader)) == sorted(row.where for row in loader.rows)
    assert loader.rows[-1].where == f"{other}:2"
    with pytest.raises(ValueError, match="fingerprint"):
        PromptLoader([other, problems], batch_size=ROWS + 2, seed=0).restore(loader.state())


def test_batches_are_read_ahead_and_what_cannot_be_read_is_told_at_its_turn() -> None:
    """By a thread, which has read two more when the first is given out; a state counts those given out."""
    asked: list[int] = []

    class Source:
        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> int:
            asked.append(index)
            if index == 4:
                raise OSError("gone")
            return index

    options: dict[str, Any] = {"fingerprint": "f", "batch_fn": list, "batch_size": 1, "seed": 0}
    loader = BatchLoader(Source(), shuffle=False, **options)
    assert next(loader) == [0]
    deadline = time.monotonic() + 10
    while asked != [0, 1, 2] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert asked == [0, 1, 2] and loader.state()["position"] == 1
    assert [next(loader) for _ in range(3)] == [[1], [2], [3]]
    for _ in range(2):
        with pytest.raises(OSError, match="gone"):
            next(loader)
    assert loader.state()["position"] == 4
    loader.restore(loader.state() | {"position": 5})
    assert next(loader) == [5]
